"""Files as older programs wrote them: read as what they would be today, and refused where something is missing."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from localmix.convert import convert
from localmix.errors import FileError, InputError
from localmix.native.model import Context, Model
from localmix.presets import load_presets
from localmix.quantize import quantize
from localmix.sources.base import TensorInfo
from localmix.sources.gguf import GGUFFile
from localmix.sources.joined import find_pieces, whole_name
from localmix.sources.legacy import common_type, stack_experts
from localmix.tensor_types import TensorType
from tests.old_files import as_version_1, cut, write_with_single_experts


@pytest.fixture(scope="module")
def quantized(tinymix_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tinymix in Q4_K_M, a mixture of four types."""
    path = tmp_path_factory.mktemp("q4") / "tinymix-Q4_K_M.gguf"
    quantize(tinymix_bf16, [(load_presets().find("Q4_K_M"), path)], threads=1)
    return path


def logits(path: Path) -> np.ndarray:
    with Model(path) as model, Context(model, context_length=64, threads=1) as context:
        tokens = np.arange(5, 45, dtype=np.int32)
        context.decode(tokens, np.arange(40), logits=True)
        return context.logits().copy()


def tensor_bytes(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


def test_single_experts_are_stacked_byte_for_byte(quantized: Path, tmp_path: Path) -> None:
    old = write_with_single_experts(quantized, tmp_path / "old.gguf")
    names = [tensor.name for tensor in gguf.GGUFReader(old).tensors]
    assert "blk.0.ffn_gate.7.weight" in names and not any("_exps" in name for name in names)
    with pytest.raises(InputError, match=r"ffn_down_exps.*not found") as refused:
        logits(old)
    assert "localmix convert" in refused.value.hint

    converted = convert(old, tmp_path / "new.gguf", threads=1)

    assert converted.type == "Q4_K_M"
    assert "72 tensors of single experts are stacked into 9" in converted.notes[0]
    assert tensor_bytes(converted.path) == tensor_bytes(quantized)
    assert np.array_equal(logits(converted.path), logits(quantized))


def test_single_experts_are_stacked_on_the_way_to_another_type(tinymix_bf16: Path, tmp_path: Path) -> None:
    old = write_with_single_experts(tinymix_bf16, tmp_path / "old.gguf")
    preset = load_presets().find("Q5_0")
    quantize(old, [(preset, tmp_path / "from-old.gguf")], threads=1)
    quantize(tinymix_bf16, [(preset, tmp_path / "from-new.gguf")], threads=1)
    assert tensor_bytes(tmp_path / "from-old.gguf") == tensor_bytes(tmp_path / "from-new.gguf")


def test_slices_across_experts(tinymix_bf16: Path, tmp_path: Path) -> None:
    old = write_with_single_experts(tinymix_bf16, tmp_path / "old.gguf")
    with GGUFFile(old) as stacked, GGUFFile(tinymix_bf16) as whole:
        tensor = next(tensor for tensor in stacked.tensors if tensor.name == "blk.1.ffn_down_exps.weight")
        for start, stop in ((0, tensor.rows), (255, 257), (300, 300), (100, 900), (tensor.rows - 1, tensor.rows)):
            assert np.array_equal(stacked.read(tensor, start, stop), whole.read(tensor, start, stop))


def test_missing_experts_are_named(quantized: Path, tmp_path: Path) -> None:
    gone = ("blk.1.ffn_up.7.weight", "blk.2.ffn_down.0.weight")
    old = write_with_single_experts(quantized, tmp_path / "old.gguf", drop=gone)
    with pytest.raises(InputError, match=r"missing: blk\.1\.ffn_up\.7\.weight, blk\.2\.ffn_down\.0\.weight\."):
        GGUFFile(old)


def test_an_absurd_count_of_experts_costs_nothing() -> None:
    infos = [TensorInfo(f"blk.{layer}.ffn_up.0.weight", (4, 32), TensorType.F32) for layer in range(3)]
    with pytest.raises(InputError, match=r"blk.0.ffn_up.8.weight and 12,884,901,874 more"):
        stack_experts(infos, (1 << 32) - 1, "m.gguf")
    with pytest.raises(InputError, match=r"has 1 experts, and holds 'blk.0.ffn_up.1.weight' besides"):
        stack_experts([*infos, TensorInfo("blk.0.ffn_up.1.weight", (4, 32), TensorType.F32)], 1, "m.gguf")
    with pytest.raises(InputError, match=r"as one tensor and as one for each expert"):
        stack_experts([*infos, TensorInfo("blk.0.ffn_up_exps.weight", (1, 4, 32), TensorType.F32)], 1, "m.gguf")
    other = TensorInfo("blk.0.ffn_up.1.weight", (8, 32), TensorType.F32)
    with pytest.raises(InputError, match=r"ffn_up.1.weight has the shape \[8, 32\], which cannot be stacked"):
        stack_experts([infos[0], other], 0, "m.gguf")
    assert [stack.info.shape for stack in stack_experts(infos, 0, "m.gguf")] == [(1, 4, 32)] * 3


def test_experts_of_mixed_types_meet_in_the_richest(quantized: Path, tmp_path: Path) -> None:
    mixed = {f"blk.0.ffn_gate.{number}.weight": Kind.Q8_0 for number in (1, 6)}
    old = write_with_single_experts(quantized, tmp_path / "old.gguf", kinds=mixed)
    converted = convert(old, tmp_path / "new.gguf", threads=1)
    assert any("6 of them are written again" in note and "Q4_K" in note for note in converted.notes)
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(old).tensors}
    stack = next(
        tensor for tensor in gguf.GGUFReader(converted.path).tensors if tensor.name == "blk.0.ffn_gate_exps.weight"
    )
    assert stack.tensor_type == Kind.Q8_0
    for number in range(8):
        expert = before[f"blk.0.ffn_gate.{number}.weight"]
        if number in (1, 6):
            assert np.array_equal(stack.data[number], expert.data)
        else:
            wide = gguf.quants.dequantize(expert.data, expert.tensor_type)
            again = gguf.quants.dequantize(stack.data[number], Kind.Q8_0)
            assert np.abs(wide - again).max() <= np.abs(wide).max() / 200
    assert np.isfinite(logits(converted.path)).all()


