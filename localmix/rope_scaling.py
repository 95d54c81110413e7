"""How rotary positions are stretched, so that a model reads more tokens than it was trained with."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("none", "linear", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """What to change of a model's own scaling; None leaves it as it is.

    Attributes:
        kind: one of `KINDS`; `none` takes a scaling away that the model brings.
        factor: how many times longer the context gets (llama.cpp's `--rope-scale`).
        freq_base: base of the rotary frequencies.
        ntk_factor: multiplies the base by factor^(d / (d - 2)), d the rotary dimensions of a head: "NTK-aware"
            scaling, which needs no `kind`.
        original_context: positions the model was trained with, for `yarn`.
    """

    kind: str | None = None
    factor: float | None = None
    freq_base: float | None = None
    ntk_factor: float | None = None
    original_context: int | None = None
