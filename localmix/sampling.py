"""How the next token is chosen: the settings, and what a model says about them itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

# What a GGUF file says about sampling (general.sampling.*): its key, our field, and how its text is read.
# llama.cpp's tools read the same keys.
OWN_SETTINGS = {
    "temp": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "penalty_repeat": ("repeat_penalty", float),
    "penalty_last_n": ("repeat_last", int),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are those of the Chinese-Mixtral chat scripts.

    Attributes:
        temperature: 0 takes the most likely token always.
        top_k: keep that many tokens; 0 keeps all.
        top_p: keep the likeliest that together reach this probability; 1 keeps all.
        min_p: keep those of at least this part of the likeliest one's probability; 0 keeps all.
        repeat_penalty: divides the logits of recent tokens; 1 does nothing.
        repeat_last: how many tokens are recent.
        seed: None for another one each time.
    """

    temperature: float = 0.2
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    repeat_penalty: float = 1.1
    repeat_last: int = 64
    seed: int | None = None

    @classmethod
    def for_model(cls, own: Mapping[str, float]) -> Sampling:
        """The defaults with a model's own settings (`Loaded.own_sampling`) in their place."""
        return dataclasses.replace(cls(), **own)  # type: ignore[arg-type]


def own_sampling(metadata: Mapping[str, str]) -> dict[str, float]:
    """The fields of `Sampling` that a model sets itself; a value that is no number, or out of range, is passed over.

    Args:
        metadata: GGUF keys and values, as text.
    """
    found: dict[str, float] = {}
    for key, (field, read) in OWN_SETTINGS.items():
        try:
            value = read(metadata[f"general.sampling.{key}"])
        except (KeyError, ValueError):
            continue
        most = 1.0 if field in ("top_p", "min_p") else 2.0**31 - 1
        if 0 <= value <= most and not (field == "repeat_penalty" and value == 0):
            found[field] = value
    return found
