"""Published models from their config.json alone: as many parameters as their authors count, and a plan.

fixtures/published.json holds the numbers of each config.json, and the parameters of the text model; for Phi 3.5 with
its 96 rotary factors, which a GGUF file stores, for MiniLM without the pooler, which it does not.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localmix.architectures import ARCHITECTURES
from localmix.plan import Planner
from localmix.presets import load_presets
from localmix.sources.open import open_source

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "published.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]["config"]))
    with open_source(tmp_path) as source:
        assert source.parameters == PUBLISHED[name]["parameters"]
        plan = Planner(source).plan(load_presets().find("Q4_K_M"))
        assert 4 < plan.file_bytes * 8 / source.parameters < 8


def test_every_family_is_there() -> None:
    types = {row["config"]["model_type"] for row in PUBLISHED.values()}
    assert types == set(ARCHITECTURES) - {"mistral", "mixtral", "qwen3"}
