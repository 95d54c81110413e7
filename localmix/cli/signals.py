"""What a signal that ends the program does: it raises, so that everything cleans up behind itself, but not anywhere.

Python runs signal handlers between any two instructions of the main thread. An exception between taking a lock and
the `with` block that gives it back leaves the lock taken: the next thread that wants it waits for ever, and with it
whoever joins that thread. The `__enter__` of threading.Condition is such a place (bpo-29988): interrupted at random, a
busy queue.Queue stayed locked once in twenty times. There the exception waits for a better moment. (Early Python 3.14
has such a place in every `with`, gh-148874; what moves between our processes uses queues without such locks.)
"""

from __future__ import annotations

# Nothing slow: until `raise_on_signals` has run, Ctrl-C is a traceback of Python's.
import signal
import sys

from localmix.cli import Terminated

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

# of threading.Condition, on which queue.Queue, threading.Event and concurrent.futures stand
_LOCKING = frozenset({"__enter__", "__exit__", "_release_save", "_acquire_restore", "_is_owned"})
_PAUSE_SECONDS = 0.002


def raise_on_signals() -> None:
    """SIGTERM and a closed terminal stop a run the way Ctrl-C does, as an exception in the main thread.

    Raises (later, anywhere):
        KeyboardInterrupt: Ctrl-C.
        Terminated: the other signals.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in stop_signals():
            signal.signal(other, _nothing)
        _Interruption(KeyboardInterrupt() if number == signal.SIGINT else Terminated()).look(number, frame)

    for number in stop_signals():
        # a parent that ignores the signal (nohup) wants it ignored
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def ignore_signals() -> None:
    """From an error on: a signal must not cut the report short, nor turn the exit code into its own."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a program to end, as far as this system has them."""
    return [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]


def _nothing(number: int, frame: FrameType | None) -> None:
    """Take a second signal, which must not cut the clean-up short.

    Not SIG_IGN: Python tells on stderr if one of another number has come by then but was not handled.
    """


class _Interruption:
    """An exception on its way. Windows has no timer to look again with: there it is raised at once."""

    def __init__(self, error: BaseException) -> None:
        self._error = error
        self._waits = False

    def look(self, _: int, frame: FrameType | None) -> None:
        """Raise it, or look again in a moment."""
        if sys.platform != "win32":
            if frame is not None and _is_locking(frame):
                if not self._waits:
                    self._waits = True
                    signal.signal(signal.SIGALRM, self.look)
                    signal.setitimer(signal.ITIMER_REAL, _PAUSE_SECONDS, _PAUSE_SECONDS)
                return
            if self._waits:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, _nothing)
        raise self._error


def _is_locking(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == "threading" and frame.f_code.co_name in _LOCKING
