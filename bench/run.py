"""Side by side with llama.cpp's own tools, on one Mixtral-8x7B-sized layer: time and peak memory, as ratios.

    make bench                          # everything, about half an hour on 2 cores
    python bench/run.py --only convert,Q8_0 --repeat 3

Builds a checkpoint of 1.7 G random weights (3.4 GB in BF16, two shards), then runs upstream's converter and
llama-quantize and localmix on it in turns, so that a slow moment of the machine hits both. Writes RESULTS.md
beside this file. Upstream's converter needs torch and transformers: they go into an environment of its own in
the user's cache, or name a Python that has them with --converter-python.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import platformdirs
import psutil
from side_by_side import ROOT, TINYMIX, prepare

from localmix.importance import Entry, Importance, write_importance
from localmix.sources.open import open_source

FOUR_TYPES = ("Q8_0", "Q4_K_M", "Q2_K", "IQ2_XXS")
GOALS = {
    "BF16": "≤ 0.25 of the time, ≤ 0.08 of the memory; ≤ 2 × cp",
    "Q8_0": "≤ 0.30",
    "Q4_0": "≤ 0.30",
    "Q4_K_M": "≤ 0.75",
    "IQ2_XXS": "≤ 0.95",
    "GGUF to Q4_K_M": "≤ 1.0",
    "four types": "≤ 0.97 of the sum",
}


@dataclass
class Side:
    """What one program took, run by run: seconds, and bytes of its largest process."""

    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    @property
    def time(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def peak(self) -> int:
        """Largest memory seen."""
        return max(self.memory)


@dataclass
class Row:
    """One piece of work, done by both."""

    work: str
    against: str
    theirs: Side
    ours: Side
    goal: str


@dataclass(frozen=True)
class Bench:
    """Where things lie, and how to run them."""

    folder: Path
    tools: Path
    converter: Path
    converter_python: Path
    repeat: int

    @property
    def checkpoint(self) -> Path:
        return self.folder / "layer"

    @property
    def imatrix(self) -> Path:
        return self.folder / "layer.imatrix.gguf"

    def measure(self, side: Side, *commands: Sequence[str | Path]) -> None:
        """Run commands one after the other and note their time together and the peak memory of the largest."""
        os.sync()
        started, peak = time.monotonic(), 0
        for command in commands:
            log = (self.folder / "log.txt").open("wb")
            process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            log.close()
            if process.returncode != 0:
                sys.exit(f"{' '.join(map(str, command))} failed:\n{(self.folder / 'log.txt').read_text()[-3000:]}")
            peak = max(peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        side.seconds.append(time.monotonic() - started)
        side.memory.append(peak)

    def in_turns(self, theirs: Callable[[Side], None], ours: Callable[[Side], None]) -> tuple[Side, Side]:
        """Both sides `repeat` times, one after the other each time."""
        left, right = Side(), Side()
        for _ in range(self.repeat):
            theirs(left)
            ours(right)
        return left, right

    def localmix(self, *words: str | Path) -> list[str | Path]:
        return [sys.executable, "-m", "localmix", *words]

    def quantize(self, source: Path, kind: str, imatrix: Path | None) -> list[str | Path]:
        """localmix's command for one type or several, from a checkpoint or a GGUF file."""
        output = self.folder / ("ours" if "," in kind else "ours.gguf")
        chosen: list[str | Path] = ["--no-imatrix"] if imatrix is None else ["--imatrix", imatrix]
        return self.localmix("quantize", kind, source, "-o", output, *chosen)

    def upstream_convert(self) -> list[str | Path]:
        output = self.folder / "theirs-bf16.gguf"
        return [self.converter_python, self.converter, self.checkpoint, "--outtype", "bf16", "--outfile", output]

    def upstream_quantize(self, kind: str, imatrix: Path | None) -> list[str | Path]:
        chosen: list[str | Path] = [] if imatrix is None else ["--imatrix", imatrix]
        cores = str(os.cpu_count() or 1)
        bf16, output = self.folder / "theirs-bf16.gguf", self.folder / "theirs.gguf"
        return [self.tools / "llama-quantize", *chosen, bf16, output, kind, cores]


def convert_row(bench: Bench) -> Row:
    """checkpoint → BF16 GGUF."""
    theirs, ours = bench.in_turns(
        lambda side: bench.measure(side, bench.upstream_convert()),
        lambda side: bench.measure(side, bench.localmix("convert", bench.checkpoint, "-o", bench.folder / "ours.gguf")),
    )
    return Row("checkpoint → BF16 GGUF", "convert_hf_to_gguf.py", theirs, ours, GOALS["BF16"])


