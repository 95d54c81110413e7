"""Record what transformers computes with the models of tests/model_families.py, for test_logits.py.

It needs torch and transformers; run it in an environment of its own, from the root of the repository:

    python -m venv upstream
    upstream/bin/pip install torch transformers
    upstream/bin/python tests/architectures/record_logits.py [MODEL…]

Recorded with torch 2.13 and transformers 5.23.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.model_families import CONFIGS, write_model

LOGITS = Path(__file__).parent / "fixtures" / "logits.json"

# Any tokens; enough of them that positions, windows and experts differ.
TOKENS = [(7 * place * place + 3 * place + 5) % 384 for place in range(48)]

# Kept are these positions, and every so many-th token of the vocabulary.
POSITIONS = (0, 1, 17, 47)
STRIDE = 16


def compute(folder: Path) -> list[list[float]]:
    """Logits of transformers in float32, `[positions, tokens]`; vectors of the tokens where there are none."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind == "deepseek":
        model = first_deepseek(folder)
    else:
        maker = AutoModel if kind == "bert" else AutoModelForCausalLM
        model = maker.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        output = model.eval()(torch.tensor([TOKENS]))
    rows = output.last_hidden_state if kind == "bert" else output.logits
    found = rows[0, list(POSITIONS), ::STRIDE]
    # Logits that are all alike would be equal to anything.
    assert found.std() > 0.3, f"{folder.name}: the logits hardly differ ({found.std()})"
    return [[round(value, 5) for value in row] for row in found.tolist()]


def first_deepseek(folder: Path) -> Any:
    """The first DeepSeek, which transformers lacks: its Llama, with the mixtures of its DeepSeek V2."""
    import torch
    from safetensors.torch import load_file
    from transformers import DeepseekV2Config, LlamaConfig, LlamaForCausalLM
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = json.loads((folder / "config.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**{**config, "model_type": "llama"}))
    weights = load_file(folder / "model.safetensors")
    mixture = DeepseekV2Config(
        **{**config, "model_type": "deepseek_v2", "num_local_experts": config["n_routed_experts"]}
    )
    for number, layer in enumerate(model.model.layers):
        if number >= config["first_k_dense_replace"]:
            layer.mlp = DeepseekV2Moe(mixture)
            prefix = f"model.layers.{number}.mlp.experts."
            parts = [
                [weights.pop(f"{prefix}{expert}.{name}_proj.weight") for expert in range(config["n_routed_experts"])]
                for name in ("gate", "up", "down")
            ]
            weights[prefix + "gate_up_proj"] = torch.cat([torch.stack(parts[0]), torch.stack(parts[1])], 1)
            weights[prefix + "down_proj"] = torch.stack(parts[2])
    model.load_state_dict(weights)
    return model


def main(models: list[str]) -> None:
    found = json.loads(LOGITS.read_text()) if LOGITS.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for model in models or CONFIGS:
            found[model] = compute(write_model(Path(scratch) / model, model))
    LOGITS.parent.mkdir(exist_ok=True)
    rows = [f" {json.dumps(model)}: {json.dumps(found[model])}" for model in CONFIGS if model in found]
    LOGITS.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
