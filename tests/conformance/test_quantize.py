"""Quantized tensors against `llama-quantize`'s, byte for byte, and the imatrix file as it reads it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest

from localmix.gguf_format import read_header
from localmix.importance import Entry, Importance, write_importance
from localmix.presets import Preset, load_presets
from localmix.quantize import quantize
from localmix.sources.open import open_source
from tests.random_model import write_random_model

pytestmark = pytest.mark.upstream

# What llama.cpp marks as needing an importance matrix, and what it takes without
WITHOUT_IMATRIX = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "Q2_K", "TQ1_0", "TQ2_0", "MXFP4_MOE"),
    *("Q2_0", "F16", "F32"),
)
WITH_IMATRIX = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_XS", "IQ2_XXS"),
    *("Q2_K_S", "Q5_1", "Q4_1", "Q4_K_S", "IQ4_NL", "IQ4_XS", "IQ3_XS", "IQ3_M", "IQ3_S", "IQ2_M", "IQ2_S"),
    *("IQ1_M", "IQ1_S"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Mixtral shape in BF16, and a dense F16 model whose feed-forward columns fit no block of 256."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "mixtral": write_random_model(folder / "mixtral.gguf", layers=1, kind=gguf.GGMLQuantizationType.BF16),
        "dense": write_random_model(
            folder / "dense.gguf", experts=0, feed_forward=352, kind=gguf.GGMLQuantizationType.F16, layers=4
        ),
    }


def random_importance(model: Path, path: Path) -> Path:
    """Plausible sums for every matrix of the blocks, and one expert that no token reached."""
    random = np.random.default_rng(7)
    entries = {}
    with open_source(model) as source:
        for tensor in source.tensors:
            if tensor.name.startswith("blk.") and "norm" not in tensor.name and "gate_inp" not in tensor.name:
                experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
                sums = random.chisquare(2, (experts, tensor.columns)).astype(np.float32) * 100
                counts = np.full(experts, 128, np.float32)
                if experts > 1:
                    sums[3], counts[3] = 0, 0
                entries[tensor.name] = Entry(sums, counts)
    write_importance(path, Importance(entries, ["random"], chunk_count=4, chunk_size=512))
    return path


def run_upstream(upstream: Path, model: Path, output: Path, kind: str, imatrix: Path | None) -> None:
    command = [str(upstream / "llama-quantize"), *(["--imatrix", str(imatrix)] if imatrix else [])]
    done = subprocess.run([*command, str(model), str(output), kind, "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def assert_equal_models(ours: Path, theirs: Path) -> None:
    """The same tensors with the same types and bytes, and the same metadata.

    Read with our own reader (which test_gguf_format holds against gguf-py's), since gguf-py knows no Q2_0.
    """
    mine, other = read_header(ours), read_header(theirs)
    data = [np.memmap(path, np.uint8, "r") for path in (ours, theirs)]
    found = {stored.info.name: stored for stored in mine.tensors}
    assert sorted(found) == sorted(stored.info.name for stored in other.tensors)
    for stored in other.tensors:
        match = found[stored.info.name]
        assert match.info == stored.info
        assert np.array_equal(
            data[0][match.offset : match.offset + match.bytes], data[1][stored.offset : stored.offset + stored.bytes]
        ), stored.info.name
    # upstream writes the whole path of the imatrix, which is nobody's business but its owner's
    for header in (mine, other):
        header.metadata.pop("quantize.imatrix.file", None)
    assert mine.metadata == other.metadata


def presets(*names: str) -> list[Preset]:
    return [load_presets().find(name) for name in names]


@pytest.mark.parametrize("shape", ["mixtral", "dense"])
def test_bytes_without_imatrix(shape: str, models: dict[str, Path], upstream: Path, tmp_path: Path) -> None:
    outputs = [(preset, tmp_path / f"{preset.name}.gguf") for preset in presets(*WITHOUT_IMATRIX)]
    quantize(models[shape], outputs, threads=2)
    for preset, path in outputs:
        expected = tmp_path / "expected.gguf"
        run_upstream(upstream, models[shape], expected, preset.name, None)
        assert_equal_models(path, expected)


@pytest.mark.parametrize("shape", ["mixtral", "dense"])
def test_bytes_with_imatrix(shape: str, models: dict[str, Path], upstream: Path, tmp_path: Path) -> None:
    imatrix = random_importance(models[shape], tmp_path / "imatrix.gguf")
    outputs = [(preset, tmp_path / f"{preset.name}.gguf") for preset in presets(*WITH_IMATRIX)]
    quantize(models[shape], outputs, imatrix=imatrix, upstream_imatrix=True, threads=2)
    for preset, path in outputs:
        expected = tmp_path / "expected.gguf"
        run_upstream(upstream, models[shape], expected, preset.name, imatrix)
        assert_equal_models(path, expected)


def test_every_preset_is_covered_here() -> None:
    """Q1_0 cannot be a dense model's with 352 columns, BF16 is tested by convert."""
    upstream_names = {name for name in load_presets().presets if "-" not in name} - {"COPY"}
    assert upstream_names == {*WITHOUT_IMATRIX, *WITH_IMATRIX, "Q1_0", "BF16"}


def test_bytes_of_q1_0(models: dict[str, Path], upstream: Path, tmp_path: Path) -> None:
    quantize(models["mixtral"], [(load_presets().find("Q1_0"), tmp_path / "ours.gguf")])
    run_upstream(upstream, models["mixtral"], tmp_path / "theirs.gguf", "Q1_0", None)
    assert_equal_models(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
