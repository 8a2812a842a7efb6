"""The policy's own probes, in order, on a table's prompts: words first, the encoder where they leave a head open."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from gateway import tiers
from gateway.policies import encoder
from probes.errors import TableError
from probes.runtime import EncoderProbe
from probes.static import StaticProbe
from probes.text import render
from routers.policy import Policy

NAN = float("nan")


class InOrder:
    """As a gateway asks them, but for a local model's own reading, which takes the engine."""

    def __init__(self, heads: Iterable[str], static: StaticProbe | None, encoder: EncoderProbe | None) -> None:
        self._static, self._encoder = static, encoder
        self.version = "+".join(probe.version for probe in (static, encoder) if probe is not None)
        self.heads = tuple(dict.fromkeys(heads))
        """Those that the policy asks for."""

    @classmethod
    def of(cls, policy: Policy, folder: Path) -> "InOrder":
        """Raises ProbeError: an artifact is not there, or all of them hear a local model read."""
        static, dense = (tiers.artifact(policy, folder, tier) for tier in ("static", "encoder"))
        if static is None and dense is None:
            raise TableError(
                "signals.difficulty.probe: only probes that hear a local model read; a simulation runs no model: "
                "give --p-success NAME=COLUMN"
            )
        return cls(
            policy.difficulty.heads.values() if policy.difficulty is not None else (),
            None if static is None else StaticProbe.load(static),
            None if dense is None else EncoderProbe.load(dense, encoder(policy, folder)),
        )

    def probe(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[dict[str, float]]:
        """P(success) by head; NaN where no probe answers."""
        found = [dict.fromkeys(self.heads, NAN) for _ in conversations]
        left = [set(self.heads) for _ in conversations]
        if self._static is not None:
            for row, conversation in enumerate(conversations):
                said = self._static.read(render(conversation))
                found[row] |= {head: p for head, p in said.p_success.items() if head in left[row]}
                left[row] -= said.p_success.keys() - said.undecided
        asked = [row for row, heads in enumerate(left) if heads]
        if self._encoder is not None and asked:
            for row, dense in zip(asked, self._encoder.probe([conversations[i] for i in asked]), strict=True):
                found[row] |= {head: p for head, p in dense.items() if head in left[row]}
        return found
