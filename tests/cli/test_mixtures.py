"""`quantize --target` and `plan --target` as a user runs them."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from localmix.gguf_format import read_header
from localmix.optimization.sensitivities import Measured, Value, write_sensitivities
from tests.checkpoints import Shape, write_checkpoint
from tests.commands import CommandLine
from tests.hub_server import serve

CLASSES = (
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_down_exps",
    "output",
    "token_embd",
)


@pytest.fixture
def measured(localmix: CommandLine) -> Path:
    """A file as `localmix sensitivity` writes it, for the model `fox`."""
    return write_measured(localmix.folder / "fox.sensitivities.json", layers=2)


def write_measured(path: Path, layers: int) -> Path:
    values = {
        kind: Value(nats=0.1 + 0.1 * place, exponent=1.2, error=0.01, tensors=2, divergence=0.1, relative_error=0.1)
        for place, kind in enumerate(CLASSES)
    }
    measured = Measured(
        model="fox",
        architecture="llama",
        layers=layers,
        parameters=1,
        base="BF16",
        corpus="corpus.txt",
        corpus_sha256="0" * 64,
        context=256,
        chunks=1,
        engine="llama.cpp",
        imatrix=False,
        probes="Q3_K",
        rounding=0.0,
        classes=values,
    )
    write_sensitivities(path, measured)
    return path


def test_a_target_is_kept_and_its_recipe_makes_the_same_bytes(localmix: CommandLine, measured: Path) -> None:
    chosen = ("--target", "4.5bpw", "--sensitivity", measured, "--threads", "1")
    run = localmix("quantize", "fox", *chosen, "--save-recipe", "recipe.yaml", "--json")
    (output,) = run.json["outputs"]
    path = localmix.home / "fox" / "fox-4.50bpw.gguf"
    assert output["path"] == str(path)
    assert 4.4775 < output["bpw"] <= 4.5
    assert output["mixture"]["expected_divergence"] < output["mixture"]["best_preset"]["expected_divergence"]
    assert "measured on fox" in output["mixture"]["sensitivities"]
    assert "sampled" in output["mixture"]["errors"]
    assert "the best preset of at most this size" in run.err
    head = read_header(path).metadata
    assert head["localmix.recipe.target"].value == "4.50bpw"

    assert "4.50bpw" in localmix("quantize", "--list", "--presets", "recipe.yaml").out
    again = localmix("quantize", "4.50bpw", "fox", "--presets", "recipe.yaml", "-o", "again.gguf", "--json").json
    assert again["outputs"][0]["mixture"] is None
    assert (localmix.folder / "again.gguf").read_bytes() == path.read_bytes()

    assert "fox:4.50bpw" in localmix("ls").out
    assert localmix("info", "fox:4.50bpw", "--json").json["bpw"] == pytest.approx(output["bpw"])
    assert localmix("verify", "fox:4.50bpw").code == 0


def test_bytes_a_split_and_a_type_beside(localmix: CommandLine, measured: Path) -> None:
    result = localmix(
        *("quantize", "Q8_0", "fox", "--target", "2200000B", "--sensitivity", measured, "-o", ".", "--threads", "1"),
        *("--split-max-size", "1MB", "--json"),
    ).json
    plain, output = result["outputs"]
    assert plain["type"] == "Q8_0" and plain["mixture"] is None
    assert len(output["parts"]) > 1
    sizes = [Path(localmix.folder / part).stat().st_size for part in output["parts"]]
    assert 0.995 * 2_200_000 < sum(sizes) == output["bytes"] <= 2_200_000


def test_minima_types_and_fixed_types(localmix: CommandLine, measured: Path) -> None:
    localmix(
        *("quantize", "--target", "4.5bpw", "fox", "--sensitivity", measured, "-o", "made.gguf", "--threads", "1"),
        *("--types", "k", "--min", "output=Q6_K", "--embedding-type", "Q5_1", "--tensor-type", "attn_v=Q4_1"),
    )
    types = {tensor.info.name: tensor.info.type.name for tensor in read_header(localmix.folder / "made.gguf").tensors}
    assert types["output.weight"] in ("Q6_K", "Q8_0")
    assert types["token_embd.weight"] == "Q5_1"
    assert types["blk.1.attn_v.weight"] == "Q4_1"
    assert not any(kind.startswith("IQ") for kind in types.values())


def test_plan_shows_types_and_presets_of_that_size(localmix: CommandLine, measured: Path) -> None:
    shown = localmix("plan", "fox", "--target", "4.5bpw", "--sensitivity", measured).out
    assert "ffn_down_exps" in shown and "Expected divergence" in shown and "measured on fox" in shown
    document = localmix("plan", "--target", "4.5bpw", "fox", "--sensitivity", measured, "--json").json
    (target,) = document["targets"]
    localmix("quantize", "fox", "--target", "4.5bpw", "--sensitivity", measured, "--threads", "1")
    assert (localmix.home / "fox" / "fox-4.50bpw.gguf").stat().st_size == target["bytes"]
    assert target["expected_divergence"] < target["best_preset"]["expected_divergence"]
    assert not (localmix.home / "fox" / "fox-Q4_0.gguf").exists()


def test_fit_takes_what_the_machine_leaves(localmix: CommandLine, measured: Path) -> None:
    run = localmix("plan", "--fit", "fox", "--sensitivity", measured, "--json")
    assert run.json["fit"]["capped"]
    assert 8 < run.json["targets"][0]["bpw"] <= 8.6
    assert "no room for weights" in localmix.fails("plan", "fox", "--fit", "1.1", "--sensitivity", measured, expect=4)
    made = localmix("quantize", "--fit", "16", "fox", "--sensitivity", measured, "--dry-run")
    assert "more gains hardly anything" in made.err


def test_a_model_of_the_hub_is_planned_from_typical_errors(localmix: CommandLine, measured: Path) -> None:
    with serve() as hub:
        hub.add("org/fox", localmix.folder / "fox")
        there = dataclasses.replace(localmix, variables=hub.variables)
        chosen = ("--target", "4.5bpw", "--sensitivity", measured, "-o", "hub.gguf", "--threads", "1", "--json")
        result = there("quantize", "org/fox", *chosen).json
    (output,) = result["outputs"]
    assert "typical" in output["mixture"]["errors"]
    assert 4.4775 < output["bpw"] <= 4.5
    assert localmix("verify", "hub.gguf").code == 0


def test_a_killed_run_from_the_hub_goes_on_with_the_same_mixture(localmix: CommandLine) -> None:
    write_checkpoint(localmix.folder / "served", Shape(hidden=256, feed_forward=256, layers=4, shards=12))
    with serve() as hub:
        hub.add("org/served", localmix.folder / "served")
        hub.bytes_per_second = 6_000_000
        there = dataclasses.replace(localmix, variables=hub.variables)
        chosen = ("quantize", "org/served", "--target", "4.5bpw", "--threads", "1", "--json")
        run = there.popen(*chosen)
        partial = localmix.home / "served" / ".served-4.50bpw.gguf.partial"
        sizes = {name: len(content) for name, content in hub.repositories["org/served"].items()}
        deadline = time.monotonic() + 60
        while sum(count >= sizes[name] for name, count in hub.sent.items() if name.startswith("model-")) < 6:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.kill()
        run.communicate()
        assert partial.exists()
        hub.bytes_per_second = 0
        hub.sent.clear()
        (output,) = there(*chosen).json["outputs"]
        fetched = [name for name, count in hub.sent.items() if name.startswith("model-") and count > 2 << 16]
    assert len(fetched) < 9
    assert output["mixture"]["recipe"]
    assert localmix("verify", output["path"]).code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["quantize", "fox", "--target", "12 parsecs"], 2, "is no target"),
        (["quantize", "fox", "--target", "100KiB"], 2, "the smallest mixture has"),
        (["quantize", "fox", "--target", "90GiB"], 2, "more than the model has as it is"),
        (["quantize", "fox", "--target", "4bpw", "--pure"], 2, "--pure"),
        (["quantize", "fox", "--target", "4bpw", "--types", "Q9_K"], 2, "no tensor type"),
        (["quantize", "fox", "--target", "4bpw", "--min", "nothing=Q4_K"], 2, "matches no tensor"),
        (["quantize", "fox", "--target", "4bpw", "--save-recipe", "no/where.yaml"], 5, "mkdir"),
        (["quantize", "./fox", "--target", "4bpw", "--save-recipe", "fox/config.json"], 2, "would destroy it"),
        (["quantize", "fox", "--target", "4bpw", "-o", "a.gguf", "--save-recipe", "a.gguf"], 2, "Two outputs"),
        (["quantize", "fox", "--target", "4bpw", "--save-recipe", "."], 5, "is a folder"),
        (["quantize", "Q4_K", "fox", "--save-recipe", "recipe.yaml"], 2, "--target or --fit"),
        (["quantize", "Q4_K", "fox", "--min", "output=Q6_K"], 2, "--target or --fit"),
        (["quantize", "Q4_K", "fox", "--ctx", "8"], 2, "--fit"),
        (["quantize", "fox", "--fit", "lots"], 2, "no quantization type 'lots'"),
        (["quantize", "fox", "--target", "4bpw", "--sensitivity", "corpus.txt"], 3, "no file of sensitivities"),
        (["quantize", "fox", "--target", "4bpw", "--sensitivity", "other.json"], 3, "another model"),
        (["plan", "fox", "--target", "4bpw", "Q4_K"], 2, "not for --target"),
        (["plan", "fox", "--target", "4bpw", "--ctx", "8"], 2, "does not depend"),
    ],
)
def test_what_cannot_be_is_told(
    localmix: CommandLine, measured: Path, arguments: list[str], code: int, told: str
) -> None:
    write_measured(localmix.folder / "other.json", layers=32)
    if "--sensitivity" not in arguments and "--target" in arguments:
        arguments = [*arguments, "--sensitivity", measured.name]
    found = localmix.fails(*arguments, expect=code)
    assert told in found
    assert not list((localmix.home / "fox").glob("*bpw*"))


def test_a_recipe_of_another_model_is_refused_and_one_beside_pure(
    localmix: CommandLine, measured: Path, random_model: Path
) -> None:
    localmix(
        *("quantize", "fox", "--target", "4.5bpw", "--sensitivity", measured, "--dry-run"),
        *("--save-recipe", "recipe.yaml"),
    )
    text = (localmix.folder / "recipe.yaml").read_text()
    told = localmix.fails("quantize", "4.50bpw", "fox", "--presets", "recipe.yaml", "--pure", expect=2)
    assert "the recipe 4.50bpw names" in told
    (localmix.folder / "recipe.yaml").write_text(text.replace("tensors: 16", "tensors: 37"))
    told = localmix.fails("quantize", "4.50bpw", "fox", "--presets", "recipe.yaml", expect=3)
    assert "of another model" in told
