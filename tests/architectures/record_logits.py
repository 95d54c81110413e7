"""Record what transformers computes with the models of tests/model_families.py, for test_logits.py.

It needs torch and transformers; run it in an environment of its own, from the root of the repository:

    python -m venv /tmp/upstream
    /tmp/upstream/bin/pip install torch transformers
    /tmp/upstream/bin/python tests/architectures/record_logits.py [MODEL…]

Recorded with torch 2.13 and transformers 5.23.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.model_families import CONFIGS, write_model

LOGITS = Path(__file__).parent / "fixtures" / "logits.json"

# Any tokens; enough of them that positions, windows and experts differ.
TOKENS = [(7 * place * place + 3 * place + 5) % 384 for place in range(48)]

# Kept are these positions, and every so many-th token of the vocabulary.
POSITIONS = (0, 1, 17, 47)
STRIDE = 16


def compute(folder: Path) -> list[list[float]]:
    """Logits of transformers in float32, `[positions, tokens]`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found = model.eval()(torch.tensor([TOKENS])).logits[0, list(POSITIONS), ::STRIDE]
    # Logits that are all alike would be equal to anything.
    assert found.std() > 0.3, f"{folder.name}: the logits hardly differ ({found.std()})"
    return [[round(value, 5) for value in row] for row in found.tolist()]


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
