"""Checkpoint folders: what is read is right slice by slice, and everything broken is said before any weight."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmix.errors import FileError, InputError
from localmix.sources.base import ShapeOnlySource, Source
from localmix.sources.checkpoint import Checkpoint, open_checkpoint
from localmix.tensor_types import FLOAT_TYPES, TensorType
from tests.checkpoints import (
    SHAPES,
    TOKENIZER_PIECES,
    Shape,
    edit_json,
    make_tensors,
    read_shard,
    write_checkpoint,
    write_shard,
)

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SMALL = Shape(experts=4, layers=2, feed_forward=64)
SINGLE = Shape(experts=4, layers=2, feed_forward=64, shards=1)
DENSE = Shape("llama", experts=0, shards=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", SMALL)


def config(**changes: Any) -> Callable[[Path], None]:
    """Damage to config.json: values to set, `...` removes."""

    def damage(folder: Path) -> None:
        def change(content: dict[str, Any]) -> None:
            for key, value in changes.items():
                if value is ...:
                    content.pop(key)
                else:
                    content[key] = value

        edit_json(folder / "config.json", change)

    return damage


def tensors(change: Callable[[dict[str, Any]], object], shape: Shape = SINGLE) -> Callable[[Path], None]:
    """Damage to the tensors of a single-file checkpoint."""

    def damage(folder: Path) -> None:
        shutil.rmtree(folder)
        write_checkpoint(folder, shape)
        stored = read_shard(folder / "model.safetensors")
        change(stored)
        write_shard(folder / "model.safetensors", stored)

    return damage


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / INDEX, change)


def without(*endings: str) -> Callable[[dict[str, Any]], None]:
    def remove(stored: dict[str, Any]) -> None:
        for name in [name for name in stored if name.endswith(endings)]:
            del stored[name]

    return remove


def replace_by_fifo(folder: Path) -> None:
    (folder / SECOND).unlink()
    os.mkfifo(folder / SECOND)


def only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_name(file.name.replace("model", "pytorch_model").replace("safetensors", "bin")))
    (folder / INDEX).unlink()


def tensor_in_two_shards(folder: Path) -> None:
    (folder / INDEX).unlink()
    write_shard(
        folder / SECOND, {**read_shard(folder / SECOND), **dict([next(iter(read_shard(folder / FIRST).items()))])}
    )


def extra_tensor_in_shard(folder: Path) -> None:
    stored = read_shard(folder / SECOND)
    write_shard(
        folder / SECOND,
        {
            **stored,
            "surplus": stored["model.norm.weight"] if "model.norm.weight" in stored else next(iter(stored.values())),
        },
    )


def place(name: str) -> Callable[[Path], None]:
    """Let the index put a tensor into a file of any name."""
    return index(lambda content: content["weight_map"].update({"model.norm.weight": name}))


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w{}.weight"

BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    # config.json
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds list"),
    "config is empty": (lambda f: (f / "config.json").write_text(""), "not valid JSON"),
    "config is nested deep": (lambda f: (f / "config.json").write_text('{"a":' * 100_000), "nested too deep"),
    "config is latin-1": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xe9"}'), "not UTF-8"),
    "zero heads": (config(num_attention_heads=0), "num_attention_heads is 0, not between"),
    "zero kv heads": (config(num_key_value_heads=0), "num_key_value_heads is 0"),
    "negative size": (config(hidden_size=-64), "hidden_size is -64"),
    "10^12 layers": (config(num_hidden_layers=10**12), "num_hidden_layers is 1000000000000"),
    "10^12 experts": (config(num_local_experts=10**12), "num_local_experts is 1000000000000"),
    "10^12 tokens": (config(vocab_size=10**12), "vocab_size is 1000000000000"),
    "layers is null": (config(num_hidden_layers=None), "num_hidden_layers is null"),
    "layers is missing": (config(num_hidden_layers=...), "num_hidden_layers is missing"),
    "layers is text": (config(num_hidden_layers="two"), "num_hidden_layers is 'two', not a whole number"),
    "layers is true": (config(num_hidden_layers=True), "not a whole number"),
    "layers is a list": (config(num_hidden_layers=[[2]]), "not a whole number"),
    "epsilon is NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "epsilon is infinite": (config(rms_norm_eps=float("inf")), "rms_norm_eps is inf"),
    "theta is null": (config(rope_theta=None), "rope_theta is null"),
    "heads do not divide": (config(num_attention_heads=3, num_key_value_heads=2), "cannot share"),
    "size does not divide": (config(num_attention_heads=5, num_key_value_heads=5), "not a multiple of 5"),
    "odd heads": (config(head_dim=15), "heads of 15 cannot be rotated"),
    "too many experts used": (config(num_experts_per_tok=5), "5 experts per token of only 4"),
    "unknown model": (config(model_type="gpt9"), "model_type 'gpt9' cannot be converted"),
    "model type is a list": (config(model_type=["mixtral"]), "cannot be converted"),
    "classifier": (config(architectures=["MixtralForTokenClassification"]), "not a model of type mixtral"),
    "unknown rope": (config(rope_scaling={"type": "spiral"}), "'spiral' is not known"),
    "rope is a list": (config(rope_scaling=[1]), "rope settings are .*, not an object"),
    "rope without factor": (config(rope_scaling={"type": "linear"}), "factor is missing"),
    "rope factor zero": (config(rope_scaling={"type": "linear", "factor": 0}), "factor is 0"),
    "quantized config": (config(quantization_config={"quant_method": "gptq"}), r"already quantized \(GPTQ\)"),
    # shards and index
    "shard missing": (lambda f: (f / SECOND).unlink(), f"lacks 1 of 2 shards: '{SECOND}'"),
    "all shards missing": (lambda f: [s.unlink() for s in f.glob("*.safetensors")], f"'{FIRST}', '{SECOND}'"),
    "numbered shard missing without index": (
        lambda f: ((f / INDEX).unlink(), (f / FIRST).unlink()),
        f"lacks 1 of 2 shards: '{FIRST}'",
    ),
    "dangling link": (
        lambda f: ((f / SECOND).unlink(), (f / SECOND).symlink_to("../blobs/gone")),
        "lacks 1 of 2 shards",
    ),
    "shard truncated": (lambda f: os.truncate(f / SECOND, (f / SECOND).stat().st_size - 1), "lies at"),
    "shard is a fifo": (replace_by_fifo, "not a regular file"),
    "shard is a folder": (lambda f: ((f / SECOND).unlink(), (f / SECOND).mkdir()), "not a regular file"),
    "only pickles": (only_pickles, "pytorch_model-00001-of-00002.bin.*refused"),
    "index is empty": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "index names a key twice": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}'),
        "names 'a' twice",
    ),
    "index leaves the folder": (place("../secret.safetensors"), "is not the name of a safetensors file"),
    "index is absolute": (place("/etc/passwd"), "'/etc/passwd'"),
    "index has NUL": (place("model\0.safetensors"), r"'model\\x00.safetensors'"),
    "index has a drive": (place("C:model.safetensors"), "is not the name"),
    "index has a backslash": (place("..\\model.safetensors"), "is not the name"),
    "index has a number": (place(3), "in 3, which is not the name"),  # type: ignore[arg-type]
    "index names an absent tensor": (
        index(lambda c: c["weight_map"].update({"ghost": SECOND})),
        "disagrees with model.safetensors.index.json: it lacks 'ghost'",
    ),
    "index misses a tensor": (extra_tensor_in_shard, "holds 'surplus' besides"),
    "tensor in two shards": (tensor_in_two_shards, f"is in {FIRST} and in {SECOND}"),
    # tensors
    "untied without head": (tensors(without("lm_head.weight")), "'lm_head.weight' is missing; .*tie_word"),
    "layer gap": (
        tensors(lambda s: [s.pop(name) for name in list(s) if ".layers.0." in name]),
        "layer 0 is missing",
    ),
    "expert gap": (
        tensors(without("experts.2.w1.weight", "experts.2.w2.weight", "experts.2.w3.weight")),
        "expert 2 of 'model.layers.0.block_sparse_moe.experts.{expert}.w1.weight' is missing",
    ),
    "one tensor missing": (tensors(without("0.self_attn.v_proj.weight")), "v_proj.weight' is missing"),
    "more layers than config says": (config(num_hidden_layers=1), "belong nowhere"),
    "fewer experts than config says": (
        config(num_local_experts=5),
        r"gate.weight has the shape \[4, 64\], config.json asks for \[5, 64\]",
    ),
    "unmapped tensor": (
        tensors(lambda s: s.update({"model.extra.weight": s["model.norm.weight"]})),
        "1 tensor belongs nowhere in a mixtral model of this config.json: 'model.extra.weight'",
    ),
    "wrong shape": (config(intermediate_size=32), r"has the shape \[64, 64\], config.json asks for \[32, 64\]"),
    "transposed": (
        tensors(lambda s: s.update({EXPERT.format(0, 1): ("F32", np.zeros((64, 32), "<f4"))})),
        "has the shape",
    ),
    "gptq tensors": (
        tensors(lambda s: s.update({"model.layers.0.mlp.qweight": ("F32", np.zeros(4, "<f4"))})),
        "already quantized .GPTQ",
    ),
    "fp8 scales": (
        tensors(lambda s: s.update({"lm_head.weight_scale": ("F32", np.zeros(1, "<f4"))})),
        "already quantized .FP8",
    ),
    "bitsandbytes": (
        tensors(lambda s: s.update({"lm_head.SCB": ("F32", np.zeros(1, "<f4"))})),
        "already quantized .bitsandbytes",
    ),
    "integer weights": (
        tensors(lambda s: s.update({"lm_head.weight": ("I8", np.zeros((TOKENIZER_PIECES, 64), "i1"))})),
        "'lm_head.weight' is I8; weights must be BF16, F16, F32, F64",
    ),
    "embedding smaller than vocabulary": (config(vocab_size=TOKENIZER_PIECES + 1), "has 384 rows"),
    "sampling is text": (
        lambda f: (f / "generation_config.json").write_text('{"top_k": "many"}'),
        "top_k is 'many'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(folder: Path, case: str) -> None:
    """One sentence that names the thing and a folder or file; nothing is left open."""
    if sys.platform == "win32" and "fifo" in case:
        pytest.skip("there are no FIFOs on Windows")
    damage, problem = BROKEN[case]
    damage(folder)
    before = open_files()
    with pytest.raises(InputError, match=problem) as caught:
        open_checkpoint(folder)
    assert str(folder) in caught.value.message
    assert caught.value.message.endswith(".") and "\n" not in caught.value.message
    assert len(caught.value.message) < 1000
    assert open_files() == before


def open_files() -> int:
    descriptors = Path("/proc/self/fd")
    return len(list(descriptors.iterdir())) if descriptors.exists() else 0


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        open_checkpoint(tmp_path / "file")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no config\.json") as caught:
        open_checkpoint(tmp_path)
    assert "--lora" in caught.value.hint


def test_a_folder_above_the_checkpoint_names_it(folder: Path) -> None:
    snapshot = folder.parent / "models--org--fox" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.move(folder / "config.json", snapshot)
    for above in snapshot.parents[:2]:
        with pytest.raises(InputError, match=r"has no config\.json") as caught:
            open_checkpoint(above)
        assert caught.value.hint == f"Give {snapshot}."


def test_hostile_config_costs_nothing(tmp_path: Path) -> None:
    """The largest counts that are let through are still answered at once and in little memory."""
    import time
    import tracemalloc

    folder = tmp_path / "model"
    folder.mkdir()
    tensors(without("gate.weight"))(folder)
    config(num_hidden_layers=512, num_local_experts=256)(folder)
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(InputError, match="layers 2, 3, 4, 5, 6, 7, 8, 9 and 502 more are missing"):
        open_checkpoint(folder)
    assert time.monotonic() - started < 20
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


def test_byte_order_mark_in_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    open_checkpoint(folder).close()


def test_leftovers_are_dropped_and_said(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", SINGLE)
    stored = read_shard(folder / "model.safetensors")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    stored[name] = ("F32", np.zeros(8, "<f4"))
    write_shard(folder / "model.safetensors", stored)
    with open_checkpoint(folder) as source:
        assert any("1 leftover tensors are dropped" in note and name in note for note in source.notes)
        assert len(source.tensors) == 23


def test_embedding_larger_than_config_says(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", Shape(experts=4, vocabulary=TOKENIZER_PIECES + 6))
    config(vocab_size=TOKENIZER_PIECES)(folder)
    with open_checkpoint(folder) as source:
        assert source.get("{arch}.vocab_size") == TOKENIZER_PIECES + 6
        assert len(source.metadata["tokenizer.ggml.tokens"].value) == TOKENIZER_PIECES + 6
        assert any("embedding's 390 rows are kept" in note for note in source.notes)
        assert any("6 are padded" in note for note in source.notes)


def test_shards_without_index_under_any_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", SMALL)
    (folder / INDEX).unlink()
    (folder / FIRST).rename(folder / "one.safetensors")
    (folder / SECOND).rename(folder / "two.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(b"not looked at")
    with open_checkpoint(folder) as source:
        assert [path.name for path in source.files()] == ["one.safetensors", "two.safetensors"]


def test_linked_shards_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "models--somebody--Tiny-Mixtral" / "snapshots" / ("0" * 40)
    write_checkpoint(folder, SMALL)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    for shard in (FIRST, SECOND):
        (folder / shard).rename(blobs / shard)
        (folder / shard).symlink_to(Path("../../blobs") / shard)
    with open_checkpoint(folder) as source:
        assert source.get("general.name") == "Tiny-Mixtral"


def test_change_under_the_run_is_noticed(folder: Path) -> None:
    with open_checkpoint(folder) as source:
        source.check_unchanged()
        os.utime(folder / SECOND, (1, 1))
        with pytest.raises(InputError, match=f"{SECOND} changed"):
            source.check_unchanged()


def test_truncation_under_the_run_is_noticed(folder: Path) -> None:
    with open_checkpoint(folder) as source:
        os.truncate(folder / FIRST, 4000)
        with pytest.raises(InputError, match=f"{FIRST} ends at byte 4000"):
            for tensor in source.tensors:
                source.read(tensor, 0, tensor.rows)


def test_models_without_weights_are_planned_only(tmp_path: Path) -> None:
    """A folder with only config.json names the same tensors as the whole checkpoint does."""
    for name in ("mixtral", "llama-f32-tied", "llama-rope-llama3", "mistral"):
        whole = write_checkpoint(tmp_path / name, name)
        bare = tmp_path / "bare" / name
        bare.mkdir(parents=True)
        shutil.copy(whole / "config.json", bare)
        with open_checkpoint(whole) as full:
            source = open_checkpoint(bare)
            assert isinstance(source, ShapeOnlySource)
            assert source.tensors == full.tensors
            tokenizer = {key for key in full.metadata if key.startswith("tokenizer.")}
            assert source.metadata == {key: full.metadata[key] for key in full.metadata if key not in tokenizer}
            with pytest.raises(InputError, match="has no weights"):
                source.read(source.tensors[0], 0, 1)
        shutil.copy(whole / "tokenizer.model", bare)
        assert "tokenizer.ggml.tokens" in open_checkpoint(bare).metadata


def test_mixtral_8x7b(tmp_path: Path) -> None:
    """The published numbers of the real model, from its config.json alone."""
    (tmp_path / "config.json").write_text(
        '{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,'
        '"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,'
        '"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768,'
        '"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-05,'
        '"tie_word_embeddings": false, "torch_dtype": "bfloat16", "sliding_window": null}'
    )
    source = open_checkpoint(tmp_path)
    assert len(source.tensors) == 323
    assert source.parameters == 46_702_792_704
    assert {tensor.type for tensor in source.tensors} == {TensorType.BF16, TensorType.F32}


# What the reader must give, written down a second time from the model's definition.


def rotary_pairs(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Row 2i + j of a head is row j * size / 2 + i of transformers' head."""
    size = rows.shape[0] // heads
    result = np.empty_like(rows)
    for head in range(heads):
        for row in range(size):
            result[head * size + row] = rows[head * size + row % 2 * (size // 2) + row // 2]
    return result


@cache
def reference(name: str) -> dict[str, npt.NDArray[Any]]:
    shape = SHAPES[name]
    stored = {key: values for key, (_, values) in make_tensors(shape).items()}
    found = {
        "token_embd.weight": stored["model.embed_tokens.weight"],
        "output.weight": stored["lm_head.weight"],
    }
    for layer in range(shape.layers):
        source, target = f"model.layers.{layer}.", f"blk.{layer}."
        found[target + "attn_q.weight"] = rotary_pairs(stored[source + "self_attn.q_proj.weight"], shape.heads)
        found[target + "attn_k.weight"] = rotary_pairs(stored[source + "self_attn.k_proj.weight"], shape.kv_heads)
        found[target + "attn_v.weight"] = stored[source + "self_attn.v_proj.weight"]
        found[target + "attn_output.weight"] = stored[source + "self_attn.o_proj.weight"]
        for matrix, ours in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            found[f"{target}ffn_{ours}_exps.weight"] = np.concatenate(
                [
                    stored[f"{source}block_sparse_moe.experts.{expert}.{matrix}.weight"]
                    for expert in range(shape.experts)
                ]
            )
    return found


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "mixtral", "mixtral"))


