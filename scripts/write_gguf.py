"""A Qwen3 checkpoint as a GGUF file, for llama.cpp: `python scripts/write_gguf.py [--float32] CHECKPOINT FILE`.

Matrices stay in float32 or bfloat16, unless all are to be float32; norms are float32, as llama.cpp wants them.
Run by the Python of what scripts/install_llamacpp.sh made, which has gguf. It knows byte-level BPE alone, and llama.cpp
splits words by GPT-2's rule whatever the tokenizer's own rule is: the same tokens where no merge crosses its borders.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf.utility import SafetensorsLocal
from numpy.typing import NDArray

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def named(name: str) -> str:
    """llama.cpp's name of a tensor. Raises KeyError."""
    stem, _, kind = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER[part]}.{kind}"


def widened(dtype: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def tokenizer(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    said = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {id: token for token, id in said["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in said["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(id, f"[PAD{id}]") for id in range(size)])
    writer.add_token_types([kinds.get(id, gguf.TokenType.UNUSED) for id in range(size)])
    merges = said["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ids = {token: id for id, token in tokens.items()}
    writer.add_eos_token_id(ids[config["eos_token"]])
    writer.add_pad_token_id(ids[config["pad_token"]])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def main(folder: Path, out: Path, *, float32: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "qwen3":
        sys.exit(f"model_type: {config['model_type']}: only qwen3 is known here.")
    writer = gguf.GGUFWriter(out, "qwen3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer(writer, folder, config["vocab_size"])
    for name, tensor in SafetensorsLocal(folder / "model.safetensors").tensors.items():
        data = tensor.mmap_bytes()
        if tensor.dtype == "BF16" and len(tensor.shape) == 2 and not float32:
            rows = data.view(np.uint8).reshape(tensor.shape[0], -1)
            writer.add_tensor(named(name), rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(named(name), widened(tensor.dtype, data).reshape(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    *options, checkpoint, file = sys.argv[1:]
    main(Path(checkpoint), Path(file), float32=options == ["--float32"])
