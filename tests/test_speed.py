"""Speed: only that it measures what it says, since every machine has its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from localmix.speed import generation_speed


def test_figures_belong_together(random_model: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    speed = generation_speed(random_model, 64, 16, 3, threads=1, progress=lambda *step: steps.append(step))
    assert (speed.prompt, speed.generated, speed.repetitions, speed.threads) == (64, 16, 3, 1)
    assert speed.prompt_tps > speed.generation_tps > 0
    assert speed.ms_per_token == pytest.approx(1000 / speed.generation_tps, rel=0.5)
    assert steps[-1] == (6, 6, "runs")
