from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from localmix.errors import InputError, UsageError
from localmix.gguf_format import read_header
from localmix.importance import Entry, Importance, write_importance
from localmix.presets import load_presets
from localmix.quantize import parse_override, parse_rule, quantize
from localmix.sources.open import open_source
from localmix.tensor_types import TensorType
from tests.random_model import write_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(
        tmp_path_factory.mktemp("model") / "model.gguf", layers=1, kind=gguf.GGMLQuantizationType.BF16
    )


def test_a_split_output_reads_back_as_one_model(model: Path, tmp_path: Path) -> None:
    preset = load_presets().find("Q8_0")
    whole = quantize(model, [(preset, tmp_path / "whole.gguf")]).outputs[0]
    split = quantize(model, [(preset, tmp_path / "split.gguf")], split_bytes=1_000_000).outputs[0]
    assert whole.parts == (tmp_path / "whole.gguf",)
    assert len(split.parts) > 2
    assert split.path.name == f"split-00001-of-{len(split.parts):05d}.gguf"
    # one stacked tensor is larger than the limit; whatever is smaller keeps to it
    assert sorted(path.stat().st_size for path in split.parts)[0] < 1_000_000
    with open_source(whole.path) as one, open_source(split.parts[1]) as other:
        assert [info.name for info in one.tensors] == [info.name for info in other.tensors]
        assert one.metadata == other.metadata
        for left, right in zip(one.tensors, other.tensors, strict=True):
            np.testing.assert_array_equal(one.read(left, 0, left.rows), other.read(right, 0, right.rows))


def test_llama_cpp_loads_a_split_output(model: Path, tmp_path: Path) -> None:
    preset = load_presets().find("Q8_0")
    split = quantize(model, [(preset, tmp_path / "split.gguf")], split_bytes=1_000_000).outputs[0]
    from localmix.native.model import Model

    with open_source(model) as source, Model(split.path) as loaded:
        assert loaded.parameters == source.parameters


def test_a_missing_part_is_named(model: Path, tmp_path: Path) -> None:
    split = quantize(model, [(load_presets().find("Q8_0"), tmp_path / "s.gguf")], split_bytes=1_000_000).outputs[0]
    split.parts[1].unlink()
    with pytest.raises(InputError, match=split.parts[1].name):
        open_source(split.path)


def test_metadata_can_be_overridden(model: Path, tmp_path: Path) -> None:
    specs = ["llama.context_length=int:99", "a.new=str:words: and = signs", "b.real=float:0.5", "c.flag=bool:true"]
    quantize(
        model,
        [(load_presets().find("COPY"), tmp_path / "out.gguf")],
        overrides=[parse_override(spec) for spec in specs],
    )
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert [fields[key].contents() for key in ("llama.context_length", "a.new", "b.real", "c.flag")] == [
        99,
        "words: and = signs",
        0.5,
        True,
    ]


def test_copy_keeps_every_tensor(model: Path, tmp_path: Path) -> None:
    quantize(model, [(load_presets().find("Q4_K"), tmp_path / "q4.gguf")])
    quantize(tmp_path / "q4.gguf", [(load_presets().find("COPY"), tmp_path / "copy.gguf")])
    before, after = (gguf.GGUFReader(tmp_path / name) for name in ("q4.gguf", "copy.gguf"))
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert one.tensor_type == other.tensor_type
        np.testing.assert_array_equal(one.data, other.data)


def test_requantizing_is_refused_and_can_be_forced(model: Path, tmp_path: Path) -> None:
    quantize(model, [(load_presets().find("Q4_K"), tmp_path / "q4.gguf")])
    with pytest.raises(InputError, match="already quantized"):
        quantize(tmp_path / "q4.gguf", [(load_presets().find("F32"), tmp_path / "f32.gguf")])
    quantize(tmp_path / "q4.gguf", [(load_presets().find("F32"), tmp_path / "f32.gguf")], allow_requantize=True)
    # gguf-py's decoder is the judge of ours
    wide = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "f32.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "q4.gguf").tensors:
        expected = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(wide[tensor.name], expected.reshape(wide[tensor.name].shape), rtol=1e-6, atol=1e-9)


def test_an_unreached_expert_is_said_and_gets_the_mean(model: Path, tmp_path: Path) -> None:
    header = read_header(model)
    entries = {}
    for stored in header.tensors:
        if stored.info.name.startswith("blk.") and "norm" not in stored.info.name and "inp" not in stored.info.name:
            experts = stored.info.shape[0] if len(stored.info.shape) == 3 else 1
            sums = np.random.default_rng(1).chisquare(1, (experts, stored.info.columns)).astype(np.float32)
            counts = np.ones(experts, np.float32)
            counts[5 % experts] = 0 if experts > 1 else 1
            entries[stored.info.name] = Entry(sums, counts)
    imatrix = tmp_path / "imatrix.gguf"
    write_importance(imatrix, Importance(entries, ["x"], 1, 512))
    preset = load_presets().find("IQ3_XXS")
    ours = quantize(model, [(preset, tmp_path / "mean.gguf")], imatrix=imatrix)
    theirs = quantize(model, [(preset, tmp_path / "ones.gguf")], imatrix=imatrix, upstream_imatrix=True)
    assert "Layer 0: no calibration token reached expert 5, so the mean" in ours.notes[0]
    assert "blk.0.ffn_down_exps.weight" in ours.notes[0]
    assert "every column counts the same" in theirs.notes[0]
    down = "blk.0.ffn_down_exps.weight"
    one, other = (
        next(tensor.data for tensor in gguf.GGUFReader(tmp_path / name).tensors if tensor.name == down)
        for name in ("mean.gguf", "ones.gguf")
    )
    assert [bool((one[expert] == other[expert]).all()) for expert in range(8)] == [*[True] * 5, False, True, True]


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    planned = quantize(model, [(load_presets().find("Q4_K"), tmp_path / "q4.gguf")], dry_run=True).outputs[0]
    assert not list(tmp_path.iterdir())
    done = quantize(model, [(load_presets().find("Q4_K"), tmp_path / "q4.gguf")]).outputs[0]
    assert planned == done


def test_rules_and_overrides_are_read_strictly() -> None:
    assert parse_rule("a=b=Q6_K").tensor == "a=b"
    assert parse_rule("attn_v=q8_0").type == TensorType.Q8_0
    for spec in ("attn_v", "=Q8_0", "attn_v=Q9"):
        with pytest.raises(UsageError):
            parse_rule(spec)
    for spec in ("key", "key=int", "key=int:x", "key=bool:maybe", "=int:3", "key=list:1"):
        with pytest.raises(UsageError):
            parse_override(spec)


@pytest.mark.parametrize("typed", ["int:-5", "int:4294967296", "float:1e300", "float:-inf", "float:nan"])
def test_an_override_out_of_range_is_refused(typed: str) -> None:
    with pytest.raises(UsageError, match="is no number from"):
        parse_override(f"llama.context_length={typed}")


def test_the_largest_overrides() -> None:
    assert parse_override("k=int:4294967295")[1].value == (1 << 32) - 1
    assert parse_override("k=float:3.4028234e38")[1].value == pytest.approx(3.4028234e38)
