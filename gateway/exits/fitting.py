"""From trajectories to an exit artifact."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import msgspec
import numpy as np

from local_engine.reason.artifact import Certified, ExitArtifact, ExitManifest, ExitProbe
from local_engine.reason.thought import FEATURES
from local_engine.reason.trajectories import Trajectory
from probes.calibrate import Array
from probes.errors import CertificateError
from probes.exits import DELTAS, FORMS, LOSSES, Cues, fit, fit_budget, halves, leave, quality, resplit, threshold

CLOSING_TOKENS = 2
"""What is forced to close a thought, about."""


@dataclass(frozen=True, slots=True)
class Fitted:
    artifact: ExitArtifact
    not_certified: list[str]
    """Why, of each promise that these trajectories are too few for."""


def fit_artifact(
    trajectories: Sequence[Trajectory],
    *,
    model: str,
    weights_sha256: str,
    effort: str,
    layers: Sequence[int] = (),
    deltas: Sequence[float] = DELTAS,
) -> Fitted:
    """Fit on one half of the trajectories, calibrate on the other. Raises CertificateError where they are too few."""
    for_fit = halves([one.key for one in trajectories])
    learn = [one for one, ours in zip(trajectories, for_fit, strict=True) if ours]
    rest = [one for one, ours in zip(trajectories, for_fit, strict=True) if not ours]
    fitted = fit(cues_of(learn))
    probe = ExitProbe(_numbers(fitted.mean), _numbers(fitted.scale), _numbers(fitted.weight), fitted.bias)
    base, per_prompt_token = fit_budget(
        np.array([one.prompt_tokens for one in learn], np.float64),
        np.array([_needed(one) for one in learn], np.float64),
    )
    manifest = ExitManifest(
        model=model,
        weights_sha256=weights_sha256,
        features=FEATURES,
        layers=tuple(layers),
        certified=(),
        budget_base=round(base, 3),
        budget_per_prompt_token=round(per_prompt_token, 4),
        n_fit=len(learn),
        n_calibration=0,
        data_sha256="",
        created="",
        metrics={},
        effort=effort,
    )
    return certify_artifact(ExitArtifact(manifest, probe), rest, deltas=deltas)


def certify_artifact(
    artifact: ExitArtifact, trajectories: Sequence[Trajectory], *, deltas: Sequence[float] = DELTAS
) -> Fitted:
    """The same probe with thresholds calibrated on these trajectories; those it may have been fitted on are left out.

    Raises CertificateError where not one promise can be made.
    """
    for_fit = halves([one.key for one in trajectories])
    ours = [one for one, fitted in zip(trajectories, for_fit, strict=True) if not fitted]
    cues = cues_of(ours)
    p = scores(artifact.probe, cues)
    certified: list[Certified] = []
    problems: list[str] = []
    for loss in LOSSES:
        for form in FORMS:
            for delta in deltas if form != "per_event" or loss == "wrong" else ():
                try:
                    above = threshold(cues, p, delta, form, loss)
                except CertificateError as error:
                    problems.append(f"delta {delta:g}, {form}, {loss}: {error}")
                else:
                    certified.append(Certified(delta, form, loss, above, len(ours)))
    if not certified:
        raise CertificateError(problems[0] if problems else "no delta was asked for: name one, such as 0.05")
    manifest = msgspec.structs.replace(
        artifact.manifest,
        certified=tuple(certified),
        n_calibration=len(ours),
        data_sha256=hashlib.sha256(msgspec.json.encode(ours)).hexdigest(),
        created=date.today().isoformat(),
        metrics={**quality(cues, p), "at": [effect(one, ours, cues, p) for one in certified]},
    )
    return Fitted(ExitArtifact(manifest, artifact.probe), problems)


def effect(promise: Certified, trajectories: Sequence[Trajectory], cues: Cues, p: Array) -> dict[str, Any]:
    """What leaving by a threshold does to these trajectories, replayed: nothing is generated."""
    left = leave(cues, p, promise.threshold, promise.loss)
    flat = [cue for one in trajectories for cue in one.cues]
    tokens = [
        one.output_tokens if at < 0 else flat[at].tokens + CLOSING_TOKENS + flat[at].answer_tokens
        for one, at in zip(trajectories, left.at, strict=True)
    ]
    whole = sum(one.output_tokens for one in trajectories)
    return {
        "delta": promise.delta,
        "form": promise.form,
        "loss": promise.loss,
        "left": round(float((left.at >= 0).mean()), 4),
        "saved": round(1 - sum(tokens) / whole, 4),
        "accuracy": round(float(left.right.mean()), 4),
        "accuracy_of_whole": round(float(cues.right_at_end.mean()), 4),
        "risk": round(left.risk, 4),
    }


def proofs(
    artifact: ExitArtifact,
    trajectories: Sequence[Trajectory],
    *,
    deltas: Sequence[float],
    splits: int = 200,
    fresh: bool = False,
) -> list[dict[str, Any]]:
    """For each promise: what risk is realised over random halves of trajectories that the probe has not seen; `fresh`:
    it has seen none of these. What half of them are too few for is left out."""
    for_fit = halves([one.key for one in trajectories])
    cues = cues_of([one for one, fitted in zip(trajectories, for_fit, strict=True) if fresh or not fitted])
    p = scores(artifact.probe, cues)
    found = []
    for form in FORMS:
        for delta in deltas:
            try:
                result = resplit(cues, p, delta, form, splits=splits)
            except CertificateError:  # half of these trajectories are too few for it
                continue
            found.append(
                {
                    "form": form,
                    "delta": delta,
                    "mean_risk": round(float(result.risks.mean()), 5),
                    "held": round(result.held, 4),
                    "left": round(float(result.shares_left.mean()), 4),
                    "trajectories": cues.n,
                    "splits": splits,
                }
            )
    return found


def cues_of(trajectories: Sequence[Trajectory]) -> Cues:
    """Their cues, as numbers."""
    rows = [(at, cue) for at, one in enumerate(trajectories) for cue in one.cues]
    width = len(rows[0][1].features) if rows else 0
    return Cues(
        len(trajectories),
        np.array([at for at, _ in rows], np.intp),
        np.array([cue.features for _, cue in rows], np.float64).reshape(len(rows), width),
        np.array([cue.right for _, cue in rows], np.bool_),
        np.array([one.right for one in trajectories], np.bool_),
    )


def scores(probe: ExitProbe, cues: Cues) -> Array:
    """[cues] the p that the engine would compute."""
    return np.array([probe.p(row) for row in cues.values.tolist()], np.float64)


def _needed(one: Trajectory) -> int:
    """Thinking tokens until an answer would have been right; all of them if never before the end."""
    return next((cue.tokens for cue in one.cues if cue.right), one.reasoning_tokens)


def _numbers(values: Array) -> tuple[float, ...]:
    return tuple(map(float, values))