def test_every_tensor_is_what_the_definition_says(mixtral: Source) -> None:
    wanted = reference("mixtral")
    for tensor in mixtral.tensors:
        if tensor.name in wanted:
            rows = mixtral.read(tensor, 0, tensor.rows)
            assert rows.dtype == FLOAT_TYPES[tensor.type] and rows.shape == (tensor.rows, tensor.columns)
            assert np.array_equal(rows, wanted[tensor.name]), tensor.name
        else:
            assert tensor.type == TensorType.F32, tensor.name


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_slice_is_a_slice_of_the_whole(mixtral: Source, data: st.DataObject) -> None:
    tensor = data.draw(st.sampled_from(list(mixtral.tensors)))
    start = data.draw(st.integers(0, tensor.rows))
    stop = data.draw(st.integers(start, tensor.rows))
    rows = mixtral.read(tensor, start, stop)
    assert rows.dtype == FLOAT_TYPES[tensor.type] and rows.shape == (stop - start, tensor.columns)
    assert np.array_equal(rows, mixtral.read(tensor, 0, tensor.rows)[start:stop])


def test_slices_from_many_threads(mixtral: Source) -> None:
    slices = [(t, a, min(a + 5, t.rows)) for t in mixtral.tensors for a in range(0, t.rows, 5)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: mixtral.read(*place).tobytes(), slices))
    assert found == [mixtral.read(*place).tobytes() for place in slices]


