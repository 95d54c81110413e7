"""Tiny checkpoints of any shape, written the way transformers writes them, the same bytes every time.

`write_checkpoint(folder)` makes a Mixtral; `SHAPES` has the others. Tests break one thing in the result:
`edit_json` for the JSON files, `read_shard` and `write_shard` for tensors, plain bytes for the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# 384 pieces with byte fallback, trained by `train_tokenizer` below; committed because another version of
# sentencepiece may break ties differently.
TOKENIZER = Path(__file__).parent / "fixtures" / "tokenizer.model"
TOKENIZER_PIECES = 384

CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"

Tensors = dict[str, tuple[str, npt.NDArray[Any]]]

_STORAGE = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "U8": np.dtype("u1"),
}
_CONFIG_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Shape:
    """A checkpoint to write; `config` and `tokenizer_config` are laid over what follows from the rest.

    A value of `...` in them removes the key.
    """

    model_type: str = "mixtral"
    dtype: str = "BF16"
    hidden: int = 64
    feed_forward: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None
    experts: int = 8
    vocabulary: int = TOKENIZER_PIECES
    tied: bool = False
    bias: bool = False
    shards: int = 2
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}

# Named as the fixtures of tests/conformance are.
SHAPES: Mapping[str, Shape] = {
    "mixtral": Shape(),
    "mixtral-4-experts-f16": Shape(experts=4, dtype="F16", shards=1, feed_forward=64, seed=1),
    "mixtral-sliding-window": Shape(
        experts=4, config={"sliding_window": 32, "rope_theta": 1e6, "head_dim": 16}, seed=2
    ),
    "mixtral-padded": Shape(experts=4, vocabulary=TOKENIZER_PIECES + 16, shards=3, seed=3),
    "mixtral-generation": Shape(
        experts=4,
        files={
            "generation_config.json": {
                "bos_token_id": 1,
                "temperature": 0.2,
                "top_k": 40,
                "top_p": 0.9,
                "repetition_penalty": 1.1,
            }
        },
        config={"rms_norm_eps": ..., "rope_theta": ...},
        seed=4,
    ),
    "llama": Shape("llama", kv_heads=4, experts=0, dtype="F16", seed=5),
    "llama-f32-tied": Shape("llama", experts=0, dtype="F32", tied=True, shards=1, seed=6),
    "llama-old": Shape(
        "llama",
        kv_heads=4,
        experts=0,
        dtype="F16",
        shards=1,
        config={
            "num_key_value_heads": ...,
            "rms_norm_eps": ...,
            "rope_theta": ...,
            "max_position_embeddings": ...,
            "tie_word_embeddings": ...,
            "pad_token_id": 0,
        },
        seed=7,
    ),
    "llama-bias": Shape("llama", experts=0, bias=True, head_dim=24, seed=8),
    "llama-rope-linear": Shape(
        "llama", experts=0, shards=1, config={"rope_scaling": {"type": "linear", "factor": 4.0}}, seed=9
    ),
    "llama-rope-yarn": Shape(
        "llama",
        experts=0,
        shards=1,
        config={
            "rope_scaling": {
                "type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.25,
                "beta_fast": 24,
                "beta_slow": 2,
            }
        },
        seed=10,
    ),
    "llama-rope-llama3": Shape(
        "llama",
        experts=0,
        shards=1,
        head_dim=64,
        config={
            "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        seed=11,
    ),
    "llama-rope-parameters": Shape(
        "llama",
        experts=0,
        shards=1,
        config={"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        seed=12,
    ),
    "mistral": Shape("mistral", experts=0, config={"sliding_window": 16, "head_dim": 24}, head_dim=24, seed=13),
    "mistral-f32": Shape("mistral", experts=0, dtype="F32", kv_heads=1, shards=1, tied=True, seed=14),
    "mistral-added-tokens": Shape(
        "mistral",
        experts=0,
        vocabulary=TOKENIZER_PIECES + 8,
        tokenizer_config={
            "add_prefix_space": False,
            "add_eos_token": True,
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True},
                "1": {"content": "<s>", "special": True},
                "2": {"content": "</s>", "special": True},
                str(TOKENIZER_PIECES + 2): {"content": "<|im_end|>", "special": False},
                str(TOKENIZER_PIECES + 3): {"content": "▁▁▁", "special": False},
                str(TOKENIZER_PIECES + 4): {"content": "[TOOL]", "special": True},
            },
            "chat_template": [
                {"name": "default", "template": CHAT_TEMPLATE},
                {"name": "tool use", "template": "tools: {{ tools }}"},
            ],
        },
        files={
            "added_tokens.json": {
                "<pad>": TOKENIZER_PIECES,
                "plain words": TOKENIZER_PIECES + 1,
                "far away": TOKENIZER_PIECES + 99,
            },
            "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        },
        config={"pad_token_id": TOKENIZER_PIECES, "eos_token_id": [2, TOKENIZER_PIECES + 2]},
        seed=15,
    ),
    "mixtral-fast-tokenizer": Shape(
        experts=4,
        tokenizer_config={"chat_template": ..., "unk_token": {"content": "<unk>", "lstrip": False}},
        files={
            "tokenizer.json": {
                "version": "1.0",
                "added_tokens": [
                    {"id": 0, "content": "<unk>", "special": True},
                    {"id": 1, "content": "<s>", "special": True},
                    {"id": 2, "content": "</s>", "special": True},
                ],
                "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<s>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [
                        {"SpecialToken": {"id": "<s>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"SpecialToken": {"id": "<s>", "type_id": 1}},
                        {"Sequence": {"id": "B", "type_id": 1}},
                    ],
                },
                "model": {"type": "BPE", "vocab": {}, "merges": []},
            },
            "chat_template.jinja": CHAT_TEMPLATE,
        },
        seed=16,
    ),
}


def write_checkpoint(folder: Path, shape: Shape | str = "mixtral") -> Path:
    """Write a checkpoint folder: config.json, shards (with an index if several), and tokenizer files."""
    if isinstance(shape, str):
        shape = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _config(shape))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(shape))
    for name, content in shape.files.items():
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        else:
            _write_json(folder / name, content)
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    _write_shards(folder, make_tensors(shape), shape.shards)
    return folder


def make_tensors(shape: Shape) -> Tensors:
    """Random weights of every tensor, by checkpoint name: (dtype, array in its storage type)."""
    random = np.random.default_rng(shape.seed)
    head = shape.head_dim or shape.config.get("head_dim") or shape.hidden // shape.heads
    queries, keys = shape.heads * head, shape.kv_heads * head
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        sizes[f"{name}.weight"] = (rows, columns)
        if bias:
            sizes[f"{name}.bias"] = (rows,)

    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        sizes[prefix + "input_layernorm.weight"] = (shape.hidden,)
        sizes[prefix + "post_attention_layernorm.weight"] = (shape.hidden,)
        linear(prefix + "self_attn.q_proj", queries, shape.hidden, shape.bias)
        linear(prefix + "self_attn.k_proj", keys, shape.hidden, shape.bias)
        linear(prefix + "self_attn.v_proj", keys, shape.hidden, shape.bias)
        linear(prefix + "self_attn.o_proj", shape.hidden, queries, shape.bias)
        if not shape.experts:
            linear(prefix + "mlp.gate_proj", shape.feed_forward, shape.hidden, shape.bias)
            linear(prefix + "mlp.up_proj", shape.feed_forward, shape.hidden, shape.bias)
            linear(prefix + "mlp.down_proj", shape.hidden, shape.feed_forward, shape.bias)
            continue
        linear(prefix + "block_sparse_moe.gate", shape.experts, shape.hidden, False)
        for expert in range(shape.experts):
            name = f"{prefix}block_sparse_moe.experts.{expert}."
            linear(name + "w1", shape.feed_forward, shape.hidden, False)
            linear(name + "w2", shape.hidden, shape.feed_forward, False)
            linear(name + "w3", shape.feed_forward, shape.hidden, False)
    sizes["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        sizes["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    return {
        name: (shape.dtype, to_storage(random.standard_normal(size, np.float32) * np.float32(0.05), shape.dtype))
        for name, size in sizes.items()
    }


def to_storage(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """float32 in the storage type of a dtype; BF16 by cutting the mantissa, as unsigned integers."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2")
    return values.astype(_STORAGE[dtype])


