"""From a command to the controller that runs it: what can be checked before work is spent is checked here."""

import logging
from collections.abc import Mapping, Sequence

from local_engine.chat import (
    InvalidRequest,
    Tool,
    check_calls,
    check_tools,
    parse_messages,
    parse_tools,
    prompt_tokens,
)
from local_engine.constrain import check_schemas
from local_engine.errors import ConfigError
from local_engine.generation import Generation
from local_engine.lane import Lane
from local_engine.model import LocalModel
from local_engine.pinning import Pinning
from local_engine.plan_types import Cascade, SpeculateSteps, Vote
from local_engine.prefix import PrefixStore
from local_engine.primitives import Controller
from local_engine.probe_types import PromptReader
from local_engine.reason.plans import shared
from local_engine.reason.samples import Samples
from local_engine.room import MORE_ROOM
from local_engine.sampler import sampling_problem
from local_engine.scoring import Scoring
from local_engine.sounding import PromptSounding
from local_engine.tool_calls import check_functions
from local_engine.types import (
    Effort,
    FailureCode,
    Generate,
    Message,
    Prefix,
    Probe,
    Score,
    TapSpec,
    ThoughtSoFar,
)

MAX_CHOICES = 128
MAX_CANDIDATES = 256
MAX_BYTES_PER_TOKEN = 64
"""Messages with more bytes than this per token of a model's window are not even counted: they cannot fit."""

logger = logging.getLogger(__name__)


