"""The slower tiers of the prefix store, behind one thread of their own: the engine's step never waits on them.

What is committed is handed over and written when there is time. What a new request could use is fetched while others
are stepped: the scheduler asks for it, looks whether it is `ready`, and admits the request without it after a bounded
time. A tier that fails is left alone for a while, and all it costs is misses: what it should have forgotten meanwhile
it forgets before anything else, as soon as it is back.

A tier is worth its reads where bytes per token / its bandwidth < the time to compute a token (LMCache's rule). Both
sides are measured as they happen, not assumed; a tier that does not pay is neither read nor written, but tried again
every RETRY_S.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from local_engine.config import EngineConfig
from local_engine.errors import ConfigError
from local_engine.prefix_block import Block
from local_engine.prefix_disk import DiskTier
from local_engine.prefix_format import Loaded, Unusable, Wanted, decode
from local_engine.prefix_identity import KVLayout
from local_engine.prefix_redis import RedisTier
from local_engine.prefix_types import TierStats

RETRY_S: Final = 60.0
FIRST_PAUSE_S: Final = 1.0
MAX_PAUSE_S: Final = 60.0
REDIS_TTL_S: Final = 24 * 3600
REDIS_VALUE_BYTES: Final = 8 << 20
_READ_AT_ONCE: Final = 16
"""Blocks read from a tier before it is seen whether anybody still waits for them."""
_WEIGHT: Final = 0.2
"""Of the newest measurement in a running mean."""
_OWED_BLOCKS: Final = 4096
"""Of one tenant, that a tier is still to forget one by one; of more than these it forgets all that the tenant has."""

logger = logging.getLogger(__name__)


class Tier(Protocol):
    """Where blocks are kept beside memory. Used by the worker thread alone, but for `may_have`.

    A tier that cannot do what it is asked raises OSError; a miss is no error. Blocks are named by the digest of the
    tenant's root and their own.
    """

    @property
    def medium(self) -> str: ...

    def may_have(self, root: bytes, digest: bytes) -> bool:
        """False where it is known, at once and on any thread, that the block is not there."""
        ...

    def read(self, root: bytes, digests: Sequence[bytes]) -> list[bytes]:
        """The leading blocks that are there."""
        ...

    def keep(self, root: bytes, path: Sequence[Block], rewrite: frozenset[Block]) -> Iterator[None]:
        """Use `path`, the blocks of a prefix; write those that are not there or in `rewrite`.

        Yields after each written block; other methods may be called then.
        """
        ...

    def forget(self, root: bytes, digests: Sequence[bytes] | None) -> None:
        """Remove these blocks; None: all below the root."""
        ...

    def close(self) -> None: ...


class Fetch:
    """Blocks on their way from the slower tiers. `ready` once they are there, or not worth waiting for any longer."""

    def __init__(
        self, root: bytes, wanted: Sequence[Wanted], layout: KVLayout, block_tokens: int, wait_s: float
    ) -> None:
        self.root = root
        self.wanted = wanted
        self.layout = layout
        self.block_tokens = block_tokens
        self.loaded: list[Loaded] = []
        self._deadline = time.monotonic() + wait_s
        self._finished = threading.Event()

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self._deadline

    @property
    def finished(self) -> bool:
        return self._finished.is_set()

    @property
    def ready(self) -> bool:
        """Whether the request should be admitted now, with what has come."""
        return self.finished or self.expired

    def wait(self, timeout_s: float = math.inf) -> None:
        """Until it is ready, or for `timeout_s`."""
        self._finished.wait(max(0.0, min(timeout_s, self._deadline - time.monotonic())))

    def finish(self) -> None:
        """Nothing more will come. By the worker, once."""
        self._finished.set()


@dataclass(frozen=True)
class _Keep:
    root: bytes
    path: Sequence[Block]
    rewrite: frozenset[Block]
    new_bytes: int
    seconds_per_kv_byte: float | None


@dataclass(frozen=True)
class _Forget:
    root: bytes
    digests: Sequence[bytes] | None


class _Watched:
    """One tier with its measurements, its pauses and what it is still to forget."""

    def __init__(self, tier: Tier, clock: Callable[[], float]) -> None:
        self.tier = tier
        self._clock = clock
        self.read = self.written = self.unusable = self.failures = 0
        self.seconds_per_byte: float | None = None
        self.owed: dict[bytes, set[bytes] | None] = {}
        """Root → blocks to forget before the tier is used again; None: all below the root."""
        self._last_read = 0.0
        self._away_until = 0.0
        self._pause = FIRST_PAUSE_S

    @property
    def away(self) -> bool:
        return self.away_s > 0

    @property
    def away_s(self) -> float:
        """For how long it is still left alone."""
        return max(0.0, self._away_until - self._clock())

    def pays(self, seconds_per_kv_byte: float | None) -> bool:
        """Whether reading KV is quicker than computing it, as far as both are known."""
        if self.seconds_per_byte is None or seconds_per_kv_byte is None:
            return True
        return self.seconds_per_byte < seconds_per_kv_byte or self._clock() - self._last_read > RETRY_S

    def measured(self, size: int, seconds: float) -> None:
        self._last_read = self._clock()
        new = seconds / size
        old = self.seconds_per_byte
        self.seconds_per_byte = new if old is None else old + _WEIGHT * (new - old)

    def failed(self, error: OSError) -> None:
        self.failures += 1
        if self._pause == FIRST_PAUSE_S:
            logger.warning("prefix tier %s is left alone for a while: %s", self.tier.medium, error)
        self._away_until = self._clock() + self._pause
        self._pause = min(2 * self._pause, MAX_PAUSE_S)

    def worked(self) -> None:
        if self._pause != FIRST_PAUSE_S:
            logger.info("prefix tier %s is back", self.tier.medium)
            self._pause = FIRST_PAUSE_S

    def owe(self, root: bytes, digests: Sequence[bytes] | None) -> None:
        owed = self.owed.get(root, set())
        if owed is None or digests is None or len(owed) + len(digests) > _OWED_BLOCKS:
            self.owed[root] = None
        else:
            self.owed[root] = owed.union(digests)

    def settle(self) -> None:
        """Forget what is owed. Raises OSError when the tier does, and owes the rest."""
        while self.owed:
            root, digests = self.owed.popitem()
            try:
                self.tier.forget(root, None if digests is None else list(digests))
            except OSError:
                self.owed[root] = digests
                raise

    def stats(self) -> TierStats:
        return TierStats(
            self.tier.medium, self.read, self.written, self.unusable, self.failures, self.away, self.seconds_per_byte
        )


class SlowTiers:
    """The tiers in the order in which they are asked, and their thread; shared by the stores of several models."""

    def __init__(
        self, tiers: Sequence[Tier], *, wait_s: float = 0.25, queue_bytes: int = 64 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`wait_s`: the longest that a request waits for a fetch. `queue_bytes`: what may wait to be written."""
        self.wait_s = wait_s
        self._queue_bytes = queue_bytes
        self._tiers = [_Watched(tier, clock) for tier in tiers]
        self._fetches: deque[Fetch] = deque()
        self._jobs: deque[_Keep | _Forget] = deque()
        """What to do, in this order, when nobody waits for a fetch."""
        self._queued = 0
        self.dropped_bytes = 0
        """Not written because the tiers did not keep up."""
        self._busy = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="prefix-tiers", daemon=True)
        self._thread.start()

    def may_have(self, root: bytes, digest: bytes, seconds_per_kv_byte: float | None) -> bool:
        """Whether a fetch of this block could be worth its while."""
        return any(
            not watched.away and watched.pays(seconds_per_kv_byte) and watched.tier.may_have(root, digest)
            for watched in self._tiers
        )

    def fetch(self, fetch: Fetch) -> None:
        """Start it; it is finished whatever happens."""
        with self._changed:
            self._fetches.append(fetch)
            self._changed.notify_all()

    def keep(
        self, root: bytes, path: Sequence[Block], rewrite: frozenset[Block], new_bytes: int,
        seconds_per_kv_byte: float | None,
    ) -> None:  # fmt: skip
        """Write what is new of a prefix, `new_bytes`, and remember that it was used; dropped when too much waits."""
        if self._queued + new_bytes > self._queue_bytes:
            self.dropped_bytes += new_bytes
            return
        self._add(_Keep(root, path, rewrite, new_bytes, seconds_per_kv_byte))

    def forget(self, root: bytes, digests: Sequence[bytes] | None) -> None:
        """Remove these blocks from every tier; None: all below the root. From now on no fetch brings them.

        A tier that is away does so once it is back.
        """
        self._add(_Forget(root, digests))

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything asked for so far is done; whether it was in time.

        What is not read or written because a tier is away is done with; what that tier is to forget is waited for.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._idle and not self._owing(), timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Finish what waits, and stop, within `timeout_s`.

        What is not written after half of it is dropped; what is to be forgotten is forgotten, also in a tier that is
        away. Where that fails or takes longer, an error is logged: what was evicted is then still in that tier, and is
        found by whoever uses it next, until it is evicted again or the tier lets go of it.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._idle, timeout_s / 2)
            self._closing = True
            self._jobs = deque(job for job in self._jobs if isinstance(job, _Forget))
            self._changed.notify_all()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() or self._owing():
            logger.error("prefix tiers are closed before all was done: what was evicted last may still be in them")

    def stats(self) -> list[TierStats]:
        return [watched.stats() for watched in self._tiers]

    @property
    def _idle(self) -> bool:
        return not (self._busy or self._jobs or self._fetches)

    def _owing(self) -> list[_Watched]:
        return [watched for watched in self._tiers if watched.owed]

    def _add(self, job: _Keep | _Forget) -> None:
        with self._changed:
            if isinstance(job, _Keep):
                self._queued += job.new_bytes
            self._jobs.append(job)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                back_s = min((watched.away_s for watched in self._owing()), default=None)
                self._changed.wait_for(lambda: self._closing or self._fetches or self._jobs, back_s)
                if self._closing and self._idle:
                    break
                self._busy = True
                job = self._jobs.popleft() if self._jobs and not self._fetches else None
            try:
                self._do(job)
            except Exception:  # a bug must not end the thread: fetches would be waited for in vain
                logger.exception("a job of the prefix tiers failed")
            if isinstance(job, _Keep):
                with self._changed:
                    self._queued -= job.new_bytes
        for watched in self._owing():
            self._try(watched, _Watched.settle)
        for watched in self._tiers:
            watched.tier.close()

    def _do(self, job: _Keep | _Forget | None) -> None:
        """Fetches that came meanwhile go first at every tier."""
        if isinstance(job, _Keep):
            for watched in self._tiers:
                self._serve_waiting()
                if not watched.away:
                    self._try(watched, lambda watched: self._keep(watched, job))
        elif job is not None:
            for watched in self._tiers:
                watched.owe(job.root, job.digests)
        self._serve_waiting()
        for watched in self._owing():
            if not watched.away:
                self._try(watched, _Watched.settle)
                self._serve_waiting()

    def _try(self, watched: _Watched, work: Callable[[_Watched], None]) -> None:
        """Do `work` with a tier, after what it owes."""
        try:
            watched.settle()
            work(watched)
        except OSError as error:
            watched.failed(error)
        else:
            watched.worked()

    def _keep(self, watched: _Watched, job: _Keep) -> None:
        if watched.pays(job.seconds_per_kv_byte):
            for _ in watched.tier.keep(job.root, job.path, job.rewrite):
                watched.written += 1
                self._serve_waiting()
                if self._closing:
                    break

    def _serve_waiting(self) -> None:
        while self._fetches:
            self._serve(self._fetches.popleft())

    def _serve(self, fetch: Fetch) -> None:
        try:
            for watched in self._tiers:
                if not (watched.away or self._to_be_forgotten(fetch.root)):
                    self._read(watched, fetch)
        except Exception:
            logger.exception("a fetch of the prefix tiers failed")
        finally:
            fetch.finish()

    def _to_be_forgotten(self, root: bytes) -> bool:
        """Whether some of it is, after what waits to be written: until then the tiers cannot be trusted with it."""
        with self._changed:
            return any(isinstance(job, _Forget) and job.root == root for job in self._jobs)

    def _read(self, watched: _Watched, fetch: Fetch) -> None:
        """Add to what is loaded the blocks that come next, as far as the tier has them."""
        while (start := len(fetch.loaded)) < len(fetch.wanted) and not fetch.expired:
            wanted = fetch.wanted[start : start + _READ_AT_ONCE]
            try:
                watched.settle()
                began = time.monotonic()
                raws = watched.tier.read(fetch.root, [block.digest for block in wanted])
            except OSError as error:
                watched.failed(error)
                return
            watched.worked()
            for block, raw in zip(wanted, raws, strict=False):
                try:
                    fetch.loaded.append(decode(raw, block, fetch.layout, fetch.block_tokens))
                except Unusable as why:
                    watched.unusable += 1
                    logger.warning(
                        "prefix tier %s: %s is removed: %s", watched.tier.medium, block.digest.hex()[:32], why
                    )
                    watched.owe(fetch.root, [block.digest])
                    self._try(watched, _Watched.settle)
                    return
            watched.read += len(raws)
            if raws:
                watched.measured(sum(map(len, raws)), time.monotonic() - began)
            if len(raws) < len(wanted):
                return


def open_tiers(config: EngineConfig) -> SlowTiers | None:
    """What `config` asks for below memory; None for nothing. Raises ConfigError, ModuleNotFoundError without redis."""
    tiers: list[Tier] = []
    if config.prefix_disk is not None:
        try:
            tiers.append(DiskTier(config.prefix_disk, config.prefix_disk_bytes))
        except OSError as error:
            why = f"{config.prefix_disk} cannot be used: {error.strerror}; name a folder that can be written to"
            raise ConfigError("prefix_disk", why) from error
    if config.prefix_redis is not None:
        try:
            tiers.append(RedisTier(config.prefix_redis, ttl_s=REDIS_TTL_S, value_bytes_limit=REDIS_VALUE_BYTES))
        except ValueError as error:
            raise ConfigError("prefix_redis", f"cannot be used: {error}") from error
    return SlowTiers(tiers) if tiers else None
