"""Whatever stands in a config.json, a row answers with settings that fit together or with one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from localmix.errors import InputError
from localmix.sources.checkpoint import open_checkpoint
from tests.model_families import CONFIGS, config_of

ODD = (None, 0, -1, 10**12, math.nan, "x", True, [1], {"type": "yarn"})


@pytest.mark.parametrize("model", CONFIGS)
def test_odd_values(tmp_path: Path, model: str) -> None:
    config = config_of(model)
    places = [(config, key) for key in config]
    for block in [value for value in config.values() if isinstance(value, dict)]:
        places += [(block, key) for key in block]
    for place, key in places:
        kept = place[key]
        for value in (*ODD, ...):
            if value is ...:
                del place[key]
            else:
                place[key] = value
            opened_or_refused(tmp_path, config)
            place[key] = kept


def opened_or_refused(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    try:
        with open_checkpoint(folder) as source:
            assert source.parameters > 0
    except InputError as error:
        assert error.message.endswith(".") and len(error.message) < 600, error.message
        assert "config.json" in error.message
