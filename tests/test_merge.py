"""Merged checkpoints: the base's shards with other weights, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localmix.errors import CapacityError, FileError, InputError, LocalmixError
from localmix.merge import merge
from localmix.sources.adapter import Lora
from localmix.sources.checkpoint import open_checkpoint
from tests.adapters import (
    CONFIG,
    DENSE,
    KINDS,
    MIXTURE,
    PREFIX,
    WEIGHTS,
    Kind,
    edit_config,
    read_checkpoint,
    write_adapter,
    write_pair,
)
from tests.checkpoints import TOKENIZER_PIECES, edit_json, read_shard, write_checkpoint, write_shard
from tests.commands import CommandLine

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path, "plain")


def header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    found: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    found.pop("__metadata__")
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_shards_are_those_of_the_base(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    steps: list[tuple[int, int]] = []
    merged = merge(
        base, [Lora(adapter)], tmp_path / "out", threads=2, progress=lambda done, total, _: steps.append((done, total))
    )
    before, after = contents(base), contents(tmp_path / "out")
    assert before.keys() == after.keys()
    for shard in (FIRST, SECOND):
        assert header(base / shard) == header(tmp_path / "out" / shard)
        assert list(header(base / shard)) == list(header(tmp_path / "out" / shard))
        changed = {name for name, (_, values) in read_shard(base / shard).items()} - {
            name
            for name, (_, values) in read_shard(base / shard).items()
            if (values == read_shard(tmp_path / "out" / shard)[name][1]).all()
        }
        adapted = {name.removeprefix(PREFIX).split(".lora_")[0] for name in read_shard(adapter / WEIGHTS)}
        assert changed == {name for name in header(base / shard) if name.removesuffix(".weight") in adapted}
        assert before.pop(shard) != after.pop(shard)
    assert before == after  # configuration, tokenizer and index
    assert (merged.shards, merged.tensors, merged.merged) == (2, 29, 22)
    assert merged.bytes == sum((tmp_path / "out" / shard).stat().st_size for shard in (FIRST, SECOND))
    assert steps[-1] == (merged.bytes, merged.bytes)
    assert steps == sorted(steps)
    assert not list(tmp_path.glob(".*"))


def test_nothing_of_an_adapter_is_the_base(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    merge(base, [Lora(adapter, 0)], tmp_path / "out", threads=1)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    for name, (dtype, values) in before.items():
        assert after[name][0] == dtype
        np.testing.assert_array_equal(after[name][1], values)


def test_a_larger_vocabulary_changes_config_index_and_tokenizer(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "vocabulary")
    (base / "generation_config.json").write_text('{"top_k": 7}')
    (base / "tokenizer.json").write_text("{}")
    (base / "LICENSE").write_text("as it is")
    (base / "training_args.bin").write_bytes(b"never read")
    edit_json(base / INDEX, lambda index: index.update(note="kept"))
    (adapter / "additional_chat_templates").mkdir()
    (adapter / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    merge(base, [Lora(adapter)], tmp_path / "out", threads=1)
    after = contents(tmp_path / "out")
    size = TOKENIZER_PIECES + 24
    assert json.loads(after["config.json"]) == json.loads((base / "config.json").read_text()) | {"vocab_size": size}
    tensors = read_checkpoint(tmp_path / "out")
    index = json.loads(after[INDEX])
    assert index["note"] == "kept"
    assert index["metadata"]["total_size"] == sum(values.nbytes for _, values in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert tensors["lm_head.weight"][1].shape == tensors["model.embed_tokens.weight"][1].shape == (size, 32)
    assert {dtype for dtype, _ in tensors.values()} == {"BF16"}
    assert after["added_tokens.json"] == (adapter / "added_tokens.json").read_bytes()
    assert after["additional_chat_templates/tools.jinja"] == b"{{ tools }}"
    assert after["generation_config.json"] == b'{"top_k": 7}'
    assert after["LICENSE"] == b"as it is"
    assert not {"tokenizer.json", "training_args.bin", CONFIG, WEIGHTS} & after.keys()
    with open_checkpoint(tmp_path / "out") as source:
        assert len(source.get("tokenizer.ggml.tokens")) == size


def test_an_output_of_its_own_unties_the_model(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", replace(DENSE, tied=True))
    adapter = write_adapter(tmp_path / "adapter", base, Kind(DENSE, "q_proj"))
    values = np.random.default_rng(0).standard_normal((TOKENIZER_PIECES, 32), np.float32)
    write_shard(adapter / WEIGHTS, read_shard(adapter / WEIGHTS) | {f"{PREFIX}lm_head.weight": ("F32", values)})
    merge(base, [Lora(adapter)], tmp_path / "out", threads=1)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]["lm_head.weight"] == FIRST
    with open_checkpoint(tmp_path / "out") as source:
        assert "output.weight" in {info.name for info in source.tensors}


def test_a_padded_vocabulary_stays_what_it_is(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "embedding")
    edit_json(base / "config.json", lambda config: config.update(vocab_size=TOKENIZER_PIECES - 3))
    merge(base, [Lora(adapter)], tmp_path / "out", threads=1)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("above", [True, False], ids=["above", "inside"])
def test_the_size_of_a_vocabulary_in_a_section(tmp_path: Path, above: bool) -> None:
    base, adapter = write_pair(tmp_path, "vocabulary")

    def change(config: dict[str, Any]) -> None:
        size = config["vocab_size"] if above else config.pop("vocab_size")
        config["text_config"] = {"vocab_size": size, "x": 1}

    edit_json(base / "config.json", change)
    merge(base, [Lora(adapter)], tmp_path / "out", threads=1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"] == {"vocab_size": TOKENIZER_PIECES + 24, "x": 1}
    assert config.get("vocab_size") == (TOKENIZER_PIECES + 24 if above else None)


def test_models_that_localmix_does_not_convert_are_merged_by_names(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    merge(base, [Lora(adapter)], tmp_path / "known", threads=1)
    edit_json(base / "config.json", lambda config: config.update(model_type="of tomorrow"))
    merge(base, [Lora(adapter)], tmp_path / "unknown", threads=1)
    assert (tmp_path / "known" / FIRST).read_bytes() == (tmp_path / "unknown" / FIRST).read_bytes()


def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", replace(MIXTURE, hidden=256, feed_forward=640, layers=1))
    kind = replace(KINDS["plain"], shape=replace(MIXTURE, hidden=256, feed_forward=640, layers=1))
    adapter = write_adapter(tmp_path / "adapter", base, kind)
    for threads in (1, 3):
        merge(base, [Lora(adapter)], tmp_path / str(threads), threads=threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def damage_nothing(base: Path, adapter: Path, folder: Path) -> None:
    pass


def quantized(base: Path, adapter: Path, folder: Path) -> None:
    edit_json(base / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq"}))


def without_weights(base: Path, adapter: Path, folder: Path) -> None:
    for path in base.glob("model*"):
        path.unlink()


def eight_bits(base: Path, adapter: Path, folder: Path) -> None:
    for shard in (FIRST, SECOND):
        tensors = read_shard(base / shard)
        write_shard(
            base / shard,
            {
                name: ("F8_E4M3", values.view("u1").reshape(*values.shape, 2)[..., 0])
                for name, (_, values) in tensors.items()
            },
        )


def tensor_twice(base: Path, adapter: Path, folder: Path) -> None:
    (base / INDEX).unlink()
    write_shard(base / SECOND, read_shard(base / FIRST))


def full_folder(base: Path, adapter: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "note.txt").write_text("mine")


def file_there(base: Path, adapter: Path, folder: Path) -> None:
    folder.write_text("mine")


def broken_numbers(base: Path, adapter: Path, folder: Path) -> None:
    tensors = read_shard(adapter / WEIGHTS)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = "F32", tensors[name][1] * np.float32("inf")
    write_shard(adapter / WEIGHTS, tensors)


FAULTS: dict[str, tuple[Callable[[Path, Path, Path], None], type[LocalmixError], str]] = {
    "quantized": (quantized, InputError, "already quantized"),
    "no weights": (without_weights, InputError, "no weights"),
    "eight bits": (eight_bits, InputError, "is F8_E4M3, into which"),
    "a tensor twice": (tensor_twice, InputError, "is there twice"),
    "a folder that is not empty": (full_folder, FileError, "is not empty"),
    "a file": (file_there, FileError, "is a file"),
    "infinity": (broken_numbers, InputError, "nan|inf"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_everything_as_it_was(tmp_path: Path, pair: tuple[Path, Path], fault: str) -> None:
    base, adapter = pair
    inflict, kind, sentence = FAULTS[fault]
    inflict(base, adapter, tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(kind, match=sentence) as error:
        merge(base, [Lora(adapter)], tmp_path / "out", threads=1)
    assert error.value.hint
    assert contents(tmp_path) == before
    assert not (tmp_path / ".out.partial").exists()


def test_folders_that_are_there_or_not(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = pair
    with pytest.raises(FileError, match="does not exist"):
        merge(base, [Lora(adapter)], tmp_path / "absent" / "out", threads=1)
    with pytest.raises(FileError, match="does not exist"):
        merge(base, [Lora(adapter)], base / "config.json" / "out", threads=1)
    (tmp_path / "out").mkdir()
    merge(base, [Lora(adapter)], tmp_path / "out", threads=1)  # an empty one is as good as none
    assert (tmp_path / "out" / FIRST).exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merge(base, [Lora(adapter)], Path("."), threads=1)
    assert (tmp_path / "here" / FIRST).exists()


def test_a_disk_that_is_too_small_is_said_before_the_work(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = pair
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CapacityError, match=r"has 1\.0 KiB free, and out takes 0\.11 MiB"):
        merge(base, [Lora(adapter)], tmp_path / "out", threads=1)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "plain"}


def test_an_interrupt_leaves_nothing(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair

    def stop(done: int, total: int, label: str) -> None:
        if label == SECOND:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, [Lora(adapter)], tmp_path / "out", threads=2, progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "plain"}


RUN = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from localmix.merge import merge
    from localmix.sources.adapter import Lora

    def kill(done, total, label):
        if label == sys.argv[4]:
            os.kill(os.getpid(), signal.SIGKILL)

    merge(Path(sys.argv[1]), [Lora(Path(sys.argv[2]))], Path(sys.argv[3]), threads=1, progress=kill)
""")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("same", [True, False], ids=["same", "changed"])
def test_a_killed_run_is_gone_on_with_or_swept(tmp_path: Path, pair: tuple[Path, Path], same: bool) -> None:
    base, adapter = pair
    arguments = [sys.executable, "-c", RUN, base, adapter, tmp_path / "out", SECOND]
    root = str(Path(__file__).parent.parent)
    killed = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": root}, check=False)
    assert killed.returncode == -signal.SIGKILL
    partial = tmp_path / ".out.partial"
    assert not (tmp_path / "out").exists()
    assert (partial / FIRST).exists()
    assert not (partial / SECOND).exists()
    finished = (partial / FIRST).stat().st_ino, (partial / FIRST).stat().st_mtime_ns
    if not same:
        edit_config(adapter, lora_alpha=5)
    merge(base, [Lora(adapter)], tmp_path / "out", threads=1)
    kept = (tmp_path / "out" / FIRST).stat()
    assert ((kept.st_ino, kept.st_mtime_ns) == finished) is same
    merge(base, [Lora(adapter)], tmp_path / "quiet", threads=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "quiet")
    assert not partial.exists()


