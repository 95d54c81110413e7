from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import numpy as np
import pytest

from localmix.convert import convert
from localmix.errors import InputError, UsageError
from localmix.presets import load_presets
from localmix.quantize import quantize
from tests.random_model import write_random_model

BF16 = gguf.GGMLQuantizationType.BF16


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_bytes_do_not_depend_on_threads_or_on_the_other_outputs(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", layers=1, kind=BF16)
    presets = [load_presets().find(name) for name in ("Q4_K_M", "Q8_0")]
    quantize(model, [(preset, tmp_path / f"{preset.name}.gguf") for preset in presets], threads=4)
    for preset in presets:
        quantize(model, [(preset, tmp_path / "alone.gguf")], threads=1)
        assert sha256(tmp_path / "alone.gguf") == sha256(tmp_path / f"{preset.name}.gguf")


def test_convert_keeps_a_bf16_file_byte_for_byte(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", layers=1, kind=BF16)
    result = convert(model, tmp_path / "copy.gguf")
    assert result.type == "BF16"
    before, after = (gguf.GGUFReader(path) for path in (model, tmp_path / "copy.gguf"))
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.data, other.data)


def test_progress_counts_every_weight_once(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", layers=1, kind=BF16)
    seen: list[tuple[int, int, str]] = []
    convert(model, tmp_path / "out.gguf", "f32", progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(int(t.n_elements) for t in gguf.GGUFReader(model).tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
def test_nan_and_inf_are_found_with_tensor_and_place(value: float, kind: str, tmp_path: Path) -> None:
    bad = np.zeros((256, 512), np.float32)
    bad[200, 33] = value
    model = write_random_model(
        tmp_path / "model.gguf",
        layers=1,
        experts=0,
        feed_forward=512,
        kind=gguf.GGMLQuantizationType[kind],
        change={"blk.0.ffn_down.weight": bad},
    )
    with pytest.raises(InputError, match=r"blk\.0\.ffn_down\.weight holds -?(nan|inf) at row 200, column 33"):
        quantize(model, [(load_presets().find("Q8_0"), tmp_path / "out.gguf")])
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_value_that_f16_cannot_hold(tmp_path: Path) -> None:
    big = np.zeros((256, 512), np.float32)
    big[7, 8] = 70000
    one_layer = {"layers": 1, "experts": 0, "feed_forward": 512, "kind": BF16}
    model = write_random_model(tmp_path / "model.gguf", **one_layer, change={"blk.0.ffn_down.weight": big})
    with pytest.raises(InputError, match="row 7, column 8, which F16 cannot hold"):
        convert(model, tmp_path / "out.gguf", "f16")
    assert convert(model, tmp_path / "out.gguf", "bf16").type == "BF16"


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", layers=1, kind=BF16)

    def meddle(done: int, total: int, name: str) -> None:
        with model.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\0")

    with pytest.raises(InputError, match="changed while it was read"):
        convert(model, tmp_path / "out.gguf", progress=meddle)
    assert not (tmp_path / "out.gguf").exists()


def test_the_source_cannot_be_the_output(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", layers=1, kind=BF16)
    before = sha256(model)
    with pytest.raises(UsageError, match="would destroy it"):
        convert(model, model)
    assert sha256(model) == before


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0", "Q4_K_M"])
def test_memory_does_not_grow_with_the_tensors(kind: str, tmp_path: Path) -> None:
    """A tensor of 537 MB: peak memory stays far below it (the limit is 300 MB above the interpreter)."""
    model = _large_model(tmp_path)
    code = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        from localmix.presets import load_presets
        from localmix.quantize import quantize
        from localmix.native.library import api, ggml
        ggml()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        quantize(Path(sys.argv[1]), [(load_presets().find(sys.argv[2]), Path(sys.argv[3]))], threads=2)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    run = subprocess.run(
        [sys.executable, "-c", code, str(model), kind, str(tmp_path / "out.gguf")],
        capture_output=True,
        text=True,
        check=True,
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(run.stdout) * unit < 150e6


def _large_model(folder: Path) -> Path:
    """A model whose embedding alone has 268 million weights, most of them a hole that reads as zeros."""
    path = write_random_model(folder / "large.gguf", layers=1, experts=0, embedding_rows=1024, kind=BF16)
    from dataclasses import replace

    from localmix.gguf_format import encode_header, layout, read_header

    header = read_header(path)
    infos = [
        replace(stored.info, shape=(1 << 20, 256)) if stored.info.name == "token_embd.weight" else stored.info
        for stored in header.tensors
    ]
    head = encode_header(header.metadata, infos)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + layout(infos)[1])
    return path