def test_the_common_type() -> None:
    assert common_type([TensorType.Q4_K, TensorType.Q6_K]) == TensorType.Q6_K
    assert common_type([TensorType.F16, TensorType.F32]) == TensorType.F32
    assert common_type([TensorType.IQ2_XXS, TensorType.Q2_K]) == TensorType.Q2_K
    assert common_type([TensorType.IQ2_XXS, TensorType.IQ2_XS]) == TensorType.Q8_0  # neither without an imatrix


def test_version_1_becomes_version_3(quantized: Path, tmp_path: Path) -> None:
    old = as_version_1(quantized, tmp_path / "old.gguf")
    with pytest.raises(InputError, match="no longer supported") as refused:
        logits(old)
    assert "localmix convert" in refused.value.hint
    converted = convert(old, tmp_path / "new.gguf", threads=1)
    assert converted.path.read_bytes() == quantized.read_bytes()


NAMES = {
    "letters": ["m.gguf-split-a", "m.gguf-split-b", "m.gguf-split-c"],
    "numbers of a count": ["m.gguf.part1of3", "m.gguf.part2of3", "m.gguf.part3of3"],
    "part and letters": ["m.gguf.part-a", "m.gguf.part-b", "m.gguf.part-c"],
    "split's own": ["m.gguf.aa", "m.gguf.ab", "m.gguf.ac"],
    "padded from nought": ["m.gguf.000", "m.gguf.001", "m.gguf.002"],
    "padded of a count": ["m.gguf-part-00001-of-00003", "m.gguf-part-00002-of-00003", "m.gguf-part-00003-of-00003"],
    "more than nine": [f"m.gguf.part{number}" for number in range(1, 12)],
}


