"""`probe.json`: what a fitted probe is, for those who need not run it. Light: gateway workers import this."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from probes.errors import ArtifactError
from probes.types import Bands, Kind, Reading, Tier

FORMAT = 1
MANIFEST = "probe.json"
TENSORS = "probe.safetensors"
ARTIFACTS = Path(__file__).parent / "artifacts"
"""Those that ship with the package, each in a folder of its name."""
SKETCH = 1024
DIGEST_DIGITS = 12
BELOW_ALL = -2.0
"""A threshold that every score exceeds: probabilities and their differences lie in [-1, 1]."""

Loss = Literal["weak_wrong_strong_right", "accepted_wrong"]


def default_artifact_path() -> Path:
    """The artifact that is used where none is named."""
    return ARTIFACTS / "default"


def artifact_folder(name: str) -> Path:
    """The folder of that name; where there is none, the artifact that ships under it, such as `default`."""
    shipped = ARTIFACTS / name
    return shipped if name and "/" not in name and not Path(name).exists() and shipped.is_dir() else Path(name)


class HeadInfo(BaseModel):
    """One head: what a label meant, and on how many labels it was fitted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    label: str
    n: int
    base_rate: float
    """Mean of the labels."""
    calibration: Literal["platt", "isotonic", "exp", "softmax", "rate"]
    """From score to value: `exp` of heads for tokens, `softmax` over all heads for domains; the `rate` of a cluster is
    one already."""
    kind: Kind = "correct"
    undecided: tuple[float, float] | None = None
    """Between these two it knows hardly more than the base rate."""
    spread: tuple[float, float] | None = None
    """Of a head for tokens: four of five answers lie within these multiples of the value."""
    bands: tuple[tuple[float, float, float], ...] = ()
    """Of P(correct): (up to this value, low, high), the 95% interval of the share of right answers where it was such a
    value, out of fold; empty: not measured."""


class SimilarityInfo(BaseModel):
    """How the heads' inputs are made: exp(-gamma |z - landmark|^2) in a space of so many components."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    components: int = Field(ge=1)
    landmarks: int = Field(ge=1)
    gamma: float = Field(gt=0)


class ExpertInfo(BaseModel):
    """A kind of prompts that is recognised, and which heads its own probe has: none where it has no such probe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    heads: tuple[str, ...] = ()
    similarity: SimilarityInfo | None = None


class ClustersInfo(BaseModel):
    """How a table of clusters is read: the nearest centres by cosine, weighed by exp(beta x cosine)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(ge=1)
    nearest: int = Field(ge=1)
    beta: float = Field(gt=0)


class Certificate(BaseModel):
    """A threshold on calibrated probabilities, what is proven of it, and by which rows.

    With several `heads`, cheapest first, a query goes to the first whose probability is more than `threshold` above the
    last one's, else to the last: a loss is "that one wrong, the last one right". With one head its answer is accepted
    iff its probability is above `threshold`: a loss is "accepted and wrong".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: Loss
    heads: tuple[str, ...] = Field(min_length=1)
    method: Literal["crc", "ltt"]
    """Conformal risk control (the mean loss is at most alpha), or Learn-then-Test (so it is with chance 1 - delta)."""
    alpha: float = Field(gt=0, lt=1)
    delta: float | None = Field(gt=0, lt=1)
    horizon: int | None = Field(ge=1)
    """Number of queries whose realised loss is bounded; None: the expected loss is."""
    threshold: float = Field(ge=BELOW_ALL, le=1)
    n: int = Field(ge=1)
    risk: float = Field(ge=0, le=1)
    """Loss on the n rows."""
    shares: dict[str, float]
    """Of the n rows, the share that goes to each head; with one head, the share accepted."""
    rows: Literal["held_out", "out_of_fold"]
    """Rows that the heads were not fitted on, or rows scored by heads of other folds: the promise is exact for the
    former, and for the latter as good as the folds' heads are like the final ones."""
    data_sha256: str
    tensors_sha256: str
    encoder_sha256: str
    """Of the artifact that made the probabilities: the threshold is worth nothing for another one's."""
    created: str
    """Date, ISO 8601."""

    def accepts(self, probabilities: Mapping[str, float]) -> bool:
        """Whether the first head's answer may be taken."""
        reference = probabilities[self.heads[-1]] if len(self.heads) > 1 else 0.0
        return probabilities[self.heads[0]] - reference > self.threshold

    def choose(self, probabilities: Mapping[str, float]) -> str:
        """The head that a query goes to; of a certificate of one head always that one."""
        *cheaper, last = self.heads
        reference = probabilities[last]
        return next((head for head in cheaper if probabilities[head] - reference > self.threshold), last)

    def __str__(self) -> str:
        what = (
            "accepted and wrong" if self.loss == "accepted_wrong" else f"{self.heads[0]} wrong, {self.heads[-1]} right"
        )
        over = "" if self.horizon is None else f" over {self.horizon} queries"
        sure = "on average" if self.delta is None else f"with {1 - self.delta:.4g} confidence{over}"
        return f"at most {self.alpha:.4g} {what}, {sure} ({self.method}, {self.n} {self.rows.replace('_', '-')} rows)"