class Refused(Exception):
    """A command cannot be run; `code` says why, the message says it to the caller."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Controllers:
    """Makes them for the models of `lanes`. Raises ConfigError for a reader that wants what its model does not have."""

    def __init__(self, lanes: Mapping[str, Lane], readers: Mapping[str, Sequence[PromptReader]]) -> None:
        self._lanes = lanes
        self._readers = readers
        for name, found in readers.items():
            self._check_readers(name, found)

    def of(self, command: Generate | Score | Probe | Prefix) -> Controller:
        """Raises Refused and InvalidRequest. Of probes those with a model, of `Prefix` a pin."""
        match command:
            case Generate():
                return self._generation(command)
            case Score():
                return self._scoring(command)
            case Probe():
                return self._sounding(command)
            case Prefix():
                prompt = self.prompt(command, parse_tools(command.tools_json), command.effort, opened=False)
                self._check_room(command.model, len(prompt) + 1)
                return Pinning(command, prompt, self.store(command.model))

    def _generation(self, command: Generate) -> Controller:
        lane = self.lane(command.model)
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
        if tools:
            check_tools(lane.model.tokenizer)
            check_functions(tools)
        if command.plan is not None and command.thought is not None:
            raise InvalidRequest("plan: the thought has begun already; leave out the plan, or the thought", "plan")
        prompt = self.prompt(command, tools, _effort(command))
        self._check_room(command.model, len(prompt) + 1, command.context)
        if tools:
            check_schemas(tools)
        most = lane.most_tokens if command.context is None else min(lane.most_tokens, command.context)
        if isinstance(command.plan, SpeculateSteps | Cascade):
            return self._shared(command, command.plan, model, prompt, most)
        if isinstance(command.plan, Vote):
            return Samples(command, command.plan, model, prompt, tools, most)
        return Generation(command, model, prompt, tools, most)

    def _shared(
        self, command: Generate, plan: SpeculateSteps | Cascade, model: LocalModel, prompt: list[int], most: int
    ) -> Controller:
        """By two models."""
        draft = self._lanes.get(plan.draft)
        if draft is None:
            raise InvalidRequest(f"plan.draft: no local model {plan.draft!r}; there are {self._names}", "plan")
        draft_prompt = self.prompt(command, None, _effort(command), by=draft)
        return shared(command, plan, (model, draft.model), (prompt, draft_prompt), (most, draft.most_tokens))

    def _scoring(self, command: Score) -> Controller:
        lane = self.lane(command.model)
        if not 1 <= len(command.candidates) <= MAX_CANDIDATES:
            raise InvalidRequest(
                f"candidates must hold 1 to {MAX_CANDIDATES} texts, not {len(command.candidates)}", "candidates"
            )
        prompt = self.prompt(command, parse_tools(command.tools_json), "none")
        candidates = [_plain_tokens(lane.model, text) for text in command.candidates]
        self._check_room(command.model, len(prompt) + 1)
        room = lane.most_tokens - len(prompt)
        for at, tokens in enumerate(candidates):
            if not tokens:
                raise InvalidRequest(f"candidates[{at}] has no tokens: there is nothing to score", "candidates")
            if len(tokens) > room:
                raise InvalidRequest(
                    f"candidates[{at}] has {len(tokens)} tokens, and after the prompt's {len(prompt)} there is room for"
                    f" {room} in {command.model}; shorten it",
                    "candidates",
                )
        return Scoring(command, prompt, candidates)

    def _sounding(self, command: Probe) -> Controller:
        lane = self.lane(command.model)
        readers = self._readers.get(command.model)
        if not readers:
            raise InvalidRequest(f"no probe reads the prompts of {command.model!r}; name one in the policy", "model")
        prompt = self.prompt(command, parse_tools(command.tools_json), command.effort)
        self._check_room(command.model, len(prompt) + 1)
        return PromptSounding(command, prompt, lane.model, lane, readers)

    def store(self, name: str) -> PrefixStore:
        """Raises Refused, and InvalidRequest where the model has none."""
        store = self.lane(name).store
        if store is None:
            raise InvalidRequest("model: this engine stores no prefixes; start it with prefix_bytes above 0", "model")
        return store

    def lane(self, name: str) -> Lane:
        """Raises Refused where there is no such model."""
        lane = self._lanes.get(name)
        if lane is None:
            raise Refused("model_not_found", f"no local model {name!r}; there are {self._names}")
        return lane

    def prompt(
        self,
        command: Generate | Score | Probe | Prefix,
        tools: list[Tool] | None,
        effort: Effort,
        *,
        opened: bool = True,
        by: Lane | None = None,
    ) -> list[int]:
        """The tokens that a command's model, or that of another lane, reads. `opened`: the answer's turn has begun.

        Raises Refused and InvalidRequest.
        """
        lane = by or self.lane(command.model)
        if command.messages_json is None:
            raise InvalidRequest("messages is missing: send the conversation that is meant")
        messages = parse_messages(command.messages_json)
        if not isinstance(command, Probe):  # it may be about a conversation of another model
            check_calls(messages)
        window = lane.model.card.context_window
        if len(command.messages_json) > window * MAX_BYTES_PER_TOKEN:
            reason = f"{len(command.messages_json)} bytes of messages cannot fit the {window} tokens of {command.model}"
            raise Refused("context_length_exceeded", reason)
        prompt = prompt_tokens(lane.model.tokenizer, messages, tools, effort, opened=opened)
        if isinstance(command, Generate) and command.thought is not None:
            prompt = _with_thought(lane.model, prompt, command.thought)
        prefix = "" if isinstance(command, Probe | Prefix) else command.prefix
        return prompt + _plain_tokens(lane.model, prefix) if prefix else prompt

    def _check_room(self, name: str, tokens: int, context: int | None = None) -> None:
        """Refuse at once what could never be computed, or may not be in this `context`."""
        lane = self.lane(name)
        window = lane.model.card.context_window
        if context is not None:
            window = min(window, context)
        if tokens > window:
            reason = f"the prompt has {tokens - 1} tokens, and {name} has a context window of {window}"
            raise Refused("context_length_exceeded", reason)
        if tokens > lane.most_tokens:
            reason = (
                f"the prompt has {tokens - 1} tokens, and the KV budget of {name} ({lane.kv.bytes_limit} bytes) holds"
                f" {lane.most_tokens}: {MORE_ROOM}"
            )
            raise Refused("context_length_exceeded", reason)

    def counts(self, messages: list[Message], size: int) -> dict[str, int]:
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

    @property
    def _names(self) -> str:
        return ", ".join(sorted(self._lanes))

    def _check_readers(self, name: str, readers: Sequence[PromptReader]) -> None:
        """Raises ConfigError where one wants what the model does not have."""
        if name not in self._lanes:
            raise ConfigError("readers", f"a probe reads the prompts of {name!r}, and there are {self._names} here")
        most = int(self._lanes[name].model.network.config.num_hidden_layers)
        for reader in readers:
            if not all(0 <= layer <= most for layer in reader.layers):
                raise ConfigError(
                    "readers", f"probe {reader.version} wants layers {list(reader.layers)}; {name} has 0 to {most}"
                )


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
