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
from local_engine.chat import InvalidRequest, Tool, parse_messages, parse_tools, prompt_tokens
from local_engine.errors import ConfigError
from local_engine.generation import Generation
from local_engine.kv import KVCache
from local_engine.lane import Lane, Runs, Turn
from local_engine.model import LocalModel
from local_engine.pinning import Pinning
from local_engine.plan_types import Cascade, SpeculateSteps, Vote
from local_engine.prefix import PrefixStore
from local_engine.prefix_identity import KVIdentity, KVLayout, weights_fingerprint
from local_engine.prefix_tiers import SlowTiers
from local_engine.prefix_types import KVEvent, PrefixStats
from local_engine.primitives import Controller, Primitives
from local_engine.probe_types import Prober, PromptReader, Sounding
from local_engine.reason.plans import shared
from local_engine.reason.samples import Samples
from local_engine.runner import Runner, new_kv
from local_engine.sampler import sampling_problem
from local_engine.scoring import Scoring
from local_engine.sounding import PromptSounding
from local_engine.spec.build import MakeSpeculator, without_speculation
from local_engine.types import (
    Cancel,
    Command,
    Effort,
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
    Message,
    Prefix,
    PrefixEvents,
    PrefixResult,
    Probe,
    ProbeResult,
    Score,
    Stats,
    StatsResult,
    TapSpec,
    ThoughtSoFar,
)

