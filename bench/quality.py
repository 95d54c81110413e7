"""Mixtures that localmix chooses against llama.cpp's at the same size: how far each is from BF16 on a text never seen.

    python bench/train_models.py build/models --bfloat16       # two models beside tinymix, see there
    python bench/quality.py build/quality --models build/models/dense build/models/moe

For each model and preset: the preset's file, and files of at most its bytes whose types were chosen with sensitivities
of the model's own (`localmix sensitivity`), of the other models (the shipped priors as they would be without this one),
and with none (all tensors alike). The importance matrix and the sensitivities come from calibration.txt, the
divergences from heldout.txt. What is finished is in FOLDER/results.json and is not measured again; the tables go to
stdout. `--priors` prints the section of quant_presets.yaml instead.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmix.convert import convert
from localmix.imatrix import collect
from localmix.importance import Importance, load_importance
from localmix.measurement.corpus import read_corpus
from localmix.measurement.divergence import Reference, open_reference
from localmix.measurement.perplexity import Conditions
from localmix.measurement.reference import Cache
from localmix.optimization.choice import Chooser
from localmix.optimization.freedom import TYPES, Freedom, Terms
from localmix.optimization.probing import measure
from localmix.optimization.sampled_error import Errors, relative_errors
from localmix.optimization.sensitivities import Sensitivities, read_measured, shipped_priors
from localmix.optimization.target import parse_target
from localmix.output import write_atomically
from localmix.plan import Planner
from localmix.presets import Curve, Preset, Priors, load_presets
from localmix.quantize import quantize
from localmix.sources.base import Source
from localmix.sources.open import open_source
from localmix.tensor_types import TensorType

TINYMIX = Path(__file__).parent.parent / "examples" / "tinymix"
PRESETS = ("Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS")
METHODS = {
    "probes": "class probes",
    "layers": "layer probes",
    "priors": "priors",
    "alike": "relative error alone",
    "pinned": "class probes, output and token_embd as in the preset",
}


@dataclass(frozen=True)
class Model:
    """A model of the bench and what is known of it."""

    name: str
    path: Path
    imatrix: Path
    sensitivities: Path
    reference: Reference

    def importance(self) -> Importance:
        return load_importance(self.imatrix)


def prepare(folder: Path, checkpoint: Path, threads: int, per_layer: bool, chunks: int | None) -> Model:
    """BF16 file, importance matrix, sensitivities and the reference's logits, unless they are there."""
    name = checkpoint.name
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    path, imatrix, known = (place / f"{name}{end}" for end in ("-BF16.gguf", ".imatrix.gguf", ".sensitivities.json"))
    calibration = TINYMIX / "calibration.txt"
    if not path.exists():
        convert(checkpoint, path)
    if not imatrix.exists():
        collect(path, [calibration], imatrix, threads=threads)
    if not known.exists() or (per_layer and not read_measured(known).by_layer):
        corpus = read_corpus([calibration])
        measure(path, corpus, known, load_importance(imatrix), threads=threads, per_layer=per_layer, resume=True)
    conditions = Conditions(512, chunks, threads)
    reference = open_reference(path, read_corpus([TINYMIX / "heldout.txt"]), conditions, Cache.of_user())
    return Model(name, path, imatrix, known, reference)


