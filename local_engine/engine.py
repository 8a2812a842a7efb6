"""The engine: one thread that owns the models and turns commands into events, a step at a time.

Each model has a lane (`lane.py`), which computes its sequences; the lanes take turns. Each request has a controller
(`generation.py`, `scoring.py`), which owns sequences through `primitives.py` and says what its caller is told.
Cancels and deadlines are looked at before every step; the encoder answers probes and embeds on a thread of its own
(`beside.py`). What one step means for one connection is delivered at once, as one message.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from local_engine.beside import Asker, Beside, Vectors
from local_engine.chat import InvalidRequest, parse_messages, parse_tools
from local_engine.controllers import Controllers, Refused
from local_engine.kv import KVCache
from local_engine.lane import Lane, Runs
from local_engine.model import LocalModel
from local_engine.prefix import PrefixStore
from local_engine.prefix_identity import KVIdentity, KVLayout, weights_fingerprint
from local_engine.prefix_tiers import SlowTiers
from local_engine.prefix_types import KVEvent, PrefixStats
from local_engine.primitives import Controller, Primitives
from local_engine.probe_types import Prober, PromptReader, Sounding
from local_engine.runner import Runner, new_kv
from local_engine.spec.build import MakeSpeculator, without_speculation
from local_engine.turns import Turn
from local_engine.types import (
    Cancel,
    Command,
    Embed,
    EmbedResult,
    EngineStats,
    Event,
    Failed,
    FailureCode,
    Finished,
    FinishReason,
    Follow,
    Generate,
    Hello,
    Prefix,
    PrefixEvents,
    PrefixResult,
    Probe,
    ProbeResult,
    Score,
    Stats,
    StatsResult,
)

MAX_EVENTS = 10_000
"""Of one message about stored prefixes."""

logger = logging.getLogger(__name__)

Deliver = Callable[[list[Event]], None]
"""Takes events for one connection. Called on the engine's threads: hand over and return."""


@dataclass(slots=True, eq=False)
class _Job:
    """A command on its way."""

    link: "Link"
    command: Generate | Score | Probe | Embed | Prefix | Follow
    cancelled: bool = False
    since: float = field(default_factory=time.perf_counter)
    deadline: float = float("inf")
    controller: Controller | None = None
    engine: Primitives | None = None
    counts: dict[str, int] = field(default_factory=dict)
    """Of a probe: prompt tokens per model."""

    @property
    def begun(self) -> bool:
        return self.engine is not None and any(s.slot is not None for s in self.engine.sequences)


class Link:
    """One client of the engine. `submit` and `close` may be called from any thread, and return at once."""

    def __init__(self, engine: "Engine", deliver: Deliver) -> None:
        self._engine = engine
        self._live: dict[int, _Job] = {}
        self.deliver = deliver

    def submit(self, command: Command) -> None:
        """Start a command, or cancel one; its events arrive at `deliver`."""
        if isinstance(command, Stats):
            self.deliver([StatsResult(command.id, self._engine.stats(), self._engine.prefix_stats())])
            return
        if isinstance(command, Cancel):
            job = self._live.get(command.id)
            if job is not None:
                job.cancelled = True
                self._engine._nudge()
            return
        job = self._live[command.id] = _Job(self, command)
        self._engine._enqueue(job)

    def close(self) -> None:
        """Cancel everything; nothing is delivered any more."""
        self.deliver = _ignore
        for job in list(self._live.values()):
            job.cancelled = True
        self._engine._nudge()

    def _settle(self, id: int) -> None:
        self._live.pop(id, None)


def _ignore(events: list[Event]) -> None:
    """Where the events of a closed link go."""