def copy_row(bench: Bench) -> Row:
    """The same bytes with cp: what the disk alone takes."""
    shards = sorted(bench.checkpoint.glob("*.safetensors"))
    target = bench.folder / "copy"
    target.mkdir(exist_ok=True)
    theirs, ours = bench.in_turns(
        lambda side: bench.measure(side, ["cp", *shards, target]),
        lambda side: bench.measure(side, bench.localmix("convert", bench.checkpoint, "-o", bench.folder / "ours.gguf")),
    )
    shutil.rmtree(target)
    return Row("checkpoint → BF16 GGUF", "cp of the shards", theirs, ours, "≤ 2")


def quantize_row(bench: Bench, kind: str, imatrix: Path | None) -> Row:
    """checkpoint → one type: convert and llama-quantize against one pass."""
    theirs, ours = bench.in_turns(
        lambda side: bench.measure(side, bench.upstream_convert(), bench.upstream_quantize(kind, imatrix)),
        lambda side: bench.measure(side, bench.quantize(bench.checkpoint, kind, imatrix)),
    )
    with_imatrix = " with imatrix" if imatrix else ""
    return Row(f"checkpoint → {kind}{with_imatrix}", "convert + llama-quantize", theirs, ours, GOALS[kind])


def gguf_row(bench: Bench) -> Row:
    """BF16 GGUF → Q4_K_M: llama-quantize alone against localmix."""
    source = bench.folder / "theirs-bf16.gguf"
    if not source.exists():
        bench.measure(Side(), bench.upstream_convert())
    theirs, ours = bench.in_turns(
        lambda side: bench.measure(side, bench.upstream_quantize("Q4_K_M", None)),
        lambda side: bench.measure(side, bench.quantize(source, "Q4_K_M", None)),
    )
    return Row("BF16 GGUF → Q4_K_M", "llama-quantize", theirs, ours, GOALS["GGUF to Q4_K_M"])


def four_row(bench: Bench) -> Row:
    """Four types in one pass against four passes of localmix."""
    (bench.folder / "ours").mkdir(exist_ok=True)

    def four(side: Side) -> None:
        bench.measure(side, *(bench.quantize(bench.checkpoint, kind, bench.imatrix) for kind in FOUR_TYPES))

    def one(side: Side) -> None:
        bench.measure(side, bench.quantize(bench.checkpoint, ",".join(FOUR_TYPES), bench.imatrix))

    theirs, ours = bench.in_turns(four, one)
    shutil.rmtree(bench.folder / "ours")
    return Row(f"{', '.join(FOUR_TYPES)} in one pass", "four passes of localmix", theirs, ours, GOALS["four types"])


def rows(bench: Bench, only: set[str]) -> Iterator[Row]:
    """Every row that was asked for; an empty set asks for all."""
    work: dict[str, Callable[[], Row]] = {
        "convert": lambda: convert_row(bench),
        "cp": lambda: copy_row(bench),
        "Q8_0": lambda: quantize_row(bench, "Q8_0", None),
        "Q4_0": lambda: quantize_row(bench, "Q4_0", None),
        "Q4_K_M": lambda: quantize_row(bench, "Q4_K_M", None),
        "IQ2_XXS": lambda: quantize_row(bench, "IQ2_XXS", bench.imatrix),
        "gguf": lambda: gguf_row(bench),
        "four": lambda: four_row(bench),
    }
    if unknown := only - set(work):
        sys.exit(f"Unknown rows: {', '.join(sorted(unknown))}. Known: {', '.join(work)}.")
    for name, measure in work.items():
        if not only or name in only:
            print(f"{name} …", file=sys.stderr, flush=True)
            yield measure()


