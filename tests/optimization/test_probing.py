from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from localmix import worker
from localmix.capacity.memory import Available
from localmix.convert import convert
from localmix.errors import CapacityError, FileError, InputError
from localmix.imatrix import collect
from localmix.importance import load_importance
from localmix.measurement.corpus import Corpus, read_corpus
from localmix.measurement.divergence import open_reference
from localmix.measurement.perplexity import Conditions
from localmix.measurement.reference import Cache
from localmix.native.kernels import quantize_rows
from localmix.optimization import probing
from localmix.optimization.probing import FINE, journal_path, measure, plan_probes
from localmix.optimization.sampled_error import relative_errors
from localmix.optimization.sensitivities import Measured, Value, read_measured
from localmix.presets import Preset, Rule, load_presets
from localmix.quantize import quantize
from localmix.sources.open import open_source
from localmix.tensor_types import TensorType, widen
from tests.commands import CommandLine
from tests.conftest import TINYMIX
from tests.model_families import write_model
from tests.probing_jobs import predictions

CLASSES = {
    "attn_k",
    "attn_output",
    "attn_q",
    "attn_v",
    "ffn_down_exps",
    "ffn_gate_exps",
    "ffn_up_exps",
    "output",
    "token_embd",
}


@pytest.fixture(scope="module")
def text() -> Corpus:
    return read_corpus([TINYMIX / "calibration.txt"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("references"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tinymix_bf16: Path, text: Corpus, cache: Cache) -> Measured:
    output = tmp_path_factory.mktemp("sensitivities") / "tinymix.json"
    found = measure(tinymix_bf16, text, output, ctx=256, chunks=4, threads=1, cache=cache)
    assert read_measured(output) == found
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return found


def test_weights_are_overwritten_with_what_is_left_of_them_and_put_back(tmp_path: Path, tinymix_bf16: Path) -> None:
    """A file that holds the decoded weights, made with gguf-py's decoder, predicts what the perturbed model does."""
    types = {"blk.1.ffn_down_exps.weight": TensorType.Q3_K, "output.weight": TensorType.Q4_0}
    (before, perturbed, after), lost = worker.run(predictions, tinymix_bf16, types)
    assert np.array_equal(before, after)
    assert not np.allclose(before, perturbed, atol=0.01)

    copy = tmp_path / "decoded.gguf"
    copy.write_bytes(tinymix_bf16.read_bytes())
    with open_source(tinymix_bf16) as source, copy.open("r+b") as file:
        offsets = {tensor.name: tensor.data_offset for tensor in gguf.GGUFReader(tinymix_bf16).tensors}
        infos = [tensor for tensor in source.tensors if tensor.name in types]
        for tensor in infos:
            rows = np.ascontiguousarray(widen(source.read(tensor, 0, tensor.rows), tensor.type))
            kind = types[tensor.name]
            decoded = dequantize(quantize_rows(kind, rows, None), gguf.GGMLQuantizationType(kind))
            file.seek(int(offsets[tensor.name]))
            file.write(quantize_rows(TensorType.BF16, decoded, None).tobytes())
        expected = relative_errors(source, types.values(), tensors=infos, weights=1 << 40)
    (of_the_file, *_), _ = worker.run(predictions, copy, {})
    np.testing.assert_array_equal(perturbed, of_the_file)
    for name, kind in types.items():
        assert lost[name] == pytest.approx(expected[name][kind], rel=1e-4)


def damage_at(value: Value, error: float = 0.08) -> float:
    """Nats of all tensors of a class together."""
    return float(value.tensors * value.nats * error**value.exponent)


def test_every_class_that_is_quantized_is_measured(measured: Measured) -> None:
    assert set(measured.classes) == CLASSES
    assert measured.by_layer == {}
    assert (measured.base, measured.probes, measured.chunks, measured.layers) == ("BF16", "Q3_K, Q2_K", 4, 3)
    assert not measured.imatrix
    assert measured.classes["attn_q"].tensors == 3
    for value in measured.classes.values():
        # what the curve says of the probe is what the probe gave, less what rounding makes
        damage = value.tensors * value.nats * value.relative_error**value.exponent
        assert 0.7 * value.divergence < damage <= value.divergence * 1.000001
        assert 1 <= value.exponent <= 1.7
        assert 0 < value.error < 1
    most = max(measured.classes, key=lambda kind: damage_at(measured.classes[kind]))
    assert most == "output"


def test_a_probe_shows_the_divergence_of_a_file_with_those_types(
    tmp_path: Path, tinymix_bf16: Path, text: Corpus, cache: Cache, measured: Measured
) -> None:
    """The file's own kernels round the activations, too, so the two are only near."""
    path = tmp_path / "down.gguf"
    preset = Preset("down", "Q8_0", rules=(Rule("ffn_down_exps", TensorType.Q3_K),))
    quantize(tinymix_bf16, [(preset, path)], threads=1)
    reference = open_reference(tinymix_bf16, text, Conditions(256, 4, 1), cache)
    divergence = reference.measure(path).divergence
    assert divergence is not None
    assert divergence.mean == pytest.approx(measured.classes["ffn_down_exps"].divergence, rel=0.25)


def test_q8_0_tells_nearly_what_bf16_does(
    tmp_path: Path, tinymix_bf16: Path, text: Corpus, cache: Cache, measured: Measured
) -> None:
    path = tmp_path / "tinymix-Q8_0.gguf"
    quantize(tinymix_bf16, [(load_presets().find("Q8_0"), path)], threads=1)
    found = measure(path, text, tmp_path / "q8.json", ctx=256, chunks=4, threads=1, cache=cache)
    assert found.base == "Q8_0"
    assert found.rounding > 3 * measured.rounding
    for kind, value in found.classes.items():
        one, other = damage_at(value), damage_at(measured.classes[kind])
        error = math.hypot(one * value.error, other * measured.classes[kind].error)
        assert one == pytest.approx(other, abs=3 * error, rel=0.05)


def test_layers_are_probed_alone_where_that_is_wanted(
    tmp_path: Path, tinymix_bf16: Path, text: Corpus, cache: Cache
) -> None:
    imatrix = tmp_path / "imatrix.gguf"
    collect(tinymix_bf16, [TINYMIX / "calibration.txt"], imatrix, ctx=256, chunks=4, threads=1)
    with open_source(tinymix_bf16) as source:
        importance = load_importance(imatrix)
        probes = plan_probes(source, importance, per_layer=True)
    places = {(probe.kind, probe.layer): probe for probe in probes if probe.coarse == "Q3_K"}
    assert {probe.kind for probe in probes if probe.coarse == "IQ1_S"} == CLASSES
    assert [probe.kind for probe in probes if probe.coarse == FINE] == ["token_embd"]
    assert {kind for kind, layer in places if layer is None} == CLASSES
    assert {layer for kind, layer in places if kind == "attn_v"} == {None, 0, 1, 2}
    assert {layer for kind, layer in places if kind == "output"} == {None}
    assert list(places["attn_v", 1].types) == ["blk.1.attn_v.weight"]
    coarsest = {probe.kind: set(probe.types.values()) for probe in probes if probe.coarse == "IQ1_S"}
    assert coarsest["attn_v"] == {TensorType.IQ1_S}
    assert coarsest["output"] == {TensorType.Q2_K}  # the importance matrix does not cover it

    found = measure(
        tinymix_bf16,
        text,
        tmp_path / "layers.json",
        importance,
        ctx=64,
        chunks=1,
        per_layer=True,
        threads=1,
        cache=cache,
    )
    assert found.imatrix
    assert len(found.by_layer) == 7 * 3
    assert found.sensitivities().of("blk.2.attn_v.weight") == found.by_layer["attn_v", 2].curve
    assert found.by_layer["attn_v", 2].exponent == found.classes["attn_v"].exponent


def test_a_run_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, tinymix_bf16: Path, text: Corpus, cache: Cache, measured: Measured
) -> None:
    output = tmp_path / "tinymix.json"

    class Stop(Exception):
        pass

    def stop(done: int, total: int, label: str) -> None:
        if journal_path(output).exists() and len(json.loads(journal_path(output).read_text())["found"]) == 3:
            raise Stop

    with pytest.raises(Stop):
        measure(tinymix_bf16, text, output, ctx=256, chunks=4, threads=1, cache=cache, progress=stop)
    assert not output.exists()

    seen: list[int] = []
    again = measure(
        tinymix_bf16,
        text,
        output,
        ctx=256,
        chunks=4,
        resume=True,
        threads=1,
        cache=cache,
        progress=lambda done, total, label: seen.append(done),
    )
    assert min(seen) == 3 * 4
    assert again == measured
    assert not journal_path(output).exists()


@pytest.mark.parametrize(
    ("family", "classes"),
    [
        ("deepseek_v2", {"attn_kv_a_mqa", "attn_v_b", "ffn_gate", "ffn_gate_exps", "ffn_down_shexp", "output"}),
        ("gemma3_text", {"attn_q", "ffn_up", "token_embd"}),  # its embeddings are its output, too
    ],
)
def test_other_architectures_are_measured(
    family: str, classes: set[str], tmp_path: Path, text: Corpus, cache: Cache
) -> None:
    path = tmp_path / "model.gguf"
    convert(write_model(tmp_path / "checkpoint", family), path)
    found = measure(path, text, tmp_path / "out.json", ctx=32, chunks=2, threads=1, cache=cache)
    assert classes <= set(found.classes)
    assert all(value.nats > 0 for value in found.classes.values())


def test_a_model_that_makes_no_text_is_refused(tmp_path: Path, text: Corpus, cache: Cache) -> None:
    path = tmp_path / "model.gguf"
    convert(write_model(tmp_path / "checkpoint", "bert"), path)
    with pytest.raises(InputError):
        measure(path, text, tmp_path / "out.json", ctx=32, chunks=2, threads=1, cache=cache)


def test_what_another_run_left_is_not_gone_on_with(
    tmp_path: Path, tinymix_bf16: Path, text: Corpus, cache: Cache
) -> None:
    output = tmp_path / "tinymix.json"
    journal_path(output).write_text(json.dumps({"key": "another", "found": {}}))
    with pytest.raises(InputError, match="another model, text"):
        measure(tinymix_bf16, text, output, ctx=256, chunks=4, resume=True, threads=1, cache=cache)
    journal_path(output).write_text("{")
    with pytest.raises(InputError, match="is broken"):
        measure(tinymix_bf16, text, output, ctx=256, chunks=4, resume=True, threads=1, cache=cache)


def test_a_model_that_has_lost_too_much_already_is_refused(
    tmp_path: Path, tinymix_bf16: Path, text: Corpus, cache: Cache
) -> None:
    path = tmp_path / "coarse.gguf"
    quantize(tinymix_bf16, [(load_presets().find("Q4_K_S"), path)], threads=1)
    with pytest.raises(InputError, match="has lost too much to measure from"):
        measure(path, text, tmp_path / "coarse.json", ctx=256, chunks=4, threads=1, cache=cache)


def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_loaded(
    tmp_path: Path, tinymix_bf16: Path, text: Corpus, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "available", lambda: Available(1 << 20, "a small machine"))
    with pytest.raises(CapacityError, match="overwritten in memory"):
        measure(tinymix_bf16, text, tmp_path / "out.json", ctx=256, chunks=4, threads=1, cache=cache)


def test_a_folder_that_is_not_there_is_told_before_the_work(
    tmp_path: Path, tinymix_bf16: Path, text: Corpus, cache: Cache
) -> None:
    with pytest.raises(FileError):
        measure(tinymix_bf16, text, tmp_path / "none" / "out.json", ctx=256, threads=1, cache=cache)


def test_the_command_survives_kill_9_and_prints_what_it_measured(tmp_path: Path, tinymix_bf16: Path) -> None:
    line = CommandLine(tmp_path / "home", tmp_path)
    words: list[str | Path] = ["sensitivity", tinymix_bf16, "--corpus", TINYMIX / "calibration.txt", "-o", "out.json"]
    words += ["--ctx", "128", "--chunks", "4", "--threads", "1", "--json"]
    process = line.popen(*words)
    partial = tmp_path / "out.json.partial"
    while process.poll() is None and not partial.exists():
        time.sleep(0.02)
    process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    process.communicate()
    assert not (tmp_path / "out.json").exists()
    assert json.loads(partial.read_text())["found"]

    done = line(*words, "--resume")
    assert set(done.json["classes"]) == CLASSES
    assert done.json["chunks"] == 4
    assert read_measured(tmp_path / "out.json").classes["output"].nats == done.json["classes"]["output"]["nats"]
    assert not partial.exists()


def test_the_command_names_what_is_wrong(tmp_path: Path, tinymix_bf16: Path) -> None:
    line = CommandLine(tmp_path / "home", tmp_path)
    calibration = TINYMIX / "calibration.txt"
    assert "--corpus" in line.fails("sensitivity", tinymix_bf16, "-o", "out.json", expect=2)
    assert "--output" in line.fails("sensitivity", tinymix_bf16, "--corpus", calibration, expect=2)
    line.fails("sensitivity", tinymix_bf16, "--corpus", calibration, "-o", tinymix_bf16, expect=2)
    (tmp_path / "short.txt").write_text("one word")
    line.fails("sensitivity", tinymix_bf16, "--corpus", "short.txt", "-o", "out.json", expect=3)
    assert not (tmp_path / "out.json").exists()
