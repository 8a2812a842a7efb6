"""The `leadline` command. Each command imports what it needs, so that the base installation can run the light ones."""

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gateway.exits.command import app as exits_app
from gateway.export.command import app as export_app
from gateway.policy_commands import add_to, load, stop
from gateway.replay.command import replay
from gateway.simulate.command import simulate
from gateway.tune.command import tune

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from gateway.admission.keys import KeyStore

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
keys_app = typer.Typer(help="Make, list and revoke the gateway's API keys.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
engine_app = typer.Typer(help="Run the engine alone, or measure it.")
app.add_typer(engine_app, name="engine")
add_to(app)
app.command("simulate")(simulate)
app.command("replay")(replay)
app.add_typer(exits_app, name="exits")
app.command("tune")(tune)
app.add_typer(export_app, name="export")


def main() -> None:
    """Entry point of the console script."""
    _mount_probe()
    try:
        app()
    except ModuleNotFoundError as error:
        sys.exit(
            f"this command needs the package {error.name!r}, which is not installed; "
            "install leadline[server] for the gateway, leadline[server,local] for local models and probes, "
            "leadline[server,local,train] to fit probes and to simulate"
        )


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to bind. Beyond loopback, put TLS in front.")] = "127.0.0.1",
    policy: Annotated[Path | None, typer.Option(help="Policy file; without it, the embedded default.")] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=256, help="Processes; more than one need REDIS_URL and PostgreSQL.")
    ] = 1,
    drain: Annotated[str, typer.Option(help="How long what is under way may take to end after SIGTERM.")] = "30s",
) -> None:
    """Run the gateway, and the engine process that its policy needs, until Ctrl-C."""
    gc.disable()  # a start makes nothing to collect, and looks at much; `settle_memory` puts it on again
    from gateway import serve
    from gateway.policies import CannotServe
    from routers.units import UnitError, parse_duration_ms

    try:
        raise typer.Exit(serve.serve(host, port, policy, workers, parse_duration_ms(drain) / 1000))
    except CannotServe as error:
        stop(str(error))
    except UnitError as error:
        stop(f"--drain {drain!r}: {error}; {error.fix}")


@engine_app.callback(invoke_without_command=True)
def engine(
    context: typer.Context,
    socket: Annotated[
        Path | None, typer.Option(help="For gateways of this host: they find it by LEADLINE_ENGINE.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT for an OpenAI-compatible API, e.g. 127.0.0.1:8100.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="The gateways' policy: it names models and probe.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="NAME=SOURCE in place of a policy; may be repeated.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="For embeddings, without a policy: `default`, a folder, or a hub id.")
    ] = None,
) -> None:
    """Run the engine alone, for gateways in other containers or on other hosts, until SIGTERM or Ctrl-C."""
    if context.invoked_subcommand is not None:
        return
    from gateway.engine_alone import run_alone
    from gateway.policies import CannotServe

    try:
        run_alone(socket, listen, policy, model or [], encoder)
    except CannotServe as error:
        stop(str(error))


@engine_app.command("bench")
def bench_engine(
    source: Annotated[str, typer.Argument(help="bundled/base, a folder, or a hub id.")],
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Type of the weights.")] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where it runs.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: one core is left to others.")] = None,
) -> None:
    """Measure decode steps of a model on this machine, beside what memory and arithmetic allow. Takes half a minute."""
    from local_engine.config import configure_process, default_threads

    count = threads or default_threads()
    configure_process(count)
    from local_engine.bench import report
    from local_engine.errors import ConfigError, ModelLoadError

    try:
        for line in report(source, dtype, device, count):
            typer.echo(line)
    except ConfigError as error:
        stop(f"--{error.field}: {error.why}")
    except ModelLoadError as error:
        stop(str(error))


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="A name to know it by; limits in the policy may use it.")],
    tenant: Annotated[str, typer.Option(help="Caches, spend and receipts are kept apart by tenant.")] = "default",
    team: Annotated[str | None, typer.Option(help="Limits of the policy may be given to a team.")] = None,
    role: Annotated[Literal["admin", "user", "reader"], typer.Option(help="A reader sees, and runs nothing.")] = "user",
    admin: Annotated[bool, typer.Option("--admin", help="Short for --role admin.")] = False,
    budget: Annotated[str | None, typer.Option(help="A hard budget, such as $5/month.")] = None,
) -> None:
    """Make a key and print it: the only time it is shown. A running gateway knows it within a second."""
    from gateway.admission.keys import KeyNameError
    from routers.units import UnitError, parse_budget

    try:
        limit = parse_budget(budget) if budget is not None else None
        token = _with_keys(
            lambda keys, _: keys.create(
                name,
                tenant=tenant,
                team=team,
                role="admin" if admin else role,
                budget_nanousd=limit.nanousd if limit is not None else None,
                budget_window=limit.window if limit is not None else "month",
            )
        )
    except KeyNameError as error:
        stop(str(error))
    except UnitError as error:
        stop(f"--budget {budget!r}: {error}; {error.fix}")
    typer.echo(token)