def build_checkpoint(folder: Path) -> None:
    """One layer of Mixtral-8x7B with random weights, and TinyMix's tokenizer (its embedding is padded to 32,000)."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pool = np.random.default_rng(0).standard_normal(1 << 24, np.float32) * np.float32(0.02)
    bits = (pool.view(np.uint32) >> 16).astype(np.uint16)

    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32000, 4096),
        layer + "self_attn.q_proj.weight": (4096, 4096),
        layer + "self_attn.k_proj.weight": (1024, 4096),
        layer + "self_attn.v_proj.weight": (1024, 4096),
        layer + "self_attn.o_proj.weight": (4096, 4096),
        layer + "block_sparse_moe.gate.weight": (8, 4096),
        layer + "input_layernorm.weight": (4096,),
        layer + "post_attention_layernorm.weight": (4096,),
        "model.norm.weight": (4096,),
        "lm_head.weight": (32000, 4096),
    }
    for expert in range(8):
        name = f"{layer}block_sparse_moe.experts.{expert}."
        shapes |= {name + "w1.weight": (14336, 4096), name + "w3.weight": (14336, 4096)}
        shapes[name + "w2.weight"] = (4096, 14336)
    numbers = {name: number for number, name in enumerate(shapes)}
    names, half = list(shapes), len(shapes) // 2
    weight_map: dict[str, str] = {}
    for number, members in enumerate((names[:half], names[half:]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        _save_bf16({name: shapes[name] for name in members}, numbers, bits, folder / shard)
        weight_map |= dict.fromkeys(members, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINYMIX / name, folder / name)
    config = json.loads((ROOT / "localmix/data/mixtral-8x7b/config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _save_bf16(shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[str, int], bits: np.ndarray, path: Path) -> None:
    """A shard of BF16 tensors drawn from a pool of bits; by hand, since safetensors' numpy door knows no BF16."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head = head.ljust(-(-len(head) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, shape in shapes.items():
            count = math.prod(shape)
            start = numbers[name] * 7919 * 4096 % bits.size
            while count:
                piece = bits[start : start + count]
                file.write(piece.tobytes())
                count -= piece.size
                start = 0


def build_imatrix(bench: Bench) -> None:
    """Plausible importance for every matrix of the layer."""
    if bench.imatrix.exists():
        return
    random = np.random.default_rng(1)
    entries = {}
    with open_source(bench.checkpoint) as source:
        for tensor in source.tensors:
            if tensor.name.startswith("blk.") and "norm" not in tensor.name and "gate_inp" not in tensor.name:
                experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
                sums = random.chisquare(2, (experts, tensor.columns)).astype(np.float32)
                entries[tensor.name] = Entry(sums, np.ones(experts, np.float32))
    write_importance(bench.imatrix, Importance(entries, ["random"], 1, 512))


def build(bench: Bench) -> None:
    """Everything that the runs need."""
    build_checkpoint(bench.checkpoint)
    build_imatrix(bench)


def converter_python(chosen: Path | None) -> Path:
    """A Python with torch and transformers: the one that was named, or an environment made for this once."""
    if chosen is not None:
        return chosen
    folder = platformdirs.user_cache_path("localmix") / "bench-environment"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "complete").exists():
        print("Making an environment with torch and transformers for upstream's converter …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        packages = ["torch", "transformers", "sentencepiece", "safetensors", "protobuf", "pyyaml", "tqdm", "requests"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "complete").touch()
    return python


def report(found: Sequence[Row], repeat: int) -> str:
    """RESULTS.md."""
    processor = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    lines = [
        "# Side by side with llama.cpp's tools",
        "",
        "One Mixtral-8x7B-sized layer: 1.7 G random weights, 3.4 GB in BF16, in two shards. Both programs on the same"
        f" files, in turns, median of {repeat}; memory is the peak of the largest process."
        " `make bench` measures it again.",
        "",
        f"Machine: {processor}, {psutil.cpu_count(logical=False)} cores,"
        f" {psutil.virtual_memory().total / 2**30:.0f} GiB of memory.",
        "",
        "| work | against | theirs | localmix | time | goal | their memory | localmix's | memory |",
        "|---|---|--:|--:|--:|---|--:|--:|--:|",
    ]
    lines += [
        f"| {row.work} | {row.against} | {row.theirs.time:.1f} s | {row.ours.time:.1f} s"
        f" | **{row.ours.time / row.theirs.time:.2f}** | {row.goal} | {row.theirs.peak / 1e6:.0f} MB"
        f" | {row.ours.peak / 1e6:.0f} MB | {row.ours.peak / row.theirs.peak:.2f} |"
        for row in found
    ]
    return "\n".join(lines) + "\n"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def main() -> None:
    """Run what was asked for and write RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows to measure, with commas between; all by default")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side (3)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench", help="where 15 GB fit")
    parser.add_argument("--converter-python", type=Path, help="a Python with torch and transformers")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "RESULTS.md")
    arguments = parser.parse_args()
    folder, tools = prepare(arguments.folder)
    bench = Bench(
        folder,
        tools,
        tools.parent / "src" / "convert_hf_to_gguf.py",
        converter_python(arguments.converter_python),
        arguments.repeat,
    )
    # in a process of its own: a child's peak memory begins with that of the process it was forked from
    builder = multiprocessing.get_context("spawn").Process(target=build, args=(bench,))
    builder.start()
    builder.join()
    if builder.exitcode:
        sys.exit("The checkpoint of the benchmark could not be made.")
    found = list(rows(bench, {word for word in arguments.only.split(",") if word}))
    text = report(found, arguments.repeat)
    print(text)
    if not arguments.only:
        arguments.results.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
