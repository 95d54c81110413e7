"""What the side-by-side runs share: two programs in turns on the same files, their figures in pairs, the set-up."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
TINYMIX = ROOT / "examples" / "tinymix"


@dataclass
class Pairs:
    """One kind of work: what each side took, pair by pair."""

    work: str
    against: str
    unit: str
    theirs: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)

    def line(self) -> str:
        """A row of the table."""
        ratios = sorted(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))
        quarter = len(ratios) // 4
        return (
            f"| {self.work} | {self.against} | {statistics.median(self.theirs):.2f} {self.unit}"
            f" | {statistics.median(self.ours):.2f} {self.unit} | **{statistics.median(ratios):.3f}**"
            f" | {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f} | {len(ratios)} |"
        )


@dataclass(frozen=True)
class Side:
    """Where things lie, and how to run them."""

    folder: Path
    tools: Path
    threads: int
    repeat: int

    def run(self, *words: object) -> tuple[str, float, float]:
        """Run a command: its output, its seconds by the clock, and in processor time with its children's."""
        out = self.folder / "out.txt"
        with out.open("wb") as stream, (self.folder / "log.txt").open("wb") as log:
            started = time.monotonic()
            process = subprocess.Popen(list(map(str, words)), stdout=stream, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            sys.exit(f"{' '.join(map(str, words))} failed:\n{(self.folder / 'log.txt').read_text()[-3000:]}")
        return out.read_text(), seconds, usage.ru_utime + usage.ru_stime

    def localmix(self, *words: object) -> tuple[str, float, float]:
        return self.run(sys.executable, "-m", "localmix", *words)


def options(about: str, folder: str, room: str, results: str, repeat: int) -> argparse.ArgumentParser:
    """The options that every run has.

    Args:
        about: the help text.
        folder: below build/, where models are made.
        room: what fits there, in words.
        results: the file beside this one.
        repeat: pairs of runs.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=repeat, help="pairs of runs (%(default)s)")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / folder, help=f"where {room} fit")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / results)
    return parser


def prepare(folder: Path) -> tuple[Path, Path]:
    """Make the folder, with a library of its own, and find llama.cpp's tools: both, absolute."""
    print_dir = [sys.executable, str(ROOT / "vendor/llama.cpp/build.py"), "--print-dir"]
    tools = Path(subprocess.run(print_dir, capture_output=True, text=True, check=True).stdout.strip())
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["LOCALMIX_HOME"] = str(folder / "library")  # the user's own library has no part in this
    return folder, tools


def side_of(asked: argparse.Namespace) -> Side:
    """What `options` read, prepared."""
    return Side(*prepare(asked.folder), asked.threads, asked.repeat)