@pytest.mark.parametrize("kind", NAMES)
def test_pieces_are_joined(kind: str, quantized: Path, tmp_path: Path) -> None:
    pieces = cut(quantized, NAMES[kind], tmp_path)
    (tmp_path / "other.gguf-split-a").write_bytes(b"of another file")
    assert find_pieces(pieces[1]) == pieces
    converted = convert(pieces[0], tmp_path / "new.gguf", threads=1)
    assert converted.path.read_bytes() == quantized.read_bytes()
    assert converted.notes == (f"m.gguf is read from {len(pieces)} pieces.",)


@pytest.mark.parametrize("kind", NAMES)
def test_a_missing_piece_is_named(kind: str, quantized: Path, tmp_path: Path) -> None:
    names = NAMES[kind]
    for gone in (0, 1, len(names) - 1):
        folder = tmp_path / str(gone)
        folder.mkdir()
        pieces = cut(quantized, names, folder)
        pieces[gone].unlink()
        left = next(piece for number, piece in enumerate(pieces) if number != gone)
        with pytest.raises(InputError) as refused:
            GGUFFile(left)
        assert names[gone] in str(refused.value)


@pytest.mark.parametrize(
    "name", ["m.gguf", "m.gguf.xz", "m.gguf.md", "m.gguf.bak", "m-00001-of-00002.gguf", "a", "m.gguf.part", "m.gguf-"]
)
def test_names_that_are_no_pieces(name: str, tmp_path: Path) -> None:
    assert find_pieces(tmp_path / name) == []
    assert whole_name(name) == name


def test_pieces_of_two_files_do_not_fit(quantized: Path, tmp_path: Path) -> None:
    pieces = cut(quantized, NAMES["letters"], tmp_path)
    pieces[2].write_bytes(pieces[1].read_bytes() + bytes(1 << 17))
    with pytest.raises(InputError, match="bytes together, and its head tells of"):
        GGUFFile(pieces[0])


def test_a_piece_that_changes_is_noticed(quantized: Path, tmp_path: Path) -> None:
    pieces = cut(quantized, NAMES["letters"], tmp_path)
    with GGUFFile(pieces[0]) as source:
        source.check_unchanged()
        with pieces[1].open("ab") as piece:
            piece.write(b"more")
        with pytest.raises(InputError, match="changed while it was read"):
            source.check_unchanged()


def test_a_single_piece_may_be_the_whole(quantized: Path, tmp_path: Path) -> None:
    (path,) = cut(quantized, ["m.gguf.1"], tmp_path)
    with GGUFFile(path) as source:
        assert source.notes == []


def test_a_piece_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing: 'm\.gguf-split-a', 'm\.gguf-split-b'\."):
        find_pieces(tmp_path / "m.gguf-split-b")
    with pytest.raises(InputError, match=r"'m\.gguf\.part5of900' and 895 more\."):
        find_pieces(tmp_path / "m.gguf.part1of900")
    with pytest.raises(InputError, match="one of more than 1000 pieces"):
        find_pieces(tmp_path / "m.gguf.part1of10000")
    with pytest.raises(FileError, match="cannot be read"):
        find_pieces(tmp_path / "absent" / "m.gguf-split-b")


def test_an_absurd_count_is_not_looped_over(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf.part1of99999"
    path.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="no model has"):
        GGUFFile(path)


def test_a_tokenizer_without_its_way_of_splitting(tmp_path: Path, random_model: Path) -> None:
    reader = gguf.GGUFReader(random_model)
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_file_type(0)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "old.gguf") as source:
        assert "--pre NAME" in source.notes[0]
    with GGUFFile(tmp_path / "old.gguf", pre="llama-bpe") as source:
        assert source.get("tokenizer.ggml.pre") == "llama-bpe"
        assert not source.notes
