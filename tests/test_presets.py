from __future__ import annotations

from pathlib import Path

import pytest

from localmix.errors import FileError, InputError, UsageError
from localmix.native.mixture import file_type
from localmix.plan import COPY
from localmix.presets import load_presets, tensor_type
from localmix.tensor_types import TensorType


def test_every_shipped_preset_is_a_mixture_of_this_llama_cpp() -> None:
    for preset in load_presets().presets.values():
        assert preset.base == COPY or file_type(preset.base) >= 0
        assert preset.advice


def test_short_names_mean_the_medium_mixture() -> None:
    presets = load_presets()
    assert presets.find("q4_k").name == "Q4_K_M"
    assert presets.find("Q3_K").name == "Q3_K_M"
    assert presets.find("iq2_xxs").imatrix == "required"


def test_the_published_set_has_the_columns_of_the_table() -> None:
    assert len(load_presets().find_set("chinese-mixtral")) == 11


def test_unknown_names_get_near_ones() -> None:
    with pytest.raises(UsageError, match="Q4_K_M"):
        load_presets().find("Q4KM")
    with pytest.raises(UsageError, match="chinese-mixtral"):
        load_presets().find_set("mixtral")
    with pytest.raises(UsageError, match="Q6_K"):
        tensor_type("Q6K")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "presets:\n  SMALL:\n    base: IQ2_XXS\n    output: q6_k\n    imatrix: required\n"
        "    rules:\n      - {tensor: 'attn_v', type: Q8_0}\n",
        "utf-8",
    )
    preset = load_presets(path).find("small")
    assert (preset.base, preset.output) == ("IQ2_XXS", TensorType.Q6_K)
    assert [(rule.tensor, rule.type) for rule in preset.rules] == [("attn_v", TensorType.Q8_0)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("presets: [", "not valid YAML"),
        ("- a list", "is not a mapping"),
        ("preset: {}", "unknown field 'preset'"),
        ("presets: {X: {bits: 4}}", "unknown field 'bits'"),
        ("presets: {X: {imatrix: maybe}}", "one of required"),
        ("presets: {X: {output: Q9_K}}", "names Q9_K"),
        ("presets: {X: {rules: {}}}", "is not a list"),
        ("presets: {X: {rules: [{tensor: a}]}}", "needs the fields tensor and type"),
        ("presets: {X: {output: Q8_K}}", "names Q8_K, which is no tensor type"),
        ("presets: {X: {}, X: {}}", "found a key twice"),
        ("presets: {X: {pure: maybe}}", "true or false is meant"),
        ("[" * 100_000, "nested too deep"),
        ("aliases: {A: B}", "names B, which is no preset"),
        ("sets: {s: [B]}", "names B, which is no preset"),
    ],
)
def test_a_broken_file_is_refused_with_the_entry(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content, "utf-8")
    with pytest.raises(InputError, match=reason) as caught:
        load_presets(path)
    assert str(path) in caught.value.message


def test_the_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("presets:\n  A: {}\n  B:\n    advice: fine\n    output: Q9_K\nsets:\n  s: [A]\n", "utf-8")
    with pytest.raises(InputError, match="line 3: the preset B names Q9_K"):
        load_presets(path)
    path.write_text("presets:\n  A:\n    advice: fine\n    bits: 4\n", "utf-8")
    with pytest.raises(InputError, match="line 4: the preset A has the unknown field 'bits'"):
        load_presets(path)
    path.write_text("presets:\n  A: {}\nsets:\n  s: [A]\n  t: [B]\n", "utf-8")
    with pytest.raises(InputError, match="line 5: the set t names B"):
        load_presets(path)
    path.write_text("presets:\n  A: {\n", "utf-8")
    with pytest.raises(InputError, match="line 3"):
        load_presets(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        load_presets(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ("{}", "priors needs models and errors"),
        ("{models: {one: {attn_q: [1, 2]}}}", "priors needs models and errors"),
        ("{models: {one: {attn_q: 1}}, errors: {Q2_K: 0.1}}", "attn_q of one is not a list"),
        ("{models: {one: {attn_q: [1]}}, errors: {Q2_K: 0.1}}", "attn_q of one needs two numbers"),
        ("{models: {one: {attn_q: [-1, 1]}}, errors: {Q2_K: 0.1}}", "'-1', not a positive number"),
        (f"{{models: {{one: {{attn_q: [1{'0' * 400}, 1]}}}}, errors: {{Q2_K: 0.1}}}}", "not a positive number"),
        ("{models: {one: {attn_q: [.nan, 1]}}, errors: {Q2_K: 0.1}}", "'nan', not a positive number"),
        ("{models: {one: {attn_q: [1, 1]}}, errors: {Q2: 0.1}}", "Q2"),
        ("{models: {one: {attn_q: [1, 1]}}, errors: {Q2_K: no}}", "the relative error of Q2_K is 'False'"),
        ("{origin: x}", "has the unknown field 'origin'"),
    ],
)
def test_broken_priors_are_named(section: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "presets.yaml"
    path.write_text(f"presets:\n  Q8_0: {{}}\npriors: {section}\n")
    with pytest.raises(InputError) as caught:
        load_presets(path)
    assert reason in caught.value.message
