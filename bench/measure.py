"""Measuring side by side with llama.cpp's own tools: ppl against llama-perplexity, bench against llama-bench.

    python bench/measure.py                          # about ten minutes on 2 idle cores
    python bench/measure.py --only bench --repeat 9 --threads 2

Both programs on the same files with the same threads, one after the other, many times: each pair gives a ratio, and
the median of the ratios counts, so that a slow moment of the machine hits both. Speeds are what the programs report;
times are those of the whole commands, by the clock and in processor time, which other work on the machine disturbs
less. Writes MEASURING.md beside this file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
from side_by_side import ROOT, TINYMIX, Pairs, Side, options, side_of

from localmix.native.devices import devices


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
    parser = options(__doc__ or "", "measure", "a gigabyte or two", "MEASURING.md", repeat=5)
    parser.add_argument("--only", default="", choices=["", "bench", "ppl"], help="one half of it")
    asked = parser.parse_args()
    side = side_of(asked)
    found = list(measure(side, asked.only))
    text = report(found, side)
    print(text)
    if not asked.only:
        asked.results.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
