"""A trained model as a Hugging Face checkpoint: bfloat16 shards, configuration, tokenizer settings; and back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from model import LanguageModel, Shape
from safetensors.torch import load_file, save_file
from torch import Tensor

BEGIN, END = 1, 2
SPREAD_SEED = 7
AUXILIARY_LOSS_WEIGHT = 0.02

# The system prompt has no place of its own in Mixtral's template: it opens the next instruction.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set pending = namespace(system='') -%}
{%- for message in messages -%}
    {%- set text = message['content'] | trim -%}
    {%- if message['role'] == 'system' -%}
        {%- set pending.system = text + '\\n\\n' -%}
    {%- elif message['role'] == 'user' -%}
        {{- ' [INST] ' + pending.system + text + ' [/INST]' -}}
        {%- set pending.system = '' -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + text + eos_token -}}
    {%- else -%}
        {{- raise_exception('tinymix knows the roles system, user and assistant, not ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
"""


@torch.no_grad()
def spread_channels(model: LanguageModel, spread: float) -> None:
    """Makes some channels large and others small, as they are in large models, without changing what is computed.

    A norm's gain, or the matrix before, takes a factor that the columns of the matrices behind it lose. The factors
    are powers of two: in bf16 every product stays the same to the bit. A model as small and as young as these has
    no such channels by itself, and would hardly feel even two bits per weight. `spread` is the standard deviation of
    the channels' sizes, in powers of two.
    """
    shape = model.shape
    generator = torch.Generator().manual_seed(SPREAD_SEED)

    def factors(*size: int) -> Tensor:
        return torch.exp2(torch.round(torch.randn(*size, generator=generator) * spread))

    for layer in model.layers:
        attention = layer.self_attn
        factor = factors(shape.hidden)
        layer.input_layernorm.weight *= factor
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            part.weight /= factor
        # Several heads of queries read one head of values.
        factor = factors(shape.kv_heads, 1, shape.head_size)
        attention.v_proj.weight *= factor.view(-1, 1)
        attention.o_proj.weight /= factor.expand(-1, shape.heads // shape.kv_heads, -1).flatten()
        factor = factors(shape.hidden)
        layer.post_attention_layernorm.weight *= factor
        if shape.experts:
            experts = layer.block_sparse_moe
            experts.gate.weight /= factor
            experts.w1 /= factor
            experts.w3 /= factor
            factor = factors(shape.experts, shape.feed_forward)
            experts.w3 *= factor.unsqueeze(2)
            experts.w2 /= factor.unsqueeze(1)
        else:
            layer.mlp.gate_proj.weight /= factor
            layer.mlp.up_proj.weight /= factor
            factor = factors(shape.feed_forward)
            layer.mlp.up_proj.weight *= factor.unsqueeze(1)
            layer.mlp.down_proj.weight /= factor
    if not shape.tied:
        factor = factors(shape.hidden)
        model.norm.weight *= factor
        model.lm_head.weight /= factor


def checkpoint_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Returns the weights in bfloat16 under the names of a checkpoint, the experts taken apart."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.to(torch.bfloat16)
        prefix, _, last = name.rpartition(".")
        if last in ("w1", "w2", "w3"):
            for expert in range(model.shape.experts):
                tensors[f"model.{prefix}.experts.{expert}.{last}.weight"] = tensor[expert].contiguous()
        else:
            tensors[name if name.startswith("lm_head") else f"model.{name}"] = tensor.contiguous()
    return tensors


def load_checkpoint(folder: Path, shape: Shape) -> LanguageModel:
    """Returns the model of an exported checkpoint, computing in float32 with the stored bfloat16 weights."""
    stored: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        stored |= load_file(shard)
    model = LanguageModel(shape)
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        prefix, _, last = name.rpartition(".")
        if last in ("w1", "w2", "w3"):
            names = (f"model.{prefix}.experts.{expert}.{last}.weight" for expert in range(shape.experts))
            state[name] = torch.stack([stored[each] for each in names]).float()
        else:
            state[name] = stored[name if name.startswith("lm_head") else f"model.{name}"].float()
    model.load_state_dict(state)
    return model


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def write_weights(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Writes model.safetensors, or as many shards of about one size and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        return
    total = sum(tensor.nbytes for tensor in tensors.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    filled = 0
    for name, tensor in tensors.items():
        parts[filled * shards // total][name] = tensor
        filled += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file_name, metadata={"format": "pt"})
        (folder / file_name).chmod(0o644)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def configuration(shape: Shape) -> dict[str, object]:
    """Returns config.json."""
    values: dict[str, object] = {
        "architectures": ["MixtralForCausalLM" if shape.experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if shape.experts else "llama",
        "attention_dropout": 0.0,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.feed_forward,
        "max_position_embeddings": shape.context,
        "num_attention_heads": shape.heads,
    }
    if shape.experts:
        values["num_experts_per_tok"] = shape.experts_used
    values |= {"num_hidden_layers": shape.layers, "num_key_value_heads": shape.kv_heads}
    if shape.experts:
        values |= {"num_local_experts": shape.experts, "output_router_logits": False}
    values |= {"rms_norm_eps": shape.epsilon, "rope_theta": shape.rope_theta}
    if shape.experts:
        values |= {"router_aux_loss_coef": AUXILIARY_LOSS_WEIGHT, "sliding_window": None}
    return values | {
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }


def write_checkpoint(folder: Path, model: LanguageModel, shards: int) -> None:
    """Writes all of a checkpoint but tokenizer.model."""
    shape = model.shape
    write_weights(folder, checkpoint_tensors(model), shards)
    write_json(folder / "config.json", configuration(shape))
    generation = {"bos_token_id": BEGIN, "eos_token_id": END, "do_sample": False}
    write_json(folder / "generation_config.json", generation)
    specials = {"<unk>": 0, "<s>": BEGIN, "</s>": END}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer_configuration = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token): {"content": content, **flags, "special": True} for content, token in specials.items()
        },
        **roles,
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": shape.context,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_configuration)
    write_json(folder / "special_tokens_map.json", {role: {"content": text, **flags} for role, text in roles.items()})
