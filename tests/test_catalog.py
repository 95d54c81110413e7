from __future__ import annotations

from localmix.catalog import catalog
from localmix.presets import load_presets


def test_every_type_has_its_size_on_mixtral_and_a_sentence() -> None:
    entries = {entry.type: entry for entry in catalog(load_presets())}
    assert set(entries) == set(load_presets().presets)
    assert round(entries["Q4_K_M"].bpw or 0, 2) == 4.87
    assert round(entries["IQ3_XXS"].bpw or 0, 2) == 3.12  # with the importance matrix it requires
    assert entries["COPY"].bpw is None
    assert all(entry.advice for entry in entries.values())
