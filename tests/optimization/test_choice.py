from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from localmix.errors import InputError, UsageError
from localmix.gguf_format import read_header
from localmix.importance import Entry, Importance, write_importance
from localmix.native.model import Model
from localmix.optimization.choice import Chooser
from localmix.optimization.freedom import K_TYPES, TYPES, Freedom, Terms
from localmix.optimization.recipe import describe_rules
from localmix.optimization.sampled_error import can_hold, relative_errors
from localmix.optimization.target import parse_target
from localmix.plan import Planner
from localmix.presets import Preset, Rule, load_presets
from localmix.quantize import quantize
from localmix.sources.base import Source
from localmix.sources.open import open_source
from localmix.tensor_types import TensorType
from tests.random_model import write_random_model


@dataclass(frozen=True)
class Sensitivities:
    """So many nats for the tensors whose name has the key in it, 1 for others."""

    nats: Mapping[str, float] = field(default_factory=dict)
    origin: str = "the test"

    def damage(self, tensor_name: str, relative_error: float) -> float:
        return relative_error * next((nats for key, nats in self.nats.items() if key in tensor_name), 1.0)


def importance_of(source: Source) -> Importance:
    """Columns matter differently, in every block."""
    random = np.random.default_rng(5)
    entries = {}
    for tensor in source.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
            sums = random.lognormal(0, 1, (experts, tensor.columns)).astype(np.float32)
            entries[tensor.name] = Entry(sums, np.ones(experts, np.float32))
    return Importance(entries, ("a text",), 1, 512)


@pytest.fixture(scope="module")
def tinymix(tinymix_bf16: Path) -> Source:
    return open_source(tinymix_bf16)


def chooser(
    source: Source,
    terms: Terms | None = None,
    *,
    with_importance: bool = True,
    seconds: Mapping[TensorType, float] | None = None,
    **nats: float,
) -> Chooser:
    importance = importance_of(source) if with_importance else None
    freedom = Freedom(source, terms, importance=importance)
    errors = relative_errors(
        source, freedom.wanted_types, importance, tensors=freedom.quantizable, weights=1 << 13, threads=1
    )
    return Chooser(freedom, load_presets(), errors, Sensitivities(nats), seconds)


@pytest.fixture(scope="module")
def usual(tinymix: Source) -> Chooser:
    return chooser(tinymix)


def test_at_the_size_of_every_preset_it_loses_less_and_keeps_to_the_size(usual: Chooser) -> None:
    assert len(usual.rated) > 25
    for preset in usual.rated:
        chosen = usual.choose(parse_target(f"{preset.bytes}B"))
        assert 0.995 * preset.bytes < chosen.plan.file_bytes <= preset.bytes
        assert chosen.rated.bytes == chosen.plan.file_bytes
        assert chosen.best_preset is not None
        assert chosen.rated.damage <= chosen.best_preset.damage <= preset.damage
        # the recipe in the head takes what a tiny step would
        assert not chosen.notes or preset.name == "Q8_0"


def test_bits_of_a_weight_are_those_of_the_weights(usual: Chooser) -> None:
    chosen = usual.choose(parse_target("3.5bpw"))
    assert 3.4825 < chosen.plan.bits_per_weight <= 3.5
    assert chosen.plan.type == chosen.preset.name == "3.50bpw"


def test_what_is_sensitive_gets_more_bits(tinymix: Source) -> None:
    target = parse_target("3.5bpw")
    for key in ("attn_v", "ffn_down_exps", "token_embd"):
        plan = chooser(tinymix, **{key: 300.0}).choose(target).plan
        bits = {tensor.info.name: tensor.bytes / tensor.info.elements for tensor in plan.tensors}
        least = min(size for name, size in bits.items() if key in name)
        others = [tensor for tensor in plan.tensors if key not in tensor.info.name and "exps" in tensor.info.name]
        assert least > max(bits[tensor.info.name] for tensor in others)


def test_what_llama_cpp_never_quantizes_stays(usual: Chooser) -> None:
    plan = usual.choose(parse_target("2.5bpw")).plan
    types = {tensor.info.name: tensor.type for tensor in plan.tensors}
    fixed = [name for name in types if "norm" in name or "ffn_gate_inp" in name]
    assert len(fixed) == 2 * 3 + 1 + 3
    assert {types[name] for name in fixed} == {TensorType.F32}


@pytest.mark.parametrize("target", ["1B", "1.2bpw"])
def test_a_target_below_the_smallest_mixture_is_told_with_its_size(usual: Chooser, target: str) -> None:
    with pytest.raises(UsageError, match=r"too small for this model: the smallest mixture has .*(MiB|bpw)"):
        usual.choose(parse_target(target))


