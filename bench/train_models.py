"""Trains two more small models, so that what holds for tinymix is seen on other shapes: a dense one, another mixture.

    pip install torch numpy safetensors sentencepiece
    python bench/train_models.py build/models --bfloat16     # both, some ten minutes each on two free cores
    localmix convert build/models/dense
    localmix ppl dense --corpus examples/tinymix/heldout.txt

They learn tinymix's texts with its tokenizer, so its calibration.txt, heldout.txt and questions.jsonl are theirs, too.
Their channels are made uneven as tinymix's are, and for the same reason (examples/tinymix/README.md). A run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

TINYMIX = Path(__file__).parent.parent / "examples" / "tinymix"
sys.path.insert(0, str(TINYMIX))

import torch  # noqa: E402
import train  # noqa: E402
from checkpoint import load_checkpoint, spread_channels, write_checkpoint  # noqa: E402
from model import Shape  # noqa: E402


@dataclass(frozen=True)
class Recipe:
    """A model of the bench: its shape, and how long it is trained."""

    shape: Shape
    schedule: train.Schedule


RECIPES = {
    # Four layers and small heads, one feed-forward network in each layer.
    "dense": Recipe(
        Shape(layers=4, heads=8, kv_heads=2, head_size=32, feed_forward=512, experts=0),
        train.Schedule(steps=1600, everyone_steps=0, learning_rate=5e-3, muon=True),
    ),
    # Half of tinymix's experts, twice as large, in two layers; no queries share their keys.
    "moe": Recipe(
        Shape(layers=2, heads=4, kv_heads=4, head_size=64, feed_forward=512, experts=4),
        train.Schedule(steps=1600, everyone_steps=0, learning_rate=5e-3, muon=True),
    ),
}


def make(recipe: Recipe, folder: Path, use_bfloat16: bool) -> dict[str, object]:
    """Trains a model in `folder`/build, writes its checkpoint to `folder`, and returns its figures."""
    work = folder / "build"
    work.mkdir(parents=True, exist_ok=True)
    train.train(recipe.shape, recipe.schedule, TINYMIX, work, use_bfloat16)
    model = train.load_trained(recipe.shape, work)
    spread_channels(model, train.CHANNEL_SPREAD)
    write_checkpoint(folder, model, shards=1)
    shutil.copyfile(TINYMIX / "tokenizer.model", folder / "tokenizer.model")
    stored = load_checkpoint(folder, recipe.shape)
    text = (TINYMIX / "heldout.txt").read_text(encoding="utf-8")
    accuracy = train.question_accuracy(stored, TINYMIX)
    return {
        "parameters": sum(parameter.numel() for parameter in stored.parameters()),
        "questions": {language: accuracy[language] for language in ("en", "zh")},
        "heldout_perplexity_512": train.perplexity(stored, [train.BEGIN, *train.load_tokenizer(TINYMIX).encode(text)])[
            0
        ],
    }


def main() -> None:
    """Train what was asked for, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder that gets one folder for each model")
    parser.add_argument("--only", choices=RECIPES, help="this one alone")
    parser.add_argument("--steps", type=int, help="training steps of 2048 tokens")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    parser.add_argument(
        "--bfloat16", action="store_true", help="multiply in bfloat16, for processors that are fast at it"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in [arguments.only] if arguments.only else RECIPES:
        recipe = RECIPES[name]
        if arguments.steps:
            recipe = replace(recipe, schedule=replace(recipe.schedule, steps=arguments.steps))
        print(name, json.dumps(make(recipe, arguments.output / name, arguments.bfloat16), indent=2), flush=True)


if __name__ == "__main__":
    main()