@keys_app.command("list")
def list_keys(
    policy: Annotated[Path | None, typer.Option(help="Policy file, to show the budgets that it gives as well.")] = None,
) -> None:
    """Every key that works, without its secret, and the budgets that bound it."""
    from routers.units import format_money

    loaded = load(policy) if policy is not None else None

    def show(keys: "KeyStore", _: "Engine") -> None:
        for p in sorted(keys.all(), key=lambda p: p.key_name):
            limits = ["no budget of its own"]
            if p.budget_nanousd is not None:
                limits = [f"{format_money(p.budget_nanousd)}/{p.budget_window} (its own)"]
            for limit in loaded.limits_for(key=p.key_name, team=p.team, tenant=p.tenant) if loaded is not None else ():
                if limit.budget is not None and limit.scope != "run":
                    given = f"{format_money(limit.budget.nanousd)}/{limit.budget.window}"
                    limits.append(f"{given} (policy, {limit.scope} {limit.name})")
            team = f"  team {p.team}" if p.team is not None else ""
            typer.echo(f"{p.key_id}  {p.key_name}  tenant {p.tenant}{team}  {p.role}  {', '.join(limits)}")
        if policy is None:
            typer.echo("budgets of the keys alone; `--policy FILE` shows what a policy gives them, too", err=True)

    _with_keys(show)


@keys_app.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="The id that `keys list` shows.")]) -> None:
    """End a key for good. A running gateway refuses it within a second."""
    if not _with_keys(lambda keys, _: keys.revoke(key_id)):
        stop(f"{key_id!r} is not the id of a key that works; `leadline keys list` shows them")


@app.command()
def spend(hours: Annotated[float, typer.Option(min=0, help="How far back.")] = 720) -> None:
    """What was spent, from the ledger: exact, by model."""
    from gateway.ledger import report
    from routers.units import format_money

    def show(_: "KeyStore", engine: "Engine") -> None:
        since_ms = int((time.time() - hours * 3600) * 1000)
        totals = report.summary(engine, since_ms=since_ms)
        typer.echo(
            f"{totals['requests']} requests, {format_money(totals['cost_nanousd'])} spent, "
            f"{totals['cache_hits']} from the cache, {totals['not_ok']} failed or cancelled"
        )
        worth = report.worth(engine, since_ms=since_ms)
        if worth["rated"]:
            passed = worth["cost_of_pass_nanousd"]
            each = "" if passed is None else f", {format_money(passed)} spent for each (retries and shadows included)"
            typer.echo(f"{worth['rated']} rated, {worth['accepted']} accepted{each}")
        for row in report.by_model(engine, since_ms=since_ms):
            typer.echo(
                f"  {row['model'] or '(none served)':<24} {row['requests']:>8}  {format_money(row['cost_nanousd'])}"
            )

    _with_keys(show)


def _with_keys(use: "Callable[[KeyStore, Engine], Any]") -> Any:
    from gateway.admission.keys import KeyStore, load_pepper
    from gateway.ledger.store import LedgerUnreachable, connect
    from gateway.settings import Settings, SettingsError

    try:
        settings = Settings.from_env()
        settings.prepare_home()
    except SettingsError as error:
        stop(str(error))
    try:
        engine = connect(settings.database_url, settings.durability)
    except LedgerUnreachable as error:
        stop(str(error))
    try:
        return use(KeyStore(engine, load_pepper(settings.home)), engine)
    finally:
        engine.dispose()


def _mount_probe() -> None:
    try:
        from probes.commands import app as probe_app
    except ModuleNotFoundError:
        return
    from gateway.score import score
    from probes.accept_cli import accept

    probe_app.command("score")(score)
    probe_app.command("accept")(accept)
    app.add_typer(probe_app, name="probe")
