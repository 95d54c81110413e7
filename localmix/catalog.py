"""The quantization types as a person chooses among them: what each costs on Mixtral-8x7B, and what it is good for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localmix.plan import COPY, Planner
from localmix.presets import Presets
from localmix.sources.open import open_source

# Mixtral-8x7B's config.json: its facts, no weights
REFERENCE_MODEL = Path(__file__).parent / "data" / "mixtral-8x7b"


@dataclass(frozen=True)
class CatalogEntry:
    """One quantization type.

    Attributes:
        bpw: bits per weight of a Mixtral-8x7B, with an importance matrix where the type wants one; None for COPY, and
            for a recipe of one model.
        bytes: size of a Mixtral-8x7B.
        imatrix: required, recommended, optional or unused.
    """

    type: str
    bpw: float | None
    bytes: int | None
    imatrix: str
    advice: str


def catalog(presets: Presets) -> Sequence[CatalogEntry]:
    """Every preset with what it costs; takes under a second."""
    planner = Planner(open_source(REFERENCE_MODEL))
    entries = []
    for preset in presets.presets.values():
        if preset.base == COPY or preset.recipe is not None:
            entries.append(CatalogEntry(preset.name, None, None, preset.imatrix, preset.advice))
            continue
        plan = planner.plan(preset, has_imatrix=preset.imatrix in ("required", "recommended"))
        entries.append(CatalogEntry(preset.name, plan.bits_per_weight, plan.file_bytes, preset.imatrix, preset.advice))
    return entries