class Results:
    """What was measured, in a file: by model, preset and method the bytes and where the tokens' divergences lie."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "results.json"
        self.rows: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def add(self, key: str, row: Mapping[str, Any], divergence: NDArray[np.float64]) -> None:
        np.save(self._tokens(key), divergence)
        self.rows[key] = dict(row)
        write_atomically(self._path, json.dumps(self.rows, indent=1).encode())

    def divergence(self, key: str) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.load(self._tokens(key))
        return found

    def _tokens(self, key: str) -> Path:
        return self._folder / f"{key.replace('/', '-')}.npy"


class Bench:
    """Measures one model.

    Args:
        priors: of all models of the bench; its own are left out.
    """

    def __init__(self, model: Model, priors: Priors, results: Results) -> None:
        self._model = model
        self._results = results
        self._source: Source = open_source(model.path)
        self._importance = model.importance()
        self._presets = load_presets()
        names = [tensor.name for tensor in self._source.tensors]
        measured = read_measured(model.sensitivities).sensitivities()
        classes = Sensitivities(measured.by_class, origin="class probes")
        self._sensitivities = {
            "probes": classes,
            "pinned": classes,
            "layers": measured,
            "priors": shipped_priors(names, without=model.name, priors=priors),
            "alike": Sensitivities(dict.fromkeys(measured.by_class, Curve(1, 1)), origin="all tensors alike"),
        }
        self._errors: Errors | None = None

    def run(self, preset: str, methods: Iterable[str]) -> None:
        """Measure a preset, and the mixtures of its size."""
        key = f"{self._model.name}/{preset}"
        found = self._presets.find(preset)
        if key not in self._results.rows:
            self._measure(key, found, {})
        row = self._results.rows[key]
        for method in methods:
            if f"{key}/{method}" not in self._results.rows:
                terms = self._terms(found, method)
                chosen = self._chooser(method, terms).choose(parse_target(f"{row['bytes']}B"))
                told = {"expected": chosen.rated.damage, "of_preset": getattr(chosen.best_preset, "damage", None)}
                self._measure(f"{key}/{method}", chosen.preset, told)

    def _terms(self, preset: Preset, method: str) -> Terms:
        if method != "pinned":
            return Terms()
        planned = Planner(self._source).plan(preset, has_imatrix=True).tensors
        types = {tensor.info.name: tensor.type for tensor in planned}
        return Terms(output=types["output.weight"], embedding=types["token_embd.weight"])

    def _chooser(self, method: str, terms: Terms) -> Chooser:
        freedom = Freedom(self._source, terms, importance=self._importance)
        if self._errors is None:
            wanted = Freedom(self._source, Terms(), importance=self._importance)
            self._errors = relative_errors(
                self._source, wanted.wanted_types, self._importance, tensors=wanted.quantizable
            )
        return Chooser(freedom, self._presets, self._errors, self._sensitivities[method])

    def _measure(self, key: str, preset: Preset, told: Mapping[str, Any]) -> None:
        path = self._model.path.with_name(f"tried-{os.getpid()}.gguf")
        path.unlink(missing_ok=True)
        quantize(self._model.path, [(preset, path)], imatrix=self._model.imatrix)
        found = self._model.reference.measure(path)
        assert found.divergence is not None
        row = {"bytes": path.stat().st_size, "kld": found.divergence.mean, "error": found.divergence.error, **told}
        path.unlink()
        self._results.add(key, row, found.token_divergence)
        print(f"{key}: {row['bytes']:,} bytes, KLD {row['kld']:.5f}", file=sys.stderr, flush=True)


def totals(model: Model) -> dict[str, Curve]:
    """By class: the damage when all its tensors have a relative error."""
    classes = read_measured(model.sensitivities).classes.items()
    return {kind: Curve(value.nats * value.tensors, value.exponent) for kind, value in classes}


def print_priors(models: Sequence[Model]) -> None:
    """The section `priors` of quant_presets.yaml."""
    losses: dict[TensorType, list[float]] = {}
    print("priors:\n  models:")
    for model in models:
        print(f"    {model.name}:")
        for name, curve in sorted(totals(model).items(), key=lambda item: -item[1].nats):
            print(f"      {name}: [{curve.nats:.3g}, {curve.exponent:.2f}]")
        with open_source(model.path) as source:
            importance = model.importance()
            freedom = Freedom(source, Terms(), importance=importance)
            found = relative_errors(source, TYPES, importance, tensors=freedom.quantizable)
        for errors in found.values():
            for kind, error in errors.items():
                losses.setdefault(kind, []).append(error)
    print("  errors:")
    for kind, values in sorted(losses.items(), key=lambda item: -statistics.median(item[1])):
        print(f"    {kind.name}: {statistics.median(values):.3g}")


def print_tables(models: Sequence[str], methods: Sequence[str], results: Results) -> None:
    """Markdown: for each model a row for each preset that was measured with all methods."""
    for model in models:
        print(f"\n### {model}\n\n| preset | bytes | KLD | " + " | ".join(METHODS[method] for method in methods) + " |")
        print("|---|--:|--:|" + "--:|" * len(methods))
        for preset in PRESETS:
            key = f"{model}/{preset}"
            if any(f"{key}/{method}" not in results.rows for method in methods):
                continue
            row = results.rows[key]
            cells = [_cell(results, key, method) for method in methods]
            print(f"| {preset} | {row['bytes']:,} | {row['kld']:.5f} ± {row['error']:.5f} | {' | '.join(cells)} |")


def _cell(results: Results, key: str, method: str) -> str:
    """A mixture's divergence, how much less it is than the preset's, and the error of that from the same tokens."""
    of_preset, of_mixture = results.rows[key]["kld"], results.rows[f"{key}/{method}"]["kld"]
    difference = results.divergence(f"{key}/{method}") - results.divergence(key)
    error = float(difference.std()) / math.sqrt(difference.size - 1) / of_preset
    return f"{of_mixture:.5f} ({100 * (of_mixture / of_preset - 1):+.0f} ± {100 * error:.0f} %)"


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where files are made; 60 MB")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="checkpoints beside tinymix")
    parser.add_argument(
        "--methods", nargs="*", choices=METHODS, default=["probes", "layers", "priors", "alike", "pinned"]
    )
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    parser.add_argument("--chunks", type=int, help="of 512 tokens of heldout.txt (default: all)")
    parser.add_argument(
        "--priors", action="store_true", help="print the priors of these models, and measure no mixtures"
    )
    options = parser.parse_args()
    checkpoints = [TINYMIX, *options.models]
    with_layers = "layers" in options.methods
    models = [
        prepare(options.folder, checkpoint, options.threads, with_layers, options.chunks) for checkpoint in checkpoints
    ]
    if options.priors:
        print_priors(models)
        return
    priors = Priors({model.name: totals(model) for model in models}, {})
    results = Results(options.folder)
    benches = [Bench(model, priors, results) for model in models]
    for preset in PRESETS:
        for bench in benches:
            bench.run(preset, options.methods)
    print_tables([model.name for model in models], options.methods, results)


if __name__ == "__main__":
    main()