def test_rows_that_do_not_exist(mixtral: Source) -> None:
    with pytest.raises(IndexError):
        mixtral.read(mixtral.tensors[0], 0, mixtral.tensors[0].rows + 1)


def test_experts_of_mixed_types_meet_in_f32(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", SINGLE)
    stored = read_shard(folder / "model.safetensors")
    name = EXPERT.format(2, 1)
    half = np.linspace(-1, 1, 64 * 64, dtype="<f2").reshape(64, 64)
    stored[name] = ("F16", half)
    write_shard(folder / "model.safetensors", stored)
    with open_checkpoint(folder) as source:
        (tensor,) = (t for t in source.tensors if t.name == "blk.1.ffn_gate_exps.weight")
        assert tensor.type == TensorType.F32
        rows = source.read(tensor, 0, tensor.rows)
        assert np.array_equal(rows[128:192], half.astype(np.float32))
        first = stored[EXPERT.format(0, 1)][1]
        assert np.array_equal(rows[:64].view(np.uint32), first.astype(np.uint32) << 16)


def test_double_precision_becomes_single(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", Shape("llama", dtype="F64", experts=0))
    with open_checkpoint(folder) as source:
        assert {tensor.type for tensor in source.tensors} == {TensorType.F32}
        assert source.read(source.tensors[0], 0, 3).dtype == np.float32


def test_a_tied_model_that_stores_its_head_keeps_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", DENSE)
    config(tie_word_embeddings=True)(folder)
    with open_checkpoint(folder) as source:
        assert isinstance(source, Checkpoint)
        assert source.tensors[-1].name == "output.weight"
