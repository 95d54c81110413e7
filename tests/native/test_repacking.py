"""Which weights are copied for this processor: the answer against what a real load allocates."""

from __future__ import annotations

from pathlib import Path

import pytest

from localmix import worker
from localmix.capacity.placement import weigh
from localmix.capacity.requirements import repacked_bytes
from localmix.capacity.simulation import Setting
from localmix.native.repacking import is_repacked
from localmix.sizes import MIB
from localmix.tensor_types import TensorType
from tests.memory_jobs import hollow, peak, sliding_window_model, write_config, zeros


def test_floats_stay_as_they_are() -> None:
    assert not is_repacked(TensorType.F32, 256)
    assert not is_repacked(TensorType.BF16, 256, 8)


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q4_0", "Q2_K", "Q8_0", "IQ4_NL"])
def test_bytes_are_those_of_the_buffer(tmp_path: Path, kind: str) -> None:
    source = hollow(
        write_config(
            tmp_path / "model",
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=1003,  # no multiple of what a kernel takes at once: the output stays where it is
        ),
        kind,
    )
    with zeros(source) as path:
        _, buffers = worker.run(peak, path, Setting(256), fill=0)
    assert repacked_bytes(weigh(source.tensors)) / MIB == pytest.approx(buffers.get("CPU_REPACK model", 0), abs=0.02)


def test_a_tied_embedding_is_copied_for_the_output() -> None:
    source = sliding_window_model()
    with zeros(source) as path:
        _, buffers = worker.run(peak, path, Setting(256), fill=0)
    assert repacked_bytes(weigh(source.tensors)) / MIB == pytest.approx(buffers.get("CPU_REPACK model", 0), abs=0.02)


def test_without_repacking_nothing_is_copied(tmp_path: Path) -> None:
    source = hollow(
        write_config(
            tmp_path / "model",
            experts=0,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=1000,
        ),
        "Q4_0",
    )
    with zeros(source) as path:
        _, buffers = worker.run(peak, path, Setting(256), repack=False, fill=0)
    assert not any("REPACK" in name for name in buffers)