class Manifest(BaseModel):
    """What the tensors mean. `layers` are hidden-state indices, 0 being the embeddings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    tier: Tier = "encoder"
    name: str = Field(min_length=1)
    encoder: str
    encoder_sha256: str
    layers: tuple[int, ...] = Field(min_length=1)
    dims: int
    pooling: Literal["mean"] = "mean"
    max_tokens: int
    similarity: SimilarityInfo | None = None
    """None: the heads are linear in the hidden states."""
    clusters: ClustersInfo | None = None
    """Where there are some, the heads are rates of clusters, and of no other kind."""
    heads: tuple[HeadInfo, ...] = Field(min_length=1)
    groups: tuple[str, ...] = ()
    """Names of those that are recognised, from whose means the scores start."""
    experts: tuple[ExpertInfo, ...] = ()
    """Kinds of prompts that are recognised, and whose probes speak for them."""
    data_sha256: str
    prompts_sketch: tuple[str, ...] = ()
    """Of the prompts it was fitted on; see `sketch`."""
    n: int
    created: str
    """Date, ISO 8601."""
    versions: dict[str, str]
    metrics: dict[str, Any]
    limits: dict[str, float] = {}
    """Beyond these a text is unlike those it was fitted on, and the probe abstains; by the names its tier gives."""
    over: Literal["last", "prompt"] = "last"
    """Of tier `prefill`: the states of the prompt's last token, or their mean over all of its tokens."""
    question: str = ""
    """Of tier `self`: what the model is asked about the prompt that it has read."""
    answers: tuple[str, str] = ("Yes", "No")
    """Yes and no, as the answer to it begins."""
    tensors_sha256: str = ""
    certificates: tuple[Certificate, ...] = ()

    def certified(self, certificates: Sequence[Certificate]) -> "Manifest":
        """With these certificates, each in place of an older one that promises the same."""

        def promise(one: Certificate) -> object:
            return one.loss, one.heads, one.method, one.alpha, one.delta, one.horizon is None

        new = {promise(one): one for one in certificates}
        kept = [one for one in self.certificates if promise(one) not in new]
        return self.model_copy(update={"certificates": (*kept, *new.values())})

    def seen(self, prompts: Sequence[str]) -> int:
        """About how many of these prompts it was fitted on; 0 where fewer than three show, as real tables repeat."""
        digests = set(self.prompts_sketch)
        found = sum(digest in digests for digest in map(_digest, prompts))
        # The sketch holds the smallest digests: of prompts that were seen, the same share as of all that were.
        return round(found * max(1.0, self.n / len(digests))) if found >= 3 else 0

    def certificate_for(
        self,
        alpha: float,
        loss: Loss = "weak_wrong_strong_right",
        heads: Sequence[str] | None = None,
        method: Literal["crc", "ltt"] | None = None,
    ) -> Certificate | None:
        """The certificate that proves a loss of at most alpha with the loosest threshold, or None.

        A smaller alpha than asked for is proof enough. Where no method is named, confidence goes before the mean.
        """
        fit = [
            one
            for one in self.certificates
            if one.loss == loss
            and one.alpha <= alpha
            and (heads is None or one.heads == tuple(heads))
            and (method is None or one.method == method)
        ]
        return min(fit, key=lambda one: (one.method != "ltt", one.threshold, one.created), default=None)


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_DIGITS]


