"""The `static` tier: what the words of a query say, read in a gateway worker in tens of microseconds.

A linear model over hashed words and word pairs, each weighed by how rare it is, and a few statistics of the text. Only
the standard library runs here: numpy would cost a worker a quarter of its memory. The tables are bytes, one a bucket:

    score = bias + z . stats + scale x sum(table[bucket]) / sqrt(sum(rarity[bucket]))

Hashing is feature hashing (Weinberger et al., 2009) without signs; weights are inverse document frequencies, normalised
to unit length as TF-IDF is. It says nothing of text unlike what it was fitted on, and marks as undecided what it knows
no better than the base rate.
"""

import hashlib
import math
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter, mul, sub, truediv
from pathlib import Path
from typing import Any, Final, Self
from zlib import crc32

from probes.errors import ArtifactError
from probes.manifest import MANIFEST, TENSORS, Manifest, read_manifest, reading_of, version_of
from probes.tensors import read_bytes, read_tensors
from probes.types import Reading

FEATURES: Final = "hashed-words"
"""In place of an encoder's name in the manifest."""
BUCKETS: Final = 1 << 16
MAX_CHARS: Final = 4096
"""Of a longer text the first quarter of this and the last three quarters are read: instructions stand first, questions
last."""
STATS: Final = ("chars", "words", "lines", "bytes_per_word", "distinct", "digits", "questions", "non_ascii")
CLIP: Final = 3.0
"""Statistics further from the mean than so many standard deviations count as if they were so far."""

_MASK: Final = BUCKETS - 1
_FOLD: Final = bytes(48 if 48 <= byte <= 57 else byte + 32 if 65 <= byte <= 90 else byte for byte in range(256))
"""Letters to lower case, digits to 0: a number is known by its length."""
_WORDS: Final = re.compile(rb"[a-z]+|0+|[\x80-\xff]+|[^\sa-z0\x80-\xff]").findall
_DEFINITION: Final = f"{FEATURES}/1 {BUCKETS} {MAX_CHARS} {' '.join(STATS)}"
FEATURES_SHA256: Final = hashlib.sha256(_DEFINITION.encode()).hexdigest()
"""Changes when the same text would be read otherwise: weights fitted for one reading are refused by another."""


@dataclass(frozen=True, slots=True)
class Words:
    """One text as it is read."""

    places: set[int]
    """The buckets in which its words, and the pairs of neighbours among them, are counted."""
    stats: tuple[float, ...]
    """The numbers named in STATS."""


def words_of(text: str) -> Words:
    """Never fails, and never reads more than MAX_CHARS."""
    read = text
    if len(text) > MAX_CHARS:
        head = MAX_CHARS // 4
        read = f"{text[:head]} {text[head - MAX_CHARS :]}"
    data = read.encode("utf-8", "surrogatepass").translate(_FOLD)
    words = _WORDS(data)
    hashes = list(map(crc32, words))
    hashes += map(crc32, words[1:], hashes)
    places = {value & _MASK for value in hashes}
    count, size = len(words) or 1, len(data) or 1
    stats = (
        math.log1p(len(text)),
        math.log1p(len(words)),
        math.log1p(read.count("\n")),
        size / count,
        len(places) / count,
        data.count(b"0") / size,
        math.log1p(read.count("?")),
        (len(data) - len(read)) / size,
    )
    return Words(places, stats)


