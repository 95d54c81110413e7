"""What checkpoints of each family hold, as transformers writes them: tensor names with sizes, and config.json."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import CHAT_TEMPLATE, TOKENIZER, to_storage, write_shard

# 384 tokens of bytes split as Qwen 2 does; written by `byte_level` of small_tokenizers.py, and kept because another
# version of the library may break ties differently.
BYTE_LEVEL = Path(__file__).parent / "fixtures" / "byte_level.json"

# 380 tokens of BERT's kind, by `word_piece` there.
WORD_PIECE = Path(__file__).parent / "fixtures" / "word_piece.json"

# How sentence-transformers says that the vectors of tokens become one.
_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]

Sizes = dict[str, tuple[int, ...]]

# The numbers of all families; config.json and sizes follow from them.
NUMBERS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 384,
}

_DECODER = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32"}
_BYTES = {"bos_token_id": 0, "eos_token_id": 1}
_PIECES = {"bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

_GEMMA3 = {
    **_DECODER,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": ...,
    "num_hidden_layers": 7,
    "tie_word_embeddings": True,
    "head_dim": 24,
    "query_pre_attn_scalar": 24,
    "sliding_window": 16,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
}
_DEEPSEEK = {
    **_EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "aux_loss_alpha": 0.001,
}
_FOLDED = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
}
_PHI3 = {"architectures": ["Phi3ForCausalLM"], "pad_token_id": 0, "sliding_window": None}

# model_type and a word that tells variants apart → what its config.json says beyond the numbers.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_DECODER, **_PIECES, "architectures": ["LlamaForCausalLM"], "head_dim": 24},
    "llama 3": {
        **_DECODER,
        **_BYTES,
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {**_DECODER, **_PIECES, "architectures": ["MistralForCausalLM"], "sliding_window": None},
    "mixtral": {**_DECODER, **_PIECES, **_EXPERTS, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
    "qwen2": {**_DECODER, **_BYTES, "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6},
    "qwen2_moe": {
        **_DECODER,
        **_BYTES,
        **_EXPERTS,
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": 4,
        "shared_expert_intermediate_size": 80,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
    },
    "qwen3": {
        **_DECODER,
        **_BYTES,
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 24,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        **_DECODER,
        **_BYTES,
        **_EXPERTS,
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 24,
        "num_experts": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "gemma2": {
        **_DECODER,
        **_PIECES,
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "head_dim": 24,
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        **_GEMMA3,
        **_PIECES,
        "architectures": ["Gemma3ForCausalLM"],
        "rope_scaling": None,
    },
    "gemma3": {
        **_PIECES,
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {
            **NUMBERS,
            **_GEMMA3,
            "model_type": "gemma3_text",
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "torch_dtype": "float32",
    },
    "phi3": {**_DECODER, **_PIECES, **_PHI3, "original_max_position_embeddings": 512},
    "phi3 long": {
        **_DECODER,
        **_PIECES,
        **_PHI3,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0, 1.1, 1.3, 2.0, 4.0, 8.0],
            "short_factor": [1.0, 1.0, 1.05, 1.1, 1.2, 1.5],
        },
    },
    "olmo2": {
        **_DECODER,
        **_BYTES,
        "architectures": ["Olmo2ForCausalLM"],
        "rope_theta": 500000.0,
        "attention_bias": False,
    },
    "deepseek": {
        **_DECODER,
        **_PIECES,
        **_DEEPSEEK,
        "architectures": ["DeepseekForCausalLM"],
        "scoring_func": "softmax",
    },
    "deepseek_v2": {
        **_DECODER,
        **_BYTES,
        **_DEEPSEEK,
        **_FOLDED,
        "q_lora_rank": 40,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "deepseek_v2 lite": {
        **_DECODER,
        **_BYTES,
        **_DEEPSEEK,
        **_FOLDED,
        "q_lora_rank": None,
        "num_hidden_layers": 26,
        "hidden_size": 32,
        "n_routed_experts": 2,
    },
    "gpt_oss": {
        **_DECODER,
        **_BYTES,
        "architectures": ["GptOssForCausalLM"],
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attention_bias": True,
        "rope_theta": 150000.0,
        "swiglu_limit": 7.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 128,
        },
    },
    "bert": {
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "num_key_value_heads": ...,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    },
}


def config_of(model: str) -> dict[str, Any]:
    """config.json of a model of `CONFIGS`."""
    return _without_gaps({"model_type": model.split()[0], **NUMBERS, **CONFIGS[model]})


def _without_gaps(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the keys whose value is `...`."""
    return {
        key: _without_gaps(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value is not ...
    }


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """Names and sizes of the tensors that a checkpoint of this config.json holds."""
    if "text_config" in config:
        text = sizes_of(config["text_config"])
        return {name.replace("model.", "model.language_model.", 1): size for name, size in text.items()} | _VISION
    if config["model_type"] == "bert":
        return _bert(config)
    sizes: Sizes = {"model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"])}
    for layer in range(config["num_hidden_layers"]):
        for name, size in _layer(config, layer).items():
            sizes[f"model.layers.{layer}.{name}"] = size
    sizes["model.norm.weight"] = (config["hidden_size"],)
    if not config["tie_word_embeddings"]:
        sizes["lm_head.weight"] = sizes["model.embed_tokens.weight"]
    return sizes


