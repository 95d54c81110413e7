"""What a model is said to need, against llama.cpp's own measure and against what a real run takes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from localmix import worker
from localmix.capacity.memory import Need, trained_context
from localmix.capacity.placement import weigh
from localmix.capacity.requirements import Requirements, repacked_bytes, vocabulary_bytes
from localmix.capacity.simulation import Setting, simulate, skeleton
from localmix.errors import InputError
from localmix.gguf_format import encode_header
from localmix.native.devices import PROCESSOR
from localmix.sizes import GIB, MIB
from localmix.sources.base import (
    MetaValue,
    ShapeOnlySource,
    Source,
    TensorInfo,
    ValueType,
    array,
    boolean,
    f32,
    text,
    u32,
)
from localmix.sources.open import open_source
from localmix.tensor_types import TensorType
from tests.memory_jobs import hollow, peak, sliding_window_model, write_config, zeros
from tests.random_model import write_random_model

SMALL = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "vocab_size": 8000,
}
LARGE = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "vocab_size": 32000,
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral-8x7B as a folder with nothing but config.json."""
    return write_config(tmp_path_factory.mktemp("models") / "mixtral-8x7b")


def test_mixtral_takes_what_llama_cpp_measured(mixtral: Path) -> None:
    with open_source(mixtral) as source:
        computed, simulated = Requirements(source), Requirements(source)
        settings = [Setting(4096), Setting(32768), Setting(4096, "q8_0")]
        simulated.simulate(settings)
    assert simulated.simulated and not computed.simulated
    for requirements in (computed, simulated):
        assert [requirements.buffers(setting).kv / MIB for setting in settings] == [512, 4096, 272]
        compute = [requirements.buffers(setting).compute["CPU"] / MIB for setting in settings[:2]]
        assert compute == pytest.approx([204, 232], abs=1)


@pytest.mark.parametrize("experts", [8, 0])
def test_the_formulas_agree_with_llama_cpp(tmp_path: Path, experts: int) -> None:
    with open_source(write_config(tmp_path / "model", experts=experts, **SMALL)) as source:
        settings = [
            Setting(context, kind, outputs=outputs)
            for context, kind in ((512, "f16"), (4096, "q8_0"), (40000, "f16"))
            for outputs in (1, 512)
        ]
        simulated = Requirements(source)
        simulated.simulate(settings)
        for setting in settings:
            computed = Requirements(source).buffers(setting)
            assert computed.kv / MIB == pytest.approx(simulated.buffers(setting).kv / MIB, abs=0.01)
            found = simulated.buffers(setting).compute["CPU"]
            assert computed.compute["CPU"] / MIB == pytest.approx(found / MIB, rel=0.2)


def real_and_predicted(source: Source, setting: Setting, fill: int) -> tuple[int, Need]:
    """Anonymous bytes of a real run, and the need that was predicted."""
    requirements = Requirements(source)
    requirements.simulate([setting])
    assert requirements.simulated
    weights = weigh(source.tensors)
    with zeros(source) as path:
        real, _ = worker.run(peak, path, setting, fill=fill)
    return real, requirements.need(weights, setting, repacked_bytes(weights))


def check_prediction(source: Source, setting: Setting) -> None:
    real, need = real_and_predicted(source, setting, fill=512)
    # the run has no vocabulary, and counts from where the program has started
    predicted = need.anonymous - need.program - need.vocabulary
    assert predicted >= real * 0.98
    assert predicted - real <= max(0.05 * real, 100 * 10**6)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_full_context_takes_what_was_predicted(tmp_path: Path, kv_type: str) -> None:
    source = hollow(write_config(tmp_path / "model", experts=0, **{**SMALL, "num_hidden_layers": 2}), "Q4_0")
    real, need = real_and_predicted(source, Setting(2048, kv_type), fill=2048)
    predicted = need.anonymous - need.program - need.vocabulary
    assert real * 0.98 <= predicted <= real + 8 * MIB


def test_a_sliding_window_takes_what_was_predicted() -> None:
    check_prediction(sliding_window_model(), Setting(8192))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "kind", "setting"),
    [
        pytest.param({"experts": 0}, "Q8_0", Setting(16384), id="dense"),
        pytest.param({"experts": 0, "num_key_value_heads": 4}, "Q6_K", Setting(32768), id="grouped-query"),
        pytest.param({"num_key_value_heads": 4}, "Q4_K_M", Setting(8192), id="mixture"),
        pytest.param({"experts": 0}, "Q2_K", Setting(32768, "q8_0"), id="q8_0-cache"),
        pytest.param({"experts": 0}, "Q4_K_M", Setting(32768, "q4_0"), id="q4_0-cache"),
        pytest.param({"experts": 0, **SMALL}, "Q4_0", Setting(65536), id="long-context"),
        pytest.param({"experts": 0, **SMALL}, "Q8_0", Setting(8192, batch=2048), id="large-batch"),
    ],
)
def test_large_shapes_take_what_was_predicted(
    tmp_path: Path, changes: dict[str, int], kind: str, setting: Setting
) -> None:
    source = hollow(
        write_config(tmp_path / "model", **{**LARGE, "max_position_embeddings": 65536, **changes}),
        kind,
    )
    check_prediction(source, setting)


