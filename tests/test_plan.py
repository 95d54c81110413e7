from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from localmix.errors import InputError, UsageError
from localmix.importance import Entry, Importance
from localmix.plan import Planner, check_coverage, check_importance, check_quantizable, check_rules
from localmix.presets import Rule, load_presets
from localmix.quantize import quantize
from localmix.sources.base import Source
from localmix.sources.open import open_source
from localmix.tensor_types import TensorType
from tests.random_model import write_random_model

# GiB and bits per weight of Mixtral-8x7B in llama.cpp 0c1e57098, without and with an importance matrix
MIXTRAL = {
    "Q8_0": (46.22, 8.50),
    "Q6_K": (35.74, 6.57),
    "Q5_K_M": (30.95, 5.69),
    "Q5_0": (30.02, 5.52),
    "Q4_K_M": (26.49, 4.87),
    "Q4_0": (24.63, 4.53),
    "Q3_K_M": (21.00, 3.86),
    "IQ3_XXS": (17.88, 3.29),
    "Q2_K": (16.12, 2.97),
    "IQ2_XS": (12.97, 2.38),
    "IQ2_XXS": (11.69, 2.15),
    "IQ1_M": (10.10, 1.86),
    "IQ1_S": (9.15, 1.68),
    "Q2_K_S": (14.93, 2.75),
    "IQ4_XS": (23.63, 4.35),
    "IQ2_S": (13.16, 2.42),
    "IQ2_M": (14.43, 2.65),
}
MIXTRAL_WITH_IMATRIX = {
    **MIXTRAL,
    "Q5_0": (30.13, 5.54),
    "Q4_0": (24.74, 4.55),
    "IQ3_XXS": (16.99, 3.12),
    "IQ4_XS": (23.36, 4.30),
}

