"""The bytes that each token stands for, whatever stands around it.

Both kinds of tokenizer that our model families have are byte-exact: byte-level BPE (GPT-2's alphabet, one letter per
byte) and sentencepiece's (`▁` for a space, `<0xE2>` for a byte without a token of its own). So text can be put
together from bytes, at a cost per token that does not grow with the text.
"""

import json
from typing import Any, Final

from local_engine.errors import ModelLoadError

_SPACE: Final = "▁"


class Pieces:
    """Looks up tokens of one tokenizer; remembers those it has met. Raises ModelLoadError for other kinds."""

    def __init__(self, tokenizer: Any) -> None:
        backend = tokenizer.backend_tokenizer
        state = backend.decoder.__getstate__() if backend.decoder is not None else b"{}"
        decoder = json.loads(state)
        kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
        if "ByteLevel" in kinds:
            self._alphabet: dict[str, int] | None = _byte_level_alphabet()
        elif "ByteFallback" in kinds or "Metaspace" in kinds:
            self._alphabet = None
        else:
            raise ModelLoadError(
                f"its tokenizer joins tokens by {', '.join(sorted(kinds)) or 'nothing'}, and this engine knows "
                "byte-level BPE and sentencepiece with byte fallback; convert the tokenizer"
            )
        self.drops_first_space: Final = "Strip" in kinds or "Metaspace" in kinds
        """Whether a text's first piece loses its leading space."""
        self._token = backend.id_to_token
        self._added = {id: token.content.encode() for id, token in backend.get_added_tokens_decoder().items()}
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        """Of an id beyond the tokenizer's (a padded vocabulary): none."""
        piece = self._known.get(token)
        if piece is None:
            piece = self._known[token] = self._added.get(token) or self._spelled(self._token(token) or "")
        return piece

    def _spelled(self, token: str) -> bytes:
        if self._alphabet is None:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes.fromhex(token[3:5])
            return token.replace(_SPACE, " ").encode()
        try:
            return bytes(self._alphabet[letter] for letter in token)
        except KeyError:  # not of the alphabet: a token that stands for itself
            return token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 stands for itself, every other byte for the next letter from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + at): byte for at, byte in enumerate(others)}
