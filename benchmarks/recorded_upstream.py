"""A provider that replays recorded answers: GPT-4-1106 and Mixtral-8x7B on GSM8K, as RouteLLM recorded them.

    python benchmarks/recorded_upstream.py DATA_FOLDER TRUTH.jsonl

It speaks OpenAI's chat completions, plain and streamed, answers 404 to what was not recorded, and keeps its own books:
nothing of the gateway's code is imported here, so that two independent counts can be compared. Answers come as fast as
they can be sent; no provider's latency is imitated.
"""

import argparse
import asyncio
import json
import re
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, TextIO

from aiohttp import web

WEAK = "mixtral-8x7b"
STRONG = "gpt-4-1106-preview"
RECORDINGS = "routellm_gsm8k.parquet"
CHUNK_PIECES = 8
"""Word pieces in one streamed chunk."""
MESSAGE_TOKENS = 4
"""What a message costs beside its text, as chat templates do."""

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class DollarPrice:
    """Dollars per million tokens."""

    prompt: Decimal
    completion: Decimal


PRICES = {
    # together.ai's price of Mixtral-8x7B-Instruct-v0.1, from `zeroeval_prices.csv` (LiteLLM's table)
    WEAK: DollarPrice(Decimal("0.60"), Decimal("0.60")),
    # OpenAI's list price of gpt-4-1106-preview in 2024
    STRONG: DollarPrice(Decimal("10"), Decimal("30")),
}


def count_tokens(text: str) -> int:
    """Word pieces: a run of letters and digits counts one for each four characters begun, any other mark one.

    A stand-in for the providers' tokenizers, which are not public (or not here); close to them on English prose.
    """
    return sum(-(-len(piece) // 4) for piece in _WORD.findall(text))


def prompt_tokens(messages: Iterable[Mapping[str, Any]]) -> int:
    return sum(MESSAGE_TOKENS + count_tokens(str(message["content"])) for message in messages)


def bill_nanousd(price: DollarPrice, prompt: int, completion: int) -> int:
    """The money oracle: one call in nano-dollars, exact in decimal dollars, rounded half up once."""
    dollars = (price.prompt * prompt + price.completion * completion) / Decimal(1_000_000)
    return int((dollars * 10**9).quantize(Decimal(1), rounding=ROUND_HALF_UP))


class RecordedUpstream:
    """The server. `answers` maps (model, question) to the recorded text; each call leaves one line in `truth`."""

    def __init__(self, answers: Mapping[tuple[str, str], str], truth: TextIO) -> None:
        self._answers = answers
        self._truth = truth
        self._served = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=16 << 20)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        call = await request.json()
        self._served += 1
        completion_id = f"chatcmpl-recorded-{self._served}"
        question, model = str(call["messages"][-1]["content"]), call["model"]
        answer = self._answers.get((model, question))
        streamed = bool(call.get("stream"))
        if answer is None:
            self._write(completion_id, model, 404, streamed)
            return _not_recorded(model, question)
        prompt, completion = prompt_tokens(call["messages"]), count_tokens(answer)
        nanousd = bill_nanousd(PRICES[model], prompt, completion)
        self._write(completion_id, model, 200, streamed, prompt, completion, nanousd)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        frame = {"id": completion_id, "created": 0, "model": model}
        if streamed:
            wants_usage = bool((call.get("stream_options") or {}).get("include_usage"))
            return await _stream(request, frame, answer, usage if wants_usage else None)
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response({**frame, "object": "chat.completion", "choices": [choice], "usage": usage})

    def _write(
        self,
        completion_id: str,
        model: str,
        status: int,
        streamed: bool,
        prompt: int = 0,
        completion: int = 0,
        nanousd: int = 0,
    ) -> None:
        """One line of truth, on disk before the answer is complete."""
        line = {
            "id": completion_id,
            "model": model,
            "status": status,
            "streamed": streamed,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "nanousd": nanousd,
        }
        self._truth.write(json.dumps(line) + "\n")
        self._truth.flush()


def _not_recorded(model: str, question: str) -> web.Response:
    message = f"no recorded answer of {model!r} to {question[:60]!r}"
    error = {"message": message, "type": "invalid_request_error", "param": "messages", "code": "not_recorded"}
    return web.json_response({"error": error}, status=404)


async def _stream(
    request: web.Request, frame: Mapping[str, Any], answer: str, usage: Mapping[str, int] | None
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        chunk = {**frame, "object": "chat.completion.chunk", "choices": choices, **more}
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    await response.write(event([_delta({"role": "assistant", "content": ""})]))
    for text in pieces(answer):
        await response.write(event([_delta({"content": text})]))
    await response.write(event([_delta({}, "stop")]))
    if usage is not None:
        await response.write(event([], usage=usage))
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _delta(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}


def pieces(text: str) -> Iterator[str]:
    """The text in parts of a few words; together they are the text again."""
    starts = [found.start() for found in _WORD.finditer(text)][CHUNK_PIECES::CHUNK_PIECES]
    for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
        yield text[start:end]


def read_recordings(folder: Path) -> dict[tuple[str, str], str]:
    """(model, question) → recorded answer; empty where the folder has no recordings. Contaminated rows are left out."""
    import pandas as pd

    path = folder / RECORDINGS
    if not path.is_file():
        return {}
    frame = pd.read_parquet(path)
    frame = frame[~frame["contaminated"]]
    answers: dict[tuple[str, str], str] = {}
    for model, column in ((WEAK, "mixtral_8x7b_response"), (STRONG, "gpt4_1106_response")):
        answers |= {(model, question): text for question, text in zip(frame["prompt"], frame[column], strict=True)}
    return answers


async def serve(folder: Path, truth: Path) -> None:
    """Serve on a free loopback port, printed as one line, until asked to stop."""
    with truth.open("a", encoding="utf-8") as file:
        runner = web.AppRunner(RecordedUpstream(read_recordings(folder), file).app(), access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        print(f"http://{host}:{port}/v1", flush=True)
        stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        await stopped.wait()
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help=f"folder that holds {RECORDINGS}")
    parser.add_argument("truth", type=Path, help="JSONL file to append one line a call to")
    args = parser.parse_args()
    asyncio.run(serve(args.data, args.truth))


if __name__ == "__main__":
    main()
