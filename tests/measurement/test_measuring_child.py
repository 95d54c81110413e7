"""One child for many jobs: what it keeps, what ends it, and that the next job has another."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from localmix.errors import InputError
from localmix.measurement.measuring_child import MeasuringChild
from localmix.worker import Progress, WorkerFailure
from tests import measuring_jobs

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak cannot be forgotten")


@pytest.fixture
def child() -> Iterator[MeasuringChild]:
    with MeasuringChild() as found:
        yield found


@linux
def test_it_does_one_job_after_the_other(child: MeasuringChild, tmp_path: Path) -> None:
    first = child.run(measuring_jobs.process_id)
    steps: list[tuple[int, int, str]] = []
    assert child.run(measuring_jobs.count, 2, progress=lambda *step: steps.append(step)) == 2
    assert steps == [(1, 2, "numbers"), (2, 2, "numbers")]
    assert list(child.events(measuring_jobs.count, 1)) == [0, Progress(1, 1, "numbers")]
    with pytest.raises(InputError, match="is refused"):
        child.run(measuring_jobs.refuse, tmp_path)
    assert child.run(measuring_jobs.process_id) == first


def test_a_death_names_the_file_and_ends_only_that_job(child: MeasuringChild, tmp_path: Path) -> None:
    first = child.run(measuring_jobs.process_id)
    child.run(measuring_jobs.complain, "error loading model: of an earlier one\n")
    with pytest.raises(InputError, match=r"model\.gguf makes llama\.cpp abort\. Check"):
        child.run(measuring_jobs.complain_and_die, tmp_path / "model.gguf", "")
    second = child.run(measuring_jobs.process_id)
    assert second != first
    with pytest.raises(InputError, match=r"other\.gguf makes llama\.cpp abort: GGML_ASSERT\(a\)\. Check"):
        child.run(measuring_jobs.complain_and_die, tmp_path / "other.gguf", "GGML_ASSERT(a)\n")
    with pytest.raises(WorkerFailure, match="ZeroDivisionError"):
        child.run(measuring_jobs.fail)
    assert child.run(measuring_jobs.process_id) not in (first, second)


def test_a_job_that_is_left_early_is_ended(child: MeasuringChild) -> None:
    first = child.run(measuring_jobs.process_id)
    events = child.events(measuring_jobs.count, 1000)
    assert next(events) == 0
    events.close()
    assert child.run(measuring_jobs.process_id) != first
    assert child.run(measuring_jobs.count, 3) == 3


def test_each_job_has_its_own_peak(child: MeasuringChild) -> None:
    large, small = child.run(measuring_jobs.hold, 200), child.run(measuring_jobs.hold, 1)
    assert large - small > 150 << 20
