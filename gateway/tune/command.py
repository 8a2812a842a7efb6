"""`leadline tune`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.tune.preferences import Preference

if TYPE_CHECKING:
    from gateway.tune.choose import Measured
    from local_engine.engine import Engine
    from local_engine.model import LocalModel
    from local_engine.plan_types import Plan
    from local_engine.reason.trajectories import Question
    from local_engine.types import SamplingParams
    from routers.policy import Model, Policy

WITHOUT = "no plan"
_DELTAS = (0.01, 0.05, 0.1)


def tune(
    file: Annotated[Path, typer.Argument(help="Policy file.")],
    model: Annotated[str, typer.Option(help="A model of the policy that runs on the local engine.")],
    prefer: Annotated[
        Preference,
        typer.Option(help="quality: the most accurate plan; balanced: the cheapest within 1 point; economy: within 5."),
    ] = "balanced",
    effort: Annotated[list[str] | None, typer.Option(help="low, high; repeatable. Default: both.")] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines {"question", "answer"}, half of which fit cascades, where a smaller model is there; '
            "without: arithmetic, for the bundled models."
        ),
    ] = None,
    per_level: Annotated[int, typer.Option(min=1, help="Arithmetic problems of each level.")] = 20,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 600,
    seed: Annotated[int, typer.Option(help="Of the problems.")] = 1,
    write: Annotated[bool, typer.Option("--write", help="Write the chosen plans into the policy.")] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write all that was measured.")] = None,
) -> None:
    """Measure which plan of the engine pays for a local model here: accuracy beside cost, on the same questions.

    Cost is money where the policy gives the model a price, and processor time where it is free.
    """
    from gateway.policies import accept_numbers, local_models
    from gateway.policy_commands import load, stop
    from gateway.tune.choose import choose
    from gateway.tune.write import CannotWrite, with_field
    from local_engine.errors import ModelLoadError
    from local_engine.reason.trajectories import AskingFailed
    from routers.errors import PolicyError
    from routers.load import parse

    policy = load(file)
    target = policy.models.get(model)
    sources = local_models(policy, file.parent)
    if target is None or target.upstream not in sources:
        local = [name for name, one in policy.models.items() if one.upstream in sources]
        stop(f"--model {model!r} is no model of {file} on the local engine; it has {', '.join(local) or 'none'}")
    efforts = effort or ["low", "high"]
    if strange := [name for name in efforts if name not in ("low", "high")]:
        stop(f"--effort {strange[0]!r}: low or high; without a thought there is nothing to plan")
    try:
        found = _measured(policy, target, sources, efforts, (questions, seed, per_level), max_tokens)
    except (AskingFailed, ModelLoadError, ValueError, OSError) as error:
        stop(str(error))
    chosen = {name: choose(rows, prefer) for name, (rows, _) in found.items()}
    for name, (rows, _) in found.items():
        _show(f"{model} at effort {name}", rows, chosen[name].name)
    if json_out is not None:
        kept = {name: [asdict(row) for row in rows] for name, (rows, _) in found.items()}
        json_out.write_text(json.dumps({"model": model, "prefer": prefer, "efforts": kept}, indent=2) + "\n")
    plans = {name: plan for name, (_, plans) in found.items() if (plan := plans[chosen[name].name]) is not None}
    if not write:
        typer.echo(f"models.{model}.plans: {json.dumps(plans)}   (--write puts it into {file})")
        return
    text = file.read_text(encoding="utf-8")
    try:
        text = with_field(text, model, "plan", None)
        text = with_field(text, model, "plans", plans or None, f"leadline tune, {prefer}")
        parse(text, file=str(file), rules=partial(accept_numbers, file.parent))
    except (CannotWrite, PolicyError) as error:
        stop(f"nothing was written: {error}")
    beside = file.with_name(f".{file.name}.tuned")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)
    typer.echo(f"wrote models.{model}.plans into {file}; a running gateway takes it up at its next reload")


Found = dict[str, tuple[list["Measured"], dict[str, dict[str, Any] | None]]]
"""By effort: what was measured, and each plan as a policy states it."""


def _measured(
    policy: "Policy",
    target: "Model",
    sources: dict[str, str],
    efforts: Sequence[str],
    asked: tuple[Path | None, int, int],
    max_tokens: int,
) -> Found:
    from rich.progress import Progress

    from gateway.exits.command import questions_of
    from gateway.tune.measure import measure
    from local_engine.types import SamplingParams
    from routers.policy import FREE

    names = {one.upstream: one.name for one in policy.models.values() if one.provider == target.provider}
    with _engine(sources) as (engine, models):
        smaller = _smaller(models, target.upstream)
        drafts = [names[name] for name in smaller]
        stated = candidates(models[target.upstream], drafts)
        prices = {name: policy.models[names[name]].price or FREE for name in models}
        questions = questions_of(*asked, "test")
        fit = questions_of(*asked, "fit") if asked[0] is None else questions[::2]
        if asked[0] is not None and drafts:
            questions = questions[1::2]
        found: Found = {}
        with Progress(transient=True) as bars:
            for name in efforts:
                sampling = SamplingParams(
                    temperature=0.0, max_tokens=max_tokens, effort="low" if name == "low" else "high"
                )
                ways = stated | {
                    f"{names[draft]} answers first": cascade
                    for draft in smaller
                    if (cascade := _cascade(engine, target.upstream, (draft, names[draft]), fit, sampling)) is not None
                }
                plans = {name: None if plan is None else _as_told(plan, policy) for name, plan in ways.items()}
                task = bars.add_task(f"questions, {name}", total=len(questions) * len(plans))
                rows = measure(engine, target.upstream, questions, sampling, plans, prices, partial(bars.advance, task))
                found[name] = rows, ways
    return found


def _cascade(
    engine: "Engine", base: str, draft: tuple[str, str], questions: "list[Question]", sampling: "SamplingParams"
) -> dict[str, Any] | None:
    """The plan in which this draft (its name in the engine, in the policy) answers first, where a rule for that can be
    fitted; else None, said aloud."""
    from gateway.tune.cascades import fitted_cascade
    from probes.errors import TableError

    try:
        rule = fitted_cascade(engine, base, draft[0], questions, sampling)
    except TableError as error:
        typer.echo(f"no cascade of {draft[1]} at effort {sampling.effort}: {error}")
        return None
    return {"cascade": {"draft": draft[1], "accept": rule.planned()}}


def candidates(model: "LocalModel", drafts: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """By name, as a policy states them; the model without a plan first. `drafts`: smaller models, by the policy's
    names, with the same tokens."""
    found: dict[str, dict[str, Any] | None] = {WITHOUT: None}
    if model.think_token is None:
        return found
    if model.exits is not None:
        found |= {
            f"exit by probe, delta {delta:.0%}": {"exit": {"rule": "probe", "delta": f"{delta:.0%}"}}
            for delta in _DELTAS
            if any(one.delta == delta and one.form == "expected" for one in model.exits.manifest.certified)
        }
    found["exit by convergence"] = {"exit": {"rule": "convergence"}}
    found["exit by momentum"] = {"exit": {"rule": "momentum"}}
    found |= {f"{draft} writes steps": {"speculate": {"draft": draft}} for draft in drafts}
    return found


def _as_told(plan: dict[str, Any], policy: "Policy") -> "Plan":
    from gateway.world import engine_plan
    from routers.plan_files import read_plan

    read = read_plan(plan)
    return engine_plan(read, policy.models[read.draft].upstream if read.draft is not None else None)


def _smaller(models: "dict[str, LocalModel]", name: str) -> list[str]:
    """Those that could draft for it: fewer parameters, the same tokens."""
    own = models[name]
    vocabulary = own.tokenizer.get_vocab()
    return [
        other
        for other, model in models.items()
        if model.card.parameters < own.card.parameters and model.tokenizer.get_vocab() == vocabulary
    ]


@contextmanager
def _engine(sources: dict[str, str]) -> "Iterator[tuple[Engine, dict[str, LocalModel]]]":
    from local_engine.config import configure_process, default_threads

    configure_process(default_threads())
    from local_engine.engine import Engine
    from local_engine.model import load_model

    models = {name: load_model(name, source) for name, source in sources.items()}
    engine = Engine(models, max_running=8)
    engine.start()
    try:
        yield engine, models
    finally:
        engine.stop()


def _show(title: str, rows: "Sequence[Measured]", chosen: str) -> None:
    from rich.table import Table

    from probes.report import console

    table = Table(title=title)
    for head in ("plan", "accuracy", "gain", "tokens computed", "cost", ""):
        table.add_column(head)
    for row in rows:
        table.add_row(
            row.name,
            "{:.3f} [{:.3f}, {:.3f}]".format(*row.accuracy),
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row.gain),
            f"{row.tokens:,.0f}",
            "{:.2f} [{:.2f}, {:.2f}]".format(*row.cost),
            "chosen" if row.name == chosen else "",
        )
    console().print(table)
