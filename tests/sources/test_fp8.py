"""FP8 checkpoints equal the plain ones that they stand for; other quantizations are named and refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from localmix.convert import convert
from localmix.errors import InputError
from localmix.sources.checkpoint import open_checkpoint
from localmix.sources.fp8 import _VALUES
from localmix.sources.quantized import read_scheme
from tests.checkpoints import Shape, Tensors, make_tensors, read_shard, write_checkpoint, write_shard

# All 128 values without a sign, as BF16: torch 2.13, arange(128).view(float8_e4m3fn).to(bfloat16)
E4M3 = (
    "0000003b803bc03b003c203c403c603c803c903ca03cb03cc03cd03ce03cf03c003d103d203d303d403d503d603d703d803d903da03db03d"
    "c03dd03de03df03d003e103e203e303e403e503e603e703e803e903ea03eb03ec03ed03ee03ef03e003f103f203f303f403f503f603f703f"
    "803f903fa03fb03fc03fd03fe03ff03f0040104020403040404050406040704080409040a040b040c040d040e040f0400041104120413041"
    "404150416041704180419041a041b041c041d041e041f0410042104220423042404250426042704280429042a042b042c042d042e042f042"
    "0043104320433043404350436043704380439043a043b043c043d043e043c07f"
)
# float8_e5m2 likewise
E5M2 = (
    "00008037003840388038a038c038e03800392039403960398039a039c039e039003a203a403a603a803aa03ac03ae03a003b203b403b603b"
    "803ba03bc03be03b003c203c403c603c803ca03cc03ce03c003d203d403d603d803da03dc03de03d003e203e403e603e803ea03ec03ee03e"
    "003f203f403f603f803fa03fc03fe03f00402040404060408040a040c040e04000412041404160418041a041c041e0410042204240426042"
    "8042a042c042e04200432043404360438043a043c043e04300442044404460448044a044c044e04400452045404560458045a045c045e045"
    "00462046404660468046a046c046e0460047204740476047807fc07fc07fc07f"
)


def recorded(text: str) -> np.ndarray:
    positive = np.frombuffer(bytes.fromhex(text), "<u2").astype(np.uint32) << 16
    values = positive.view(np.float32)
    return np.concatenate([values, -values])


@pytest.mark.parametrize(("name", "text"), [("F8_E4M3", E4M3), ("F8_E5M2", E5M2)])
def test_all_values_are_those_of_torch(name: str, text: str) -> None:
    assert np.array_equal(_VALUES[name], recorded(text), equal_nan=True)
    assert np.array_equal(np.signbit(_VALUES[name][:255]), np.arange(255) >= 128)


# Neither side of any matrix is a multiple of 128.
SHAPE = Shape(hidden=160, feed_forward=200, layers=1, experts=4, seed=30)
Scales = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
RANDOM = np.random.default_rng(31)


def block_scales(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """As stored, and one for each weight."""
    stored = RANDOM.uniform(0.0005, 0.02, (math.ceil(rows / 128), math.ceil(columns / 128))).astype(np.float32)
    return stored, np.kron(stored, np.ones((128, 128), np.float32))[:rows, :columns]


def row_scales(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    stored = RANDOM.uniform(0.0005, 0.02, (rows, 1)).astype(np.float32)
    return stored, np.broadcast_to(stored, (rows, columns))


def flat_row_scales(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    stored, wide = row_scales(rows, columns)
    return stored[:, 0], wide


def one_scale(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    stored = RANDOM.uniform(0.0005, 0.02, ()).astype(np.float32)
    return stored, np.broadcast_to(stored, (rows, columns))


def to_bf16(values: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def quantized(tensors: Tensors, scales: Scales, ending: str) -> tuple[Tensors, Tensors]:
    """The tensors with the layers' matrices in FP8, and the same ones widened."""
    narrow, wide = dict(tensors), dict(tensors)
    for name, (_, values) in tensors.items():
        if "proj" not in name and "experts" not in name:
            continue
        codes = RANDOM.integers(0, 255, values.shape, np.uint8)
        codes[codes == 127] = 0  # no number
        stored, each = scales(*values.shape)
        narrow[name] = ("F8_E4M3", codes)
        narrow[name + ending] = ("F32", stored)
        narrow[name.removesuffix("weight") + "input_scale"] = ("F32", np.ones((), np.float32))
        wide[name] = ("BF16", to_bf16(recorded(E4M3)[codes] * each))
    return narrow, wide


