"""Does the speed of types tell the speed of models? Predicted and real milliseconds of a token, as a Markdown table.

    python bench/type_speed.py                           # about five minutes on two idle cores
    python bench/type_speed.py --types Q4_K_M,Q2_K --rounds 20

Models of a Mixtral's and a Llama's shape, a few layers of random weights: each preset as it is, and at its size the
mixture that the optimizer chooses with `--types fast` and with all types. The prediction is the sum of
`type_speed.seconds_per_weight` over the weights that a token uses. Everything takes turns and the quickest counts, so
that a busy moment of the machine hits all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localmix.gguf_format import encode_header, layout
from localmix.measurement.type_speed import RING_BYTES, seconds_per_weight
from localmix.native.devices import devices
from localmix.native.kernels import quantize_rows
from localmix.native.model import Context, Model
from localmix.native.weight_ring import COLUMNS, ROWS, WeightRing
from localmix.optimization.freedom import Freedom
from localmix.optimization.optimizer import Request, optimize
from localmix.optimization.target import parse_target
from localmix.plan import Plan
from localmix.presets import load_presets
from localmix.sources.base import ShapeOnlySource, Source, TensorInfo, text
from localmix.sources.open import open_source
from localmix.tensor_types import TensorType

COMMON = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "Mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": 3584,
        "num_hidden_layers": 3,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "Llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": 5632,
        "num_hidden_layers": 8,
    },
}
TYPES = "Q8_0,Q4_K_M,IQ4_XS,Q3_K_M,IQ3_XXS,Q2_K,IQ2_XXS"
MIXTURES = "Q4_K_M,Q3_K_M,Q2_K"
TURNS, TOKENS = 3, 24  # in each round


@dataclasses.dataclass
class Candidate:
    """A file to time."""

    shape: str
    name: str
    path: Path
    used: dict[TensorType, float]
    damage: float
    milliseconds: float = float("inf")


def used_weights(source: Source, tensors: list[TensorInfo]) -> dict[TensorType, float]:
    """Weights that a token is multiplied with, by type."""
    used: dict[TensorType, float] = {}
    for tensor in tensors:
        share = 1.0
        if len(tensor.shape) == 3:
            share = source.number("{arch}.expert_used_count", tensor.shape[0]) / tensor.shape[0]
        if len(tensor.shape) > 1 and tensor.name != "token_embd.weight":
            used[tensor.type] = used.get(tensor.type, 0.0) + tensor.elements * share
    return used


def write_random(path: Path, source: Source, tensors: list[TensorInfo]) -> None:
    """A file of these tensors: 64 random rows of each, again and again."""
    metadata = {key: value for key, value in source.metadata.items() if not key.startswith("tokenizer.")}
    metadata["tokenizer.ggml.model"] = text("no_vocab")
    head = encode_header(metadata, tensors)
    offsets, size = layout(tensors)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
        for tensor, offset in zip(tensors, offsets, strict=True):
            random = np.random.default_rng(zlib.crc32(tensor.name.encode()))
            count = tensor.elements // tensor.columns
            values = random.standard_normal((min(64, count), tensor.columns), np.float32) / tensor.columns**0.5
            rows = quantize_rows(tensor.type, values, np.ones(tensor.columns, np.float32)).reshape(-1)
            file.seek(len(head) + offset)
            file.write(np.resize(rows, len(rows) * count // len(values)).tobytes())


def candidates(folder: Path, shape: str, asked: argparse.Namespace) -> list[Candidate]:
    """Each preset, and at the size of some of them the mixtures of the optimizer."""
    (folder / "config.json").write_text(json.dumps({**COMMON, **SHAPES[shape]}))
    with open_source(folder) as opened:
        source = ShapeOnlySource(folder, opened.metadata, opened.tensors)
    freedom = Freedom(source, has_imatrix=True)
    kinds = freedom.wanted_types | {tensor.type for tensor in freedom.quantizable}
    seconds = seconds_per_weight(sorted(kinds), asked.threads)
    found: list[Candidate] = []

    def add(name: str, plan: Plan, damage: float) -> None:
        tensors = [dataclasses.replace(tensor.info, type=tensor.type) for tensor in plan.tensors]
        path = folder / f"{name}.gguf"
        write_random(path, source, tensors)
        found.append(Candidate(shape, name, path, used_weights(source, tensors), damage))

    for name in asked.types.split(","):
        plan = freedom.plan(load_presets().find(name))
        target = parse_target(f"{plan.file_bytes}B")
        mixtures = {
            label: optimize(source, [target], request, has_imatrix=True)
            for label, request in (("fast", Request(seconds=seconds)), ("all", Request()))
        }
        add(name, plan, next(preset.damage for preset in mixtures["all"].presets if preset.name == name))
        for label, optimized in mixtures.items():
            if name in asked.mixtures.split(","):
                add(f"{name}, {label}", optimized.mixtures[0].plan, optimized.mixtures[0].rated.damage)
    return found


def measure(found: list[Candidate], rounds: int, threads: int) -> dict[TensorType, float]:
    """Seconds of a weight by type; the candidates learn their milliseconds."""
    kinds = sorted({kind for one in found for kind in one.used})
    seconds: dict[TensorType, NDArray[np.float64]] = {}
    for _ in range(rounds):
        for kind in kinds:
            with WeightRing(kind, RING_BYTES, threads) as ring:
                turn = np.min([ring.turn() for _ in range(TURNS)], axis=0)
            seconds[kind] = np.minimum(turn, seconds.get(kind, np.inf))
        for one in found:
            with Model(one.path) as model, Context(model, context_length=256, threads=threads) as context:
                for place in range(TOKENS + 1):
                    start = time.perf_counter()
                    context.decode(5 + place, place, 0, True)
                    context.synchronize()
                    if place:
                        one.milliseconds = min(one.milliseconds, 1e3 * (time.perf_counter() - start))
    return {kind: float(times.mean()) / (ROWS * COLUMNS) for kind, times in seconds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=TYPES, help="presets, separated by commas")
    parser.add_argument("--mixtures", default=MIXTURES, help="those at whose size mixtures are chosen")
    parser.add_argument("--rounds", type=int, default=8, help="of which the quickest counts")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    processor = next(device.description for device in devices() if device.kind == "cpu")
    print(f"{processor}, threads: {asked.threads}, the quickest of {asked.rounds} rounds.\n")
    print("| shape | mixture | expected damage | predicted ms/token | real | difference |")
    print("|---|---|--:|--:|--:|--:|")
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            found = candidates(Path(folder), shape, asked)
            seconds = measure(found, asked.rounds, asked.threads)
        for one in found:
            predicted = 1e3 * sum(weights * seconds[kind] for kind, weights in one.used.items())
            print(
                f"| {shape} | {one.name} | {one.damage:.4f} | {predicted:.2f} | {one.milliseconds:.2f}"
                f" | {100 * (predicted / one.milliseconds - 1):+.1f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