def _bert(config: Mapping[str, Any]) -> Sizes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    norm = {"LayerNorm.weight": (hidden,), "LayerNorm.bias": (hidden,)}
    layer: Sizes = {f"attention.output.{name}": size for name, size in norm.items()}
    layer |= {f"output.{name}": size for name, size in norm.items()}
    matrices = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
    matrices |= {"attention.output.dense": (hidden, hidden)}
    matrices |= {"intermediate.dense": (inner, hidden), "output.dense": (hidden, inner)}
    for name, (rows, columns) in matrices.items():
        layer |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    sizes: Sizes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
        "pooler.dense.weight": (hidden, hidden),
        "pooler.dense.bias": (hidden,),
        **{f"embeddings.{name}": size for name, size in norm.items()},
    }
    for number in range(config["num_hidden_layers"]):
        sizes |= {f"encoder.layer.{number}.{name}": size for name, size in layer.items()}
    return sizes


_VISION: Sizes = {
    "model.multi_modal_projector.mm_input_projection_weight": (32, 64),
    "model.multi_modal_projector.mm_soft_emb_norm.weight": (32,),
    "model.vision_tower.post_layernorm.weight": (32,),
}


def _layer(config: Mapping[str, Any], layer: int) -> Sizes:
    kind, hidden = config["model_type"], config["hidden_size"]
    norms = _NORMS.get(kind, ("input_layernorm", "post_attention_layernorm"))
    sizes: Sizes = {f"{name}.weight": (hidden,) for name in norms}
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    rows = {"q": queries, "k": keys, "v": keys}
    sizes |= {f"self_attn.{name}_proj.weight": (count, hidden) for name, count in rows.items()}
    sizes["self_attn.o_proj.weight"] = (hidden, queries)
    if kind.startswith("qwen2"):
        sizes |= {f"self_attn.{name}_proj.bias": (count,) for name, count in rows.items()}
    if kind == "gpt_oss":
        sizes |= {f"self_attn.{name}_proj.bias": (count,) for name, count in {**rows, "o": hidden}.items()}
        experts, inner = config["num_local_experts"], config["intermediate_size"]
        return sizes | {
            "self_attn.sinks": (config["num_attention_heads"],),
            "mlp.router.weight": (experts, hidden),
            "mlp.router.bias": (experts,),
            "mlp.experts.gate_up_proj": (experts, hidden, 2 * inner),
            "mlp.experts.gate_up_proj_bias": (experts, 2 * inner),
            "mlp.experts.down_proj": (experts, inner, hidden),
            "mlp.experts.down_proj_bias": (experts, hidden),
        }
    if kind == "deepseek_v2":
        sizes = {name: (hidden,) for name in list(sizes)[:2]} | _folded(config)
    if kind == "olmo2":
        sizes |= {"self_attn.q_norm.weight": (queries,), "self_attn.k_norm.weight": (keys,)}
    if kind.startswith(("qwen3", "gemma3")):
        sizes |= {f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
    if kind == "phi3":
        sizes = {
            name: size
            for name, size in sizes.items()
            if name[:12] not in ("self_attn.q_", "self_attn.k_", "self_attn.v_")
        }
        sizes["self_attn.qkv_proj.weight"] = (queries + 2 * keys, hidden)
        sizes["mlp.gate_up_proj.weight"] = (2 * config["intermediate_size"], hidden)
        sizes["mlp.down_proj.weight"] = (hidden, config["intermediate_size"])
    elif kind == "mixtral":
        sizes["block_sparse_moe.gate.weight"] = (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
            for name, size in _mlp("", hidden, config["intermediate_size"]).items():
                own = names[name.removesuffix(".weight")]
                sizes[f"block_sparse_moe.experts.{expert}.{own}.weight"] = size
    elif "moe_intermediate_size" in config and layer >= config.get("first_k_dense_replace", 0):
        experts = config.get("num_experts") or config["n_routed_experts"]
        sizes["mlp.gate.weight"] = (experts, hidden)
        if kind.startswith("deepseek"):
            sizes |= _mlp("mlp.shared_experts.", hidden, config["n_shared_experts"] * config["moe_intermediate_size"])
        for expert in range(experts):
            sizes |= _mlp(f"mlp.experts.{expert}.", hidden, config["moe_intermediate_size"])
        if kind == "qwen2_moe":
            sizes |= _mlp("mlp.shared_expert.", hidden, config["shared_expert_intermediate_size"])
            sizes["mlp.shared_expert_gate.weight"] = (1, hidden)
    else:
        sizes |= _mlp("mlp.", hidden, config["intermediate_size"])
    return sizes


def _folded(config: Mapping[str, Any]) -> Sizes:
    """Attention of DeepSeek V2."""
    heads, hidden, rank = config["num_attention_heads"], config["hidden_size"], config["kv_lora_rank"]
    plain, rotated, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    sizes: Sizes = {
        "self_attn.kv_a_proj_with_mqa.weight": (rank + rotated, hidden),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (heads * (plain + value), rank),
        "self_attn.o_proj.weight": (hidden, heads * value),
    }
    queries = heads * (plain + rotated)
    if config["q_lora_rank"] is None:
        return sizes | {"self_attn.q_proj.weight": (queries, hidden)}
    return sizes | {
        "self_attn.q_a_proj.weight": (config["q_lora_rank"], hidden),
        "self_attn.q_a_layernorm.weight": (config["q_lora_rank"],),
        "self_attn.q_b_proj.weight": (queries, config["q_lora_rank"]),
    }


_AROUND_BOTH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_NORMS = {
    "gemma2": _AROUND_BOTH,
    "gemma3_text": _AROUND_BOTH,
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


def _mlp(prefix: str, hidden: int, inner: int) -> Sizes:
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }


def write_model(folder: Path, model: str) -> Path:
    """Write the checkpoint of a model of `CONFIGS`, with weights large enough that its logits differ."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(model)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder, config)
    tied = config.get("text_config", config)["tie_word_embeddings"]
    random = np.random.default_rng(zlib.crc32(model.encode()))
    tensors = {}
    for name, size in sizes_of(config).items():
        values = random.standard_normal(size, np.float32)
        if len(size) == 1:
            # Gemma adds the 1 itself.
            values = values / np.float32(10) + np.float32("norm" in name.lower() and "gemma" not in model)
        elif "embed" not in name or tied:  # as output, an embedding gives logits about 1
            values /= np.float32(np.sqrt(size[-1]))
        tensors[name] = ("F32", to_storage(values, "F32"))
    write_shard(folder / "model.safetensors", tensors)
    return folder


def _write_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    """A tokenizer that fits: sentencepiece where 1 begins a text, else bytes."""
    settings: dict[str, Any] = {"chat_template": CHAT_TEMPLATE}
    if config["model_type"] == "bert":
        (folder / "tokenizer.json").write_bytes(WORD_PIECE.read_bytes())
        names = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
        settings = {f"{kind}_token": token for kind, token in names.items()}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "modules.json").write_text(json.dumps(_MODULES))
        (folder / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    elif config["bos_token_id"] == 1:
        (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
        settings |= {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "add_bos_token": True,
            "tokenizer_class": "LlamaTokenizer",
        }
    else:
        (folder / "tokenizer.json").write_bytes(BYTE_LEVEL.read_bytes())
        settings |= {"bos_token": "<|begin|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