class StaticProbe:
    """A fitted static probe."""

    def __init__(self, manifest: Manifest, tensors: "Mapping[str, array[Any]]", version: str) -> None:
        self.manifest = manifest
        self.version = version
        self._rarity = tensors["rarity"]
        self._rarity_scale = float(tensors["rarity_scale"][0])
        self._mean, self._std = tuple(tensors["stats_mean"]), tuple(tensors["stats_std"])
        self._chars_max, self._rarity_max = manifest.limits["chars"], manifest.limits["rarity"]
        stats = len(STATS)
        self._heads = tuple(
            (
                tensors["table"][at * BUCKETS : (at + 1) * BUCKETS],
                float(tensors["table_scale"][at]),
                tuple(tensors["stats_weight"][at * stats : (at + 1) * stats]),
                float(tensors["bias"][at]),
                _CALIBRATORS[head.calibration](tensors.get(f"calibration.{head.name}", array("d"))),
            )
            for at, head in enumerate(manifest.heads)
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises ArtifactError for what is damaged, of another tier, or fitted for another reading of text."""
        manifest = read_manifest(folder)
        if manifest.tier != "static":
            raise ArtifactError(f"{folder} is a probe of tier `{manifest.tier}`; a static one is wanted")
        if manifest.encoder_sha256 != FEATURES_SHA256:
            raise ArtifactError(
                f"{folder} was fitted on {manifest.encoder!r} (sha256 {manifest.encoder_sha256}), and this release "
                f"reads text as sha256 {FEATURES_SHA256}: refit with `leadline probe fit --tier static`"
            )
        if {"chars", "rarity"} - manifest.limits.keys():
            raise ArtifactError(f"{folder / MANIFEST}: `limits` must state chars and rarity; refit")
        data = read_bytes(folder, manifest)
        return cls(manifest, read_tensors(data, _expected(manifest), folder / TENSORS), version_of(manifest, data))

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(head.name for head in self.manifest.heads)

    def read(self, text: str) -> Reading:
        """What it says of one text; an empty reading where it abstains. Never fails, and takes bounded time."""
        words = words_of(text)
        if not words.places or len(text) > self._chars_max:
            return _NOTHING
        pick = itemgetter(0, *words.places)  # one place too many, so that it gives a tuple even of one
        rarity = (sum(pick(self._rarity)) - self._rarity[0]) * self._rarity_scale
        if rarity > self._rarity_max * len(words.places):
            return _NOTHING
        norm = math.sqrt(rarity)
        stats = [
            -CLIP if z < -CLIP else CLIP if z > CLIP else z
            for z in map(truediv, map(sub, words.stats, self._mean), self._std)
        ]
        values = [
            calibrate(bias + sum(map(mul, weights, stats)) + (sum(pick(table)) - table[0]) * scale / norm)
            for table, scale, weights, bias, calibrate in self._heads
        ]
        return reading_of(self.manifest.heads, values)


_NOTHING: Final = Reading()


def _sigmoid(z: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * z))


def _platt(numbers: Sequence[float]) -> Callable[[float], float]:
    slope, intercept = numbers
    return lambda score: _sigmoid(slope * score + intercept)


def _isotonic(numbers: Sequence[float]) -> Callable[[float], float]:
    knots = len(numbers) // 2
    x, y = numbers[:knots], numbers[knots:]

    def calibrate(score: float) -> float:
        at = bisect_right(x, score)
        if at in (0, knots):
            return y[min(at, knots - 1)]
        share = (score - x[at - 1]) / (x[at] - x[at - 1])
        return y[at - 1] + share * (y[at] - y[at - 1])

    return calibrate


def _exp(numbers: Sequence[float]) -> Callable[[float], float]:
    return lambda score: math.exp(max(-50.0, min(50.0, score)))


_CALIBRATORS: Final = {"platt": _platt, "isotonic": _isotonic, "exp": _exp, "softmax": _exp}


def _expected(manifest: Manifest) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name to (type, shape), -1 standing for any length."""
    heads, stats = len(manifest.heads), len(STATS)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "table": ("I8", (heads, BUCKETS)),
        "table_scale": ("F64", (heads,)),
        "rarity": ("U8", (BUCKETS,)),
        "rarity_scale": ("F64", (1,)),
        "stats_mean": ("F64", (stats,)),
        "stats_std": ("F64", (stats,)),
        "stats_weight": ("F64", (heads, stats)),
        "bias": ("F64", (heads,)),
    }
    shapes = {"platt": (2,), "isotonic": (2, -1)}
    return expected | {
        f"calibration.{head.name}": ("F64", shapes[head.calibration])
        for head in manifest.heads
        if head.calibration in shapes
    }
