"""Speed: only that it measures what it says, since every machine has its own. tests/conformance compares the work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localmix.errors import CapacityError, InputError
from localmix.measurement import peak_memory
from localmix.measurement.speed import Settings, SpeedPoint, SpeedTest, bench, sweep
from localmix.worker import run
from tests.random_model import write_random_model
from tests.speed_jobs import time_opened


def test_a_point_for_each_test_of_each_settings(random_model: Path) -> None:
    tests = [SpeedTest(64, 0), SpeedTest(0, 16), SpeedTest(20, 4)]
    settings = sweep([1], depths=[0, 30], kv_types=["f16", "q8_0"])
    steps: list[tuple[int, int, str]] = []
    points = list(bench([random_model], tests, settings, 3, lambda *step: steps.append(step)))
    assert [(point.settings, point.test) for point in points] == [(some, test) for some in settings for test in tests]
    assert [point.name for point in points[:4]] == ["pp64", "tg16", "pp20+tg4", "pp64 @ d30"]
    for point in points:
        assert point.failure == ""
        assert len(point.nanoseconds) == 3
        tokens = point.test.prompt + point.test.generated
        speeds = [1e9 * tokens / duration for duration in point.nanoseconds]
        assert point.tps == pytest.approx(np.mean(speeds))
        assert point.deviation == pytest.approx(np.std(speeds, ddof=1))
        assert point.ms_per_token == pytest.approx(np.mean(point.nanoseconds) / 1e6 / tokens)
        assert point.memory_bytes is not None and point.memory_bytes > 10e6
        assert point.parameters > 1e6 and point.machine.processor
    assert {step[1] for step in steps} == {4 * 3 * 3}
    assert [step[0] for step in steps] == sorted(step[0] for step in steps)


def test_combinations_come_in_the_order_that_loads_least() -> None:
    found = sweep([1, 2], gpu_layers=[None, 0], depths=[0, 8])
    assert [(some.gpu_layers, some.threads, some.depth) for some in found] == [
        (None, 1, 0), (None, 1, 8), (None, 2, 0), (None, 2, 8), (0, 1, 0), (0, 1, 8), (0, 2, 0), (0, 2, 8)
    ]  # fmt: skip
    assert found[0] == Settings(threads=1, batch=2048, micro_batch=512, depth=0, kv_type="f16", gpu_layers=None)


def test_one_repetition_has_no_deviation(random_model: Path) -> None:
    point = next(bench([random_model], [SpeedTest(8, 0)], sweep([1]), 1))
    assert point.deviation == 0
    unmeasured = SpeedPoint(random_model, SpeedTest(8, 0), Settings(1))
    assert unmeasured.tps is unmeasured.deviation is unmeasured.ms_per_token is None


def test_what_fails_says_so_and_the_others_go_on(random_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(random_model.read_bytes()[:5000])
    tests = [SpeedTest(8, 0), SpeedTest(0, 2)]
    points = list(bench([broken, random_model], tests, sweep([1]), 1))
    assert [bool(point.failure) for point in points] == [True, True, False, False]
    assert "cannot load broken.gguf" in points[0].failure
    with pytest.raises(InputError, match=r"cannot load broken\.gguf"):
        list(bench([broken], tests, sweep([1]), 1))


def test_settings_that_fail_do_not_stop_the_others(tmp_path: Path) -> None:
    # heads of 16 numbers have no whole block of q8_0
    path = write_random_model(tmp_path / "thin.gguf", hidden=64, feed_forward=64, experts=0)
    tests = [SpeedTest(8, 0), SpeedTest(0, 2)]
    points = list(bench([path], tests, sweep([1], kv_types=["q8_0", "f16"]), 1))
    assert [bool(point.failure) for point in points] == [True, True, False, False]
    with pytest.raises((InputError, CapacityError)):
        list(bench([path], tests, sweep([1], kv_types=["q8_0"]), 1))


def test_a_loaded_model_is_measured_as_it_is(random_model: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    speed = run(time_opened, random_model, 64, 16, 3, progress=lambda *step: steps.append(step))
    assert (speed.prompt, speed.generated) == (64, 16)
    assert speed.prompt_tps and min(speed.prompt_tps, speed.generation_tps) > 0
    # the mean of the times, which is not the time of the mean speed but never less
    assert speed.ms_per_token >= 1000 / speed.generation_tps * (1 - 1e-9)
    assert steps[-1] == (6, 6, "runs")


def test_a_peak_is_remembered_until_it_is_forgotten() -> None:
    peak_memory.forget_peak()
    before = peak_memory.peak()
    block = np.ones(64 << 20, np.uint8)  # zeros would not be touched
    del block
    assert peak_memory.peak() - before > 60 << 20
    if Path("/proc/self/clear_refs").exists():
        peak_memory.forget_peak()
        assert peak_memory.peak() - before < 32 << 20
