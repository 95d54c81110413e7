"""gpt-oss in MXFP4: packed experts are widened exactly and pack to the same values again; broken ones stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localmix.convert import convert
from localmix.errors import InputError
from localmix.presets import load_presets
from localmix.quantize import quantize
from localmix.sources.open import open_source
from tests.checkpoints import edit_json, read_shard, write_shard
from tests.model_families import write_model

# The value of each code, by the definition: sign, two bits of exponent, one of mantissa.
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def packed_model(folder: Path) -> dict[str, Any]:
    """A gpt-oss with random packed experts; returns what the experts weigh, by name."""
    write_model(folder, "gpt_oss")
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "mxfp4"}))
    stored, weights = read_shard(folder / "model.safetensors"), {}
    random = np.random.default_rng(5)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(name)[1].shape  # the packed form is not transposed
        blocks = random.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        scales = random.integers(118, 124, (experts, rows, columns // 32), np.uint8)
        stored[name + "_blocks"], stored[name + "_scales"] = ("U8", blocks), ("U8", scales)
        wide = np.empty((experts, rows, columns), np.float32)
        for place in np.ndindex(blocks.shape):
            expert, row, group, byte = place
            for half, code in enumerate((int(blocks[place]) & 15, int(blocks[place]) >> 4)):
                value = VALUES[code & 7] * (-1.0 if code & 8 else 1.0) * 2.0 ** (int(scales[place[:3]]) - 127)
                wide[expert, row, group * 32 + byte * 2 + half] = value
        weights[name] = wide
    write_shard(folder / "model.safetensors", stored)
    return weights


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("packed") / "model"
    return folder, packed_model(folder)


def tensor_of(path: Path, name: str) -> Any:
    import gguf

    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return gguf.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_widened_exactly(made: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str) -> None:
    folder, weights = made
    convert(folder, tmp_path / "out.gguf", kind, threads=1)
    for layer in range(3):
        both = weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        down = weights[f"model.layers.{layer}.mlp.experts.down_proj"]
        expected = {"gate": both[:, ::2], "up": both[:, 1::2], "down": down}
        for name, values in expected.items():
            found = tensor_of(tmp_path / "out.gguf", f"blk.{layer}.ffn_{name}_exps.weight")
            assert np.array_equal(found.reshape(values.shape), values)


def test_packed_again_without_loss(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, weights = made
    quantize(folder, [(load_presets().find("MXFP4_MOE"), tmp_path / "out.gguf")], threads=1)
    values = weights["model.layers.1.mlp.experts.gate_up_proj"][:, ::2]
    found = tensor_of(tmp_path / "out.gguf", "blk.1.ffn_gate_exps.weight")
    assert np.array_equal(found.reshape(values.shape), values)


def test_slices_are_parts_of_the_whole(made: tuple[Path, dict[str, Any]]) -> None:
    with open_source(made[0]) as source:
        tensor = next(tensor for tensor in source.tensors if tensor.name == "blk.0.ffn_up_exps.weight")
        whole = source.read(tensor, 0, tensor.rows)
        for start, stop in ((0, 1), (5, 100), (95, 97), (tensor.rows - 1, tensor.rows), (7, 7)):
            assert np.array_equal(source.read(tensor, start, stop), whole[start:stop])


NAME = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda stored: stored.pop(NAME + "_scales"), "down_proj_blocks has no scales that fit it"),
        (lambda stored: stored.pop(NAME + "_blocks"), "already quantized .MXFP4.*down_proj_scales"),
        (
            lambda stored: stored.update({NAME + "_scales": ("U8", np.zeros((4, 64), np.uint8))}),
            "down_proj_blocks has no scales that fit it",
        ),
    ],
)
def test_broken(tmp_path: Path, damage: Callable[[Any], object], problem: str) -> None:
    folder = tmp_path / "model"
    packed_model(folder)
    stored = read_shard(folder / "model.safetensors")
    damage(stored)
    write_shard(folder / "model.safetensors", stored)
    with pytest.raises(InputError, match=problem):
        open_source(folder)


def test_scale_that_is_no_number(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    packed_model(folder)
    stored = read_shard(folder / "model.safetensors")
    scales = stored[NAME + "_scales"][1].copy()
    scales[0, 0, 0] = 255
    write_shard(folder / "model.safetensors", {**stored, NAME + "_scales": ("U8", scales)})
    with pytest.raises(InputError, match=r"down_proj_blocks has a scale that is no number"):
        convert(folder, tmp_path / "out.gguf", "bf16", threads=1)


def test_other_models_stay_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen3_moe")
    for method in ("mxfp4", "gptq"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
        with pytest.raises(InputError, match=f"already quantized .{method.upper()}"):
            open_source(folder)
