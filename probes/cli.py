"""`leadline probe …`: fit probes on labelled prompts and measure them. Heavy imports stay inside commands."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from probes.manifest import artifact_folder

if TYPE_CHECKING:
    from probes.evaluate import Row
    from probes.table import Table
    from probes.train import Fitted, Recipe
    from probes.types import Tier

app = typer.Typer(no_args_is_help=True, help="Fit and evaluate probes.")

TablePath = Annotated[Path, typer.Argument(help="A .parquet or .csv file, one prompt a row.")]
Prompt = Annotated[str, typer.Option(help="Column that holds the prompt.")]
Head = Annotated[
    list[str],
    typer.Option(
        help="NAME=COLUMN, repeatable: a head and its 0/1 label. `weak` and `strong` are also routed between."
    ),
]
DropIf = Annotated[str | None, typer.Option(help="Leave out rows where this 0/1 column is 1.")]
TierName = Annotated[
    Literal["static", "encoder", "prefill", "self"],
    typer.Option(
        help="What is read: `static`, the words, in the gateway; `encoder`, a small network's states; `prefill`, a "
        "local model's own states as it reads the prompt; `self`, what it says of itself."
    ),
]
ModelName = Annotated[
    str | None, typer.Option(help="Of tiers prefill and self: `bundled/base`, or the folder of a local model.")
]
Over = Annotated[
    Literal["last", "prompt"],
    typer.Option(help="Of tier prefill: states of the prompt's last token, or their mean over all of its tokens."),
]
Tokens = Annotated[
    list[str] | None,
    typer.Option(help="NAME=COLUMN, repeatable: how many tokens the answers of head NAME's model had."),
]
Domain = Annotated[str | None, typer.Option(help="Column of domain names to be told apart.")]
Reasoning = Annotated[
    str | None,
    typer.Option(help="COLUMN,COLUMN: 0/1, right without thinking and right with it; learns where thinking pays."),
]
Answers = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of queries on which a head is sure; about the others a policy asks the next tier.",
    ),
]
Clusters = Annotated[
    int,
    typer.Option(
        min=0,
        help="Of tier encoder: a table of at most so many clusters of queries, such as 64, in place of a regression; "
        "for many models and few labels.",
    ),
]
EncoderName = Annotated[
    str, typer.Option(help="`default`, a folder, or a hub id; of a fitted prefill or self, its model's folder.")
]
Group = Annotated[
    str | None, typer.Option(help="Column of groups, such as the domain, for a prior and held-out groups.")
]
Recognise = Annotated[
    bool,
    typer.Option(
        "--recognise",
        help="Learn to recognise the groups of --group-column, and start from their means: pays where they are tasks "
        "that tell the models apart, costs where prompts of none of them will come.",
    ),
]
Experts = Annotated[
    str | None,
    typer.Option(
        help="Column of kinds of prompts, such as their source: each that has 300 labels or more gets a probe of its "
        "own beside that of all, and is recognised. Pays where the kinds have little to do with each other.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of folds, projection and resamples.")]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")]
Report = Annotated[Path | None, typer.Option(help="Also write a page with plots to this .html file.")]


@app.command()
def fit(
    table: TablePath,
    prompt: Prompt,
    head: Head,
    out: Annotated[Path, typer.Option(help="Folder to write the artifact to.")],
    drop_if: DropIf = None,
    encoder: EncoderName = "default",
    group_column: Group = None,
    name: Annotated[str | None, typer.Option(help="Name in the artifact's version; the folder's by default.")] = None,
    tier: TierName = "encoder",
    model: ModelName = None,
    over: Over = "last",
    tokens: Tokens = None,
    domain: Domain = None,
    reasoning: Reasoning = None,
    answers: Answers = 0.5,
    clusters: Clusters = 0,
    recognise: Recognise = False,
    experts: Experts = None,
    seed: Seed = 0,
    json_out: JsonOut = None,
    report: Report = None,
) -> None:
    """Fit a probe, print its out-of-fold worth beside the baselines, write the artifact."""
    with _explained():
        heads = _parse_heads(head)
        from probes.errors import TableError
        from probes.table import read_table
        from probes.train import Recipe

        if (out / "config.json").is_file():
            raise TableError(
                f"--out {out}: a model is there, and engines would take a probe for its weights; give another"
            )
        if (model is None) == (tier in ("prefill", "self")):
            raise TableError(f"--tier {tier}: " + ("say whose, by --model" if model is None else "leave out --model"))
        if clusters and tier != "encoder":
            raise TableError(f"--clusters {clusters}: belongs to --tier encoder; leave it out for {tier}")
        if over != "last" and tier != "prefill":
            raise TableError(f"--over {over}: belongs to --tier prefill; leave it out for {tier}")
        if recognise and (tier != "encoder" or clusters or group_column is None):
            raise TableError("--recognise: needs --group-column, --tier encoder and no --clusters")
        if experts and (tier != "encoder" or clusters):
            raise TableError(f"--experts {experts}: belongs to --tier encoder without --clusters; leave it out")
        data = read_table(
            table, prompt, heads, drop_if=drop_if, group_column=group_column, experts=experts,
            tokens=_parse_heads(tokens or (), "--tokens"), domain=domain, reasoning=_pair(reasoning),
        )  # fmt: skip
        for name_of, kind, labels in zip(data.names, data.kinds, data.labels.T, strict=True):
            known = set(labels[labels == labels].tolist())
            if kind == "correct" and len(known) == 1:
                typer.echo(f"warning: head {name_of!r} has only labels of {known.pop():g}: it learns nothing", err=True)
        if tier == "static":
            from probes.static_fit import fit_static, static_rows, write_static

            words = fit_static(data, seed=seed, answers=answers, progress=True)
            rows = static_rows(words, data, seed)
            write_static(words, data, out, name or out.name, rows)
            probabilities = words.out_of_fold
        else:
            from probes.artifact import write

            recipe = Recipe(clusters=clusters, recognise=recognise, seed=seed)
            fitted = _fit_network(data, tier, encoder, model, name or out.name, answers, recipe, over)
            write(fitted.artifact, out)
            rows, probabilities = fitted.rows, fitted.probabilities
        from probes.scored import opened

        probe = opened(out)
        if report is not None:
            from probes.html import probe_report

            lead = f"Fitted on {len(data.prompts):,} prompts of {table.name}; every number here is out of fold."
            _write_report(
                report,
                probe_report(
                    f"Probe {probe.version}", lead, probe, table.name, data, {"probe": probabilities}, rows,
                    certificates=probe.manifest.certificates, seed=seed,
                ),
            )  # fmt: skip
    _show(f"{probe.version}, out of fold on {len(data.prompts)} prompts", rows, json_out)
    typer.echo(f"wrote {out}")


def _fit_network(
    data: "Table",
    tier: "Tier",
    encoder: str,
    model: str | None,
    name: str,
    answers: float,
    recipe: "Recipe",
    over: Over,
) -> "Fitted":
    """By the hidden states of the encoder, or by what a local model is heard to read."""
    from probes.train import Recipe, fit_probe

    seed = recipe.seed
    if model is None:
        from probes.extract import Encoder

        return fit_probe(data, Encoder.load(encoder), recipe, name=name, answers=answers, progress=True)
    from probes.listen import ListenedModel, Ratings
    from probes.prefill import QUESTION

    heard = ListenedModel.load(model)
    if tier == "self":
        features = heard.ratings(data.prompts, progress=True)
        return fit_probe(
            data, Ratings(heard.name, heard.sha256), Recipe((0,), linear=True, seed=seed),
            name=name, features=features, tier="self", question=QUESTION, answers=answers, progress=True,
        )  # fmt: skip
    layers = heard.default_layers
    features = heard.states(data.prompts, layers, progress=True, over=over)
    recipe = Recipe(layers, heard.context, linear=True, seed=seed)
    return fit_probe(
        data, heard, recipe, name=name, features=features, tier="prefill", over=over, answers=answers, progress=True
    )


@app.command("eval")
def evaluate(
    table: TablePath,
    artifact: Annotated[
        list[Path],
        typer.Argument(
            parser=artifact_folder,
            metavar="ARTIFACT...",
            help="Artifact folders, or shipped ones by name, such as `default`; the first is the reference.",
        ),
    ],
    prompt: Prompt,
    head: Head,
    drop_if: DropIf = None,
    encoder: EncoderName = "default",
    group_column: Group = None,
    seed: Seed = 0,
    json_out: JsonOut = None,
    report: Report = None,
) -> None:
    """Measure fitted artifacts on a table they were not fitted on."""
    with _explained():
        heads = _parse_heads(head)
        from probes.scored import opened, scored
        from probes.table import read_table
        from probes.train import table_rows

        artifacts = [opened(folder) for folder in artifact]
        data = read_table(table, prompt, heads, drop_if=drop_if, group_column=group_column)
        scores = {probe.version: scored(data, probe, encoder, progress=True) for probe in artifacts}
        digest = data.sha256()
        trained_on = [
            probe.version
            for probe in artifacts
            if probe.manifest.data_sha256 == digest or probe.manifest.seen(data.prompts)
        ]
        rows = table_rows(data, scores, seed)
        if report is not None:
            from probes.html import probe_report

            lead = f"Measured on {len(data.prompts):,} prompts of {table.name}."
            if trained_on:
                lead += f" {', '.join(trained_on)} was fitted on some of these prompts: these numbers flatter it."
            title = f"Probe {artifacts[0].version} on {table.name}"
            _write_report(
                report,
                probe_report(
                    title, lead, artifacts[0], table.name, data, scores, rows,
                    certificates=artifacts[0].manifest.certificates, seed=seed,
                ),
            )  # fmt: skip
    if trained_on:
        typer.echo(
            f"warning: {', '.join(trained_on)} was fitted on some of these prompts: these numbers flatter it", err=True
        )
    _show(f"{len(data.prompts)} prompts of {table.name}", rows, json_out)


def _parse_heads(pairs: Sequence[str], option: str = "--head") -> dict[str, str]:
    heads: dict[str, str] = {}
    for pair in pairs:
        name, sign, column = pair.partition("=")
        if not (name and sign and column):
            raise typer.BadParameter(f"{pair!r}: write {option} NAME=COLUMN, for example {option} weak=mixtral")
        if name in heads:
            raise typer.BadParameter(f"head {name!r} is given twice; names must differ")
        heads[name] = column
    return heads


def _pair(columns: str | None) -> tuple[str, str] | None:
    if columns is None:
        return None
    first, comma, second = columns.partition(",")
    if not (first and comma and second) or "," in second:
        raise typer.BadParameter(f"{columns!r}: write --reasoning WITHOUT,WITH, two 0/1 columns")
    return first, second


@contextmanager
def _explained() -> Iterator[None]:
    """Turn this package's errors, and files that cannot be written, into one line and exit status 2."""
    from probes.errors import ProbeError

    try:
        yield
    except ProbeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"error: {error.filename}: {error.strerror}; give another path, or make its folder", err=True)
        raise typer.Exit(2) from None


def _write_report(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {path}")


def _show(title: str, rows: Sequence["Row"], json_out: Path | None) -> None:
    from probes.report import console, render_rows

    console().print(render_rows(title, rows))
    if json_out is not None:
        with _explained():
            json_out.write_text(json.dumps([row.to_json() for row in rows], indent=2) + "\n", encoding="utf-8")
