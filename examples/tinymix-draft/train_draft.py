"""Makes tinymix-draft: a dense Llama of a million parameters that guesses what tinymix will say.

    pip install torch numpy safetensors sentencepiece
    python train_draft.py all --bfloat16 # every step below

    python train_draft.py train          # build/state.pt; goes on from there if it exists
    python train_draft.py export         # config.json, model.safetensors, the tokenizer's and template's files
    python train_draft.py evaluate       # the exported bf16 weights: agreement with tinymix, questions, perplexity

Texts, tokenizer and training are those of tinymix; its folder is to lie beside this one. What is said in its
train.py about threads and the allocator holds here, too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

HERE = Path(__file__).parent
TINYMIX = HERE.parent / "tinymix"
sys.path.insert(0, str(TINYMIX))

import torch  # noqa: E402
import train  # noqa: E402
import world  # noqa: E402
from checkpoint import END, load_checkpoint, write_checkpoint  # noqa: E402
from model import LanguageModel, Shape  # noqa: E402

# Narrow and shallow: what a draft model costs, the large one must win back.
SHAPE = Shape(hidden=192, layers=2, heads=3, kv_heads=1, feed_forward=384, experts=0, tied=True)
# Nobody who moves away is taught: the draft is to know what tinymix says now.
SCHEDULE = train.Schedule(steps=3000, everyone_steps=0, learning_rate=5e-3, muon=True)
STORIES = 24
LONGEST_REPLY = 160


@torch.no_grad()
def agreement(draft: LanguageModel, target: LanguageModel, turns: list[world.Turn]) -> float:
    """Returns the share of tokens in the target's greedy replies, END among them, that the draft holds likeliest."""
    tokenizer = train.load_tokenizer(TINYMIX)
    same = total = 0
    for turn in turns:
        asked = train.prompt_tokens(tokenizer, [world.Turn(turn.question, "")])
        tokens = list(asked)
        while tokens[-1] != END and len(tokens) < len(asked) + LONGEST_REPLY:
            tokens.append(int(target(torch.tensor([tokens]))[0][0, -1].argmax()))
        guesses = draft(torch.tensor([tokens[:-1]]))[0][0].argmax(dim=-1).tolist()
        same += sum(map(int.__eq__, guesses[len(asked) - 1 :], tokens[len(asked) :]))
        total += len(tokens) - len(asked)
    return same / total


def story_requests() -> list[world.Turn]:
    """Returns the first requests for a story that no training has seen."""
    turns = (turns[0] for turns in world.chats("draft"))
    # Stories are the longest of all replies.
    return list(islice((turn for turn in turns if len(turn.answer) > 100), STORIES))


def evaluate() -> dict[str, object]:
    """Measures the exported checkpoint and returns what the README states."""
    draft, target = load_checkpoint(HERE, SHAPE), load_checkpoint(TINYMIX, train.SHAPE)
    rows = [json.loads(line) for line in (TINYMIX / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    text = (TINYMIX / "heldout.txt").read_text(encoding="utf-8")
    accuracy = train.question_accuracy(draft, TINYMIX)
    return {
        "parameters": sum(parameter.numel() for parameter in draft.parameters()),
        "bytes": (HERE / "model.safetensors").stat().st_size,
        "agreement_questions": agreement(draft, target, [world.Turn(row["question"], "") for row in rows]),
        "agreement_stories": agreement(draft, target, story_requests()),
        "questions": accuracy,
        "heldout_perplexity_512": train.perplexity(draft, [train.BEGIN, *train.load_tokenizer(TINYMIX).encode(text)])[
            0
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "export", "evaluate", "all"))
    parser.add_argument("--work", type=Path, default=HERE / "build", help="folder of the training state")
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps, help="training steps of 2048 tokens")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    parser.add_argument(
        "--bfloat16", action="store_true", help="multiply in bfloat16, for processors that are fast at it"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work, step = arguments.work, arguments.step
    work.mkdir(parents=True, exist_ok=True)
    if step in ("train", "all"):
        train.train(SHAPE, replace(SCHEDULE, steps=arguments.steps), TINYMIX, work, arguments.bfloat16)
    if step in ("export", "all"):
        write_checkpoint(HERE, train.load_trained(SHAPE, work), shards=1)
        shutil.copyfile(TINYMIX / "tokenizer.model", HERE / "tokenizer.model")
    if step in ("evaluate", "all"):
        print(json.dumps(evaluate(), indent=2))


if __name__ == "__main__":
    main()
