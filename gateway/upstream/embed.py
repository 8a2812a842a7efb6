"""Texts to vectors on the local engine, in the shape of OpenAI's embeddings."""

import asyncio
import base64
import struct
from typing import Any

import msgspec

from gateway.ledger.settle import Usage
from gateway.upstream.local_params import refused
from gateway.upstream.types import Answer, ChatCall, Target, UpstreamError
from local_engine.client import EngineClient

_encode = msgspec.json.Encoder().encode
_texts = msgspec.json.Decoder(str | list[str])


async def embed(client: EngineClient, target: Target, call: ChatCall) -> Answer:
    """Raises UpstreamError, and the engine's own errors as its client raises them."""
    try:
        given = _texts.decode(call.fields["input"])
    except msgspec.ValidationError as error:
        raise refused("input", f"{target.model} takes texts, not token ids of another tokenizer") from error
    try:
        async with asyncio.timeout(target.timeout_s):
            result = await client.embed([given] if isinstance(given, str) else given)
    except TimeoutError as error:
        raise UpstreamError("timeout", f"the engine gave no vectors within {target.timeout_s:g} s") from error
    asked = call.fields.get("dimensions")
    if asked is not None and bytes(asked) not in (b"null", b"%d" % result.dims):
        raise refused("dimensions", f"{target.model} has {result.dims}, and no other number")
    wants_base64 = bytes(call.fields.get("encoding_format", b"null")) == b'"base64"'
    size = result.dims * 4
    data: list[dict[str, Any]] = []
    for index in range(len(result.vectors) // size):
        raw = result.vectors[index * size : (index + 1) * size]
        vector = base64.b64encode(raw).decode() if wants_base64 else struct.unpack(f"<{result.dims}f", raw)
        data.append({"object": "embedding", "index": index, "embedding": vector})
    usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
    body = _encode({"object": "list", "data": data, "model": target.model, "usage": usage})
    return Answer(body, Usage(input=result.tokens), delivered_bytes=len(body))