GROUPS = {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}
CONFIGS: dict[str, tuple[Scales, str, dict[str, Any]]] = {
    "blocks": (block_scales, "_scale_inv", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "compressed-tensors": (row_scales, "_scale", {"quant_method": "compressed-tensors", "config_groups": GROUPS}),
    "fbgemm": (flat_row_scales, "_scale", {"quant_method": "fbgemm_fp8"}),
    "static": (one_scale, "_scale", {"quant_method": "fp8", "activation_scheme": "static"}),
    "modelopt": (one_scale, "_scale", {"quant_method": "modelopt", "quant_algo": "FP8"}),
}


def tensor_bytes(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_the_plain_checkpoint(kind: str, tmp_path: Path) -> None:
    scales, ending, block = CONFIGS[kind]
    narrow, wide = quantized(make_tensors(SHAPE), scales, ending)
    plain = write_checkpoint(tmp_path / "plain", Shape(**{**vars(SHAPE), "shards": 1}))
    write_shard(plain / "model.safetensors", wide)
    small = write_checkpoint(
        tmp_path / "small", Shape(**{**vars(SHAPE), "shards": 1, "config": {"quantization_config": block}})
    )
    write_shard(small / "model.safetensors", narrow)
    converted = convert(small, tmp_path / "small.gguf", threads=1)
    convert(plain, tmp_path / "plain.gguf", threads=1)
    assert tensor_bytes(converted.path) == tensor_bytes(tmp_path / "plain.gguf")
    assert converted.type == "BF16"
    assert any("16 FP8 tensors are widened to BF16" in note for note in converted.notes)
    assert any("16 scales of activations are dropped" in note for note in converted.notes)


def test_slices_of_any_rows_and_scales_as_powers(tmp_path: Path) -> None:
    shape = Shape("llama", hidden=192, feed_forward=300, layers=1, experts=0, dtype="F32", shards=1)
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = write_checkpoint(tmp_path / "model", Shape(**{**vars(shape), "config": {"quantization_config": block}}))
    stored = read_shard(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    codes = RANDOM.integers(0, 127, (300, 192), np.uint8)
    powers = RANDOM.integers(100, 140, (3, 2), np.uint8)
    stored[name] = ("F8_E4M3", codes)
    stored[name + "_scale_inv"] = ("F8_E8M0", powers)
    write_shard(folder / "model.safetensors", stored)
    each = np.kron(2.0 ** (powers.astype(int) - 127), np.ones((128, 128)))[:300, :192]
    expected = recorded(E4M3)[codes] * each.astype(np.float32)
    with open_checkpoint(folder) as source:
        tensor = next(tensor for tensor in source.tensors if tensor.name == "blk.0.ffn_up.weight")
        for start, stop in ((0, 300), (127, 129), (5, 5), (256, 300), (299, 300), (0, 128)):
            assert np.array_equal(source.read(tensor, start, stop), expected[start:stop])


def fp8_folder(tmp_path: Path, change: Callable[[Tensors], object], declared: bool = True) -> Path:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}} if declared else {}
    folder = write_checkpoint(tmp_path / "model", Shape("llama", layers=1, experts=0, shards=1, config=config))
    stored = read_shard(folder / "model.safetensors")
    change(stored)
    write_shard(folder / "model.safetensors", stored)
    return folder


UP = "model.layers.0.mlp.up_proj.weight"
CODES = ("F8_E4M3", np.full((96, 64), 0x38, np.uint8))


def test_a_missing_or_wrong_scale_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'model.layers.0.mlp.up_proj.weight' has 0 scales"):
        open_checkpoint(fp8_folder(tmp_path, lambda stored: stored.update({UP: CODES})))
    wrong = {UP: CODES, UP + "_scale_inv": ("F32", np.ones((3, 1), "<f4"))}
    with pytest.raises(InputError, match=r"\[3, 1\], which do not fit \[96, 64\] in blocks of 128 x 128"):
        open_checkpoint(fp8_folder(tmp_path, lambda stored: stored.update(wrong)))


def test_values_that_stand_for_themselves(tmp_path: Path) -> None:
    folder = fp8_folder(tmp_path, lambda stored: stored.update({UP: CODES}), declared=False)
    with open_checkpoint(folder) as source:
        tensor = next(tensor for tensor in source.tensors if tensor.name == "blk.0.ffn_up.weight")
        assert np.array_equal(source.read(tensor, 0, 2), np.full((2, 64), 0x3F80))


def test_no_number_is_found_while_writing(tmp_path: Path) -> None:
    codes = CODES[1].copy()
    codes[3, 5] = 0xFF
    scale = {UP: ("F8_E4M3", codes), UP + "_scale_inv": ("F32", np.ones((1, 1), "<f4"))}
    folder = fp8_folder(tmp_path, lambda stored: stored.update(scale))
    with pytest.raises(InputError, match=r"blk.0.ffn_up.weight holds nan at row 3, column 5"):
        convert(folder, tmp_path / "out.gguf", threads=1)


REFUSED: dict[str, tuple[Any, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
    "awq": ({"quant_method": "awq"}, "AWQ"),
    "bitsandbytes 4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4 bit"),
    "bitsandbytes 8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8 bit"),
    "hqq": ({"quant_method": "hqq"}, "HQQ"),
    "int4": (
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}},
        "compressed-tensors int4",
    ),
    "mixed": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {**GROUPS, "b": {"weights": {"num_bits": 4, "type": "int"}}},
        },
        "compressed-tensors float8, int4",
    ),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt NVFP4"),
    "mxfp4 elsewhere": ({"quant_method": "mxfp4"}, "MXFP4"),
    "unknown": ({"quant_method": "new\x1bthing"}, "new"),
    "no method": ({"bits": 4}, "quantization_config"),
    "no object": (True, "quantization_config"),
    "a list": ([1], "quantization_config"),
    "groups of nonsense": (
        {"quant_method": "compressed-tensors", "config_groups": {"a": None, "b": {"weights": 3}}},
        "",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_quantizations_are_named_and_refused(kind: str, tmp_path: Path) -> None:
    block, name = REFUSED[kind]
    with pytest.raises(InputError, match="already quantized") as refused:
        read_scheme({"quantization_config": block}, tmp_path / "config.json")
    assert name in refused.value.message and "\x1b" not in refused.value.message
    assert "localmix quantizes it itself" in refused.value.hint


def test_the_base_model_is_told(tmp_path: Path) -> None:
    for head in ("base_model: org/plain-7B", "tags: [a]\nbase_model:\n- org/plain-7B\n"):
        (tmp_path / "README.md").write_text(f"---\n{head}\n---\nbase_model: not/this")
        with pytest.raises(InputError) as refused:
            read_scheme({"quantization_config": {"quant_method": "gptq"}}, tmp_path / "config.json")
        assert refused.value.hint.endswith("README.md names org/plain-7B.")
    (tmp_path / "README.md").write_text("base_model: not/this")
    with pytest.raises(InputError) as refused:
        read_scheme({"quantization_config": {"quant_method": "gptq"}}, tmp_path / "config.json")
    assert "not/this" not in str(refused.value)


def test_plain_weights_have_no_scheme(tmp_path: Path) -> None:
    assert read_scheme(json.loads('{"quantization_config": null}'), tmp_path / "config.json") is None
    assert read_scheme({"quantization_config": {"quant_method": "mxfp4"}}, tmp_path / "c", "mxfp4") is None
