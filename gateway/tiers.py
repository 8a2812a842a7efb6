"""The probes that a policy names, in order, each read for what it is. Light: no torch, no numpy."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from probes.errors import ArtifactError
from probes.manifest import ARTIFACTS, MANIFEST, Manifest, bands_of, read_manifest
from probes.static import StaticProbe
from probes.types import Bands, Tier
from routers.policy import Policy

ORDER: Final[tuple[Tier, ...]] = ("static", "encoder", "prefill", "self")
"""From the cheapest to the dearest: each is asked where the one before it left a head open."""


def places(policy: Policy, folder: Path) -> list[Path]:
    """Where its artifacts lie: one that ships with the package by its name, any other relative to the policy file."""
    names = policy.difficulty.probes if policy.difficulty is not None else ()
    shipped = {path.name for path in ARTIFACTS.iterdir()}
    return [ARTIFACTS / name if name in shipped else folder / Path(name).expanduser() for name in names]


def artifact(policy: Policy, folder: Path, tier: Tier) -> Path | None:
    """The artifact of one tier. One that cannot be read counts as an encoder's: who loads it says what is wrong."""
    return next((place for place in places(policy, folder) if _tier(place) == tier), None)


@dataclass(frozen=True, slots=True)
class Tiers:
    """What a worker may ask, from the cheapest on."""

    static: StaticProbe | None = None
    encoder: bool = False
    heard: tuple[str, ...] = ()
    """Local models, by the engine's name, that a probe hears read."""
    bands: Mapping[str, Mapping[str, Bands]] = field(default_factory=dict)
    """By tier, `static` or `encoder`, or `heard:` and the local model; then by head."""
    marks: Mapping[str, str] = field(default_factory=dict)
    """As `marks` found them."""

    def __bool__(self) -> bool:
        return self.static is not None or self.encoder or bool(self.heard)


def load(policy: Policy, folder: Path, sources: Mapping[str, str]) -> Tiers:
    """Raises ArtifactError. `sources`: of local models, by the engine's name."""
    words, dense = artifact(policy, folder, "static"), artifact(policy, folder, "encoder")
    heard = readers(policy, folder, sources)
    own: dict[str, list[Path | None]] = {"static": [words], "encoder": [dense]}
    own |= {f"heard:{name}": [*map(Path, at)] for name, at in heard.items()}
    return Tiers(
        StaticProbe.load(words) if words is not None else None,
        dense is not None,
        tuple(heard),
        {name: _bands([place for place in found if place is not None]) for name, found in own.items()},
        marks(policy, folder),
    )


def marks(policy: Policy, folder: Path) -> dict[str, str]:
    """By folder, a digest of each artifact's manifest, which holds one of its tensors."""
    found = {}
    for place in places(policy, folder):
        with suppress(OSError):
            found[str(place)] = hashlib.sha256((place / MANIFEST).read_bytes()).hexdigest()
    return found


def _bands(found: Sequence[Path]) -> dict[str, Bands]:
    """Of artifacts that speak of different heads. One that cannot be read has none: who loads it says what is wrong."""
    bands: dict[str, Bands] = {}
    for place in found:
        with suppress(ArtifactError):
            bands |= bands_of(read_manifest(place))
    return bands


def readers(policy: Policy, folder: Path, sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Local model (the engine's name; `sources`: to where it is loaded from) to the artifacts that hear it read."""
    found: dict[str, list[str]] = {}
    for place in places(policy, folder):
        if _tier(place) in ("prefill", "self"):
            name = _model(read_manifest(place), sources)
            if name is not None:
                found.setdefault(name, []).append(str(place))
    return found


def problems(policy: Policy, folder: Path, sources: Mapping[str, str]) -> list[str]:
    """A sentence for each artifact that cannot be used, tier out of order, and head that none of them has."""
    if policy.difficulty is None:
        return []
    found: list[str] = []
    heads: list[str] = []
    reached = -1
    for place in places(policy, folder):
        try:
            manifest = read_manifest(place)
            if manifest.tier == "static":
                StaticProbe.load(place)
        except ArtifactError as error:
            found.append(f"signals.difficulty.probe: {error}")
            continue
        heads += [head.name for head in manifest.heads if head.kind == "correct"]
        at = ORDER.index(manifest.tier)
        if at <= reached:
            found.append(
                f"signals.difficulty.probe: {manifest.name!r} is of tier `{manifest.tier}`, after `{ORDER[reached]}`; "
                f"name at most one of each, in the order {', '.join(ORDER)}"
            )
        reached = max(reached, at)
        if manifest.tier in ("prefill", "self") and _model(manifest, sources) is None:
            found.append(
                f"signals.difficulty.probe: {manifest.name!r} hears {manifest.encoder!r} read, which is no local model "
                "of this policy; add it to `models`, or leave the probe out"
            )
    if not found:
        for model, head in policy.difficulty.heads.items():
            if head not in heads:
                close = get_close_matches(head, heads, n=1)
                meant = f"did you mean {close[0]!r}? " if close else ""
                found.append(
                    f"signals.difficulty.heads.{model}: the probe has no head {head!r}; {meant}"
                    f"it has {', '.join(dict.fromkeys(heads))}"
                )
    return found


def _tier(place: Path) -> Tier:
    try:
        return read_manifest(place).tier
    except ArtifactError:
        return "encoder"


def _model(manifest: Manifest, sources: Mapping[str, str]) -> str | None:
    return next((n for n, source in sources.items() if manifest.encoder in (source, Path(source).name)), None)
