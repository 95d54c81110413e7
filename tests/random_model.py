"""A tiny model of random weights as a GGUF file, written by gguf-py: an independent writer, so that a mistake of
ours shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

WORDS = ["a", "b", "c", "ab", "▁a", "▁b", "▁the", "t", "h", "e", "th", "the", "▁", "▁t", "▁th", "i", "n", "in"]


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 as the bits of bfloat16, by cutting."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_random_model(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 256,
    feed_forward: int = 256,
    experts: int = 8,
    context: int = 2048,
    embedding_rows: int = 0,
    kind: Kind = Kind.F32,
    change: Mapping[str, np.ndarray] | None = None,
    byte_tokens: bool = True,
    duplicate: bool = False,
    poison: str = "",
    seed: int = 1,
    own: Mapping[str, str | int | float] | None = None,
    chat_template: str = "{% for message in messages %}[INST] {{ message.content }} [/INST]{% endfor %}",
) -> Path:
    """Write a model of llama.cpp's `llama` architecture.

    Args:
        experts: 0 for a dense model.
        embedding_rows: more tokens than the words and bytes, for a larger embedding.
        kind: F32, F16 or BF16, for every matrix but the router.
        change: float32 values to use instead of random ones, by tensor name.
        byte_tokens: leave them out to make llama.cpp abort at the first tokenize.
        duplicate: give two tokens one text, to make llama.cpp abort while loading.
        poison: name of a tensor that gets a NaN.
        own: further GGUF keys.
    """
    heads, kv_heads = 4, 2
    tokens = ["<unk>", "<s>", "</s>"]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    if byte_tokens:
        tokens += [f"<0x{byte:02X}>" for byte in range(256)]
        types += [gguf.TokenType.BYTE] * 256
    tokens += WORDS
    tokens += [f"▁more{number}" for number in range(embedding_rows - len(tokens))]
    types += [gguf.TokenType.NORMAL] * (len(tokens) - len(types))
    if duplicate:
        tokens[-1] = tokens[-2]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat_template)

    for key, value in (own or {}).items():
        add = {str: writer.add_string, int: writer.add_int32, float: writer.add_float32}[type(value)]
        add(key, value)

    generator = np.random.default_rng(seed)
    kv = hidden // heads * kv_heads
    stack = (experts,) if experts else ()
    suffix = "_exps" if experts else ""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), hidden)}
    for layer in range(layers):
        block = f"blk.{layer}."
        shapes |= {
            block + "attn_norm.weight": (hidden,),
            block + "attn_q.weight": (hidden, hidden),
            block + "attn_k.weight": (kv, hidden),
            block + "attn_v.weight": (kv, hidden),
            block + "attn_output.weight": (hidden, hidden),
            block + "ffn_norm.weight": (hidden,),
        }
        if experts:
            shapes[block + "ffn_gate_inp.weight"] = (experts, hidden)
        shapes |= {
            f"{block}ffn_gate{suffix}.weight": (*stack, feed_forward, hidden),
            f"{block}ffn_up{suffix}.weight": (*stack, feed_forward, hidden),
            f"{block}ffn_down{suffix}.weight": (*stack, hidden, feed_forward),
        }
    shapes |= {"output_norm.weight": (hidden,), "output.weight": (len(tokens), hidden)}
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, np.float32)
        values = np.abs(values) if len(shape) == 1 else values / np.float32(np.sqrt(shape[-1]))
        if "attn_output" in name or "ffn_down" in name:
            values /= 10  # else rounding errors grow from layer to layer, and move tokens to other experts
        if change and name in change:
            values = change[name].astype(np.float32)
        if name == poison:
            values.flat[0] = np.nan
        if len(shape) == 1 or "ffn_gate_inp" in name or kind == Kind.F32:
            writer.add_tensor(name, values)
        elif kind == Kind.BF16:
            writer.add_tensor(name, bf16_bits(values), raw_dtype=Kind.BF16)
        else:
            writer.add_tensor(name, values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
