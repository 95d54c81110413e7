"""Every way a file can be wrong is told, in one line each; what is right is left alone."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from localmix import library
from localmix.downloads.pull import pull
from localmix.errors import FileError, InputError, NetworkError, UsageError
from localmix.native.kernels import is_valid, quantize_rows
from localmix.presets import load_presets
from localmix.quantize import quantize
from localmix.tensor_types import TensorType
from localmix.verify import Verification, verify
from tests.checkpoints import Shape, write_checkpoint, write_shard
from tests.hub_server import Hub, point_to, serve
from tests.old_files import cut
from tests.random_model import write_random_model

NAME = "org/fox"


def told(found: Verification) -> list[str]:
    return [f"{problem.path.name}: {problem.what}" for problem in found.problems]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "fox", Shape(experts=4, shards=3))


@pytest.mark.parametrize("make", ["gguf", "checkpoint", "shard", "pieces"])
def test_what_is_right(make: str, folder: Path, random_model: Path, tmp_path: Path) -> None:
    path = {
        "gguf": lambda: random_model,
        "checkpoint": lambda: folder,
        "shard": lambda: folder / "model-00001-of-00003.safetensors",
        "pieces": lambda: cut(random_model, ["m.gguf-split-a", "m.gguf-split-b"], tmp_path)[0],
    }[make]()
    found = verify(path, deep=True, threads=1)
    assert told(found) == []
    assert found.weights > 10_000 and found.tensors > 5
    assert all(file.sha256 is None and not file.compared for file in found.files)


def test_every_broken_shard_is_told(folder: Path) -> None:
    first, second, third = sorted(folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(bytes(100))
    found = verify(folder)
    assert [line.split(":")[0] for line in told(found)] == [first.name, second.name]
    third.unlink()
    assert len(verify(folder).problems) == 2
    shutil.rmtree(folder)
    write_checkpoint(folder, Shape(experts=4, shards=3))
    third.unlink()
    assert told(verify(folder)) == [f"{folder.name}: lacks 1 of 3 shards: '{third.name}'."]


def test_a_quantized_or_unknown_checkpoint_is_not_a_damaged_one(folder: Path) -> None:
    config = folder / "config.json"
    text = config.read_text()
    for change in ('"quantization_config": {"quant_method": "gptq"},', '"x_model_type": 1,'):
        config.write_text(
            text.replace("{", "{" + change, 1).replace("mixtral", "mixtral" if "quant" in change else "new")
        )
        found = verify(folder)
        assert told(found) == []
        assert any("not what they are together" in note for note in found.notes)


def test_a_cut_gguf_file(random_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(random_model.read_bytes()[:-100])
    shutil.copy(random_model, tmp_path / "whole.gguf")
    found = verify(tmp_path, deep=True, threads=1)
    assert len(found.problems) == 1 and "cut.gguf: is not a usable GGUF file" in told(found)[0]


def test_no_numbers_are_found_with_their_place(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", poison="blk.1.attn_q.weight")
    values = np.ones((8, 256, 256), np.float32)
    values[5, 200, 17] = -np.inf
    values[6, 0, 0] = np.nan
    other = write_random_model(
        tmp_path / "n.gguf", change={"blk.0.ffn_up_exps.weight": values}, kind=gguf.GGMLQuantizationType.BF16
    )
    assert told(verify(path, deep=True, threads=1)) == ["m.gguf: blk.1.attn_q.weight holds nan at [0, 0]."]
    assert told(verify(other, deep=True, threads=1)) == ["n.gguf: blk.0.ffn_up_exps.weight holds -inf at [5, 200, 17]."]
    assert told(verify(path)) == []


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0", "Q6_K", "IQ4_XS", "MXFP4_MOE", "Q5_0"])
def test_no_numbers_in_quantized_blocks(kind: str, tinymix_bf16: Path, tmp_path: Path) -> None:
    presets = load_presets()
    if kind not in presets.presets:
        pytest.skip(f"there is no preset {kind}")
    path = tmp_path / "m.gguf"
    quantize(tinymix_bf16, [(presets.find(kind), path)], threads=1)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_gate_exps.weight")
    block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    row, number = 5 * 256 + 3, 256 // block - 1
    offset = tensor.data_offset + (row * (256 // block) + number) * size
    scale_at = {"Q6_K": size - 2}.get(tensor.tensor_type.name, 0)
    with path.open("r+b") as file:
        file.seek(offset + scale_at)
        file.write(b"\xff" if tensor.tensor_type.name == "MXFP4" else b"\x00\x7e")
    found = told(verify(path, deep=True, threads=2))
    assert len(found) == 1
    assert "blk.1.ffn_gate_exps.weight holds " in found[0]
    assert f"[5, 3, {number * block}]" in found[0]


def test_ggml_judges_blocks(tmp_path: Path) -> None:
    rows = np.ones((2, 256), np.float32)
    encoded = quantize_rows(TensorType.Q4_K, rows, None)
    assert is_valid(TensorType.Q4_K, encoded)
    encoded[1, 1] = 0x7E
    encoded[1, 0] = 1
    assert not is_valid(TensorType.Q4_K, encoded)


@pytest.mark.parametrize(
    ("dtype", "bad", "value"),
    [
        ("BF16", np.uint16(0x7F80), "inf"),
        ("F16", np.float16("nan"), "nan"),
        ("F32", np.float32("-inf"), "-inf"),
        ("F64", np.float64("nan"), "nan"),
        ("F8_E4M3", np.uint8(0xFF), "no number"),
        ("F8_E5M2", np.uint8(0x7C), "no number"),
    ],
)
def test_no_numbers_in_a_shard(dtype: str, bad: np.generic, value: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    values = np.zeros((3, 40, 50), bad.dtype)
    values[2, 7, 49] = bad
    write_shard(path, {"a": ("U8", np.full(9, 255, np.uint8)), "b": (dtype, values), "c": (dtype, values[0])})
    lines = told(verify(path, deep=True, threads=1))
    assert len(lines) == 1 and "b holds" in lines[0] and value in lines[0] and "[2, 7, 49]" in lines[0]


def test_a_list_of_checksums(random_model: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    shutil.copy(random_model, good)
    shutil.copy(random_model, bad)
    digest = hashlib.sha256(good.read_bytes()).hexdigest()
    with bad.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    (tmp_path / "SHA256SUMS").write_text(
        f"{digest}  good.gguf\n{digest.upper()} *bad.gguf\n\nSHA256 (gone.gguf) = {digest}\n"
    )
    found = verify(tmp_path, threads=2)
    assert [file.sha256 for file in found.files if file.path == good] == [digest]
    assert len(found.problems) == 2
    assert told(found)[0] == "gone.gguf: is missing; SHA256SUMS has it."
    assert "bad.gguf: is not the file that SHA256SUMS has" in told(found)[1] and digest in told(found)[1]
    assert told(verify(good)) == []
    assert not verify(good).notes


@pytest.mark.parametrize("line", ["abc  x.gguf", "../x", "0" * 64 + "  ../x", "0" * 64 + "  /etc/passwd", "\0"])
def test_a_list_of_something_else(line: str, random_model: Path, tmp_path: Path) -> None:
    shutil.copy(random_model, tmp_path / "m.gguf")
    (tmp_path / "SHA256SUMS").write_text(line)
    assert told(verify(tmp_path))[0].startswith("SHA256SUMS: line 1 ")


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no model"):
        verify(tmp_path)
    with pytest.raises(FileError, match="There is no file"):
        verify(tmp_path / "absent")


def test_an_imatrix_is_checked_as_one(tmp_path: Path) -> None:
    path = tmp_path / "m.imatrix.gguf"
    path.write_bytes(b"GGUF" + bytes(20))
    assert "m.imatrix.gguf: " in told(verify(tmp_path))[0]


@pytest.fixture
def served(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("LOCALMIX_HOME", str(tmp_path / "home"))
    with serve() as hub:
        hub.add(NAME, folder)
        point_to(hub.endpoint, monkeypatch)
        yield hub


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_what_pull_noted_is_held_against_the_files(served: Hub) -> None:
    pulled = pull(NAME)
    assert told(verify(pulled.path)) == []
    assert verify(pulled.path).notes == ()
    assert all(file.sha256 for file in verify(pulled.path).files)
    shard = pulled.path / "model-00003-of-00003.safetensors"
    damage(shard)
    (pulled.path / "tokenizer_config.json").write_text("{}")
    (pulled.path / "tokenizer.model").unlink()
    lines = told(verify(library.home() / "fox"))
    assert any(line.startswith(f"{shard.name}: is not the file that org/fox has") for line in lines)
    assert any(line.startswith("tokenizer_config.json: has 2 bytes, and org/fox has") for line in lines)
    assert any(line == "tokenizer.model: is missing; org/fox has it." for line in lines)


def test_the_hub_is_asked(served: Hub, folder: Path) -> None:
    pulled = pull(NAME)
    assert told(verify(pulled.path, online=True)) == []
    with pytest.raises(UsageError, match=r"--repo"):
        verify(folder, online=True)
    found = verify(folder, repository=NAME)
    assert told(found) == []
    assert all(file.compared == "the hub's org/fox" for file in found.files)
    damage(folder / "model-00001-of-00003.safetensors")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    lines = told(verify(folder, repository=NAME))
    assert len(lines) == 2 and all("the hub's org/fox" in line for line in lines)


def test_an_unknown_repository(served: Hub, folder: Path) -> None:
    with pytest.raises(NetworkError):
        verify(folder, repository="org/no-such")


def test_progress_reaches_the_end(folder: Path) -> None:
    reports: list[tuple[int, int]] = []
    digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  config.json\n")
    verify(folder, deep=True, threads=2, progress=lambda done, total, _: reports.append((done, total)))
    assert reports[-1][0] == reports[-1][1] > 0
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)


def test_ctrl_c_ends_it(folder: Path) -> None:
    def interrupt(done: int, total: int, label: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(folder, deep=True, threads=2, progress=interrupt)


def test_a_file_that_shrinks_under_the_check(random_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(random_model, path)

    def cut_it(done: int, total: int, label: str) -> None:
        if path.stat().st_size > 1 << 20:
            with path.open("r+b") as file:
                file.truncate(1 << 20)

    lines = told(verify(path, deep=True, threads=1, progress=cut_it))
    assert len(lines) == 1 and "ends at byte" in lines[0]
