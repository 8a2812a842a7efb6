"""How much a lane's step may compute: as much as takes no longer than it should."""


class Pace:
    """How many tokens a step may compute so that it takes no longer than `step_s`; at most `chunk`.

    Measured: a step of n tokens that took t allows n * step_s / t next time, smoothed. Where t = a + b * n this
    settles where the step takes `step_s`.
    """

    def __init__(self, chunk: int, step_s: float) -> None:
        self._chunk = chunk
        self._step_s = step_s
        self._tokens = float(chunk)

    @property
    def tokens(self) -> int:
        return max(1, min(self._chunk, int(self._tokens)))

    def observe(self, tokens: int, seconds: float) -> None:
        allowed = tokens * self._step_s / max(seconds, 1e-6)
        self._tokens += 0.3 * (min(allowed, 2.0 * self._chunk) - self._tokens)
