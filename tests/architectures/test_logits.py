"""Every architecture computes in llama.cpp what it computes in transformers, and can be planned without weights."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from localmix.architectures import ARCHITECTURES
from localmix.convert import convert
from localmix.native.model import Context, Model
from localmix.plan import Planner
from localmix.presets import load_presets
from localmix.quantize import quantize
from localmix.sources.open import open_source
from tests.architectures.record_logits import LOGITS, POSITIONS, STRIDE, TOKENS, compute
from tests.architectures.vectors import NO_POOLING, vectors_of
from tests.model_families import CONFIGS, config_of, write_model

RECORDED = json.loads(LOGITS.read_text())


def found_in(path: Path) -> NDArray[np.float32]:
    """What llama.cpp makes of `TOKENS` at `POSITIONS`: logits, or vectors where there are none."""
    with Model(path) as model:
        if model.metadata("general.architecture") == "bert":
            return vectors_of(model, TOKENS, NO_POOLING)[list(POSITIONS), ::STRIDE]
        with Context(model, context_length=64, threads=1) as context:
            context.decode(TOKENS, list(range(len(TOKENS))), logits=True)
            return np.array(context.logits())[list(POSITIONS), ::STRIDE]


@pytest.mark.parametrize("model", CONFIGS)
def test_same_logits_as_transformers(tmp_path: Path, model: str) -> None:
    folder = write_model(tmp_path / "model", model)
    convert(folder, tmp_path / "model.gguf", "f32", threads=1)
    found = found_in(tmp_path / "model.gguf")
    difference = np.abs(found - np.array(RECORDED[model]))
    assert difference.max() < 2e-2


@pytest.mark.parametrize("model", CONFIGS)
def test_quantized_straight_from_the_checkpoint(tmp_path: Path, model: str) -> None:
    """Four bits cost what they cost: rows in a wrong place would cost all."""
    quantize(write_model(tmp_path / "model", model), [(load_presets().find("Q4_K_M"), tmp_path / "q.gguf")], threads=1)
    found, expected = found_in(tmp_path / "q.gguf"), np.array(RECORDED[model])
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.35 * expected.std()


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("model", CONFIGS)
def test_recorded_logits_are_those_of_transformers(tmp_path: Path, model: str) -> None:
    assert np.allclose(compute(write_model(tmp_path / "model", model)), RECORDED[model], atol=1e-4)


def test_every_row_is_tried() -> None:
    assert {model.split()[0] for model in CONFIGS} == set(ARCHITECTURES)


@pytest.mark.parametrize("model", CONFIGS)
def test_plan_from_config_alone(tmp_path: Path, model: str) -> None:
    """The sizes of all types are those of the whole checkpoint, before any weight is there."""
    config: dict[str, Any] = config_of(model)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    whole = write_model(tmp_path / "model", model)
    presets = load_presets()
    with open_source(tmp_path / "config") as bare, open_source(whole) as full:
        assert {info.name: info.shape for info in bare.tensors} == {info.name: info.shape for info in full.tensors}
        for name in ("Q4_K_M", "IQ2_XXS", "Q8_0"):
            preset = presets.find(name)
            plans = [Planner(source).plan(preset) for source in (bare, full)]
            assert [t.type for t in plans[0].tensors] == [t.type for t in plans[1].tensors]
