"""Record what PEFT's `merge_and_unload` makes of the adapters of tests/adapters.py, for test_lora.py.

It needs torch and peft; run it in an environment of its own, from the root of the repository:

    python -m venv build/upstream
    build/upstream/bin/pip install torch transformers peft safetensors
    build/upstream/bin/python tests/conformance/record_lora.py

Recorded with torch 2.13 and peft 0.21.2.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.adapters import KINDS, PREFIX, WEIGHTS, Kind, read_checkpoint, write_pair
from tests.checkpoints import Tensors, read_shard

FIXTURE = Path(__file__).parent / "fixtures" / "lora.json"

# Values that are kept of each tensor, evenly over it.
SAMPLES = 12

Values = Mapping[str, npt.NDArray[np.float32]]


def sample(values: npt.NDArray[Any]) -> list[float]:
    """Some values of a tensor."""
    flat = values.reshape(-1)
    return [float(value) for value in flat[np.linspace(0, flat.size - 1, SAMPLES).astype(int)]]


def merge_with_peft(base: Path, adapter: Path, kind: Kind) -> Values:
    """Every tensor of the merged model, by the checkpoint's names, as float32.

    PEFT works on modules, whatever they are: the model is a tree of linear layers and embeddings with the names of
    the checkpoint. So experts are what they are on disk; transformers stacks them.
    """
    import torch
    from peft import PeftModel

    before = read_checkpoint(base)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[next(iter(before.values()))[0]]
    model = build_model(before, read_shard(adapter / WEIGHTS), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(model, adapter)
    _check_used(adapted, adapter)
    merged = adapted.merge_and_unload()
    found = {}
    for name, tensor in merged.state_dict().items():
        # what is held whole stays as precise as it is in the adapter, until the model is saved
        values = tensor.detach().to(dtype).to(torch.float32).numpy()
        if name.endswith(".experts.gate_up_proj"):
            for expert, both in enumerate(values):
                for own, half in zip(("w1", "w3"), np.split(both, 2), strict=True):
                    found[_expert_name(name, expert, own)] = half
        elif name.endswith(".experts.down_proj"):
            for expert, matrix in enumerate(values):
                found[_expert_name(name, expert, "w2")] = matrix
        else:
            found[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = values
    return found


def _expert_name(parameter: str, expert: int, name: str) -> str:
    block = parameter.rpartition(".")[0].replace(".mlp.", ".block_sparse_moe.")
    return f"{block}.{expert}.{name}.weight"


def _check_used(adapted: Any, adapter: Path) -> None:
    """PEFT must know the adapter's names and have taken all of its values."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    written = read_shard(adapter / WEIGHTS)
    assert kept.keys() == written.keys(), sorted(kept.keys() ^ written.keys())
    for name, tensor in kept.items():
        assert np.allclose(tensor.detach().float().numpy(), written[name][1], rtol=2**-7), name


def build_model(base: Tensors, adapter: Tensors, kind: Kind) -> Any:
    """A tree of modules with the names and weights of a checkpoint."""
    import torch

    def values(name: str) -> Any:
        dtype, array = base[name]
        if dtype == "BF16":
            return torch.from_numpy(array.astype(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    root = torch.nn.Module()

    def place(name: str, module: Any) -> None:
        parent = root
        *path, last = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, module)

    experts: dict[str, dict[str, list[Any]]] = {}
    for name in sorted(base):  # experts in the order of their numbers
        module_name, _, last = name.rpartition(".")
        if last == "bias":
            continue
        weight = values(name)
        if kind.stacked and ".experts." in name:
            block, _, leaf = module_name.replace("block_sparse_moe", "mlp").rpartition(".")
            experts.setdefault(block.rpartition(".")[0], {}).setdefault(leaf, []).append(weight)
            continue
        if kind.stacked:
            module_name = module_name.replace("block_sparse_moe", "mlp")
        own = adapter.get(f"{PREFIX}{name}")
        rows = own[1].shape[0] if own is not None else weight.shape[0]
        if module_name.endswith("embed_tokens"):
            module: Any = torch.nn.Embedding(rows, weight.shape[1], dtype=weight.dtype)
        elif weight.ndim == 2:
            bias = f"{module_name}.bias" in base
            module = torch.nn.Linear(weight.shape[1], rows, bias=bias, dtype=weight.dtype)
            if bias:
                module.bias.data = values(f"{module_name}.bias")
        else:
            module = torch.nn.Module()
            module.weight = torch.nn.Parameter(weight)
        if rows == weight.shape[0]:
            module.weight.data = weight
        place(module_name, module)
    for block, matrices in experts.items():
        module = torch.nn.Module()
        gates, ups, downs = (torch.stack(matrices[name]) for name in ("w1", "w3", "w2"))
        module.gate_up_proj = torch.nn.Parameter(torch.cat([gates, ups], dim=1))
        module.down_proj = torch.nn.Parameter(downs)
        place(block, module)
    return root


def main() -> None:
    recorded: dict[str, Any] = {}
    for name, kind in KINDS.items():
        recorded[name] = {}
        for dtype in ("F32", "BF16"):
            with tempfile.TemporaryDirectory() as folder:
                base, adapter = write_pair(Path(folder), name, dtype)
                before = read_checkpoint(base)
                merged = merge_with_peft(base, adapter, kind)
                assert merged.keys() == before.keys(), sorted(merged.keys() ^ before.keys())
                recorded[name][dtype] = {
                    tensor: {"shape": list(values.shape), "samples": sample(values)}
                    for tensor, values in merged.items()
                }
        print(name, len(recorded[name]["F32"]), file=sys.stderr)
    FIXTURE.write_text(json.dumps(recorded) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
