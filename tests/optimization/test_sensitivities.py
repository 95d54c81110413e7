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
from localmix.presets import Curve, Priors
from localmix.tensor_types import BLOCKS, TensorType

VALUE = Value(nats=0.5, exponent=1.5, error=0.01, tensors=2, divergence=0.08, relative_error=0.08)
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
    probes="Q3_K, Q2_K",
    rounding=0.0001,
    classes={"attn_q": VALUE, "output": replace(VALUE, nats=2.0, tensors=1)},
    by_layer={("attn_q", 1): replace(VALUE, nats=0.75)},
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
    assert found.of("blk.0.attn_q.weight").nats == 0.5
    assert found.of("blk.1.attn_q.weight").nats == 0.75
    assert found.of("output.weight").nats == 2.0


def test_damage_grows_by_the_exponent_of_the_class() -> None:
    assert MEASURED.sensitivities().damage("blk.0.attn_q.weight", 0.25) == pytest.approx(0.5 / 8)


def test_a_class_that_was_not_measured_gets_the_mean_of_those_that_do_its_work() -> None:
    nats = {"attn_q": 1.0, "attn_k": 2.0, "attn_v": 8.0, "ffn_down_exps": 10.0, "ffn_up": 7.0}
    known = Sensitivities({kind: Curve(value, 1 + value / 10) for kind, value in nats.items()})
    assert known.of("blk.0.attn_kv_a_mqa.weight").nats == pytest.approx(4.0)
    assert known.of("blk.0.attn_kv_a_mqa.weight").exponent == pytest.approx(1.5)
    assert known.of("blk.0.attn_qkv.weight").nats == pytest.approx(16 ** (1 / 3))
    assert known.of("blk.0.ffn_down_shexp.weight").nats == pytest.approx(10.0)
    assert known.of("blk.0.ffn_down.weight").nats == pytest.approx(10.0)
    assert known.of("blk.0.ffn_gate_up_exps.weight").nats == pytest.approx(7.0)
    # nothing does its work: the mean of all, in which every damage is their geometric mean
    assert known.of("blk.0.ssm_in.weight").nats == pytest.approx((1 * 2 * 8 * 10 * 7) ** 0.2)
    assert known.unknown(["blk.0.attn_q.weight", "blk.0.ssm_in.weight", "blk.1.ssm_in.weight"]) == ["ssm_in"]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    write_sensitivities(path, MEASURED)
    assert read_measured(path) == MEASURED
    assert read_sensitivities(path, "llama", 2).by_layer == {("attn_q", 1): Curve(0.75, 1.5)}
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
        (changed(classes={"attn_q": vars(VALUE) | {"nats": -1}}), "no positive number"),
        (changed(classes={"attn_q": vars(VALUE) | {"error": "0"}}), "no positive number"),
        (changed(classes={"attn_q": vars(VALUE) | {"exponent": 0}}), "no positive number"),
        (changed(classes={"attn_q": vars(VALUE) | {"nats": math.inf}}), "it is no JSON"),
        (changed(classes={"attn_q": vars(VALUE) | {"nats": 10**400}}), "no positive number below"),
        (changed(classes={"attn_q": vars(VALUE) | {"exponent": 11}}), "an exponent above 10"),
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
    models = {
        "one": {"attn_q": Curve(2.0, 1.0), "output": Curve(1.0, 1.2)},
        "other": {"attn_q": Curve(8.0, 1.4), "output": Curve(1.0, 1.2)},
    }
    priors = Priors(models, {})
    names = ["output.weight", *(f"blk.{layer}.attn_q.weight" for layer in range(8))]
    found = shipped_priors(names, priors=priors)
    # at every error the geometric mean of both models, an eighth of it for each tensor
    assert found.damage("blk.3.attn_q.weight", 0.5) == pytest.approx(math.sqrt(2.0 * 0.5 * 8.0 * 0.5**1.4) / 8)
    assert found.damage("output.weight", 0.5) == pytest.approx(0.5**1.2)
    assert shipped_priors(names, without="other", priors=priors).of("blk.3.attn_q.weight") == Curve(0.25, 1.0)
    assert found.origin == "priors, measured on one, other"


def test_priors_take_experts_and_what_is_none_for_one_class() -> None:
    models = {
        "dense": {"ffn_down": Curve(8.0, 1.6), "output": Curve(4.0, 1.0)},
        "mixture": {"ffn_down_exps": Curve(2.0, 1.2), "output": Curve(1.0, 1.0)},
    }
    names = [
        "blk.0.ffn_down.weight",
        *(f"blk.{layer}.ffn_down_{kind}.weight" for layer in (1, 2) for kind in ("exps", "shexp")),
    ]
    found = shipped_priors(names, priors=Priors(models, {}))
    # both models count for each of the five tensors, which do the work together
    assert set(found.by_class) == {"ffn_down", "ffn_down_exps", "ffn_down_shexp"}
    for curve in found.by_class.values():
        assert (curve.nats, curve.exponent) == pytest.approx((4.0 / 5, 1.4))
    assert found.unknown(names) == []


def test_the_shipped_priors_know_what_every_model_suffers_from_most() -> None:
    names = ["output.weight", "token_embd.weight"]
    names += [f"blk.{layer}.{kind}.weight" for layer in range(32) for kind in ("attn_q", "attn_v", "ffn_down_exps")]
    found = shipped_priors(names)
    assert found.unknown(names) == []
    damages = {kind: found.damage(f"blk.0.{kind}.weight", 0.08) for kind in ("attn_q", "attn_v", "ffn_down_exps")}
    assert damages["ffn_down_exps"] > damages["attn_v"] > damages["attn_q"]
    assert found.damage("output.weight", 0.08) > found.damage("token_embd.weight", 0.08)
    assert set(found.by_class) == {"output", "token_embd", "attn_q", "attn_v", "ffn_down_exps"}


def test_the_shipped_errors_fall_with_the_bits_of_a_family() -> None:
    errors = prior_errors()
    for family in (("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"), ("IQ1_S", "IQ2_XXS", "IQ2_S", "IQ3_S", "IQ4_XS")):
        kinds = [TensorType[name] for name in family]
        bits = [BLOCKS[kind][1] / BLOCKS[kind][0] for kind in kinds]
        assert bits == sorted(bits)
        assert [errors[kind] for kind in kinds] == sorted((errors[kind] for kind in kinds), reverse=True)
    assert all(0 < error < 1 for error in errors.values())
