"""The engine: one thread that owns the models and turns commands into events, a step at a time.

A step gives one token to every decoding sequence and one chunk to one sequence still reading its prompt (they take
turns), so a long prompt delays decoding by one chunk and no more. Cancels are looked at before every forward pass;
probes and embeds are served, all waiting ones at once, between steps.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from local_engine.chat import InvalidRequest, parse_messages, parse_tools, prompt_tokens
from local_engine.model import LocalModel
from local_engine.sampler import sampling_problem
from local_engine.sequence import Sequence
from local_engine.types import (
    Cancel,
    Command,
    Embed,
    EmbedResult,
    Event,
    Failed,
    FailureCode,
    Finished,
    Generate,
    Hello,
    Message,
    Probe,
    Prober,
    ProbeResult,
)

MAX_BYTES_PER_TOKEN = 64
"""Messages with more bytes than this per token of a model's window are not even counted: they cannot fit."""

logger = logging.getLogger(__name__)

Deliver = Callable[[list[Event]], None]
"""Takes the events of one step for one connection. Called on the engine's thread: hand over and return."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    running: int
    waiting: int
    steps: int
    """Steps that ran at least one forward pass, since the start."""
    kv_tokens: int
    """Tokens held in the caches of running sequences."""


@dataclass(slots=True, eq=False)
class _Job:
    """A command on its way, and the sequence it became."""

    link: "Link"
    command: Generate | Probe | Embed
    cancelled: bool = False
    since: float = field(default_factory=time.perf_counter)
    sequence: Sequence | None = None
    input_tokens: int = 0


class Link:
    """One client of the engine. `submit` and `close` may be called from any thread, and return at once."""

    def __init__(self, engine: "Engine", deliver: Deliver) -> None:
        self._engine = engine
        self._live: dict[int, _Job] = {}
        self.deliver = deliver

    def submit(self, command: Command) -> None:
        """Start a command, or cancel one; its events arrive at `deliver`."""
        if isinstance(command, Cancel):
            job = self._live.get(command.id)
            if job is not None:
                job.cancelled = True
            return
        job = self._live[command.id] = _Job(self, command)
        self._engine._enqueue(job)

    def close(self) -> None:
        """Cancel everything; nothing is delivered any more."""
        self.deliver = _ignore
        for job in list(self._live.values()):
            job.cancelled = True

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
        max_running: int = 8,
        prefill_chunk: int = 256,
    ) -> None:
        self._models = dict(models)
        self._prober = prober
        self._max_running = max_running
        self._prefill_chunk = prefill_chunk
        self._inbox: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._waiting: deque[_Job] = deque()
        self._running: deque[_Job] = deque()
        self._outbox: dict[Link, list[Event]] = {}
        self._steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End everything as cancelled and wait for the thread. A second call does nothing."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def connect(self, deliver: Deliver) -> Link:
        return Link(self, deliver)

    def hello(self, pid: int) -> Hello:
        """The greeting of this engine, as process `pid`."""
        version = self._prober.version if self._prober else None
        heads = list(self._prober.heads) if self._prober else []
        return Hello([model.card for model in self._models.values()], version, heads, pid)

    def stats(self) -> EngineStats:
        running = [job.sequence for job in tuple(self._running) if job.sequence is not None]
        waiting = len(self._waiting) + len(self._inbox)
        return EngineStats(len(running), waiting, self._steps, sum(sequence.kv_tokens for sequence in running))

    # ---- everything below runs on the engine's thread, but for _enqueue ---------------------------------------------

    def _enqueue(self, job: _Job) -> None:
        with self._wake:
            self._inbox.append(job)
            self._wake.notify()

    def _run(self) -> None:
        with torch.inference_mode():
            while self._await_work():
                self._take_commands()
                self._flush()  # probes and refusals do not wait for the step
                self._step()
                self._flush()
        self._take_commands()
        for job in (*self._running, *self._waiting):
            job.cancelled = True
        self._step()
        self._flush()

    def _await_work(self) -> bool:
        with self._wake:
            while not (self._stopping or self._inbox or self._waiting or self._running):
                self._wake.wait()
            return not self._stopping

    def _take_commands(self) -> None:
        probes: list[tuple[_Job, Probe]] = []
        embeds: list[tuple[_Job, Embed]] = []
        while self._inbox:
            job = self._inbox.popleft()
            match job.command:
                case Generate() as command:
                    self._guarded(job, self._prepare, command)
                case Probe() as command:
                    probes.append((job, command))
                case Embed() as command:
                    embeds.append((job, command))
        if probes:
            self._serve_probes(probes)
        if embeds:
            self._serve_embeds(embeds)

    def _prepare(self, job: _Job, command: Generate) -> None:
        """Check everything that can be checked before work is spent, and join the line."""
        model = self._models.get(command.model)
        if model is None:
            return self._fail(job, "model_not_found", f"no local model {command.model!r}; there are {self._names()}")
        problem = sampling_problem(command.sampling, model.network.config.vocab_size)
        if problem is not None:
            return self._fail(job, "invalid_request", problem)
        messages, tools = parse_messages(command.messages_json), parse_tools(command.tools_json)
        window = model.card.context_window
        if len(command.messages_json) > window * MAX_BYTES_PER_TOKEN:
            reason = f"{len(command.messages_json)} bytes of messages cannot fit the {window} tokens of {command.model}"
            return self._fail(job, "context_length_exceeded", reason)
        prompt = prompt_tokens(model.tokenizer, messages, tools, "none" if command.prefix else command.sampling.effort)
        if command.prefix:
            prompt += model.tokenizer.encode(command.prefix, add_special_tokens=False, split_special_tokens=True)
        if len(prompt) >= window:
            reason = f"the prompt has {len(prompt)} tokens, and {command.model} has a context window of {window}"
            return self._fail(job, "context_length_exceeded", reason)
        job.input_tokens = len(prompt)
        job.sequence = Sequence(command.id, model, prompt, command.sampling)
        self._waiting.append(job)

    def _serve_probes(self, jobs: list[tuple[_Job, Probe]]) -> None:
        asked: list[tuple[_Job, list[Message], int]] = []
        for job, command in jobs:
            self._guarded(job, self._hear_probe, command, asked)
        conversations = [messages for _, messages, _ in asked]
        try:
            verdicts = self._prober.probe(conversations) if self._prober and asked else [{} for _ in asked]
            answers = [
                (job, verdict, self._counts(messages, size))
                for (job, messages, size), verdict in zip(asked, verdicts, strict=True)
            ]
        except Exception:
            logger.exception("the probe failed on a batch of %d", len(asked))
            for job, _, _ in asked:
                self._fail(job, "internal", "the probe failed; the engine's log has the details")
            return
        for job, p_success, counts in answers:
            cost_us = int((time.perf_counter() - job.since) * 1e6)
            self._end(job, ProbeResult(job.command.id, p_success, counts, cost_us))

    def _hear_probe(self, job: _Job, command: Probe, asked: list[tuple[_Job, list[Message], int]]) -> None:
        if job.cancelled:
            return self._finish_cancelled(job)
        asked.append((job, parse_messages(command.messages_json), len(command.messages_json)))

    def _counts(self, messages: list[Message], size: int) -> dict[str, int]:
        """Exact prompt tokens per model for messages of `size` bytes.

        Left out are models whose template refuses these messages, and those that they cannot possibly fit: counting
        would hold up everybody else for nothing.
        """
        counts: dict[str, int] = {}
        for name, model in self._models.items():
            if size > model.card.context_window * MAX_BYTES_PER_TOKEN:
                continue
            try:
                counts[name] = len(prompt_tokens(model.tokenizer, messages))
            except InvalidRequest:
                logger.debug("no token count for %s: its template refuses the messages", name)
        return counts

    def _serve_embeds(self, jobs: list[tuple[_Job, Embed]]) -> None:
        for job, command in jobs:
            self._guarded(job, self._embed, command.texts)

    def _embed(self, job: _Job, texts: list[str]) -> None:
        if job.cancelled:
            return self._finish_cancelled(job)
        if self._prober is None:
            return self._fail(job, "invalid_request", "this engine has no embedding model")
        vectors, dims, tokens = self._prober.embed(texts)
        self._end(job, EmbedResult(job.command.id, dims, vectors, tokens))

    def _step(self) -> None:
        """One forward pass for every decoding sequence, one chunk for the prefilling sequence whose turn it is."""
        self._reap_waiting()
        while self._waiting and len(self._running) < self._max_running:
            self._running.append(self._waiting.popleft())
        chunk_given = False
        passes = 0
        for job in tuple(self._running):
            sequence = job.sequence
            assert sequence is not None, "only prepared jobs are queued"
            if job.cancelled:
                self._running.remove(job)
                self._guarded(job, self._finish_cancelled)
            elif not sequence.in_prefill:
                passes += 1
                self._guarded(job, self._advance)
            elif not chunk_given:
                chunk_given = True
                passes += 1
                self._running.remove(job)  # to the back: the next prompt gets the next chunk
                self._running.append(job)
                self._guarded(job, self._advance)
        self._steps += passes > 0

    def _reap_waiting(self) -> None:
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            self._guarded(job, self._finish_cancelled)

    def _advance(self, job: _Job) -> None:
        assert job.sequence is not None
        events = job.sequence.advance(self._prefill_chunk)
        self._outbox.setdefault(job.link, []).extend(events)
        if events and isinstance(events[-1], Finished):
            self._running.remove(job)
            job.link._settle(job.command.id)

    def _finish_cancelled(self, job: _Job) -> None:
        events: list[Event] = [Finished(job.command.id, "cancelled", job.input_tokens, 0, 0)]
        if job.sequence is not None:
            events = [*job.sequence.end("cancelled")]
        self._end(job, *events)

    def _guarded(self, job: _Job, work: Callable[..., None], *args: object) -> None:
        """Do `work(job, *args)`. Whatever goes wrong in it ends that command, not the engine."""
        try:
            work(job, *args)
        except InvalidRequest as error:
            self._fail(job, "invalid_request", str(error))
        except Exception:
            logger.exception("command %d failed", job.command.id)
            if job in self._running:
                self._running.remove(job)
            self._fail(job, "internal", "the engine failed on this request; its log has the details")

    def _fail(self, job: _Job, code: FailureCode, message: str) -> None:
        self._end(job, Failed(job.command.id, code, message))

    def _end(self, job: _Job, *events: Event) -> None:
        job.link._settle(job.command.id)
        self._outbox.setdefault(job.link, []).extend(events)

    def _flush(self) -> None:
        for link, events in self._outbox.items():
            if events:
                link.deliver(events)
        self._outbox.clear()

    def _names(self) -> str:
        return ", ".join(sorted(self._models))