def test_the_smallest_size_that_is_told_can_be_had(usual: Chooser) -> None:
    with pytest.raises(UsageError) as told:
        usual.choose(parse_target("1000000B"))
    size = told.value.message.partition("(")[2].partition(" ")[0].replace(",", "")
    assert usual.choose(parse_target(f"{int(size) + 64}B")).plan.file_bytes <= int(size) + 64


def test_a_target_above_the_model_is_refused(usual: Chooser) -> None:
    with pytest.raises(UsageError, match="more than the model has as it is"):
        usual.choose(parse_target("1GiB"))


def test_a_target_that_no_step_reaches_is_told(usual: Chooser) -> None:
    assert "below: no better type fits what is left" in " ".join(usual.choose(parse_target("15.9bpw")).notes)


def test_without_an_importance_matrix_nothing_is_chosen_that_needs_one(tinymix: Source) -> None:
    found = chooser(tinymix, with_importance=False)
    chosen = found.choose(parse_target("3.0bpw"))
    assert all(can_hold(tensor.info, tensor.type, has_importance=False) for tensor in chosen.plan.tensors)
    assert not any(preset.name.startswith(("IQ1", "IQ2")) for preset in found.rated)
    with pytest.raises(UsageError, match="too small") as told:
        found.choose(parse_target("2.0bpw"))
    assert "importance matrix" in told.value.hint


def test_minima_and_fixed_types_are_kept(tinymix: Source) -> None:
    terms = Terms(
        minima=(Rule("attn_v", TensorType.Q6_K), Rule("token_embd", TensorType.IQ4_XS)),
        rules=(Rule("blk.1.ffn_up_exps", TensorType.Q5_0),),
        output=TensorType.Q8_0,
    )
    chosen = chooser(tinymix, terms).choose(parse_target("3.5bpw"))
    types = {tensor.info.name: tensor.type for tensor in chosen.plan.tensors}
    sizes = {tensor.info.name: tensor.bytes * 8 / tensor.info.elements for tensor in chosen.plan.tensors}
    assert all(sizes[f"blk.{layer}.attn_v.weight"] >= 6.5625 for layer in range(3))
    assert sizes["token_embd.weight"] >= 4.25
    assert types["blk.1.ffn_up_exps.weight"] == TensorType.Q5_0
    assert types["output.weight"] == TensorType.Q8_0


def test_a_minimum_that_does_nothing_is_told(tinymix: Source) -> None:
    freedom = Freedom(tinymix, Terms(minima=(Rule("ffn_gate_inp", TensorType.Q8_0),)))
    assert "stays F32 in any case" in freedom.notes()[0]
    with pytest.raises(UsageError, match="matches no tensor"):
        Freedom(tinymix, Terms(minima=(Rule("nothing", TensorType.Q8_0),)))
    with pytest.raises(UsageError, match="no regular expression"):
        Freedom(tinymix, Terms(minima=(Rule("(", TensorType.Q8_0),)))


def test_when_everything_is_fixed_nothing_is_left_to_choose(tinymix: Source) -> None:
    fixed = chooser(tinymix, Terms(rules=(Rule(".", TensorType.Q4_K),)))
    with pytest.raises(UsageError, match="nothing to choose"):
        fixed.choose(parse_target("3.5bpw"))


def test_a_model_without_blocks_is_told(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "odd.gguf", hidden=72, feed_forward=72, layers=1, experts=0)
    with open_source(path) as source, pytest.raises(InputError, match="quantizes no tensor"):
        chooser(source, with_importance=False).choose(parse_target("16bpw"))


def test_where_one_tensor_is_left_it_keeps_to_the_target(tinymix: Source) -> None:
    terms = Terms(rules=(Rule("blk", TensorType.Q4_K),), output=TensorType.Q6_K)
    for target in ("4.71bpw", "4.8bpw", "4.9bpw", "5.1bpw"):
        assert chooser(tinymix, terms).choose(parse_target(target)).plan.bits_per_weight <= float(target[:-3])


def test_only_given_types_are_chosen(tinymix: Source) -> None:
    chosen = chooser(tinymix, Terms(types=K_TYPES)).choose(parse_target("4.5bpw"))
    assert {tensor.type for tensor in chosen.plan.tensors} <= {TensorType.F32, *K_TYPES}