@pytest.mark.slow
def test_a_long_context_that_is_filled_takes_what_was_predicted(tmp_path: Path) -> None:
    """Here the attention mask and llama.cpp's list of cells are most of it."""
    shape = {
        "hidden_size": 64,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 1000,
    }
    source = hollow(write_config(tmp_path / "model", experts=0, **shape), "F16")
    real, need = real_and_predicted(source, Setting(16384), fill=16384)
    assert real * 0.98 <= need.anonymous - need.program - need.vocabulary <= real + 8 * MIB


@pytest.mark.slow
def test_a_large_sliding_window_takes_what_was_predicted() -> None:
    check_prediction(sliding_window_model(), Setting(32768))


def test_a_window_is_no_mystery_to_llama_cpp() -> None:
    requirements = Requirements(sliding_window_model())
    requirements.simulate([Setting(8192)])
    assert sorted(requirements.buffers(Setting(8192)).layers) == list(range(6))


def test_what_llama_cpp_refuses_is_computed(tmp_path: Path) -> None:
    source = ShapeOnlySource(
        tmp_path, {"general.architecture": text("nonsense")}, [TensorInfo("token_embd.weight", (9, 8), TensorType.F16)]
    )
    requirements = Requirements(source)
    requirements.simulate([Setting(256)])
    assert not requirements.simulated
    assert requirements.buffers(Setting(256)).compute["CPU"] > 0


def test_no_room_for_a_skeleton(mixtral: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with open_source(mixtral) as source:
        requirements = Requirements(source)
        requirements.simulate([Setting(256)])
        assert not requirements.simulated
        assert requirements.buffers(Setting(256)).kv == 32 * MIB


def test_a_skeleton_takes_no_disk(mixtral: Path) -> None:
    with open_source(mixtral) as source, skeleton(source) as path:
        assert path.stat().st_size > 86 * GIB
        assert path.stat().st_blocks * 512 < MIB
    assert not path.exists()


def test_a_simulation_allocates_nothing(mixtral: Path) -> None:
    with open_source(mixtral) as source, skeleton(source) as path:
        (found,) = worker.run(simulate, path, [Setting(131072, sequences=4)], PROCESSOR)
    assert found.kv == 16 * GIB and found.output == pytest.approx(4 * 32000 * 4, rel=0.05)


def test_a_file_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(encode_header({"general.architecture": text("llama")}, []))
    with pytest.raises(InputError, match="cannot load"):
        worker.run(simulate, path, [Setting(256)], PROCESSOR)


def test_the_largest_context_fits_and_the_next_does_not(mixtral: Path) -> None:
    with open_source(mixtral) as source:
        weights = weigh(source.tensors)
        for simulated in (False, True):
            requirements = Requirements(source)
            if simulated:
                requirements.simulate([Setting(4096)])

            def needed(setting: Setting, requirements: Requirements = requirements) -> int:
                return requirements.need(weights, setting).mapped.anonymous

            found = requirements.largest_context(Setting(4096), lambda setting: needed(setting) <= 2 * GIB)
            assert found % 256 == 0
            requirements.simulate([Setting(found), Setting(found + 256)] if simulated else [])
            assert needed(Setting(found)) <= 2 * GIB < needed(Setting(found + 256))
            assert requirements.largest_context(Setting(4096), lambda _: False) == 0
            assert requirements.largest_context(Setting(4096), lambda _: True) == 32768


def test_a_vocabulary_is_counted(random_model: Path) -> None:
    with open_source(random_model) as source:
        small = vocabulary_bytes(source)
        assert 0 < small < MIB
        source.metadata["tokenizer.ggml.merges"] = array(ValueType.STRING, ["a b"] * 10**5)
        assert 5 * MIB < vocabulary_bytes(source) - small < 20 * MIB


def test_a_vocabulary_takes_what_was_predicted(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "words.gguf", layers=1, experts=0, hidden=64, embedding_rows=100_000)
    setting = Setting(512)
    with open_source(path) as source:
        requirements = Requirements(source)
        requirements.simulate([setting])
        need = requirements.need(weigh(source.tensors), setting)
    real, _ = worker.run(peak, path, setting, fill=512)
    assert need.vocabulary > 10 * MIB
    assert real * 0.98 <= need.anonymous - need.program <= real + 8 * MIB


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
    assert Requirements(source).buffers(Setting(256)).kv == 256 * (1 + 2) * (8 + 24) * 2


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
        Requirements(source).need(weigh([]), Setting(trained_context(source)))


def test_weights_without_reordering_are_all_mapped() -> None:
    need = Need(100, 60, 1, 2, 3, 4, 5)
    assert need.total == 115 and need.anonymous == 75
    assert need.mapped.anonymous == 15 and need.mapped.total == 115
    assert replace(need, kv=2).total == 116