MAX_CHOICES = 128
MAX_CANDIDATES = 256
MAX_EVENTS = 10_000
"""Of one message about stored prefixes."""
MAX_BYTES_PER_TOKEN = 64
"""Messages with more bytes than this per token of a model's window are not even counted: they cannot fit."""

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
        # Before any runner takes weights over, be it that of another model's draft: a store's identity holds them all.
        stores = {
            name: _prefix_store(name, model, caches[name], prefix_bytes, prefix_tiers) if prefix_bytes else None
            for name, model in models.items()
        }
        for name, model in models.items():
            kv, store = caches[name], stores[name]
            self._lanes[name] = Lane(
                model, kv, make_runner(model, kv), store,
                make_speculator(name, model, kv),
                max_running=max_running, prefill_chunk=prefill_chunk, step_s=step_s,
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
        for name, found in self._readers.items():
            self._check_readers(name, found)

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
                case Generate() as command:
                    self._guarded(job, self._prepare_generate, command)
                case Score() as command:
                    self._guarded(job, self._prepare_score, command)
                case Probe() as command:
                    self._guarded(job, self._prepare_sounding if command.model else self._prepare_probe, command)
                case Embed() as command:
                    self._guarded(job, self._prepare_embed, command)
                case Prefix() as command:
                    self._guarded(job, self._prepare_prefix, command)
                case Follow() as command:
                    self._guarded(job, self._follow, command)
        now = time.perf_counter()
        for lane in self._lanes.values():
            lane.expire(now)

    def _prepare_generate(self, job: _Job, command: Generate) -> None:
        """Check everything that can be checked before work is spent, and join the line."""
        lane = self._lane(command.model)
        model = lane.model
        sizes = model.network.config
        problem = sampling_problem(command.sampling, sizes.vocab_size) or _tap_problem(
            command.taps, sizes.num_hidden_layers, sizes.vocab_size
        )
        if problem is not None:
            raise InvalidRequest(problem, problem.split()[0])
        if not 1 <= command.n <= MAX_CHOICES:
            raise InvalidRequest(f"n must be from 1 to {MAX_CHOICES}, not {command.n}", "n")
        tools = parse_tools(command.tools_json) if command.tool_choice != "none" else None
        if command.plan is not None and command.thought is not None:
            raise InvalidRequest("plan: the thought has begun already; leave out the plan, or the thought", "plan")
        prompt = self._prompt(lane, command, tools, _effort(command))
        self._check_room(lane, command.model, len(prompt) + 1)
        if isinstance(command.plan, SpeculateSteps | Cascade):
            controller = self._shared(command, command.plan, lane, prompt)
        elif isinstance(command.plan, Vote):
            controller = Samples(command, command.plan, model, prompt, tools, lane.most_tokens)
        else:
            controller = Generation(command, model, prompt, tools, lane.most_tokens)
        self._begin(job, command, controller)

    def _shared(self, command: Generate, plan: SpeculateSteps | Cascade, lane: Lane, prompt: list[int]) -> Controller:
        """By two models."""
        draft = self._lanes.get(plan.draft)
        if draft is None:
            raise InvalidRequest(f"plan.draft: no local model {plan.draft!r}; there are {self._names()}", "plan")
        draft_prompt = self._prompt(draft, command, None, _effort(command))
        models, rooms = (lane.model, draft.model), (lane.most_tokens, draft.most_tokens)
        return shared(command, plan, models, (prompt, draft_prompt), rooms)

    def _prepare_score(self, job: _Job, command: Score) -> None:
        lane = self._lane(command.model)
        if not 1 <= len(command.candidates) <= MAX_CANDIDATES:
            raise InvalidRequest(
                f"candidates must hold 1 to {MAX_CANDIDATES} texts, not {len(command.candidates)}", "candidates"
            )
        prompt = self._prompt(lane, command, parse_tools(command.tools_json), "none")
        candidates = [_plain_tokens(lane.model, text) for text in command.candidates]
        for at, tokens in enumerate(candidates):
            if not tokens:
                raise InvalidRequest(f"candidates[{at}] has no tokens: there is nothing to score", "candidates")
        self._check_room(lane, command.model, len(prompt) + max(map(len, candidates)))
        self._begin(job, command, Scoring(command, prompt, candidates))

    def _prepare_prefix(self, job: _Job, command: Prefix) -> None:
        lane, salt = self._lane(command.model), command.salt.encode()
        store = _store_of(lane)
        if command.messages_json is None:
            if command.action != "evict":
                raise InvalidRequest(f"messages is missing: say what to {command.action}")
            self._end(job, PrefixResult(command.id, store.evict(salt), 0))
            return
        tools = parse_tools(command.tools_json)
        prompt = self._prompt(lane, command, tools, command.effort, opened=command.action == "lookup")
        if command.action == "pin":
            self._check_room(lane, command.model, len(prompt) + 1)
            self._begin(job, command, Pinning(command, prompt, store))
            return
        act = {"lookup": store.peek, "unpin": store.unpin, "evict": store.evict}[command.action]
        self._end(job, PrefixResult(command.id, act(salt, prompt), len(prompt)))

    def _follow(self, job: _Job, command: Follow) -> None:
        store = _store_of(self._lane(command.model))
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

    def _lane(self, name: str) -> Lane:
        lane = self._lanes.get(name)
        if lane is None:
            raise _Refused("model_not_found", f"no local model {name!r}; there are {self._names()}")
        return lane

    def _prompt(
        self,
        lane: Lane,
        command: Generate | Score | Probe | Prefix,
        tools: list[Tool] | None,
        effort: Effort,
        *,
        opened: bool = True,
    ) -> list[int]:
        assert command.messages_json is not None, "only `Prefix` may go without, and is asked before"
        messages = parse_messages(command.messages_json)
        window = lane.model.card.context_window
        if len(command.messages_json) > window * MAX_BYTES_PER_TOKEN:
            reason = f"{len(command.messages_json)} bytes of messages cannot fit the {window} tokens of {command.model}"
            raise _Refused("context_length_exceeded", reason)
        prompt = prompt_tokens(lane.model.tokenizer, messages, tools, effort, opened=opened)
        if isinstance(command, Generate) and command.thought is not None:
            prompt = _with_thought(lane.model, prompt, command.thought)
        prefix = "" if isinstance(command, Probe | Prefix) else command.prefix
        return prompt + _plain_tokens(lane.model, prefix) if prefix else prompt

    def _check_room(self, lane: Lane, name: str, tokens: int) -> None:
        """Refuse at once what could never be computed."""
        window = lane.model.card.context_window
        if tokens > window:
            reason = f"the prompt has {tokens - 1} tokens, and {name} has a context window of {window}"
            raise _Refused("context_length_exceeded", reason)
        if tokens > lane.most_tokens:
            reason = (
                f"the prompt has {tokens - 1} tokens, and the KV budget of {name} ({lane.kv.bytes_limit} bytes) holds"
                f" {lane.most_tokens}: raise kv_bytes"
            )
            raise _Refused("context_length_exceeded", reason)

    def _begin(self, job: _Job, command: Generate | Score | Probe | Prefix, controller: Controller) -> None:
        if command.deadline_s is not None:
            job.deadline = job.since + command.deadline_s
        job.engine = Primitives(
            self._lanes, job, serials=self._serials,
            arrived=job.since, priority=getattr(command, "priority", 0), salt=command.salt.encode(),
        )  # fmt: skip
        job.controller = controller
        self._jobs[job] = None
        controller.begin(job.engine)

    def _check_readers(self, name: str, readers: Sequence[PromptReader]) -> None:
        """Raises ConfigError where one wants what the model does not have."""
        if name not in self._lanes:
            raise ConfigError("readers", f"a probe reads the prompts of {name!r}, and there are {self._names()} here")
        most = int(self._lanes[name].model.network.config.num_hidden_layers)
        for reader in readers:
            if not all(0 <= layer <= most for layer in reader.layers):
                raise ConfigError(
                    "readers", f"probe {reader.version} wants layers {list(reader.layers)}; {name} has 0 to {most}"
                )

    def _prepare_sounding(self, job: _Job, command: Probe) -> None:
        lane = self._lane(command.model)
        readers = self._readers.get(command.model)
        if not readers:
            raise InvalidRequest(f"no probe reads the prompts of {command.model!r}; name one in the policy", "model")
        prompt = self._prompt(lane, command, parse_tools(command.tools_json), command.effort)
        self._check_room(lane, command.model, len(prompt) + 1)
        self._begin(job, command, PromptSounding(command, prompt, lane.model, lane, readers))

    def _prepare_probe(self, job: _Job, command: Probe) -> None:
        messages = parse_messages(command.messages_json)
        job.counts = self._counts(messages, len(command.messages_json))
        if self._beside is not None:
            self._beside.probe(job, messages)
        else:
            cost_us = int((time.perf_counter() - job.since) * 1e6)
            self._end(job, ProbeResult(command.id, {}, job.counts, cost_us))

    def _prepare_embed(self, job: _Job, command: Embed) -> None:
        if self._beside is None:
            problem = "this engine has no embedding model; load one, by a policy with a model that `embeds`"
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

    def _counts(self, messages: list[Message], size: int) -> dict[str, int]:
        """Exact prompt tokens per model for messages of `size` bytes.

        Left out are models whose template refuses these messages, and those that they cannot possibly fit: counting
        would hold up everybody else for nothing.
        """
        counts: dict[str, int] = {}
        for name, lane in self._lanes.items():
            model = lane.model
            if size > model.card.context_window * MAX_BYTES_PER_TOKEN:
                continue
            try:
                counts[name] = len(prompt_tokens(model.tokenizer, messages))
            except InvalidRequest:
                logger.debug("no token count for %s: its template refuses the messages", name)
        return counts

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
        except _Refused as refusal:
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

    def _names(self) -> str:
        return ", ".join(sorted(self._lanes))


class _Refused(Exception):
    """A command cannot be run; `code` says why, the message says it to the caller."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def _store_of(lane: Lane) -> PrefixStore:
    if lane.store is None:
        raise InvalidRequest("model: this engine stores no prefixes; start it with prefix_bytes above 0", "model")
    return lane.store


def _prefix_store(name: str, model: LocalModel, kv: KVCache, prefix_bytes: int, tiers: SlowTiers | None) -> PrefixStore:
    weights = weights_fingerprint(model.network) if tiers is not None else "of this process"
    return PrefixStore(KVIdentity(name, weights, KVLayout.of(kv.shape)), bytes_limit=prefix_bytes, slow=tiers)


def _effort(command: Generate) -> Effort:
    """What the prompt says of thinking: nothing is thought before words of the answer, unless the thought is given."""
    if command.thought is None:
        return "none" if command.prefix else command.sampling.effort
    return "low" if command.sampling.effort == "none" else command.sampling.effort


def _with_thought(model: LocalModel, prompt: list[int], thought: ThoughtSoFar) -> list[int]:
    """The prompt, and the thought after it in the model's own markers."""
    if model.think_token is None or model.end_think_token is None:
        raise InvalidRequest(f"thought: {model.card.name} has no thinking tags; leave it out", "thought")
    opened = prompt if model.think_token in prompt[-2:] else [*prompt, model.think_token]
    begin = "\n" if opened[-1] == model.think_token else ""
    if not thought.over:
        return opened + _plain_tokens(model, begin + thought.text)
    text = begin + thought.text
    line = "" if text.endswith("\n") else "\n"
    closing = [model.end_think_token, *_plain_tokens(model, "\n\n")]
    return opened + _plain_tokens(model, text + line) + closing


def _plain_tokens(model: LocalModel, text: str) -> list[int]:
    """The tokens of a piece of text; control tokens written in it are read as plain text."""
    tokens: list[int] = model.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return tokens


def _tap_problem(taps: TapSpec | None, layers: int, vocabulary: int) -> str | None:
    if taps is None:
        return None
    if not taps.layers or not all(0 <= layer <= layers for layer in taps.layers):
        return f"taps.layers must name layers from 0 (the embeddings) to {layers}, not {list(taps.layers)}"
    if len(set(taps.layers)) < len(taps.layers):
        return f"taps.layers names a layer twice: {list(taps.layers)}; name each once"
    if taps.where == "tokens" and not taps.tokens:
        return "taps.tokens is empty: name the token ids whose hidden states are wanted"
    if strange := [token for token in taps.tokens if not 0 <= token < vocabulary]:
        return f"taps.tokens names token {strange[0]}, and the model has tokens 0 to {vocabulary - 1}"
    return None
