"""Measuring side by side with llama.cpp's own tools: ppl against llama-perplexity, bench against llama-bench.

    python bench/measure.py                          # about ten minutes on 2 idle cores
    python bench/measure.py --only bench --repeat 9 --threads 2

Both programs on the same files with the same threads, one after the other, many times: each pair gives a ratio, and
the median of the ratios counts, so that a slow moment of the machine hits both. Speeds are what the programs report;
times are those of the whole commands, by the clock and in processor time, which other work on the machine disturbs
less. Writes MEASURING.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from localmix.native.devices import devices

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


def bench_rows(side: Side, model: Path) -> list[Pairs]:
    """Prompt processing and generation, at the start and behind a filled context."""
    asked = ("-p", 256, "-n", 32, "-r", 1, "-t", side.threads, "-d", "0,512")
    rows = [
        Pairs(f"{model.stem}, {name}", "llama-bench", "tokens/s")
        for name in ("pp256", "tg32", "pp256 @ d512", "tg32 @ d512")
    ]
    for _ in range(side.repeat):
        theirs = json.loads(side.run(side.tools / "llama-bench", "-m", model, *asked, "-o", "json")[0])
        ours = json.loads(side.localmix("bench", model, *asked, "--json")[0])["rows"]
        for row, left, right in zip(rows, theirs, ours, strict=True):
            assert all(left[name] == right[name] for name in ("n_prompt", "n_gen", "n_depth", "n_threads"))
            row.theirs.append(left["avg_ts"])
            row.ours.append(right["avg_ts"])
    return rows


def ppl_rows(side: Side, model: Path, text: Path, ctx: int, chunks: int) -> list[Pairs]:
    """The whole command by the clock and in processor time, and the command with the speed measured too."""
    count = ("--chunks", chunks)
    title = f"{model.stem}, {chunks} chunks of {ctx}"
    clock, work = (Pairs(f"{title}, {what}", "llama-perplexity", "s") for what in ("clock", "processor"))
    timed = Pairs(f"{title}, clock, speed too", "llama-perplexity and llama-bench", "s")
    tool = (side.tools / "llama-perplexity", "-m", model, "-f", text, "-c", ctx, "-t", side.threads, *count)
    mine = ("ppl", model, "--corpus", text, "--ctx", ctx, "--threads", side.threads, *count)
    for _ in range(side.repeat):
        _, seconds, processor = side.run(*tool)
        clock.theirs.append(seconds)
        work.theirs.append(processor)
        _, seconds, processor = side.localmix(*mine, "--no-speed")
        clock.ours.append(seconds)
        work.ours.append(processor)
        _, speed, _ = side.run(side.tools / "llama-bench", "-m", model, "-t", side.threads)
        timed.theirs.append(clock.theirs[-1] + speed)
        timed.ours.append(side.localmix(*mine)[1])
    return [clock, work, timed]


def build_models(side: Side) -> dict[str, Path]:
    """TinyMix in Q8_0, and a dense model of 160 M random weights in Q8_0 and Q4_0."""
    sys.path.insert(0, str(ROOT))  # the tests' generator of models
    from gguf import GGMLQuantizationType

    from tests.random_model import write_random_model

    source = side.folder / "random-F16.gguf"
    if not source.exists():
        unfinished = source.with_suffix(".part")
        write_random_model(
            unfinished,
            layers=8,
            hidden=1024,
            feed_forward=2816,
            experts=0,
            embedding_rows=32000,
            kind=GGMLQuantizationType.F16,
        )
        unfinished.rename(source)
    made = {}
    for name, start, kind in (("tinymix", TINYMIX, "Q8_0"), ("random", source, "Q8_0"), ("random", source, "Q4_0")):
        path = made[f"{name}-{kind}"] = side.folder / f"{name}-{kind}.gguf"
        if not path.exists():
            side.localmix("quantize", kind, start, "-o", path, "--no-imatrix")
    return made


def measure(side: Side, only: str) -> Iterator[Pairs]:
    """Every row that was asked for."""
    models = build_models(side)
    text = TINYMIX / "heldout.txt"
    work: dict[str, list[Callable[[], list[Pairs]]]] = {
        "bench": [lambda: bench_rows(side, models["random-Q8_0"]), lambda: bench_rows(side, models["random-Q4_0"])],
        "ppl": [
            lambda: ppl_rows(side, models["tinymix-Q8_0"], text, 512, 20),
            lambda: ppl_rows(side, models["tinymix-Q8_0"], text, 1024, 10),
            lambda: ppl_rows(side, models["random-Q4_0"], text, 512, 20),
            lambda: ppl_rows(side, models["random-Q4_0"], text, 1024, 10),
        ],
    }
    for name, steps in work.items():
        for step in steps if only in ("", name) else ():
            print(f"{name} …", file=sys.stderr, flush=True)
            yield from step()


def report(found: Sequence[Pairs], side: Side) -> str:
    """MEASURING.md."""
    processor = next(device.description for device in devices() if device.kind == "cpu")
    lines = [
        "# Measuring beside llama.cpp's tools",
        "",
        f"Both programs on the same files with --threads {side.threads}, in turns; the median of the ratios counts,"
        " and the middle half of them shows the noise. Ratios are localmix's figure through theirs: of speeds as"
        " reported, of seconds of whole commands. `python bench/measure.py` measures it again.",
        "",
        f"Machine: {processor}, {psutil.cpu_count(logical=False)} cores.",
        "",
        "| work | against | theirs | localmix | ratio | middle half | pairs |",
        "|---|---|--:|--:|--:|---|--:|",
        *(row.line() for row in found),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what was asked for and write MEASURING.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", choices=["", "bench", "ppl"], help="one half of it")
    parser.add_argument("--repeat", type=int, default=5, help="pairs of runs (5)")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "measure", help="where 1 GB fits")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "MEASURING.md")
    asked = parser.parse_args()
    print_dir = [sys.executable, str(ROOT / "vendor/llama.cpp/build.py"), "--print-dir"]
    tools = Path(subprocess.run(print_dir, capture_output=True, text=True, check=True).stdout.strip())
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["LOCALMIX_HOME"] = str(folder / "library")  # the user's own library has no part in this
    side = Side(folder, tools, asked.threads, asked.repeat)
    found = list(measure(side, asked.only))
    text = report(found, side)
    print(text)
    if not asked.only:
        asked.results.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
