"""Jobs in real children: events, messages and cancel, and every way to die, with real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from localmix import worker as worker_module
from localmix.errors import CapacityError, InputError, Interrupted, NetworkError
from localmix.worker import Progress, Worker, WorkerFailure, explain_death, last_words, run
from tests import worker_jobs

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def test_events_and_result_arrive_in_order() -> None:
    with Worker(worker_jobs.squares, 3) as worker:
        events = list(worker)
    assert [event for event in events if isinstance(event, worker_jobs.Square)] == [
        worker_jobs.Square(0, 0),
        worker_jobs.Square(1, 1),
        worker_jobs.Square(2, 4),
    ]
    assert events[-1] == Progress(3, 3, "squares")
    assert worker.result == 5


def test_run_reports_progress() -> None:
    seen: list[tuple[int, int, str]] = []
    assert run(worker_jobs.squares, 4, progress=lambda *step: seen.append(step)) == 14
    assert seen == [(number, 4, "squares") for number in range(1, 5)]


def test_messages_are_answered_and_cancel_covers_only_the_current_one() -> None:
    def reply() -> str:
        text = ""
        for event in worker:
            if not event:
                return text
            text += event
        raise AssertionError("the worker ended")

    with Worker(worker_jobs.echo) as worker:
        worker.send("hello")
        assert reply() == "hello"
        worker.cancel()  # too late: "hello" is done
        worker.send("again")
        assert reply() == "again"
        worker.send("STOP THIS ONE")
        assert next(worker) == "S"
        worker.cancel()
        assert len(reply()) < 6
        worker.send("and go on")
        assert reply() == "and go on"
        worker.send(None)
        assert list(worker) == []


def test_leaving_early_ends_the_child() -> None:
    with Worker(worker_jobs.echo) as worker:
        pid = worker.pid
        worker.send("x")
        assert next(worker) == "x"
    assert not psutil.pid_exists(pid)


def test_cancel_raises_interrupted() -> None:
    with Worker(worker_jobs.sleep_forever) as worker:
        next(worker)
        worker.cancel()
        with pytest.raises(Interrupted):
            next(worker)


def test_a_deaf_child_is_killed_after_the_grace() -> None:
    start = time.monotonic()
    with Worker(worker_jobs.sleep_deaf) as worker:
        pid = next(worker)
    assert 1.5 < time.monotonic() - start < 5
    assert not psutil.pid_exists(pid)


@posix
@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (signal.SIGABRT, InputError, "llama-vocab.cpp:12: GGML_ASSERT(size == other) failed"),
        (signal.SIGSEGV, InputError, "crash"),
        (signal.SIGBUS, InputError, "truncated"),
        (signal.SIGKILL, CapacityError, "memory"),
        (signal.SIGTERM, Interrupted, "SIGTERM"),
    ],
)
def test_each_signal_is_a_sentence_that_names_the_file(number: int, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        run(worker_jobs.die_by, number, Path("models/some.gguf"))
    assert words in str(caught.value)
    assert "some.gguf" in str(caught.value)
    assert "/build" not in str(caught.value)


@posix
def test_real_faults_of_native_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mapped.gguf"
    file.write_bytes(bytes(200_000))
    with pytest.raises(InputError, match=r"mapped\.gguf could not be read to its end"):
        run(worker_jobs.read_beyond_the_file, file)
    with pytest.raises(InputError, match="crash"):
        run(worker_jobs.follow_a_null_pointer, file)
    with pytest.raises(InputError, match="no such token"):
        run(worker_jobs.print_and_abort, file)
    assert capfd.readouterr() == ("", "")


def test_what_children_depend_on_is_asked_first_why_they_died() -> None:
    reasons: list[NetworkError | None] = [None, NetworkError("The other machine is gone.")]
    worker_module.death_reasons.extend([lambda: reasons[0], lambda: reasons[1]])
    try:
        for told, error in ((reasons[1], NetworkError), (None, CapacityError)):
            reasons[1] = told
            with Worker(worker_jobs.echo) as child:
                child.send("x")
                assert (next(child), next(child)) == ("x", "")
                assert child in worker_module.running
                child.kill()
                with pytest.raises(error):
                    next(child)
            assert child not in worker_module.running
    finally:
        worker_module.death_reasons.clear()


def test_a_condemned_child_dies_of_the_reason_given() -> None:
    reason = NetworkError("The cable is out.")
    for seconds in (0.0, 60.0):
        with Worker(worker_jobs.echo) as child:
            child.condemn(reason, seconds)
            if seconds:
                child.kill()  # it did not wait for that
            with pytest.raises(NetworkError, match="cable"):
                next(child)


def test_errors_of_the_function() -> None:
    with pytest.raises(InputError) as caught:
        run(worker_jobs.fail_with, "input")
    assert (caught.value.message, caught.value.hint) == ("config.json is empty.", "Copy it again.")
    with pytest.raises(CapacityError):
        run(worker_jobs.fail_with, "memory")
    with pytest.raises(WorkerFailure, match=r"(?s)worker_jobs\.py.*KeyError: 'a bug'"):
        run(worker_jobs.fail_with, "bug")


def test_a_function_of_main_is_refused() -> None:
    def function() -> None: ...

    function.__module__ = "__main__"
    with pytest.raises(ValueError, match="importable"):
        Worker(function)


@posix
def test_the_child_ignores_sigint_and_never_imports_main() -> None:
    assert run(worker_jobs.report_signals) == (True, False)


def test_the_child_is_light() -> None:
    environment, modules = run(worker_jobs.own_environment)
    assert environment["GGML_NO_BACKTRACE"] == "1"
    assert not {"numpy", "llama_cpp", "rich", "click", "multiprocessing"} & set(modules)


def test_the_childs_threads_wait_as_the_user_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert run(worker_jobs.own_environment)[0]["GOMP_SPINCOUNT"] == "2000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assert run(worker_jobs.own_environment)[0]["GOMP_SPINCOUNT"] == "5"


PARENT = """
import sys; sys.path[:] = {path!r}
from tests import worker_jobs
from localmix.worker import Worker
with Worker(worker_jobs.{job}) as worker:
    print(next(worker), flush=True)
    for event in worker: pass
"""


def start_parent(job: str) -> tuple[subprocess.Popen[str], int]:
    program = PARENT.format(path=sys.path, job=job)
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@posix
def test_the_child_dies_with_a_killed_parent() -> None:
    parent, child = start_parent("sleep_deaf")
    parent.kill()
    parent.communicate()
    assert gone(child, 2)


@posix
@pytest.mark.parametrize("job", ["sleep_forever", "sleep_deaf"])
def test_ctrl_c_in_the_parent_ends_both(job: str) -> None:
    parent, child = start_parent(job)
    start = time.monotonic()
    os.kill(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=6)
    assert "KeyboardInterrupt" in errors.splitlines()[-1]
    assert time.monotonic() - start < 4
    assert gone(child, 1)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        ("/a/b/ggml.c:7: GGML_ASSERT(x) failed\n", "ggml.c:7: GGML_ASSERT(x) failed"),
        ("terminate called\n  what():  bad\n", "bad"),
        ("llama_load: error loading model: no tensor\nnoise\n", "llama_load: error loading model: no tensor"),
    ],
)
def test_last_words(log: str, words: str) -> None:
    assert last_words(log) == words


def test_windows_statuses_are_known() -> None:
    assert isinstance(explain_death(3, "", "a.gguf"), InputError)
    assert isinstance(explain_death(0xC0000006, "", "a.gguf"), InputError)
    assert isinstance(explain_death(7, "why", ""), WorkerFailure)
