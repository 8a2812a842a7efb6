"""Small tokenizers of the kinds that model families have, trained here."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Ein schöner Tag, 12 345 Äpfel! 日本語のテキスト, 🎉🎉 résumé naïve",
    '{"name": "Ann", "age": 42, "tags": ["a", "b"], "nested": {"x": null, "ok": true}}\n\treturn [1, 2.5e3]\n',
] * 3
CHAT = (
    "{% if tools %}<|im_start|>system\nTools, one per line, called as <tool_call> says:\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with Hermes' tool calls, as Qwen's."""


def byte_level(size: int = 400, *, specials: tuple[str, ...] = ()) -> Any:
    """As Qwen's and Llama 3's: BPE over GPT-2's alphabet of bytes. `specials` are control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _finished(tokenizer, specials)


def sentencepiece(size: int = 500, *, specials: tuple[str, ...] = ()) -> Any:
    """As Llama 2's and Mistral's: BPE over characters with `▁` for a space, and bytes for what it does not know."""
    corpus = [text.replace(" ", "▁") for text in CORPUS[:1]]
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size - 259, show_progress=False))
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learnt = json.loads(trained.model.__getstate__())
    letters = [token for token in learnt["vocab"] if token not in "日本語🎉"]  # so that these need bytes
    vocabulary += [token for token in letters if token not in vocabulary]
    kept = set(vocabulary)
    merges = [(a, b) for a, b in learnt["merges"] if a in kept and b in kept and a + b in kept]
    ids = {token: at for at, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _finished(tokenizer, specials)


def word_pieces() -> Any:
    """As BERT's: not byte-exact."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "removed")
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_model(folder: Path, *, vocabulary: int | None = None) -> Path:
    """A checkpoint with random weights and a byte-level tokenizer: any token is about as likely as any other."""
    tokenizer = byte_level()
    torch.manual_seed(8)
    config = Qwen3Config(
        vocab_size=vocabulary or len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=2048, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _finished(tokenizer: Tokenizer, specials: tuple[str, ...]) -> Any:
    ends = ["<|im_start|>", "<|im_end|>", *specials]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ends])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHAT
    return fast