def test_on_the_command_line(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "plain")
    localmix = CommandLine(tmp_path / "home", tmp_path)
    run = localmix("merge", base, "--lora", f"{adapter}=0.5", "-o", "out", "--json")
    assert run.json["path"] == "out"
    assert run.json["merged"] == 22
    assert "plain is merged into 22 tensors with the scale 0.5" in run.json["notes"][0]
    shown = localmix("merge", base, "--lora", adapter, "-o", "again")
    assert "22 of 29 tensors are merged" in shown.out
    assert "is not empty" in localmix.fails("merge", base, "--lora", adapter, "-o", "out", expect=5)
    assert "--lora DIR" in localmix.fails("merge", base, "-o", "new", expect=2)
    assert "no PEFT adapter" in localmix.fails("merge", base, "--lora", base, "-o", "new", expect=3)
    assert "There is no folder" in localmix.fails("merge", base, "--lora", "nowhere", "-o", "new", expect=5)

    converted = localmix("convert", base, "--lora", adapter, "--json").json
    assert Path(converted["path"]).name == "base+plain-BF16.gguf"
    planned = localmix("plan", base, "Q8_0", "--lora", adapter, "--json").json
    assert planned["parameters"] == converted["parameters"]
    one = localmix("quantize", "Q8_0", base, "--lora", adapter, "-o", "one.gguf", "--json").json
    other = localmix("quantize", "Q8_0", converted["path"], "-o", "other.gguf", "--json").json
    assert one["outputs"][0]["bytes"] == other["outputs"][0]["bytes"]
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()
    # what has adapters in it was not made from the base alone: full precision is that of the merged file
    assert localmix("quantize", "Q4_0", "base+plain", "--dry-run", "--json").json["outputs"]
    refused = localmix.fails("quantize", "Q8_0", converted["path"], "--lora", adapter, "-o", "x.gguf", expect=3)
    assert "not into a GGUF file" in refused
    assert "localmix merge" in localmix.fails("convert", base, "--lora", adapter, "--upstream", expect=2)
