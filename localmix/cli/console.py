"""The one place that draws: results on stdout, progress and messages on stderr.

A command makes one `Console` and hands it what the library returned. With `json` there is exactly one JSON
document on stdout and nothing is coloured. Colour and progress bars appear on a terminal only, and not when
`NO_COLOR` is set. Text that comes from a model or a file is made inert first.
"""

from __future__ import annotations

import dataclasses
import io
import json as json_format
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from localmix.errors import Interrupted, LocalmixError
from localmix.inert import inert, inert_json

if TYPE_CHECKING:
    import rich.table

    from localmix.presentation.table import Table

Progress = Callable[[int, int, str], None]

# stderr that is no terminal (a log file) gets a line of progress this often, in seconds
LOG_INTERVAL = 10.0

_FOLDED = 16

# characters of a bar in a table, and its last one in eighths
_BAR, _EIGHTHS = 10, ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


@dataclasses.dataclass(frozen=True)
class Rate:
    """How a speed is told: `unit` is so many (`scale`) of the units that progress counts, each second."""

    unit: str
    scale: float


WEIGHTS = Rate("M weights/s", 1e6)
BYTES = Rate("MB/s", 1e6)


class Console:
    """Where one command's results and messages go."""

    def __init__(self, json: bool = False) -> None:
        self.json = json

    # stdout

    def result(self, document: object, draw: Callable[[], None]) -> None:
        """The result of a command: `document` as JSON when that was asked for, else what `draw` prints.

        Dataclasses, paths, enums and infinities inside the document are written as JSON knows them.
        """
        if self.json:
            self._document(document)
        else:
            draw()

    def line(self, text: str = "", style: str = "") -> None:
        """One line of result."""
        print(_styled(inert(text), style, sys.stdout), file=sys.stdout)

    def sentence(self, text: str, style: str = "") -> None:
        """A result in words, which goes on below in a narrow window."""
        lines = _wrapped(inert(text), shutil.get_terminal_size().columns if sys.stdout.isatty() else 0)
        print(_styled("\n".join(lines), style, sys.stdout), file=sys.stdout)

    def fields(self, fields: Mapping[str, str]) -> None:
        """Names and values, one under the other; in a narrow window a value's words go on below its start."""
        width = max(map(len, fields), default=0)
        room = shutil.get_terminal_size().columns - width - 2 if sys.stdout.isatty() else 0
        for name, value in fields.items():
            label = _styled(f"{inert(name):<{width}}", "dim", sys.stdout)
            below = "\n" + " " * (width + 2)
            print(f"{label}  {below.join(_wrapped(inert(value), room))}", file=sys.stdout)

    def table(self, table: Table, markdown: bool = False, to_messages: bool = False) -> None:
        """A table: drawn, or as Markdown source; on stdout, or on stderr when it belongs to a message."""
        stream = sys.stderr if to_messages else sys.stdout
        if markdown:
            print(inert(table.markdown()), file=stream)
            return
        import rich.console

        caption = inert(table.caption)
        if stream.isatty():
            console = rich.console.Console(file=stream, highlight=False)
            window = console.width
            caption = textwrap.fill(caption, window)
            fitting, left_out = _fit(table, console.width)
            console.width = max(console.width, _least_width(fitting))
            console.print(_drawn(fitting))
            if left_out:
                note = f"Not in a window this narrow: {', '.join(left_out)}."
                print(_styled(textwrap.fill(inert(note), window), "dim", stream), file=stream)
        else:  # a pipe has no width: nothing is cut there
            console = rich.console.Console(file=io.StringIO(), width=1000, highlight=False)
            with console.capture() as captured:
                console.print(_drawn(dataclasses.replace(table, bars=None)))
            for line in captured.get().splitlines():
                print(line.rstrip(), file=stream)
        if caption:
            print(_styled(caption, "dim", stream), file=stream)

    def stream(self, text: str) -> None:
        """A piece of a model's reply, at once and without a newline."""
        sys.stdout.write(inert(text))
        sys.stdout.flush()

    def raw(self, text: str) -> None:
        """Text of our own that must arrive as it is: a completion script."""
        sys.stdout.write(text)

    # stderr

    def note(self, text: str) -> None:
        """Something worth knowing; not a problem."""
        print(_styled(inert(text), "dim", sys.stderr), file=sys.stderr, flush=True)

    def status(self, text: str = "") -> None:
        """A line that is replaced by the next one, for short waits; on a terminal only. Without text it goes away."""
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            print(f"\r\x1b[K{_styled(inert(text), 'dim', sys.stderr)}", end="", file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """A problem that does not stop the run."""
        print(_styled(f"Note: {inert(text)}", "yellow", sys.stderr), file=sys.stderr, flush=True)

    def error(self, error: LocalmixError) -> None:
        """The sentence and the next step of an error; with `json` also a document on stdout."""
        if isinstance(error, Interrupted):
            print(_styled(inert(error.message), "dim", sys.stderr), file=sys.stderr)
        else:
            label = _styled("Error:", "red", sys.stderr)
            print(f"{label} {inert(error.message)}", file=sys.stderr)
        if error.hint:
            print(inert(error.hint), file=sys.stderr)
        if self.json:
            self._document({"error": {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}})
        sys.stderr.flush()

    @property
    def can_ask(self) -> bool:
        """Whether there is a person at the terminal."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def confirm(self, question: str) -> bool:
        """Ask on the terminal; only a yes is a yes."""
        print(f"{inert(question)} [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    @contextmanager
    def progress(self, rate: Rate | None = None) -> Iterator[Progress]:
        """A `progress(done, total, label)` for a long function: a bar on a terminal, else a line now and then.

        Args:
            rate: how to tell the speed; without it only the time is told.
        """
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            with _bar(rate) as report:
                yield report
        else:
            yield _LogProgress(sys.stderr, rate)

    def _document(self, document: object) -> None:
        text = json_format.dumps(_plain(document), ensure_ascii=False, allow_nan=False, indent=2)
        print(inert_json(text), file=sys.stdout)


def _wrapped(text: str, room: int) -> list[str]:
    """Lines of so many characters, if any; a path stays in one piece, for whoever copies it."""
    if not 0 < room < len(text):
        return [text]
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)


class _Speed:
    """Units per second since the first report: work that an earlier run did does not count."""

    def __init__(self, rate: Rate | None) -> None:
        self._rate = rate
        self._start: tuple[float, int] | None = None

    def report(self, done: int, total: int) -> tuple[str, str]:
        """The speed and the time left, each as text or empty."""
        now = time.monotonic()
        if self._start is None or done < self._start[1]:  # another part of the work, in units of its own
            self._start = now, done
        seconds, units = now - self._start[0], done - self._start[1]
        if units <= 0 or seconds <= 0:
            return "", ""
        left = f"{(total - done) * seconds / units:.0f} s left" if total else ""
        return (f"{units / seconds / self._rate.scale:.1f} {self._rate.unit}" if self._rate else ""), left


class _LogProgress:
    """Progress as lines of a log file, at most one every `LOG_INTERVAL` seconds."""

    def __init__(self, stream: TextIO, rate: Rate | None) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._started = self._last = time.monotonic()
        self._speed = _Speed(rate)

    def __call__(self, done: int, total: int, label: str) -> None:
        now = time.monotonic()
        with self._lock:
            speed, left = self._speed.report(done, total)
            if now - self._last < LOG_INTERVAL:
                return
            self._last = now
        share = f"{100 * done // total} %" if total else ""
        told = ", ".join(filter(None, (share, f"{now - self._started:.0f} s", speed, left)))
        print(f"{inert(label)}: {told}", file=self._stream, flush=True)


@contextmanager
def _bar(rate: Rate | None) -> Iterator[Progress]:
    import rich.console
    import rich.progress
    import rich.text

    console = rich.console.Console(stderr=True)
    # How far it is and how long it still takes come first; what is left goes to the name, the bar and the speed.
    bar_width = min(32, console.width - 60)
    columns: list[rich.progress.ProgressColumn] = [rich.progress.TextColumn("{task.description}", markup=False)]
    room = console.width - len("100% 0:00:00 0:00:00 ")
    if bar_width >= 8:
        columns.append(rich.progress.BarColumn(bar_width))
        room -= bar_width + 1
    columns.append(rich.progress.TaskProgressColumn())
    if rate and console.width >= 56:
        columns.append(rich.progress.TextColumn("{task.fields[speed]}", markup=False))
        room -= len(f"9999.9 {rate.unit} ")
    columns += [rich.progress.TimeElapsedColumn(), rich.progress.TimeRemainingColumn()]
    measured = _Speed(rate)
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, speed="")

        def report(done: int, total: int, label: str) -> None:
            speed, _ = measured.report(done, total)
            name = rich.text.Text(inert(label))
            name.truncate(max(room, 1), overflow="ellipsis")
            bar.update(task, completed=done, total=total or None, description=name.plain, speed=speed)

        yield report


def _drawn(table: Table) -> rich.table.Table:
    import rich.box
    import rich.table
    import rich.text

    drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in table.columns:
        drawn.add_column(
            rich.text.Text(column.title),
            justify="right" if column.number else "left",
            no_wrap=column.number,
            overflow="fold",
        )
    if table.bars:
        drawn.add_column(rich.text.Text(table.bars.title), no_wrap=True, min_width=_BAR)
    for index, row in enumerate(table.rows):
        cells = [rich.text.Text(inert(cell), _cell_style(cell)) for cell in row]
        if table.bars:
            cells.append(rich.text.Text(_blocks(table.bars.shares[index]), "cyan"))
        drawn.add_row(*cells)
    return drawn


def _blocks(share: float | None) -> str:
    """A bar in eighths of a character; what is more than nothing shows."""
    if share is None or share <= 0:
        return ""
    eighths = max(1, round(min(share, 1.0) * _BAR * 8))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8]


def _fit(table: Table, width: int) -> tuple[Table, list[str]]:
    """The table with the most important columns that fit the width, and the titles of the others."""
    ranks = {column.rank for column in table.columns} | ({table.bars.rank} if table.bars else set())
    shown: set[int] = set()
    for rank in sorted(ranks):
        if rank == 0 or _least_width(_with_ranks(table, shown | {rank})) <= width:
            shown.add(rank)
    left_out = [column.title for column in table.columns if column.rank not in shown and column.title != "±"]
    return _with_ranks(table, shown), left_out


def _with_ranks(table: Table, ranks: Set[int]) -> Table:
    kept = [index for index, column in enumerate(table.columns) if column.rank in ranks]
    return dataclasses.replace(
        table,
        columns=tuple(table.columns[index] for index in kept),
        rows=tuple(tuple(row[index] for index in kept) for row in table.rows),
        bars=table.bars if table.bars and table.bars.rank in ranks else None,
    )


def _least_width(table: Table) -> int:
    """Below it columns would be left out: numbers stay whole, words are folded to `_FOLDED` characters."""
    longest = [max(map(len, cells)) for cells in zip(*([c.title for c in table.columns], *table.rows), strict=True)]
    widths = [
        width if column.number else min(width, _FOLDED) for width, column in zip(longest, table.columns, strict=True)
    ]
    if table.bars:
        widths.append(max(_BAR, len(table.bars.title)))
    return sum(widths) + 3 * (len(widths) - 1)  # a space, the box's bar and a space between two columns


def _cell_style(cell: str) -> str:
    return {"yes": "green", "no": "red", "failed": "red"}.get(cell, "")


def _styled(text: str, style: str, stream: TextIO) -> str:
    if not style or not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def _plain(value: Any) -> Any:
    """The value in JSON's own types; NaN and infinities, which JSON lacks, become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float):
        return value if value - value == 0 else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):  # a numpy number or array
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON")
