"""BERT, the encoder of many embedding models (MiniLM, BGE).

How the vectors of a text's tokens become one is what sentence-transformers notes beside the model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf.constants import PoolingType

from localmix.architectures.base import (
    MOST_LAYERS,
    MOST_TOKENS,
    Architecture,
    Derived,
    Setting,
    Settings,
    TensorRule,
    check_heads,
)
from localmix.architectures.decoder import count
from localmix.errors import InputError
from localmix.sources.base import MetaValue, boolean, f32, u32
from localmix.sources.documents import parse_json, read_object, shown
from localmix.sources.positional import read_whole

_MODULES = "modules.json"
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]*")

# What the notes call it, in older and newer files.
_POOLING: Mapping[str, PoolingType] = {
    "pooling_mode_mean_tokens": PoolingType.MEAN,
    "pooling_mode_cls_token": PoolingType.CLS,
    "pooling_mode_lasttoken": PoolingType.LAST,
    "mean": PoolingType.MEAN,
    "cls": PoolingType.CLS,
    "lasttoken": PoolingType.LAST,
}


def _with_bias(source: str, target: str, *shape: str) -> tuple[TensorRule, ...]:
    return (
        TensorRule(f"{source}.weight", f"{target}.weight", shape),
        TensorRule(f"{source}.bias", f"{target}.bias", shape[:1]),
    )


def _of_layer(source: str, target: str, *shape: str) -> tuple[TensorRule, ...]:
    return _with_bias(f"encoder.layer.{{layer}}.{source}", f"blk.{{layer}}.{target}", *shape)


def _dimensions(settings: Settings) -> Mapping[str, int]:
    return {
        "vocabulary": int(settings["vocab_size"]),
        "hidden": int(settings["hidden_size"]),
        "feed_forward": int(settings["intermediate_size"]),
        "positions": int(settings["max_position_embeddings"]),
        "types": int(settings["type_vocab_size"]),
    }


def _derive(config: Mapping[str, Any], settings: Settings, path: Path) -> Derived:
    """That it sees the whole text at once, and how its vectors are pooled, where that is noted."""
    metadata: dict[str, MetaValue] = {"bert.attention.causal": boolean(False)}
    modules = _modules(path.parent / _MODULES)
    pooling = next((place for kind, place in modules if kind.endswith("Pooling")), None)
    if pooling is not None:
        metadata["bert.pooling_type"] = u32(_pooling(path.parent / pooling / "config.json"))
    notes = [
        f"{_MODULES} names a {kind}, which a GGUF file of BERT does not have"
        for kind, _ in modules
        if kind.endswith("Dense")
    ]
    return Derived(metadata, {}, notes)


def _modules(path: Path) -> list[tuple[str, str]]:
    """What sentence-transformers puts after the model: kinds, and the folders that describe them."""
    if not os.path.exists(path):
        return []
    entries = parse_json(read_whole(path, 2**20), str(path))
    found: list[tuple[str, str]] = []
    for entry in entries if isinstance(entries, list) else [None]:
        kind, place = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str) or (place and not _FOLDER.fullmatch(place)):
            raise InputError(f"{path} is not a list of modules with folders of their own.", "Download the file again.")
        found.append((kind, place))
    return found


def _pooling(path: Path) -> PoolingType:
    """How the vectors of the tokens become one, noted by a word or by a switch for each way."""
    config = read_object(path)
    ways = [name for name, chosen in config.items() if chosen is True and name.startswith("pooling_mode_")]
    ways += [str(config["pooling_mode"])] if config.get("pooling_mode") else []
    found = {_POOLING.get(way) for way in ways}
    pooling = found.pop() if len(found) == 1 else None
    if pooling is None:
        raise InputError(
            f"{path}: pooling by {shown(ways)} is not known.",
            "llama.cpp pools by mean, by the first or by the last token.",
        )
    return pooling


BERT = Architecture(
    model_type="bert",
    classes=("BertModel", "BertForMaskedLM"),
    name="bert",
    rows=(
        count("vocab_size", "vocab_size", most=MOST_TOKENS, absent=30522),
        count("hidden_size", "embedding_length"),
        count("intermediate_size", "feed_forward_length", most=2**24),
        count("num_hidden_layers", "block_count", most=MOST_LAYERS),
        count("num_attention_heads", "attention.head_count", most=2**16),
        count("max_position_embeddings", "context_length", absent=512),
        Setting("layer_norm_eps", float, 0, 1, absent=1e-12, keys=("{arch}.attention.layer_norm_epsilon",), write=f32),
        Setting("type_vocab_size", int, most=2**16, absent=2, keys=("tokenizer.ggml.token_type_count",), write=u32),
    ),
    rules=(
        TensorRule("embeddings.word_embeddings.weight", "token_embd.weight", ("vocabulary", "hidden")),
        TensorRule(
            "embeddings.position_embeddings.weight", "position_embd.weight", ("positions", "hidden"), float32=True
        ),
        TensorRule("embeddings.token_type_embeddings.weight", "token_types.weight", ("types", "hidden"), float32=True),
        *_with_bias("embeddings.LayerNorm", "token_embd_norm", "hidden"),
        *_of_layer("attention.self.query", "attn_q", "hidden", "hidden"),
        *_of_layer("attention.self.key", "attn_k", "hidden", "hidden"),
        *_of_layer("attention.self.value", "attn_v", "hidden", "hidden"),
        *_of_layer("attention.output.dense", "attn_output", "hidden", "hidden"),
        *_of_layer("attention.output.LayerNorm", "attn_output_norm", "hidden"),
        *_of_layer("intermediate.dense", "ffn_up", "feed_forward", "hidden"),
        *_of_layer("output.dense", "ffn_down", "hidden", "feed_forward"),
        *_of_layer("output.LayerNorm", "layer_output_norm", "hidden"),
    ),
    dimensions=_dimensions,
    derive=_derive,
    check=check_heads,
    expects={"hidden_act": ("gelu",), "position_embedding_type": ("absolute",), "is_decoder": (False,)},
    renames={r"^bert\.": "", r"\.gamma$": ".weight", r"\.beta$": ".bias"},
    elsewhere=r"^(embeddings\.position_ids$|pooler\.|cls\.)",
)
