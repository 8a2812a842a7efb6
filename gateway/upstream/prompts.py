"""The prompts that a vLLM makes of conversations: asked for, so that a thought in one can go on as raw text.

Behind a proxy these paths may be closed, or nobody may answer there: the thought goes out as a chat then, and the
server is not asked again for a while.
"""

import time

import msgspec

from gateway.telemetry.logs import get_logger
from gateway.upstream import raw_thought
from gateway.upstream.connection import Timeouts
from gateway.upstream.http import HttpClient, RequestHead
from gateway.upstream.http_errors import ConnectError, ExchangeTimeout, HttpError
from gateway.upstream.refusals import body_of, refusal
from gateway.upstream.types import ChatCall, Target, UpstreamError

WITHIN_S = 5.0
"""So long a server may take to tell what it is asked for one call; half of what its first byte may take, if less."""
UNTOLD_FOR_S = 60.0
_NOT_SERVED = (401, 403, 404, 405)
_MAX_BYTES = 64 << 20

log = get_logger(__name__)


class _UntoldError(Exception):
    """The prompt is not to be had; `lasting`: nor will the next one be."""

    def __init__(self, why: str, *, lasting: bool) -> None:
        super().__init__(why)
        self.lasting = lasting


class Prompts:
    """Those of one server at `root`, the URL that its paths begin with."""

    def __init__(self, client: HttpClient, provider: str, root: str, headers: list[tuple[str, str]]) -> None:
        self._client = client
        self._provider = provider
        self._tokenize, self._detokenize = (
            RequestHead("POST", root + path, headers) for path in ("/tokenize", "/detokenize")
        )
        self._not_until: dict[str, float] = {}
        """When it is asked for those of a model again."""

    async def as_text(self, target: Target, call: ChatCall) -> ChatCall | None:
        """A call with a thought as a text completion; None: it goes out as a chat.

        Raises UpstreamError, of which nothing is billed, for a server that is away, busy or fails.
        """
        if call.thought is None or target.prefix != "vllm" or not raw_thought.has_text(call):
            return None
        model, now = target.wire_model, time.monotonic()
        if now < self._not_until.get(model, now):
            return None
        until = now + min(WITHIN_S, target.first_byte_timeout_s / 2, target.timeout_s / 2)
        try:
            if not (prompt := await self._prompt(target, call, until)):
                return None
            prompt = raw_thought.with_thought(prompt, call.thought, call.prefix)
            if (most := raw_thought.limit(call.fields)) is None:
                told = await self._asked(self._tokenize, raw_thought.text_body(model, prompt), target, until)
                most = msgspec.Raw(b"%d" % raw_thought.read_room(told))
        except _UntoldError as error:
            if error.lasting:
                self._not_until[model] = time.monotonic() + UNTOLD_FOR_S
                log.warning("upstream.prompt_untold", provider=self._provider, model=model, why=str(error))
            return None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        fields = raw_thought.completion(call.fields, prompt, most)
        return msgspec.structs.replace(call, endpoint="completions", fields=fields, prefix="", thought=None)

    async def _prompt(self, target: Target, call: ChatCall, until: float) -> str:
        """What the server makes of the conversation; empty where its text has other tokens, as some tokenizers read no
        special ones in a text."""
        model, asked = target.wire_model, raw_thought.conversation_body(call, target.wire_model)
        key = (self._provider, asked)
        if (prompt := call.rendered.get(key)) is None:
            tokens = raw_thought.read_tokens(await self._asked(self._tokenize, asked, target, until))
            text = await self._asked(self._detokenize, raw_thought.tokens_body(model, tokens), target, until)
            prompt = raw_thought.read_text(text)
            again = await self._asked(self._tokenize, raw_thought.text_body(model, prompt), target, until)
            call.rendered[key] = prompt = prompt if raw_thought.read_tokens(again) == tokens else ""
        return prompt

    async def _asked(self, head: RequestHead, body: bytes, target: Target, until: float) -> bytes:
        """What a path of the server's own answers. Raises _UntoldError, UpstreamError."""
        left_s = max(0.0, until - time.monotonic())
        try:
            response = await self._client.request(
                head, body, Timeouts(target.connect_timeout_s, left_s, left_s, left_s)
            )
            try:
                if response.status == 200:
                    return await response.read(_MAX_BYTES)
                said = await body_of(response)
            finally:
                response.release()
        except ConnectError as error:
            raise UpstreamError("connect", f"{self._provider} cannot be reached: {error}") from error
        except ExchangeTimeout as error:
            raise _UntoldError("it took too long", lasting=True) from error
        except HttpError as error:
            raise UpstreamError("cut", f"{self._provider} did not tell its prompt: {error}") from error
        if response.status == 429 or response.status >= 500:
            raise refusal(self._provider, response, said)
        raise _UntoldError(f"it answered {response.status}", lasting=response.status in _NOT_SERVED)
