"""The memory need against llama.cpp's own measure, limits of cgroups, and the 16 GB machine."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from localmix import memory, worker
from localmix.errors import InputError, UsageError
from localmix.memory import GIB, MIB, Available, Need
from localmix.plan import Planner
from localmix.presets import load_presets
from localmix.sources.base import MetaValue, ShapeOnlySource, TensorInfo, ValueType, array, boolean, f32, text, u32
from localmix.sources.open import open_source
from localmix.tensor_types import TensorType
from tests.checkpoints import Shape, write_checkpoint
from tests.memory_jobs import measure

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral-8x7B as a folder with nothing but config.json."""
    import json

    folder = tmp_path_factory.mktemp("mixtral-8x7b")
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    return folder


def test_mixtral_takes_what_llama_cpp_measured(mixtral: Path) -> None:
    with open_source(mixtral) as source:
        need = memory.need(source, 0, 4096)
        assert need.kv == 512 * MIB
        assert need.compute / MIB == pytest.approx(204.01, abs=1)
        assert memory.need(source, 0, 32768).compute / MIB == pytest.approx(232.01, abs=1)
        assert memory.need(source, 0, 131072).kv == 16 * GIB
        assert memory.need(source, 0, 4096, "q8_0").kv == 512 * MIB * 34 // 64


@pytest.mark.parametrize("experts", [8, 0])
@pytest.mark.parametrize("context", [512, 4096, 40960])
def test_need_against_the_engine(tmp_path: Path, experts: int, context: int) -> None:
    from localmix.convert import convert

    shape = Shape("mixtral" if experts else "llama", hidden=256, feed_forward=512, experts=experts, layers=3)
    path = tmp_path / "model.gguf"
    convert(write_checkpoint(tmp_path / "model", shape), path)
    cache, compute = worker.run(measure, path, context)
    with open_source(path) as source:
        need = memory.need(source, 0, context)
    assert need.kv / MIB == pytest.approx(cache, abs=0.01)
    assert need.compute / MIB == pytest.approx(compute, abs=1)


def test_a_16_gb_machine_runs_mixtral(mixtral: Path) -> None:
    floor = memory.machine(memory.FLOOR_GB)
    assert 14 * GIB < floor.bytes < 15.3 * GIB
    with open_source(mixtral) as source:
        planner = Planner(source)

        def fits(kind: str) -> bool:
            plan = planner.plan(load_presets().find(kind), has_imatrix=True)
            return floor.fits(memory.need(source, plan.file_bytes, 4096))

        assert fits("IQ2_XS") and fits("IQ2_XXS") and fits("IQ2_S")
        assert not fits("Q2_K") and not fits("Q4_K")


def test_heads_may_differ_between_layers() -> None:
    metadata: dict[str, MetaValue] = {
        "general.architecture": text("llama"),
        "llama.block_count": u32(2),
        "llama.embedding_length": u32(64),
        "llama.attention.head_count": u32(4),
        "llama.attention.head_count_kv": MetaValue(u32(0).type, [1, 2]),
        "llama.attention.key_length": u32(8),
        "llama.attention.value_length": u32(24),
    }
    tensor = TensorInfo("token_embd.weight", (10, 64), TensorType.F16)
    source = ShapeOnlySource(Path("x"), metadata, [tensor])
    assert memory.need(source, 0, 256).kv == 256 * (1 + 2) * (8 + 24) * 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.context_length", text("4096")),
        ("llama.context_length", array(ValueType.INT32, [4096])),
        ("llama.context_length", f32(float("nan"))),
        ("llama.context_length", MetaValue(ValueType.INT32, -1)),
        ("llama.attention.head_count", array(ValueType.INT32, [])),
        ("llama.attention.head_count", text("32")),
        ("llama.attention.head_count_kv", array(ValueType.STRING, ["8"])),
        ("llama.feed_forward_length", array(ValueType.INT32, [])),
        ("llama.block_count", boolean(True)),
        ("llama.vocab_size", text("many")),
        ("tokenizer.ggml.tokens", u32(7)),
    ],
)
def test_metadata_of_the_wrong_kind_is_named(key: str, value: MetaValue) -> None:
    metadata = {"general.architecture": text("llama"), key: value}
    source = ShapeOnlySource(Path("broken.gguf"), metadata, [])
    with pytest.raises(InputError, match=f"^broken.gguf: the metadata entry {key} is "):
        memory.need(source, 0, memory.trained_context(source))


def test_the_largest_context_fits_and_the_next_does_not(mixtral: Path) -> None:
    room = Available(20 * GIB, "a test")
    with open_source(mixtral) as source:
        found = memory.largest_context(source, 17 * GIB, room)
        assert found % 256 == 0
        assert room.fits(memory.need(source, 17 * GIB, found))
        assert not room.fits(memory.need(source, 17 * GIB, found + 256))
        assert memory.largest_context(source, 30 * GIB, room) == 0
        assert memory.largest_context(source, 0, Available(2**60, "a test")) == 32768


def make_group(folder: Path, limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(str(used))
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache // 2}\nactive_file {cache - cache // 2}\n")


def test_the_tightest_cgroup_on_the_way_to_the_root_counts(tmp_path: Path) -> None:
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text("0::/user/app\n")
    make_group(root / "user" / "app", "max", 9, 0)
    make_group(root / "user", str(3 * GIB), 2 * GIB, GIB)
    make_group(root, str(8 * GIB), 2 * GIB, 0)
    found = memory._cgroup_headroom(groups, root)
    assert min(found) == (2 * GIB, "the memory limit of cgroup /user")
    assert len(found) == 2


def test_a_container_sees_its_own_group_at_the_root(tmp_path: Path) -> None:
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text("0::/not/visible/here\n")
    make_group(root, str(GIB), 0, 0)
    assert memory._cgroup_headroom(groups, root) == [(GIB, "the memory limit of cgroup /")]


def test_version_1_of_cgroups(tmp_path: Path) -> None:
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text("7:cpu:/\n4:memory:/box\n0::/\n")
    folder = root / "memory" / "box"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(2 * GIB))
    (folder / "memory.usage_in_bytes").write_text(str(GIB))
    (folder / "memory.stat").write_text(f"cache 1\ntotal_inactive_file {GIB // 2}\ntotal_active_file 0\n")
    assert memory._cgroup_headroom(groups, root) == [(GIB + GIB // 2, "the memory limit of cgroup /box")]
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert memory._cgroup_headroom(groups, root) == []


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert memory._cgroup_headroom(tmp_path / "nothing", tmp_path) == []


def test_available_names_what_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = namedtuple("machine", "available total")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine(4 * GIB, 16 * GIB))
    monkeypatch.setattr(memory, "_cgroup_headroom", lambda: [])
    assert memory.available() == Available(4 * GIB, "what is free of this machine's 16.0 GiB")
    monkeypatch.setattr(memory, "_cgroup_headroom", lambda: [(9 * GIB, "loose"), (GIB, "tight")])
    assert memory.available() == Available(GIB, "tight")
    assert not memory.available().fits(Need(GIB, 0, 0, 1))


@pytest.mark.parametrize(("words", "number"), [("16", 16), ("16GB", 16), ("12.5 GiB", 12.5), ("8g", 8)])
def test_sizes_of_memory(words: str, number: float) -> None:
    assert memory.parse_gigabytes(words) == number


@pytest.mark.parametrize("words", ["", "GB", "0", "-1", "16MB", "nan", "1e3", "16GBx"])
def test_what_is_no_size(words: str) -> None:
    with pytest.raises(UsageError):
        memory.parse_gigabytes(words)