def test_columns_that_fit_none_of_the_given_types_get_another(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "narrow.gguf", feed_forward=96, layers=1)
    with open_source(path) as source:
        terms = Terms(types=(TensorType.Q2_K, TensorType.Q4_K))
        plan = chooser(source, terms, with_importance=False).choose(parse_target("4.5bpw")).plan
    types = {tensor.info.name: tensor.type for tensor in plan.tensors}
    assert types["blk.0.ffn_up_exps.weight"] in (TensorType.Q2_K, TensorType.Q4_K)
    assert types["blk.0.ffn_down_exps.weight"] in TYPES
    assert types["blk.0.ffn_down_exps.weight"] not in (TensorType.Q2_K, TensorType.Q4_K)


def test_with_speeds_it_is_no_slower_than_the_best_k_quant_of_its_size(tinymix: Source) -> None:
    seconds = {kind: 1e-11 * (4 if kind.name.startswith("I") else 1) for kind in (*TYPES, TensorType.BF16)}
    fast = chooser(tinymix, seconds=seconds)
    usual = chooser(tinymix)
    by_name = {preset.name: preset for preset in fast.rated}
    faster = 0
    for name in ("Q4_K_M", "Q3_K_M", "Q2_K"):
        target = parse_target(f"{by_name[name].bytes}B")
        chosen = fast.choose(target)
        assert chosen.rated.seconds is not None and chosen.best_preset is not None
        limit = by_name[name].seconds
        assert limit is not None
        assert chosen.rated.seconds <= limit
        assert chosen.rated.damage <= by_name[name].damage
        faster += chosen.rated.damage > usual.choose(target).rated.damage
    assert faster >= 2


def test_a_recipe_plans_the_same_bytes_and_is_refused_for_another_model(
    usual: Chooser, tinymix: Source, random_model: Path
) -> None:
    chosen = usual.choose(parse_target("4.1bpw"))
    again = Planner(tinymix).plan(chosen.preset, importance=importance_of(tinymix))
    assert again == chosen.plan
    with open_source(random_model) as other, pytest.raises(InputError, match=r"recipe 4\.10bpw is of another model"):
        Planner(other).plan(chosen.preset, has_imatrix=True)


def test_the_recipe_is_in_the_metadata_until_the_model_is_quantized_otherwise(
    usual: Chooser, tinymix: Source, tmp_path: Path
) -> None:
    chosen = usual.choose(parse_target("4.1bpw"))
    path = tmp_path / "head.gguf"
    with path.open("wb") as file:
        file.write(chosen.plan.headers[0])
        file.truncate(chosen.plan.file_bytes)
    found = {key: value.value for key, value in read_header(path).metadata.items() if key.startswith("localmix.")}
    assert found == {
        "localmix.recipe": describe_rules(chosen.preset.rules),
        "localmix.recipe.base": chosen.preset.base,
        "localmix.recipe.target": "4.10bpw",
        "localmix.recipe.sensitivities": "the test",
    }
    with open_source(path) as source:
        assert b"localmix.recipe" in Planner(source).plan(Preset("COPY", "COPY")).headers[0]
        assert b"localmix.recipe" not in Planner(source).plan(load_presets().find("Q4_0")).headers[0]


@pytest.mark.upstream
def test_llama_quantize_makes_the_same_weights_under_the_same_rules(
    usual: Chooser, tinymix: Source, upstream: Path, tmp_path: Path
) -> None:
    chosen = usual.choose(parse_target("3.3bpw"))
    imatrix = tmp_path / "imatrix.gguf"
    write_importance(imatrix, importance_of(tinymix))
    rules = [part for rule in chosen.preset.rules for part in ("--tensor-type", f"{rule.tensor}={rule.type.name}")]
    made = tmp_path / "made.gguf"
    command = [upstream / "llama-quantize", "--imatrix", imatrix, *rules, tinymix.path, made, chosen.preset.base, "1"]
    subprocess.run(command, check=True, capture_output=True)
    ours = quantize(tinymix.path, [(chosen.preset, tmp_path / "ours.gguf")], imatrix=imatrix, threads=1).outputs[0]
    assert ours.bytes == ours.path.stat().st_size == chosen.plan.file_bytes
    planned = {tensor.info.name: tensor.type for tensor in chosen.plan.tensors}
    with open_source(made) as theirs, open_source(ours.path) as source:
        assert {tensor.name: tensor.type for tensor in theirs.tensors} == planned
        by_name = {tensor.name: tensor for tensor in source.tensors}
        for tensor in theirs.tensors:
            np.testing.assert_array_equal(
                theirs.read(tensor, 0, tensor.rows), source.read(by_name[tensor.name], 0, tensor.rows)
            )
    with Model(ours.path) as loaded:
        assert loaded.parameters == tinymix.parameters
