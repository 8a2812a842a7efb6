"""The accept rule of a cascade as a file: `leadline probe accept` writes it, a policy's `accept: {rule: …}` names it.

Light: gateway workers import this.
"""

import math
from pathlib import Path
from typing import Any, Literal

import msgspec

from probes.errors import ArtifactError

FORMAT = 1
Feature = Literal["mean_logprob", "min_logprob", "log_tokens"]


class AcceptCertificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is proven of the rule's threshold, on answers that it was not fitted on."""

    loss: Literal["accepted_wrong", "weak_wrong_strong_right"]
    """An accepted answer is wrong; or it is, and the stronger model's would have been right. Of all queries."""
    method: Literal["ltt", "crc"]
    alpha: float
    delta: float | None
    """The chance that it does not hold; None, of `crc`: it holds on average."""
    horizon: int | None
    """The next queries whose realised loss is bounded; None: the expected loss is."""
    n: int
    risk: float
    """The loss on these answers."""

    def __str__(self) -> str:
        sure = "on average" if self.delta is None else f"with {100 * (1 - self.delta):g}% confidence"
        over = "" if self.horizon is None else f" over the next {self.horizon} queries"
        return f"{self.loss} <= {self.alpha:g} {sure}{over} ({self.method}, n {self.n}, {self.risk:.4f} on them)"


class FittedAccept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """P(correct | answer) = 1 / (1 + exp(-(bias + sum of weight x feature))); accepted from `at_least` on."""

    weights: dict[Feature, float]
    bias: float
    at_least: float
    keeps_right: float
    """The share of right answers that it accepts, of answers that it was not fitted on; and of wrong ones."""
    keeps_wrong: float
    n: int
    """Answers that its shares were measured on; of a file, all that it was fitted and measured on."""
    accepted: float
    """The share of all answers."""
    accepted_right: float
    """Of the accepted answers, the share that is right, of answers that it was not fitted on."""
    certificate: AcceptCertificate | None = None

    def numbers(self) -> dict[str, float]:
        """As a policy's `accept` has them."""
        shares = {"keeps_right": self.keeps_right, "keeps_wrong": self.keeps_wrong}
        return {**self.weights, "bias": self.bias, "at_least": self.at_least, **shares}

    def __str__(self) -> str:
        """As a route of a policy writes it."""
        return "accept: {" + ", ".join(f"{name}: {value:.4g}" for name, value in self.numbers().items()) + "}"

    def planned(self) -> dict[str, Any]:
        """As the `cascade` plan of a local model writes it."""
        weights = {name: round(weight, 4) for name, weight in self.weights.items()}
        return {"weights": weights, "bias": round(self.bias, 4), "at_least": round(self.at_least, 4)}


class AcceptRule(FittedAccept, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A rule in a file, and where it comes from."""

    source: str
    """The table and its column of labels."""
    data_sha256: str
    """Of the features and the labels."""
    created: str
    format: Literal[1] = 1


def write_rule(rule: AcceptRule, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(rule), indent=2) + b"\n")


def read_rule(path: Path) -> AcceptRule:
    """Raises ArtifactError, with the fix."""
    fix = "write it with `leadline probe accept`"
    try:
        rule = msgspec.json.decode(path.read_bytes(), type=AcceptRule)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); {fix}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not an accept rule of format {FORMAT} ({error}); {fix}") from None
    numbers = rule.numbers()
    if not all(map(math.isfinite, numbers.values())):
        raise ArtifactError(f"{path}: a number of it is not finite; {fix}")
    for name in ("at_least", "keeps_right", "keeps_wrong"):
        if not 0 <= numbers[name] <= 1:
            raise ArtifactError(f"{path}: {name} is {numbers[name]:g}, and no probability; {fix}")
    return rule
