"""What a model says about sampling, and what of it is taken."""

from __future__ import annotations

import pytest

from localmix.sampling import Sampling, own_sampling


def test_the_models_own_settings_take_the_place_of_the_defaults() -> None:
    metadata = {
        "general.name": "m",
        "general.sampling.temp": "0.600000",
        "general.sampling.top_k": "20",
        "general.sampling.top_p": "0.95",
        "general.sampling.min_p": "0.01",
        "general.sampling.penalty_repeat": "1.05",
        "general.sampling.penalty_last_n": "128",
        "general.sampling.mirostat": "2",
    }
    own = own_sampling(metadata)
    assert Sampling.for_model(own) == Sampling(0.6, 20, 0.95, 0.01, 1.05, 128)
    assert Sampling.for_model({}) == Sampling()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temp", "hot"),
        ("temp", "-1"),
        ("temp", "nan"),
        ("temp", "inf"),
        ("top_k", "2.5"),
        ("top_p", "1.5"),
        ("penalty_repeat", "0"),
        ("penalty_last_n", "-1"),
    ],
)
def test_a_value_that_makes_no_sense_is_passed_over(key: str, value: str) -> None:
    assert own_sampling({f"general.sampling.{key}": value}) == {}