def _config(shape: Shape) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [_CLASSES[shape.model_type]],
        "model_type": shape.model_type,
        "torch_dtype": _CONFIG_NAMES[shape.dtype],
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
    }
    if shape.experts:
        config |= {"num_local_experts": shape.experts, "num_experts_per_tok": 2}
    if shape.head_dim:
        config["head_dim"] = shape.head_dim
    if shape.bias:
        config |= {"attention_bias": True, "mlp_bias": True}
    return _overlay(config, shape.config)


def _tokenizer_config(shape: Shape) -> dict[str, Any]:
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    }
    return _overlay(config, shape.tokenizer_config)


def _overlay(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Load a JSON file, let `change` alter the object in place, write it back."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    _write_json(path, content)


def _write_shards(folder: Path, tensors: Tensors, count: int) -> None:
    if count == 1:
        write_shard(folder / "model.safetensors", tensors)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(count):
        # Dealt out in turns, so that the experts of a layer lie in different shards.
        part = names[number::count]
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        write_shard(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.nbytes for _, array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def write_shard(path: Path, tensors: Tensors) -> None:
    """Write one safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    write_raw_shard(path, header, b"".join(array.tobytes() for _, array in tensors.values()))


def write_raw_shard(path: Path, header: Any, data: bytes) -> None:
    """A safetensors file from any header (an object, or the bytes themselves) and any data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def read_shard(path: Path) -> Tensors:
    """The tensors of a file that `write_shard` wrote."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors: Tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = content[8 + length + begin : 8 + length + end]
        tensors[name] = (
            entry["dtype"],
            np.frombuffer(raw, _STORAGE[entry["dtype"]]).reshape(entry["shape"]),
        )
    return tensors


_WORDS = (
    "the miller counts seven sacks of barley and writes the number on the door",
    "a river that is slow in summer carries every leaf to the same stone bridge",
    "she asked the clockmaker why the small bell rings before the large one",
    "nobody in the harbour remembers who painted the boats in three colours",
    "磨坊主数了七袋大麦,把数字写在门上。",
    "夏天河水很慢,把每片叶子都带到同一座石桥。",
)


def train_tokenizer(path: Path) -> None:
    """Train the committed tokenizer again (`python -c 'from checkpoints import *; train_tokenizer(…)'`)."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in _WORDS for _ in range(4)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=TOKENIZER_PIECES,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
