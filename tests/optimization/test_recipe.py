from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmix.errors import InputError
from localmix.optimization.recipe import describe_rules, fold_rules, write_recipes
from localmix.presets import Preset, Recipe, Rule, load_presets
from localmix.tensor_types import TensorType

KINDS = st.sampled_from([TensorType.Q2_K, TensorType.Q4_K, TensorType.IQ3_S, TensorType.BF16])
NAMES = st.one_of(
    st.sampled_from(["token_embd.weight", "output.weight"]),
    st.builds(
        "blk.{}.{}.weight".format, st.integers(0, 130), st.sampled_from(["attn_q", "attn_q_a", "ffn_up", "ffn_up_exps"])
    ),
)


def applied(rules: tuple[Rule, ...], name: str) -> TensorType | None:
    """As llama.cpp does: the first match decides."""
    return next((rule.type for rule in rules if re.search(rule.tensor, name)), None)


@given(st.dictionaries(NAMES, KINDS))
def test_folded_rules_give_every_tensor_its_type(types: dict[str, TensorType]) -> None:
    rules = fold_rules(types)
    assert {name: applied(rules, name) for name in types} == types
    assert applied(rules, "rope_freqs.weight") is None
    assert applied(rules, "blk.0.attn_norm.weight") is None


def test_rules_are_easy_to_read() -> None:
    types = {f"blk.{layer}.attn_v.weight": TensorType.Q4_K for layer in range(32)}
    types |= {f"blk.{layer}.attn_v.weight": TensorType.Q6_K for layer in (0, 1, 31)}
    types |= {"blk.7.attn_v.weight": TensorType.Q8_0, "output.weight": TensorType.Q6_K}
    assert describe_rules(fold_rules(types)).split() == [
        r"^output\.weight$=Q6_K",
        r"^blk\.7\.attn_v\.weight$=Q8_0",
        r"^blk\.(0|1|31)\.attn_v\.weight$=Q6_K",
        r"^blk\.\d+\.attn_v\.weight$=Q4_K",
    ]


def recipe(name: str, advice: str = "The best.") -> Preset:
    rules = fold_rules({"blk.0.attn_q.weight": TensorType.Q4_K, "output.weight": TensorType.BF16})
    return Preset(name, "Q4_K_M", "required", advice, rules, recipe=Recipe(name, "probes of 'my' model: a#b", 2))


def test_a_file_of_recipes_reads_back(tmp_path: Path) -> None:
    plain = Preset("4.0GiB", "IQ4_XS", "recommended", "Good.", output=TensorType.Q8_0, embedding=TensorType.Q6_K)
    presets = [recipe("3.50bpw", 'It\'s the\x1b "best"\nof all: {really}'), recipe("12.0GiB"), plain]
    path = tmp_path / "recipes.yaml"
    write_recipes(path, presets)
    found = load_presets(path)
    assert found.find("3.50BPW").rules == presets[0].rules
    assert found.find("3.50bpw").recipe == presets[0].recipe
    assert found.presets["12.0GiB"] == presets[1]
    assert found.presets["4.0GiB"] == plain
    assert found.presets["3.50bpw"].advice == 'It\'s the "best" of all: {really}'


@pytest.mark.parametrize("wrong", ["tensors: many", "tensors: 0", "more: 1, tensors: 2"])
def test_a_broken_recipe_is_told(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "recipes.yaml"
    path.write_text(f"presets:\n  A:\n    base: Q4_K_M\n    recipe: {{target: A, sensitivities: b, {wrong}}}\n")
    with pytest.raises(InputError, match="recipe of the preset A"):
        load_presets(path)
