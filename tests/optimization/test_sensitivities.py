from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localmix.errors import FileError, InputError
from localmix.optimization.sensitivities import (
    Measured,
    Sensitivities,
    Value,
    prior_errors,
    read_measured,
    read_sensitivities,
    shipped_priors,
    tensor_class,
    tensor_layer,
    write_sensitivities,
)
from localmix.presets import Priors
from localmix.tensor_types import BLOCKS, TensorType

VALUE = Value(value=0.5, error=0.01, tensors=2, divergence=0.08, relative_error=0.16)
MEASURED = Measured(
    model="small-BF16.gguf",
    architecture="llama",
    layers=2,
    parameters=1000,
    base="BF16",
    corpus="calibration.txt",
    corpus_sha256="ab" * 32,
    context=512,
    chunks=32,
    engine="llama.cpp 0123",
    imatrix=True,
    probe="Q3_K",
    rounding=0.0001,
    classes={"attn_q": VALUE, "output": replace(VALUE, value=2.0, tensors=1)},
    by_layer={("attn_q", 1): replace(VALUE, value=0.75)},
)


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("output.weight", "output", None),
        ("token_embd.weight", "token_embd", None),
        ("blk.0.attn_q.weight", "attn_q", 0),
        ("blk.31.ffn_gate_up_exps.weight", "ffn_gate_up_exps", 31),
        ("blk.7.attn_kv_a_mqa.weight", "attn_kv_a_mqa", 7),
        ("blk.12.ffn_down_shexp.weight", "ffn_down_shexp", 12),
        ("per_layer_token_embd.weight", "per_layer_token_embd", None),
    ],
)
def test_the_class_of_a_tensor_is_its_name_without_layer_and_suffix(name: str, kind: str, layer: int | None) -> None:
    assert tensor_class(name) == kind
    assert tensor_layer(name) == layer


def test_a_layer_that_was_measured_goes_before_its_class() -> None:
    found = MEASURED.sensitivities()
    assert found.of("blk.0.attn_q.weight") == 0.5
    assert found.of("blk.1.attn_q.weight") == 0.75
    assert found.of("output.weight") == 2.0


def test_a_class_that_was_not_measured_gets_the_mean_of_those_that_do_its_work() -> None:
    known = Sensitivities({"attn_q": 1.0, "attn_k": 2.0, "attn_v": 6.0, "ffn_down_exps": 10.0, "ffn_up": 7.0})
    assert known.of("blk.0.attn_qkv.weight") == 3.0
    assert known.of("blk.0.attn_kv_a_mqa.weight") == 4.0
    assert known.of("blk.0.ffn_down_shexp.weight") == 10.0
    assert known.of("blk.0.ffn_down.weight") == 10.0
    assert known.of("blk.0.ffn_gate_up_exps.weight") == 7.0
    assert known.of("blk.0.ssm_in.weight") == 6.0  # nothing does its work: the median
    assert known.unknown(["blk.0.attn_q.weight", "blk.0.ssm_in.weight", "blk.1.ssm_in.weight"]) == ["ssm_in"]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    write_sensitivities(path, MEASURED)
    assert read_measured(path) == MEASURED
    assert read_sensitivities(path, "llama", 2).by_layer == {("attn_q", 1): 0.75}
    assert "small-BF16.gguf" in read_sensitivities(path).origin


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    write_sensitivities(path, MEASURED)
    with pytest.raises(InputError, match="llama of 2 layers, and this one is llama of 32"):
        read_sensitivities(path, "llama", 32)
    with pytest.raises(InputError, match="this one is qwen3 of 2"):
        read_sensitivities(path, "qwen3", 2)


def changed(**fields: Any) -> str:
    """A good file's text with other fields."""
    document = {
        "kind": "localmix sensitivities",
        "format": 1,
        **{
            name: getattr(MEASURED, name)
            for name in Measured.__dataclass_fields__
            if name not in ("classes", "by_layer")
        },
        "classes": {"attn_q": vars(VALUE)},
        "by_layer": {},
    }
    return json.dumps(document | fields)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "of the kind"),
        (changed(kind="imatrix"), "of the kind"),
        (changed(format=2), "its format is 2"),
        (changed(layers=True), "its field layers"),
        (changed(model=None), "its field model"),
        (changed(classes={}), "it has no classes"),
        (changed(classes=[1]), "its field classes"),
        (changed(classes={"attn_q": 1}), "attn_q lacks a field"),
        (changed(classes={"attn_q": vars(VALUE) | {"more": 1}}), "one too many"),
        (changed(classes={"attn_q": vars(VALUE) | {"value": -1}}), "no positive number"),
        (changed(classes={"attn_q": vars(VALUE) | {"error": "0"}}), "no positive number"),
        (changed(classes={"attn_q": vars(VALUE) | {"value": math.inf}}), "it is no JSON"),
        (changed(by_layer={"attn_q": {"-1": vars(VALUE)}}), "'-1' is no layer"),
        (changed(by_layer={"attn_q": 3}), "its field attn_q"),
    ],
)
def test_a_broken_file_is_told_with_its_reason(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_sensitivities(path)
    assert reason in caught.value.message
    assert str(path) in caught.value.message


def test_a_file_that_is_not_there_and_one_that_is_no_text_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        read_sensitivities(tmp_path / "none.json")
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="no text"):
        read_sensitivities(path)


def test_priors_share_a_class_out_among_the_tensors_of_the_model() -> None:
    priors = Priors({"one": {"attn_q": 2.0, "output": 1.0}, "other": {"attn_q": 8.0, "output": 1.0}}, {})
    names = ["output.weight", *(f"blk.{layer}.attn_q.weight" for layer in range(8))]
    found = shipped_priors(names, priors=priors)
    assert found.of("blk.3.attn_q.weight") == pytest.approx(0.5)  # the geometric mean of both is 4
    assert found.of("output.weight") == pytest.approx(1.0)
    assert shipped_priors(names, without="other", priors=priors).of("blk.3.attn_q.weight") == pytest.approx(0.25)
    assert found.origin == "priors, measured on one, other"


def test_the_shipped_priors_know_what_every_model_suffers_from_most() -> None:
    names = ["output.weight", "token_embd.weight"]
    names += [f"blk.{layer}.{kind}.weight" for layer in range(32) for kind in ("attn_q", "attn_v", "ffn_down_exps")]
    found = shipped_priors(names)
    assert found.unknown(names) == []
    assert found.of("output.weight") > found.of("token_embd.weight")
    assert found.of("blk.0.ffn_down_exps.weight") > found.of("blk.0.attn_v.weight") > found.of("blk.0.attn_q.weight")
    assert set(found.by_class) == {"output", "token_embd", "attn_q", "attn_v", "ffn_down_exps"}


def test_the_shipped_errors_fall_with_the_bits_of_a_family() -> None:
    errors = prior_errors()
    for family in (("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"), ("IQ1_S", "IQ2_XXS", "IQ2_S", "IQ3_S", "IQ4_XS")):
        kinds = [TensorType[name] for name in family]
        bits = [BLOCKS[kind][1] / BLOCKS[kind][0] for kind in kinds]
        assert bits == sorted(bits)
        assert [errors[kind] for kind in kinds] == sorted((errors[kind] for kind in kinds), reverse=True)
    assert all(0 < error < 1 for error in errors.values())
