"""The child process that measures: one for all models of a table, started while the parent still chooses them.

    with MeasuringChild() as child:
        first = child.run(measure_here, Path("q8.gguf"), corpus, conditions, False)
        second = child.run(measure_here, Path("q4.gguf"), corpus, conditions, False)

Starting Python and loading llama.cpp is so paid once, and beside the parent's own imports. A model that kills the
child fails alone: the next one has a new child.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmix.errors import LocalmixError
from localmix.measurement import peak_memory
from localmix.worker import Channel, Progress, Report, Worker, WorkerFailure


class MeasuringChild:
    """Runs jobs for `Worker`, one after another; a context manager, which starts the child."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._worker: Worker | None = None

    def __enter__(self) -> MeasuringChild:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child; the next job starts another."""
        self._worker = None
        self._stack.close()

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        progress: Report | None = None,
        subject: Path | None = None,
    ) -> Any:
        """As `worker.run`."""
        events = self.events(function, *args, subject=subject)
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                return end.value
            if progress is not None and isinstance(event, Progress):
                progress(event.done, event.total, event.label)

    def events(
        self, function: Callable[..., Any], *args: Any, subject: Path | None = None
    ) -> Generator[Any, None, Any]:
        """The events of `function(channel, *args)` in the child, and what it returns.

        Args:
            subject: the file that error sentences name; by default the first Path among `args`.

        Raises:
            As `Worker`; after an error that is not the function's own, or when this is left early, the child is ended.
        """
        worker = self._worker or self._start()
        worker.subject = str(subject or next((value for value in args if isinstance(value, Path)), ""))
        worker.send(pickle.dumps((function, args), protocol=pickle.HIGHEST_PROTOCOL))
        lasts = False
        try:
            for event in worker:
                if not isinstance(event, _Answer):
                    yield event
                    continue
                lasts = event.lasts
                if event.error is not None:
                    raise event.error
                return event.result
            raise WorkerFailure("the measuring child ended without an answer")
        finally:
            if not lasts:
                self.close()

    def _start(self) -> Worker:
        self._worker = self._stack.enter_context(Worker(_serve))
        return self._worker


@dataclass(frozen=True)
class _Answer:
    """The end of a job.

    Attributes:
        error: why there is no result.
        lasts: whether the child takes another job.
    """

    result: object = None
    error: LocalmixError | None = None
    lasts: bool = True


def _serve(channel: Channel) -> None:
    """The child's part: do jobs until the parent ends it."""
    _get_ready()
    while True:
        function, args = pickle.loads(channel.receive())
        result, failure = None, None
        try:
            result = function(channel, *args)
        except LocalmixError as error:
            failure = error
        # else the next model's peak would be this one's
        lasts = peak_memory.forget_peak()
        channel.emit(_Answer(result, failure, lasts))
        if not lasts:
            return


def _get_ready() -> None:
    """Load what every job needs; the parent is still busy finding out which it is."""
    from localmix.measurement import context_curve, divergence  # noqa: F401
    from localmix.native.library import api

    api()
