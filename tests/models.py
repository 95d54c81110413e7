"""Small random models as GGUF files, written by gguf-py: an independent writer, so that a mistake of ours shows."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 as the bits of bfloat16, by cutting; the values are then exact in both."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_model(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 256,
    feed_forward: int = 512,
    experts: int = 8,
    vocabulary: int = 300,
    heads: int = 4,
    heads_kv: int = 2,
    kind: Kind = Kind.BF16,
    seed: int = 0,
    change: dict[str, np.ndarray] | None = None,
) -> Path:
    """A model of llama.cpp's `llama` architecture with normally distributed weights.

    Args:
        experts: 0 for a dense model.
        kind: F32, F16 or BF16, for every matrix but norms and routers.
        change: float32 values to use instead of random ones, by tensor name.
    """
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [f"t{index}" for index in range(vocabulary - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(index) for index in range(vocabulary)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (vocabulary - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def tensor(name: str, *shape: int, always_f32: bool = False) -> None:
        values = (random.standard_normal(shape) * 0.05).astype(np.float32)
        if change and name in change:
            values = change[name].astype(np.float32)
        if always_f32 or kind == Kind.F32:
            writer.add_tensor(name, values)
        elif kind == Kind.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, bf16_bits(values), raw_dtype=Kind.BF16)

    width_kv = hidden // heads * heads_kv
    tensor("token_embd.weight", vocabulary, hidden)
    for layer in range(layers):
        block = f"blk.{layer}."
        tensor(block + "attn_q.weight", hidden, hidden)
        tensor(block + "attn_k.weight", width_kv, hidden)
        tensor(block + "attn_v.weight", width_kv, hidden)
        tensor(block + "attn_output.weight", hidden, hidden)
        tensor(block + "attn_norm.weight", hidden, always_f32=True)
        tensor(block + "ffn_norm.weight", hidden, always_f32=True)
        stack = (experts,) if experts else ()
        suffix = "_exps" if experts else ""
        if experts:
            tensor(block + "ffn_gate_inp.weight", experts, hidden, always_f32=True)
        tensor(f"{block}ffn_gate{suffix}.weight", *stack, feed_forward, hidden)
        tensor(f"{block}ffn_down{suffix}.weight", *stack, hidden, feed_forward)
        tensor(f"{block}ffn_up{suffix}.weight", *stack, feed_forward, hidden)
    tensor("output_norm.weight", hidden, always_f32=True)
    tensor("output.weight", vocabulary, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
