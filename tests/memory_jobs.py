"""Jobs that say what llama.cpp really takes, and models whose weights are a hole, so that they cost no disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from localmix.capacity.fit import planned
from localmix.capacity.simulation import Setting, skeleton
from localmix.native import library
from localmix.native.devices import PROCESSOR
from localmix.native.model import Context, Model
from localmix.sources.base import MetaValue, ShapeOnlySource, Source, TensorInfo, f32, text, u32
from localmix.sources.open import open_source
from localmix.tensor_types import TensorType
from localmix.worker import Channel

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_config(folder: Path, **changes: Any) -> Path:
    """A folder with nothing but the config.json of a Mixtral, changed; `experts=0` makes it a Llama."""
    config: dict[str, Any] = {**MIXTRAL, **changes}
    if config.pop("experts", 8) == 0:
        config.update(architectures=["LlamaForCausalLM"], model_type="llama")
        del config["num_local_experts"], config["num_experts_per_tok"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hollow(folder: Path, kind: str) -> ShapeOnlySource:
    """The model of a config.json with the tensor types that a preset gives it."""
    with open_source(folder) as source:
        ((_, weights),) = planned(source, [kind])
        return ShapeOnlySource(folder, source.metadata, weights.tensors)


def sliding_window_model(window: int = 1024, vocabulary: int = 8000) -> ShapeOnlySource:
    """A Gemma 3 of six layers, five of which look back no further than the window."""
    hidden, heads, kv_heads, feed_forward, layers = 512, 8, 8, 1024, 6
    size = hidden // heads
    metadata: dict[str, MetaValue] = {
        "general.architecture": text("gemma3"),
        "gemma3.context_length": u32(32768),
        "gemma3.embedding_length": u32(hidden),
        "gemma3.block_count": u32(layers),
        "gemma3.feed_forward_length": u32(feed_forward),
        "gemma3.attention.head_count": u32(heads),
        "gemma3.attention.head_count_kv": u32(kv_heads),
        "gemma3.attention.key_length": u32(size),
        "gemma3.attention.value_length": u32(size),
        "gemma3.attention.sliding_window": u32(window),
        "gemma3.attention.layer_norm_rms_epsilon": f32(1e-6),
        "gemma3.vocab_size": u32(vocabulary),
    }
    tensors = [
        TensorInfo("token_embd.weight", (vocabulary, hidden), TensorType.Q4_0),
        TensorInfo("output_norm.weight", (hidden,), TensorType.F32),
    ]
    for layer in range(layers):
        shapes = {name: (hidden,) for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")}
        shapes |= {"attn_q_norm": (size,), "attn_k_norm": (size,)}
        tensors += [TensorInfo(f"blk.{layer}.{name}.weight", shape, TensorType.F32) for name, shape in shapes.items()]
        matrices = {
            "attn_q": (heads * size, hidden),
            "attn_k": (kv_heads * size, hidden),
            "attn_v": (kv_heads * size, hidden),
            "attn_output": (hidden, heads * size),
            "ffn_gate": (feed_forward, hidden),
            "ffn_up": (feed_forward, hidden),
            "ffn_down": (hidden, feed_forward),
        }
        tensors += [
            TensorInfo(f"blk.{layer}.{name}.weight", shape, TensorType.Q8_0) for name, shape in matrices.items()
        ]
    return ShapeOnlySource(Path("gemma"), metadata, tensors)


@contextmanager
def zeros(source: Source) -> Iterator[Path]:
    """A file of this model that llama.cpp loads: its weights are a hole, which reads as zeros."""
    with skeleton(source) as path:
        yield path


def peak(
    channel: Channel, path: Path, setting: Setting, repack: bool = True, fill: int = 1024
) -> tuple[int, dict[str, float]]:
    """Load a model, decode `fill` tokens, and see by how much this process's anonymous memory has grown.

    Returns:
        Bytes at the peak, and what llama.cpp says of its own buffers, in MiB by name.
    """
    library.api()
    before = largest = _anonymous()
    kind = TensorType[setting.kv_type.upper()]
    with (
        library.log.capture() as lines,
        Model(path, placement=PROCESSOR, repack=repack) as model,
        Context(
            model,
            context_length=setting.context,
            micro_batch=setting.batch,
            outputs=setting.outputs,
            type_k=kind,
            type_v=kind,
            threads=1,
        ) as context,
    ):
        for start in range(0, min(fill, setting.context), setting.batch):
            positions = np.arange(start, min(start + setting.batch, setting.context))
            context.decode(np.full(len(positions), 5), positions, 0, positions == positions[-1])
            largest = max(largest, _anonymous())
    found = re.findall(r"(\S+) +(model|KV|compute|output) buffer size = +([\d.]+) MiB", "\n".join(lines))
    return largest - before, {f"{name} {what}": float(size) for name, what, size in found}


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
