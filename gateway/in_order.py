"""The policy's own probes, read in this process as a gateway asks them: words first, then what they leave open.

For commands that run no gateway: `leadline explain`, `simulate` and `probe score --policy`. A local model is loaded
here and heard as the engine hears it (`probes.listen`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gateway import tiers
from gateway.found import Found
from gateway.policies import encoder, local_models
from probes.artifact import Artifact, read
from probes.errors import TableError
from probes.listen import ListenedModel
from probes.manifest import bands_of, reading_of
from probes.runtime import EncoderProbe
from probes.scored import listened
from probes.static import StaticProbe
from probes.text import render
from probes.types import Reading
from routers.policy import Policy
from routers.types import Signals

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Heard:
    """A probe that hears a local model read."""

    artifact: Artifact
    model: ListenedModel
    speaks_of: frozenset[str]
    """Models of the policy that this local model serves: only a query that may go to one of them is read to it."""

    def read(self, conversation: Conversation) -> Reading | None:
        """None of one that is longer than the model reads: a gateway's engine does not answer either."""
        try:
            features = listened(self.artifact, self.model, [render(conversation)])
        except TableError:
            return None
        (values,) = self.artifact.heads.predict_proba(features).tolist()
        return reading_of(self.artifact.manifest.heads, values)


class InOrder:
    """Each tier is asked only about what the one before it left open."""

    def __init__(
        self, static: StaticProbe | None, encoder: EncoderProbe | None, heard: Sequence[Heard], heads: Iterable[str]
    ) -> None:
        self._static, self._encoder, self._heard = static, encoder, heard
        probes = [probe.version for probe in (static, encoder) if probe is not None]
        self.version = "+".join([*probes, *(one.artifact.version for one in heard)])
        self.heads = tuple(dict.fromkeys(heads))
        """Those that the policy asks for."""

    @classmethod
    def of(cls, policy: Policy, folder: Path) -> Self:
        """`folder` holds the policy file. Raises ProbeError for what cannot be read here."""
        static, dense = (tiers.artifact(policy, folder, tier) for tier in ("static", "encoder"))
        sources = local_models(policy, folder)
        served: dict[str, list[str]] = {}
        for model in policy.models.values():
            served.setdefault(model.upstream, []).append(model.name)
        heard = [
            _heard(Path(place), sources[name], frozenset(served[name]))
            for name, artifacts in tiers.readers(policy, folder, sources).items()
            for place in artifacts
        ]
        return cls(
            None if static is None else StaticProbe.load(static),
            None if dense is None else EncoderProbe.load(dense, encoder(policy, folder)),
            heard,
            policy.difficulty.heads.values() if policy.difficulty is not None else (),
        )

    def sound(self, conversations: Sequence[Conversation], heads: Mapping[str, str]) -> list[Signals]:
        """The signals of each conversation. `heads`: model of the policy to head."""
        found = [Found(heads) for _ in conversations]
        if self._static is not None:
            for one, conversation in zip(found, conversations, strict=True):
                said = self._static.read(render(conversation))
                if said.p_success:
                    one.add(said, self._static.version, 0, bands=bands_of(self._static.manifest))
        left = [row for row, one in enumerate(found) if one.open]
        if self._encoder is not None and left:
            for row, dense in zip(left, self._encoder.sound([conversations[row] for row in left]), strict=True):
                found[row].add(dense, self._encoder.version, 0, beside=True, bands=self._encoder.bands)
        for probe in self._heard:
            if heads.keys() & probe.speaks_of:
                for row, one in enumerate(found):
                    if one.open:
                        heard = probe.read(conversations[row])
                        if heard is not None:
                            one.add(heard, probe.artifact.version, 0, bands=bands_of(probe.artifact.manifest))
        return [one.signals() for one in found]

    def probe(self, conversations: Sequence[Conversation]) -> list[dict[str, float]]:
        """P(success) by head, where a probe answers."""
        signals = self.sound(conversations, {head: head for head in self.heads})
        return [{head: estimate.value for head, estimate in one.p_success.items()} for one in signals]


def _heard(place: Path, source: str, speaks_of: frozenset[str]) -> Heard:
    artifact = read(place)
    model = ListenedModel.load(source)
    artifact.require_encoder(model.name, model.sha256)
    return Heard(artifact, model, speaks_of)
