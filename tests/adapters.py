"""Tiny LoRA adapters of every kind, as PEFT saves them, the same bytes every time.

`write_pair(folder, kind)` makes a checkpoint and an adapter for it. What PEFT makes of them is recorded by
tests/conformance/record_lora.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import (
    TOKENIZER,
    TOKENIZER_PIECES,
    Shape,
    Tensors,
    edit_json,
    read_shard,
    write_checkpoint,
    write_shard,
)

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

MIXTURE = Shape(hidden=32, feed_forward=48, layers=2, heads=4, kv_heads=2, experts=2)
DENSE = Shape("llama", hidden=32, feed_forward=48, layers=2, heads=4, kv_heads=2, experts=0)

ATTENTION = r"self_attn\.[qkvo]_proj"
ALL_OF_MIXTURE = rf"{ATTENTION}|block_sparse_moe\.gate|experts\.\d+\.w[123]"
ALL_OF_DENSE = rf"{ATTENTION}|mlp\.(gate|up|down)_proj"
EMBEDDING = r"embed_tokens"


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
        shape: of its checkpoint.
        targets: pattern of the modules that get factors.
        config: laid over the adapter's configuration.
        ranks: pattern of a module's name → its rank, where that is not 4.
        whole: checkpoint's names of tensors that the adapter holds whole, with the dtype F32.
        vocabulary: rows of embedding and output where they are held whole.
        magnitudes: DoRA.
        biases: the second factors have a bias.
        tokens: ids of the tokens whose embeddings are held.
        stacked: the experts are one parameter, as in transformers 5.
        tokenizer: the adapter's folder has one.
    """

    shape: Shape
    targets: str
    config: Mapping[str, Any] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    vocabulary: int = TOKENIZER_PIECES
    magnitudes: bool = False
    biases: bool = False
    tokens: tuple[int, ...] = ()
    stacked: bool = False
    tokenizer: bool = False


KINDS: Mapping[str, Kind] = {
    "plain": Kind(MIXTURE, ALL_OF_MIXTURE),
    "rank-stabilized": Kind(DENSE, ALL_OF_DENSE, {"use_rslora": True}),
    "magnitudes": Kind(DENSE, ALL_OF_DENSE, {"use_dora": True}, magnitudes=True),
    "patterns": Kind(
        DENSE,
        ALL_OF_DENSE,
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 8},
            "alpha_pattern": {r"model\.layers\.0\.self_attn\.v_proj": 64, "down_proj": 3},
        },
        ranks={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 8},
    ),
    "vocabulary": Kind(
        MIXTURE,
        ALL_OF_MIXTURE,
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        whole=("model.embed_tokens.weight", "lm_head.weight"),
        vocabulary=TOKENIZER_PIECES + 24,
        tokenizer=True,
    ),
    "embedding": Kind(DENSE, rf"{EMBEDDING}|{ATTENTION}"),
    "embedding-magnitudes": Kind(DENSE, EMBEDDING, {"use_dora": True}, magnitudes=True),
    "trained-biases": Kind(
        replace(DENSE, bias=True),
        ATTENTION,
        {"bias": "lora_only"},
        whole=tuple(f"model.layers.{layer}.self_attn.{name}_proj.bias" for layer in (0, 1) for name in "qkvo"),
    ),
    "biases": Kind(replace(DENSE, bias=True), ATTENTION, {"lora_bias": True}, biases=True),
    "tokens": Kind(DENSE, ATTENTION, {"trainable_token_indices": {"embed_tokens": [3, 300, 17]}}, tokens=(3, 300, 17)),
    "stacked-experts": Kind(
        MIXTURE,
        rf"{ATTENTION}|block_sparse_moe\.gate",
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        stacked=True,
    ),
}


def write_pair(folder: Path, name: str, dtype: str = "BF16") -> tuple[Path, Path]:
    """A checkpoint in this dtype, and an adapter of that kind for it: two folders."""
    kind = KINDS[name]
    base = write_checkpoint(folder / "base", replace(kind.shape, dtype=dtype))
    return base, write_adapter(folder / name, base, kind)


def read_checkpoint(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    found: Tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= read_shard(path)
    return found


def write_adapter(folder: Path, base: Path, kind: Kind) -> Path:
    """An adapter for a checkpoint."""
    folder.mkdir(parents=True)
    config = {
        "base_model_name_or_path": "example/base",
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": 8,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": rf".*\.({_module_name(kind.targets, kind)})",
        **kind.config,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = make_adapter(read_checkpoint(base), kind)
    # as PEFT writes them, in the order of their names
    write_shard(folder / WEIGHTS, {name: tensors[name] for name in sorted(tensors)})
    if kind.tokenizer:
        shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
        shutil.copyfile(base / "tokenizer_config.json", folder / "tokenizer_config.json")
        pieces = {f"<extra_{number}>": TOKENIZER_PIECES + number for number in range(8)}
        (folder / "added_tokens.json").write_text(json.dumps(pieces), encoding="utf-8")
    return folder


def _module_name(name: str, kind: Kind) -> str:
    """The name that transformers 5 has where it stacks experts; older ones have those of checkpoints."""
    return name.replace("block_sparse_moe", "mlp") if kind.stacked else name


def make_adapter(base: Tensors, kind: Kind) -> Tensors:
    """Random tensors of an adapter, under PEFT's names."""
    random = np.random.default_rng(99)
    found: Tensors = {}

    def add(name: str, *shape: int, scale: float = 0.1, around: float = 0.0) -> None:
        values = around + scale * random.standard_normal(shape, np.float32)
        found[PREFIX + name] = ("F32", values.astype(np.float32))

    for name, (_, weight) in base.items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or not re.search(rf"\.({kind.targets})$", f".{module}"):
            continue
        out, columns = weight.shape
        rank = next((rank for pattern, rank in kind.ranks.items() if re.search(rf"{pattern}$", module)), 4)
        module = _module_name(module, kind)
        if re.search(EMBEDDING, module):
            add(f"{module}.lora_embedding_A", rank, out)
            add(f"{module}.lora_embedding_B", columns, rank)
            if kind.magnitudes:
                add(f"{module}.lora_magnitude_vector", columns, around=1)
            continue
        add(f"{module}.lora_A.weight", rank, columns)
        add(f"{module}.lora_B.weight", out, rank)
        if kind.biases:
            add(f"{module}.lora_B.bias", out)
        if kind.magnitudes:
            add(f"{module}.lora_magnitude_vector", out, around=0.5)
    if kind.stacked:
        shape = kind.shape
        stacked = 4 * shape.experts
        for layer in range(shape.layers):
            module = f"model.layers.{layer}.mlp.experts"
            add(f"{module}.base_layer.lora_A.weight", stacked, shape.hidden)
            add(f"{module}.base_layer.lora_B.weight", 2 * shape.feed_forward, stacked)
            add(f"{module}.lora_A.weight", stacked, shape.feed_forward)
            add(f"{module}.lora_B.weight", shape.hidden, stacked)
    for name in kind.whole:
        own = base[name][1].shape
        add(name.replace(".bias", ".base_layer.bias"), *((kind.vocabulary, *own[1:]) if len(own) == 2 else own))
    if kind.tokens:
        add("model.embed_tokens.token_adapter.trainable_tokens_delta", len(kind.tokens), kind.shape.hidden)
    return found


def edit_config(adapter: Path, **changes: Any) -> None:
    """Change an adapter's configuration; a value of `...` removes the key."""

    def change(config: dict[str, Any]) -> None:
        for key, value in changes.items():
            if value is ...:
                config.pop(key)
            else:
                config[key] = value

    edit_json(adapter / CONFIG, change)