class Engine:
    """Serves `models` until `stop`. Build it, `start` it, and talk to it through `connect`."""

    def __init__(
        self,
        models: Mapping[str, LocalModel],
        prober: Prober | None = None,
        *,
        readers: Mapping[str, Sequence[PromptReader]] | None = None,
        max_running: int = 8,
        prefill_chunk: int = 256,
        kv_bytes: int = 1 << 30,
        prefix_bytes: int = 1 << 29,
        prefix_tiers: SlowTiers | None = None,
        step_s: float = 0.05,
        make_speculator: MakeSpeculator = without_speculation,
        make_runner: Callable[[LocalModel, KVCache], Runs] = Runner,
    ) -> None:
        self._prober = prober
        self._beside = Beside(prober, self._answered) if prober is not None else None
        self._readers = {name: tuple(found) for name, found in (readers or {}).items()}
        self._prefix_tiers = prefix_tiers
        self._lanes: dict[str, Lane] = {}
        caches = {name: new_kv(model, kv_bytes) for name, model in models.items()}
        summed = {name: _summed_layers(self._readers.get(name, ())) for name in models}
        # Before any runner takes weights over, be it that of another model's draft: a store's identity holds them all.
        stores = {
            name: _prefix_store(name, model, caches[name], summed[name], prefix_bytes, prefix_tiers)
            for name, model in models.items()
            if prefix_bytes
        }
        for name, model in models.items():
            kv, store = caches[name], stores.get(name)
            self._lanes[name] = Lane(
                model, kv, make_runner(model, kv), store,
                make_speculator(name, model, kv),
                max_running=max_running, prefill_chunk=prefill_chunk, step_s=step_s, mean_layers=summed[name],
            )  # fmt: skip
        self._inbox: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._jobs: dict[_Job, None] = {}
        """Those with a controller, in the order in which they came."""
        self._followers: dict[_Job, str] = {}
        """Who is told what comes and goes in the prefix store of which model."""
        self._nudged = False
        self._serials = itertools.count()
        self._cancelled = 0
        self._outbox: dict[Link, list[Event]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._controllers = Controllers(self._lanes, self._readers)

    def start(self) -> None:
        self._thread.start()
        if self._beside is not None:
            self._beside.start()

    def stop(self) -> None:
        """End everything as cancelled, wait for the threads, write what is to be kept. A second call does nothing."""
        if self._beside is not None:
            self._beside.stop()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()
        if self._prefix_tiers is not None:
            self._prefix_tiers.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def connect(self, deliver: Deliver) -> Link:
        return Link(self, deliver)

    def hello(self, pid: int) -> Hello:
        """The greeting of this engine, as process `pid`."""
        version = self._prober.version if self._prober else None
        heads = list(self._prober.heads) if self._prober else []
        readers = {name: "+".join(reader.version for reader in found) for name, found in self._readers.items()}
        return Hello([lane.model.card for lane in self._lanes.values()], version, heads, pid, readers)

    def stats(self) -> EngineStats:
        """A glance from any thread: numbers of one moment may be off by a step."""
        lanes = self._lanes.values()
        stores = [lane.store.stats() for lane in lanes if lane.store is not None]
        jobs = list(self._jobs)
        running = sum(job.begun for job in jobs)
        return EngineStats(
            running=running,
            waiting=len(jobs) - running + len(self._inbox) + (self._beside.waiting if self._beside else 0),
            steps=sum(lane.steps for lane in lanes),
            kv_tokens=sum(sequence.computed for lane in lanes for sequence in list(lane.scheduler.running)),
            kv_bytes=sum(lane.kv.bytes_used for lane in lanes),
            kv_bytes_limit=sum(lane.kv.bytes_limit for lane in lanes),
            computed_tokens=sum(lane.computed_tokens for lane in lanes),
            output_tokens=sum(lane.written_tokens for lane in lanes),
            prefix_bytes=sum(store.bytes_used for store in stores),
            prefix_asked_tokens=sum(store.asked_tokens for store in stores),
            prefix_hit_tokens=sum(store.hit_tokens for store in stores),
            cancelled=self._cancelled,
            preemptions=sum(lane.scheduler.preemptions for lane in lanes),
            drafted_tokens=sum(lane.drafted_tokens for lane in lanes),
            accepted_tokens=sum(lane.accepted_tokens for lane in lanes),
            held_prompts=sum(len(lane.held) for lane in lanes),
            held_found=sum(lane.held.found for lane in lanes),
        )

    def prefix_stats(self) -> dict[str, PrefixStats]:
        """What each model's prefix store has done, likewise; of those that have one."""
        return {name: lane.store.stats() for name, lane in self._lanes.items() if lane.store is not None}

    # ---- everything below runs on the engine's thread, but for _enqueue and _answered -------------------------------

    def _enqueue(self, job: _Job) -> None:
        with self._wake:
            self._inbox.append(job)
            self._wake.notify()

    def _nudge(self) -> None:
        """Something was cancelled: followers are looked at, though nothing is computed."""
        with self._wake:
            self._nudged = True
            self._wake.notify()

    def _run(self) -> None:
        with torch.inference_mode():
            while self._await_work():
                self._take_commands()
                self._leave_followers()
                self._flush()  # probes and refusals do not wait for the step
                for lane in self._lanes.values():
                    self._reap()
                    if lane.scheduler.busy:
                        self._tell(lane.step())
                    self._flush()
                self._fail_the_idle()
            self._take_commands()
            for job in (*self._jobs, *self._followers):
                job.cancelled = True
            self._reap()
            self._leave_followers()
            for lane in self._lanes.values():
                lane.expire(float("inf"))
            self._flush()

    def _await_work(self) -> bool:
        with self._wake:
            while not (self._stopping or self._inbox or self._jobs or self._nudged):
                ends = min((lane.held.next_end for lane in self._lanes.values()), default=float("inf"))
                now = time.perf_counter()
                if ends <= now:
                    break
                self._wake.wait(None if ends == float("inf") else ends - now)
            self._nudged = False
            return not self._stopping

    def _take_commands(self) -> None:
        while self._inbox:
            job = self._inbox.popleft()
            match job.command:
                case Probe(model="") as command:
                    self._guarded(job, self._probe, command)
                case Embed() as command:
                    self._guarded(job, self._embed, command)
                case Prefix(action="lookup" | "unpin" | "evict") as command:
                    self._guarded(job, self._prefix, command)
                case Generate() | Score() | Probe() | Prefix() as command:
                    self._guarded(job, self._begin, command)
                case Follow() as command:
                    self._guarded(job, self._follow, command)
        now = time.perf_counter()
        for lane in self._lanes.values():
            lane.expire(now)

    def _prefix(self, job: _Job, command: Prefix) -> None:
        """What needs no step."""
        store, salt = self._controllers.store(command.model), command.salt.encode()
        if command.messages_json is None and command.action == "evict":
            self._end(job, PrefixResult(command.id, store.evict(salt), 0))
            return
        tools, opened = parse_tools(command.tools_json), command.action == "lookup"
        prompt = self._controllers.prompt(command, tools, command.effort, opened=opened)
        act = {"lookup": store.peek, "unpin": store.unpin, "evict": store.evict}[command.action]
        self._end(job, PrefixResult(command.id, act(salt, prompt), len(prompt)))

    def _follow(self, job: _Job, command: Follow) -> None:
        store = self._controllers.store(command.model)
        events = list(store.inventory())
        for start in range(0, len(events), MAX_EVENTS):
            self._outbox.setdefault(job.link, []).append(PrefixEvents(command.id, events[start : start + MAX_EVENTS]))
        self._followers[job] = command.model
        store.on_event = partial(self._tell_followers, command.model)

    def _tell_followers(self, model: str, event: KVEvent) -> None:
        for job, followed in self._followers.items():
            if followed == model:
                self._outbox.setdefault(job.link, []).append(PrefixEvents(job.command.id, [event]))

    def _leave_followers(self) -> None:
        for job in [job for job in self._followers if job.cancelled]:
            model = self._followers.pop(job)
            store = self._lanes[model].store
            if store is not None and model not in self._followers.values():
                store.on_event = None
            self._end(job, Finished(job.command.id, "cancelled", 0, 0, 0))

    def _begin(self, job: _Job, command: Generate | Score | Probe | Prefix) -> None:
        """Join the line."""
        controller = self._controllers.of(command)
        if command.deadline_s is not None:
            job.deadline = job.since + command.deadline_s
        job.engine = Primitives(
            self._lanes, job, serials=self._serials,
            arrived=job.since, priority=getattr(command, "priority", 0), salt=command.salt.encode(),
        )  # fmt: skip
        job.controller = controller
        self._jobs[job] = None
        controller.begin(job.engine)

    def _probe(self, job: _Job, command: Probe) -> None:
        messages = parse_messages(command.messages_json)
        job.counts = self._controllers.counts(messages, len(command.messages_json))
        if self._beside is not None:
            self._beside.probe(job, messages)
        else:
            cost_us = int((time.perf_counter() - job.since) * 1e6)
            self._end(job, ProbeResult(command.id, {}, job.counts, cost_us))

    def _embed(self, job: _Job, command: Embed) -> None:
        if self._beside is None:
            problem = (
                "this engine has no embedding model; load one, by a policy with a model that `embeds`, or by "
                "`leadline engine --encoder`"
            )
            raise InvalidRequest(problem, "model")
        self._beside.embed(job, command.texts)

    def _answered(self, asker: Asker, answer: Sounding | Vectors | Exception | None) -> None:
        """What the encoder says for a probe or an embed; on its thread, so that no answer waits for a step."""
        assert isinstance(asker, _Job), "only jobs ask"
        id = asker.command.id
        event: Event
        match answer:
            case None:
                event = Finished(id, "cancelled", 0, 0, 0)
            case Exception():
                event = Failed(id, "internal", "the probe failed; the engine's log has the details")
            case bytes(vectors), int(dims), int(tokens):
                event = EmbedResult(id, dims, vectors, tokens)
            case said:
                cost_us = int((time.perf_counter() - asker.since) * 1e6)
                found = dict(said.p_success), asker.counts, cost_us, sorted(said.undecided)
                event = ProbeResult(id, *found, dict(said.out_tokens), dict(said.domain), said.needs_reasoning)
        asker.link._settle(id)
        asker.link.deliver([event])

    def _tell(self, turns: list[Turn]) -> None:
        """Hand each turn to the controller whose sequence it is."""
        for turn in turns:
            job = turn.sequence.owner
            assert isinstance(job, _Job), "the engine opens sequences for jobs only"
            if job.engine is not None and job.engine.owns(turn.sequence):  # an earlier turn may have ended it
                self._guarded(job, self._turn, turn)

    def _turn(self, job: _Job, turn: Turn) -> None:
        assert job.controller is not None, "it has begun"
        assert job.engine is not None
        if turn.error is not None and not turn.sequence.expendable:
            raise turn.error
        if turn.scores is not None:
            job.engine.close(turn.sequence)
        events = job.controller.stepped(turn)
        if job.controller.done:
            self._end(job, *events)
        else:
            self._outbox.setdefault(job.link, []).extend(events)

    def _fail_the_idle(self) -> None:
        """A request of whose sequences none has anything to compute would wait for ever."""
        if not any(lane.scheduler.busy for lane in self._lanes.values()):
            for job in list(self._jobs):
                logger.error("command %d is not over, but has nothing to compute", job.command.id)
                self._fail(job, "internal", "the engine failed on this request; its log has the details")

    def _reap(self) -> None:
        """End what was cancelled, and what has no time left."""
        now = time.perf_counter()
        for job in [job for job in self._jobs if job.cancelled or job.deadline <= now]:
            self._cancelled += job.cancelled
            self._guarded(job, self._cut, "cancelled" if job.cancelled else "deadline")

    def _cut(self, job: _Job, reason: FinishReason) -> None:
        assert job.controller is not None, "it has begun"
        self._end(job, *job.controller.ended(reason))

    def _guarded(self, job: _Job, work: Callable[..., None], *args: object) -> None:
        """Do `work(job, *args)`. Whatever goes wrong in it ends that command, not the engine."""
        try:
            work(job, *args)
        except Refused as refusal:
            self._fail(job, refusal.code, str(refusal))
        except InvalidRequest as error:
            self._fail(job, "invalid_request", str(error), error.param)
        except Exception:
            logger.exception("command %d failed", job.command.id)
            self._fail(job, "internal", "the engine failed on this request; its log has the details")

    def _fail(self, job: _Job, code: FailureCode, message: str, param: str = "messages") -> None:
        self._end(job, Failed(job.command.id, code, message, param))

    def _end(self, job: _Job, *events: Event) -> None:
        """Its last events; nothing of it is left in the engine."""
        self._jobs.pop(job, None)
        if job.engine is not None:
            job.engine.close_all()
        job.link._settle(job.command.id)
        self._outbox.setdefault(job.link, []).extend(events)

    def _flush(self) -> None:
        for link, events in self._outbox.items():
            if events:
                link.deliver(events)
        self._outbox.clear()


def _summed_layers(readers: Sequence[PromptReader]) -> list[int]:
    """Whose states are wanted of all tokens of a prompt."""
    return sorted({layer for reader in readers if reader.over == "prompt" for layer in reader.layers})


def _prefix_store(
    name: str, model: LocalModel, kv: KVCache, tap_layers: Sequence[int], prefix_bytes: int, tiers: SlowTiers | None
) -> PrefixStore:
    weights = weights_fingerprint(model.network) if tiers is not None else "of this process"
    layout = KVLayout.of(kv.shape, tap_layers, int(model.network.config.hidden_size) if tap_layers else 0)
    return PrefixStore(KVIdentity(name, weights, layout), bytes_limit=prefix_bytes, slow=tiers)
