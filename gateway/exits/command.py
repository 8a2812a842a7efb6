"""`leadline exits fit | certify | compare`."""

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from local_engine.engine import Engine
    from local_engine.model import LocalModel
    from local_engine.reason.trajectories import Question, Trajectory
    from local_engine.types import SamplingParams

app = typer.Typer(help="When a local model's thoughts may be left early.", no_args_is_help=True)

ModelOption = Annotated[str, typer.Option(help="A folder with the model, or `bundled/base`.")]
QuestionsOption = Annotated[
    Path | None,
    typer.Option(help='JSON lines {"question", "answer", "group"?}; without: held-out arithmetic problems.'),
]
PerLevelOption = Annotated[int, typer.Option(min=1, help="Arithmetic problems of each level.")]
SeedOption = Annotated[int, typer.Option(help="Of the problems, and of sampling.")]
EffortOption = Annotated[str, typer.Option(help="low or high.")]
TemperatureOption = Annotated[float, typer.Option(min=0, help="As it will be used: a promise holds for that alone.")]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Of one answer.")]
TogetherOption = Annotated[int, typer.Option(min=1, help="Questions under way at a time.")]
ReportOption = Annotated[Path | None, typer.Option(help="Also write a page to this file.")]
DeltaOption = Annotated[
    list[float] | None, typer.Option(help="A share of requests, repeatable; each must then be certifiable.")
]


class _Line(msgspec.Struct):
    question: str
    answer: str
    group: str = ""


@app.command()
def fit(
    trajectories: Annotated[Path, typer.Argument(help="File to collect trajectories in; what it holds is kept.")],
    model: ModelOption = "bundled/base",
    questions: QuestionsOption = None,
    per_level: PerLevelOption = 700,
    seed: SeedOption = 101,
    effort: EffortOption = "high",
    temperature: TemperatureOption = 0.0,
    max_tokens: MaxTokensOption = 600,
    layers: Annotated[list[int] | None, typer.Option(help="Hidden states to fit on as well, repeatable.")] = None,
    delta: DeltaOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the artifact; without: beside the model.")] = None,
    together: TogetherOption = 16,
    report: ReportOption = None,
) -> None:
    """Write thoughts to their end, force an answer at every cue, and fit when they may be left.

    A run that was stopped goes on where it was. Half of the questions are for fitting, half for calibration.
    """
    from gateway.exits.fitting import fit_artifact
    from local_engine.reason.artifact import weights_sha256

    with _errors(delta), _loaded(model, together) as (engine, local, folder):
        asked = questions_of(questions, seed, per_level, "fit")
        sampling = _sampling(effort, temperature, seed, max_tokens)
        rows = _collect(engine, asked, trajectories, sampling, layers or [], together)
        fitted = fit_artifact(
            rows,
            model=local.card.name,
            weights_sha256=weights_sha256(folder),
            effort=effort,
            layers=layers or [],
            **({"deltas": delta} if delta else {}),
        )
        _told(fitted, rows, out or folder, report, delta)


@app.command()
def certify(
    trajectories: Annotated[Path, typer.Argument(help="File to collect trajectories in; what it holds is kept.")],
    model: ModelOption = "bundled/base",
    questions: QuestionsOption = None,
    per_level: PerLevelOption = 700,
    seed: SeedOption = 102,
    temperature: TemperatureOption = 0.0,
    max_tokens: MaxTokensOption = 600,
    delta: DeltaOption = None,
    artifact: Annotated[Path | None, typer.Option(help="Its folder; without: beside the model.")] = None,
    together: TogetherOption = 16,
    report: ReportOption = None,
) -> None:
    """Calibrate an artifact anew, on other trajectories: of your own questions, or of another temperature."""
    from gateway.exits.fitting import certify_artifact
    from local_engine.reason.artifact import read

    with _errors(delta), _loaded(model, together) as (engine, _, folder):
        found = read(artifact or folder)
        if found is None:
            raise _Stop(f"no artifact in {artifact or folder}: run `leadline exits fit` first")
        asked = questions_of(questions, seed, per_level, "fit")
        sampling = _sampling(found.manifest.effort, temperature, seed, max_tokens)
        rows = _collect(engine, asked, trajectories, sampling, found.manifest.layers, together)
        fitted = certify_artifact(found, rows, **({"deltas": delta} if delta else {}))
        _told(fitted, rows, artifact or folder, report, delta)


@app.command()
def compare(
    model: ModelOption = "bundled/base",
    questions: QuestionsOption = None,
    per_level: PerLevelOption = 100,
    seed: SeedOption = 1,
    effort: EffortOption = "high",
    temperature: TemperatureOption = 0.0,
    max_tokens: MaxTokensOption = 600,
    together: TogetherOption = 16,
    report: ReportOption = None,
) -> None:
    """Every way to leave a thought, and leaving it alone, on questions that no artifact was fitted on."""
    from gateway.exits.compare import METHODS
    from gateway.exits.compare import compare as compared
    from gateway.exits.page import HEADS, aligned, cells, compare_page
    from local_engine.plan_types import Exit

    with _errors(), _loaded(model, together) as (engine, local, _):
        asked = questions_of(questions, seed, per_level, "test")
        fitted = ("probe", "budget")
        methods = {
            name: method
            for name, method in METHODS.items()
            if local.exits is not None or not isinstance(method.plan, Exit) or method.plan.rule not in fitted
        }
        with _progress(len(asked) * len(methods)) as advance:
            sampling = _sampling(effort, temperature, seed, max_tokens)
            rows = compared(engine, "m", asked, sampling, methods, together=together, progress=advance)
    for line in aligned([HEADS, *cells(rows)]):
        typer.echo(line)
    if report is not None:
        report.write_text(compare_page(f"Leaving thoughts of {model} early", rows), encoding="utf-8")


