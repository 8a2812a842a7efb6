"""The encoder beside the engine: a thread of its own, so that a batch of probes never stands between two decode steps.

What waits when a batch is done is the next batch. No torch here: the prober brings its own.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from local_engine.probe_types import Prober, Sounding
from local_engine.types import Message

MOST_PROBES: Final = 16
"""Of one batch: a longer one would keep its first longer than it saves its last."""

logger = logging.getLogger(__name__)

Vectors = tuple[bytes, int, int]
"""(float32 little-endian [n, dims] bytes, dims, tokens read)"""


class Asker(Protocol):
    """Who asked; comes back with the answer."""

    @property
    def cancelled(self) -> bool:
        """Nobody waits any more: it comes back with None."""
        ...


@dataclass(slots=True, eq=False)
class _Probe:
    asker: Asker
    messages: list[Message]


@dataclass(slots=True, eq=False)
class _Embed:
    asker: Asker
    texts: list[str]


class Beside:
    """Takes questions from any thread. `done(asker, answer)` is called on this one: hand over and return.

    The answer is a Sounding, vectors, None for who left before, or the error that the prober raised.
    """

    def __init__(self, prober: Prober, done: Callable[[Asker, Sounding | Vectors | Exception | None], None]) -> None:
        self._prober = prober
        self._done = done
        self._queue: deque[_Probe | _Embed] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-prober", daemon=True)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Answer what is under way, and what waits with None."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()
        for asked in self._queue:
            self._done(asked.asker, None)
        self._queue.clear()

    def probe(self, asker: Asker, messages: list[Message]) -> None:
        self._put(_Probe(asker, messages))

    def embed(self, asker: Asker, texts: list[str]) -> None:
        self._put(_Embed(asker, texts))

    def _put(self, asked: _Probe | _Embed) -> None:
        with self._wake:
            if not self._stopping:
                self._queue.append(asked)
                self._wake.notify()
                return
        self._done(asked.asker, None)

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            probes = [asked for asked in batch if isinstance(asked, _Probe)]
            if probes:
                self._serve_probes(probes)
            for asked in batch:
                if isinstance(asked, _Embed):
                    self._serve_embed(asked)

    def _take(self) -> list[_Probe | _Embed] | None:
        """What waits, at most MOST_PROBES of it; None when this is to stop."""
        with self._wake:
            while not (self._queue or self._stopping):
                self._wake.wait()
            if self._stopping:
                return None
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), MOST_PROBES))]
        wanted = [asked for asked in batch if not asked.asker.cancelled]
        for asked in batch:
            if asked not in wanted:
                self._done(asked.asker, None)
        return wanted

    def _serve_probes(self, probes: list[_Probe]) -> None:
        try:
            answers = list(zip(probes, self._prober.sound([asked.messages for asked in probes]), strict=True))
        except Exception as error:
            logger.exception("the probe failed on a batch of %d", len(probes))
            for asked in probes:
                self._done(asked.asker, error)
            return
        for asked, sounding in answers:
            self._done(asked.asker, sounding)

    def _serve_embed(self, asked: _Embed) -> None:
        try:
            answer: Vectors | Exception = self._prober.embed(asked.texts)
        except Exception as error:
            logger.exception("the encoder failed on %d texts", len(asked.texts))
            answer = error
        self._done(asked.asker, answer)