MIXTRAL_CONFIG = """{
  "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "torch_dtype": "bfloat16",
  "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
  "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
  "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
  "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2
}"""


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Mixtral-8x7B from nothing but its config.json."""
    folder = tmp_path_factory.mktemp("mixtral")
    (folder / "config.json").write_text(MIXTRAL_CONFIG)
    return open_source(folder)


@pytest.mark.parametrize("has_imatrix", [False, True])
def test_sizes_of_mixtral_8x7b(has_imatrix: bool, mixtral: Source) -> None:
    planner = Planner(mixtral)
    for name, (gib, bpw) in (MIXTRAL_WITH_IMATRIX if has_imatrix else MIXTRAL).items():
        plan = planner.plan(load_presets().find(name), has_imatrix=has_imatrix)
        assert plan.parameters == 46_702_792_704
        assert plan.weight_bytes / 2**30 == pytest.approx(gib, abs=0.0051), name
        assert plan.bits_per_weight == pytest.approx(bpw, abs=0.0051), name


def test_the_recipe_of_january_2024_brings_back_the_published_bits_per_weight(mixtral: Source) -> None:
    published = (16.0, 8.50, 6.57, 5.69, 5.52, 4.87, 4.53, 3.86, 3.14, 2.96, 2.34, 2.10)
    planner = Planner(mixtral)
    for name, bpw in zip(load_presets().find_set("hfl-2024-01"), published, strict=True):
        plan = planner.plan(load_presets().find(name))
        assert plan.bits_per_weight == pytest.approx(bpw, abs=0.01), name


def test_planning_twelve_types_of_mixtral_takes_no_time(mixtral: Source) -> None:
    started = time.monotonic()
    planner = Planner(mixtral)
    for name in list(MIXTRAL)[:12]:
        planner.plan(load_presets().find(name))
    # a guard against reading or writing at full size, not a benchmark: it takes a third of a second
    assert time.monotonic() - started < 10


def test_the_plan_is_the_file(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", layers=1)
    preset = load_presets().find("Q4_K_M")
    with open_source(model) as source:
        plan = Planner(source).plan(preset)
    output = tmp_path / "out.gguf"
    quantize(model, [(preset, output)])
    assert os.path.getsize(output) == plan.file_bytes
    with open_source(output) as written:
        assert [tensor.type for tensor in written.tensors] == [tensor.type for tensor in plan.tensors]


def test_rules_go_before_the_mixture_and_the_first_match_wins(mixtral: Source) -> None:
    rules = [Rule(r"attn_v\.weight", TensorType.Q8_0), Rule("attn_", TensorType.Q3_K)]
    plan = Planner(mixtral).plan(load_presets().find("Q4_K"), rules=rules)
    types = {tensor.info.name: tensor.type for tensor in plan.tensors}
    assert types["blk.5.attn_v.weight"] == TensorType.Q8_0
    assert types["blk.5.attn_k.weight"] == TensorType.Q3_K
    assert types["blk.5.ffn_gate_exps.weight"] == TensorType.Q4_K
    assert types["blk.5.attn_norm.weight"] == TensorType.F32


def test_a_rule_that_is_no_regular_expression(mixtral: Source) -> None:
    with pytest.raises(UsageError, match="regular expression"):
        Planner(mixtral).plan(load_presets().find("Q4_K"), rules=[Rule("attn_(", TensorType.Q8_0)])


def test_a_rule_that_does_nothing_is_said(mixtral: Source) -> None:
    def check(*rules: Rule) -> list[str]:
        return check_rules(Planner(mixtral).plan(load_presets().find("Q4_K"), rules=rules), rules)

    with pytest.raises(UsageError, match="nosuchtensor=Q4_0 matches no tensor"):
        check(Rule("attn_v", TensorType.Q8_0), Rule("nosuchtensor", TensorType.Q4_0))
    assert check(Rule("attn_v", TensorType.Q8_0)) == []
    [note] = check(Rule("norm", TensorType.Q4_0))
    assert "norm=Q4_0 changes nothing: the 65 tensors" in note
    [note] = check(Rule("attn_v", TensorType.Q8_0), Rule("attn_v.w", TensorType.Q4_0))
    assert "attn_v.w=Q4_0 changes nothing" in note
    assert check(Rule("[[:alpha:]]+_v", TensorType.Q8_0)) == []  # which Python reads otherwise


def test_fallbacks_are_counted_with_what_was_meant(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", layers=2, experts=0, feed_forward=352)
    with open_source(model) as source:
        plan = Planner(source).plan(load_presets().find("Q4_K_M"))
    assert [(tensor.info.name, tensor.meant, tensor.type) for tensor in plan.fallbacks] == [
        ("blk.0.ffn_down.weight", TensorType.Q4_K, TensorType.Q5_0),
        ("blk.1.ffn_down.weight", TensorType.Q6_K, TensorType.Q8_0),
    ]


def test_a_type_that_needs_an_imatrix_says_so_before_the_work(mixtral: Source) -> None:
    plan = Planner(mixtral).plan(load_presets().find("IQ2_XXS"))
    with pytest.raises(InputError, match="needs an importance matrix"):
        check_importance(plan, None)
    partial = Importance({"blk.0.attn_q.weight": Entry(np.ones((1, 4096), np.float32), np.ones(1, np.float32))})
    with pytest.raises(InputError, match="says nothing about"):
        check_importance(plan, partial)
    check_importance(Planner(mixtral).plan(load_presets().find("Q4_K_M")), None)


def test_an_imatrix_of_another_model_is_refused_before_the_work(mixtral: Source) -> None:
    other = Importance({"blk.0.attn_q.weight": Entry(np.ones((1, 64), np.float32), np.ones(1, np.float32))})
    with pytest.raises(InputError, match="another model"):
        check_importance(Planner(mixtral).plan(load_presets().find("Q4_K_M")), other)


def entries(*names: str) -> Importance:
    return Importance({name: Entry(np.ones((1, 4096), np.float32), np.ones(1, np.float32)) for name in names})


def test_an_imatrix_that_shares_no_name_is_of_another_model(mixtral: Source) -> None:
    plan = Planner(mixtral).plan(load_presets().find("Q4_K_M"))
    with pytest.raises(InputError, match=r"another model: it names blk\.70\.attn_q\.weight"):
        check_coverage(plan, entries("blk.70.attn_q.weight", "output.weight"))


def test_an_imatrix_that_leaves_out_weights_is_said(mixtral: Source) -> None:
    plan = Planner(mixtral).plan(load_presets().find("Q4_K_M"))
    names = [f"blk.{layer}.attn_q.weight" for layer in range(3)]
    [note] = check_coverage(plan, entries(*names))
    assert "covers 3 of the 224 weights" in note and "blk.0.attn_k.weight" in note
    assert check_coverage(plan, entries(*(tensor.info.name for tensor in plan.tensors))) == []


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", layers=1, experts=0)
    quantize(model, [(load_presets().find("Q8_0"), tmp_path / "q8.gguf")])
    with open_source(tmp_path / "q8.gguf") as source:
        plan = Planner(source).plan(load_presets().find("Q4_0"))
        with pytest.raises(InputError, match="already quantized"):
            check_quantizable(plan, source)


def test_an_architecture_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", layers=1, experts=0)
    data = model.read_bytes().replace(b"llama", b"lamma")
    model.write_bytes(data)
    with open_source(model) as source, pytest.raises(InputError, match="unknown model architecture"):
        Planner(source).plan(load_presets().find("Q4_0"))