class _Stop(ValueError):
    """What is wrong, for the person at the terminal."""


@contextmanager
def _errors(shares: list[float] | None = None) -> "Iterator[None]":
    """What is wrong becomes one line and status 2; first, whether these are shares."""
    from local_engine.errors import ModelLoadError
    from local_engine.reason.trajectories import AskingFailed
    from probes.errors import ProbeError

    try:
        if strange := [share for share in shares or () if not 0 < share < 1]:
            raise _Stop(f"--delta {strange[0]:g}: a share of requests between 0 and 1, such as 0.05")
        yield
    except (ProbeError, ModelLoadError, AskingFailed, ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def _loaded(source: str, together: int) -> "Iterator[tuple[Engine, LocalModel, Path]]":
    """An engine with the model as `m`, and its folder."""
    from local_engine.config import configure_process, default_threads, locate

    configure_process(default_threads())
    place, local = locate(source)
    if not local:
        raise _Stop(f"--model {source}: an artifact lies beside the weights it was fitted on; give a local folder")
    from local_engine.engine import Engine
    from local_engine.model import load_model

    model = load_model(source, source)
    engine = Engine({"m": model}, max_running=together)
    engine.start()
    try:
        yield engine, model, Path(place)
    finally:
        engine.stop()


def questions_of(path: Path | None, seed: int, per_level: int, half: str) -> "list[Question]":
    from local_engine.reason.trajectories import Question, arithmetic_questions

    if path is None:
        return arithmetic_questions(seed, per_level, "fit" if half == "fit" else "test")
    found = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise _Stop(f"{path}: {(error.strerror or str(error)).lower()}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = msgspec.json.decode(line, type=_Line)
        except msgspec.DecodeError as error:
            raise _Stop(f'{path}, line {number}: {error}; each line is {{"question": ..., "answer": ...}}') from None
        found.append(Question(row.question, row.question, row.answer, row.group))
    if not found:
        raise _Stop(f"{path} holds no question")
    return found


def _sampling(effort: str, temperature: float, seed: int, max_tokens: int) -> "SamplingParams":
    from local_engine.types import SamplingParams

    if effort not in ("low", "high"):
        raise _Stop(f"--effort {effort}: low or high; without a thought there is nothing to leave")
    return SamplingParams(
        temperature=temperature, seed=seed, max_tokens=max_tokens, effort="low" if effort == "low" else "high"
    )


def _collect(
    engine: "Engine",
    questions: "Sequence[Question]",
    path: Path,
    sampling: "SamplingParams",
    layers: Sequence[int],
    together: int,
) -> "list[Trajectory]":
    from local_engine.reason.trajectories import kept, trace

    keys = {question.key for question in questions}
    known = sum(one.key in keys for one in kept(path))
    with _progress(len(questions) - known) as advance:
        for _ in trace(engine, "m", questions, path, sampling=sampling, layers=layers, together=together):
            advance(1)
    return [one for one in kept(path) if one.key in keys]


@contextmanager
def _progress(total: int) -> "Iterator[Any]":
    from rich.progress import Progress

    with Progress(transient=True) as bars:
        task = bars.add_task("questions", total=total)
        yield lambda n: bars.advance(task, n)


def _told(fitted: Any, rows: "Sequence[Trajectory]", out: Path, report: Path | None, asked: list[float] | None) -> None:
    """Write the artifact, and say what it promises."""
    from gateway.exits.fitting import proofs
    from gateway.exits.page import fit_page
    from local_engine.reason.artifact import MANIFEST, write

    manifest = fitted.artifact.manifest
    if asked and (missing := set(asked) - {one.delta for one in manifest.certified}):
        raise _Stop(f"--delta {min(missing):g} cannot be certified: {fitted.not_certified[0]}")
    write(fitted.artifact, out)
    for one in manifest.metrics["at"]:
        typer.echo(
            f"delta {one['delta']:g}, {one['form']}, {one['loss']}: leaves {one['left']:.1%}, saves {one['saved']:.1%}"
            f" of the tokens, accuracy {one['accuracy']:.3f} ({one['accuracy_of_whole']:.3f} whole)"
        )
    for problem in fitted.not_certified:
        typer.echo(f"not certified: {problem}")
    typer.echo(f"wrote {out / MANIFEST}")
    if report is not None:
        deltas = sorted({one.delta for one in manifest.certified if one.delta <= 0.1})
        report.write_text(fit_page(fitted, proofs(fitted.artifact, rows, deltas=deltas)), encoding="utf-8")