def sketch(prompts: Iterable[str]) -> tuple[str, ...]:
    """The smallest digests of these prompts (Bar-Yossef et al., 2002): enough to tell whether a table shares many."""
    return tuple(sorted(set(map(_digest, prompts)))[:SKETCH])


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Replace `probe.json` whole: a reader finds the old one or the new one."""
    part = folder / f"{MANIFEST}.part"
    part.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of the artifact in `folder`. Raises ArtifactError with what is wrong and what to do."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except OSError as error:
        shipped = ", ".join(sorted(path.name for path in ARTIFACTS.iterdir() if path.is_dir()))
        raise ArtifactError(
            f"no probe artifact in {folder}: {error.strerror} ({error.filename}); give a folder that `leadline probe "
            f"fit` wrote, or one that ships: {shipped}"
        ) from None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"{folder / MANIFEST} is not JSON: {error}") from None
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise ArtifactError(f"{folder / MANIFEST}: format {version!r} is unknown, this release reads {FORMAT}; refit")
    try:
        manifest = Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{folder / MANIFEST}: {field}: {first['msg']} (got {first['input']!r})") from None
    names = [head.name for head in manifest.heads]
    for i, certificate in enumerate(manifest.certificates):
        for field in ("tensors_sha256", "encoder_sha256"):
            theirs, ours = getattr(certificate, field), getattr(manifest, field)
            if theirs != ours:
                raise ArtifactError(
                    f"{folder / MANIFEST}: certificates.{i}: {field} is {theirs}, the artifact's is {ours}: "
                    "the threshold is one for other probabilities; run `leadline probe certify` anew"
                )
        for head in certificate.heads:
            if head not in names:
                raise ArtifactError(
                    f"{folder / MANIFEST}: certificates.{i}: head {head!r} is not of this artifact, which has "
                    f"{', '.join(names)}; run `leadline probe certify` anew"
                )
    return manifest


def version_of(manifest: Manifest, tensors: bytes) -> str:
    """Name and content hash; equal versions answer alike. What is only said of an artifact does not enter."""
    unsaid: dict[str, Any] = dict.fromkeys(
        ("created", "versions", "metrics", "tensors_sha256", "certificates", "prompts_sketch"), True
    )
    unsaid["heads"] = {"__all__": {"bands"}}
    if manifest.clusters is None:
        unsaid["clusters"] = True
    if not manifest.experts:
        unsaid["experts"] = True
    if manifest.over == "last":  # as all were before there was another way
        unsaid["over"] = True
    meaning = manifest.model_dump_json(exclude=unsaid)
    return f"{manifest.name}@{hashlib.sha256(meaning.encode() + tensors).hexdigest()[:8]}"


def bands_of(manifest: Manifest) -> dict[str, Bands]:
    """By head of P(correct), where it was measured."""
    return {head.name: head.bands for head in manifest.heads if head.kind == "correct" and head.bands}


def reading_of(heads: Sequence[HeadInfo], values: Sequence[float]) -> Reading:
    """What the values of all heads, calibrated, say together; those of domains are shares of their sum.

    A head for tokens is named after the head whose answers it counts, as `NAME.tokens`; one for a domain `domain.NAME`.
    """
    p_success: dict[str, float] = {}
    undecided: list[str] = []
    out_tokens: dict[str, tuple[float, float, float]] = {}
    domain: dict[str, float] = {}
    needs_reasoning = None
    for head, value in zip(heads, values, strict=True):
        match head.kind:
            case "correct":
                p_success[head.name] = value
                if head.undecided is not None and head.undecided[0] < value < head.undecided[1]:
                    undecided.append(head.name)
            case "out_tokens":
                low, high = head.spread or (1.0, 1.0)
                out_tokens[head.name.removesuffix(".tokens")] = value, value * low, value * high
            case "domain":
                domain[head.name.removeprefix("domain.")] = value
            case "needs_reasoning":
                needs_reasoning = value
    total = sum(domain.values())
    shares = {name: value / total for name, value in domain.items()}
    return Reading(p_success, frozenset(undecided), out_tokens, shares, needs_reasoning)
