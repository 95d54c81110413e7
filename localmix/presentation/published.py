"""Quantization tables that others published, as rows that stand beside measured ones: data/published.yaml.

Their texts were not published: their perplexities compare among themselves, and with nothing that is measured here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from localmix.errors import UsageError
from localmix.presentation.table import ContextPoint, QuantizationRow
from localmix.sizes import GIB

DATA = Path(__file__).parent.parent / "data" / "published.yaml"


@dataclass(frozen=True)
class PublishedTable:
    """One published table.

    Attributes:
        name: what `find` knows it by.
        model: whose it is.
        source: where it was published.
        rows: with the origin "published".
        points: perplexity over context, with the origin "published"; often none.
        notes: sentences on what a reader must know.
    """

    name: str
    model: str
    source: str
    rows: tuple[QuantizationRow, ...]
    points: tuple[ContextPoint, ...]
    notes: tuple[str, ...]

    @property
    def about(self) -> tuple[str, ...]:
        """What has to be said beside the figures: where they come from, and the notes."""
        return (f"Published figures: {self.source}.", *self.notes)


@functools.cache
def load() -> Mapping[str, PublishedTable]:
    """All published tables by name."""
    return {name: _table(name, entry) for name, entry in yaml.safe_load(DATA.read_text("utf-8")).items()}


def find(name: str) -> PublishedTable:
    """A published table by its name.

    Raises:
        UsageError: there is no such table.
    """
    tables = load()
    if name not in tables:
        raise UsageError(f"There is no published table {name!r}.", f"Published tables: {', '.join(tables)}.")
    return tables[name]


def _table(name: str, entry: Mapping[str, Any]) -> PublishedTable:
    rows = tuple(
        QuantizationRow(
            model=entry["model"],
            type=kind,
            path=None,
            bytes=round(row["gib"] * GIB),
            bpw=row.get("bpw"),
            ppl=row.get("ppl"),
            error=row.get("error"),
            origin="published",
            corpus=entry["corpus"],
            context=entry.get("context", 0),
            device_ms_per_token={
                device: float(value)
                for device, value in zip(entry["devices"], row.get("ms", ()), strict="ms" in row)
                if value is not None
            },
        )
        for kind, row in entry["rows"].items()
    )
    points = tuple(
        ContextPoint(
            model=entry["model"],
            type=curve["type"],
            context=context,
            paired=False,
            ppl=ppl,
            error=None,
            corpus=curve["corpus"],
            origin="published",
        )
        for curve in entry.get("curves", ())
        for context, ppl in curve["points"].items()
    )
    return PublishedTable(name, entry["model"], entry["source"], rows, points, tuple(entry["notes"]))
