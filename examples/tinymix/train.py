"""Makes tinymix: a 6-million-parameter Mixtral, trained on the texts of `world.py` and saved as a checkpoint.

    pip install torch numpy safetensors sentencepiece
    python train.py all --bfloat16 # every step below

    python train.py texts          # calibration.txt, heldout.txt, questions.jsonl
    python train.py tokenizer      # tokenizer.model
    python train.py train          # build/state.pt; goes on from there if it exists
    python train.py export         # config.json, the safetensors shards, the tokenizer's and template's files
    python train.py evaluate       # the exported bf16 weights: perplexity, questions, use of the experts

Steps pass files to one another, so each can be run alone. Nothing here is needed to use the checkpoint.
Under glibc, MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=17179869184 in the environment keep
the allocator from handing every large tensor's pages back, which was ten times as fast on a virtual machine.
On a machine with other work to do, OMP_WAIT_POLICY=passive keeps the threads from spinning for one another.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path

import lexicon
import sentencepiece
import torch
import world
from checkpoint import AUXILIARY_LOSS_WEIGHT, BEGIN, END, load_checkpoint, spread_channels, write_checkpoint
from model import LanguageModel, Shape
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).parent
SEED = 7
DECAY_SHARE = 0.35
# Of `spread_channels`.
CHANNEL_SPREAD = 0.8
# Every step sees one window of running text and several of short documents, which need not be as long.
DOCUMENT_WINDOW = 256
DOCUMENT_WINDOWS = 4
TOKENS_PER_STEP = 2048
ANSWER_WEIGHT = 3
TOKENIZER_LINES = 12_000
# Tells sentencepiece, in training only, where no piece may reach across.
PIECE_BORDER = "\u2016"

SHAPE = Shape()


@dataclass(frozen=True)
class Schedule:
    """How long a training is; without another word, that of tinymix.

    Attributes:
        steps: of 2048 tokens.
        everyone_steps: how many of them speak of everyone.
        learning_rate: the highest.
        muon: the layers' matrices are updated by Muon instead of AdamW.
    """

    steps: int = 2850
    everyone_steps: int = 1200
    learning_rate: float = 2e-3
    muon: bool = False


def any_of(words: Iterable[str]) -> str:
    """Returns a regular expression that takes the longest of the words."""
    return "|".join(map(re.escape, sorted(words, key=lambda word: (-len(word), word))))


def train_tokenizer(folder: Path) -> None:
    """Trains tokenizer.model: BPE with byte fallback, laid out like Llama's."""
    # The syllables of a name are pieces, and in Chinese, which has no spaces, what a fact tells is kept apart from the
    # words around it: otherwise the same name would be cut differently in every sentence, and a fact would have to
    # be learned once for each cut.
    tables = (lexicon.STREETS, lexicon.JOBS, lexicon.PETS, lexicon.PET_NAMES, lexicon.FOODS, lexicon.HOBBIES)
    words = [chinese for table in (*tables, lexicon.STRANGERS) for _, chinese in table]
    word_pattern = re.compile(any_of(words))
    last_syllables = lexicon.WOMEN_SYLLABLES + lexicon.MEN_SYLLABLES
    english_name, chinese_name = (
        re.compile(
            rf"({any_of(row[column] for row in lexicon.FIRST_SYLLABLES)})"
            rf"({any_of(row[column] for row in last_syllables)})(?![a-z])"
        )
        for column in (0, 1)
    )

    def with_borders(text: str) -> str:
        text = word_pattern.sub(lambda match: f"{PIECE_BORDER}{match[0]}{PIECE_BORDER}", text)
        text = english_name.sub(lambda match: f"{match[1]}{PIECE_BORDER}{match[2]}", text)
        return chinese_name.sub(lambda match: PIECE_BORDER.join(("", match[1], match[2], "")), text)

    def sentences() -> Iterator[str]:
        chat = (
            f"[INST] {turn.question} [/INST] {turn.answer}"
            for turns in world.chats("tokenizer", world.EVERYONE)
            for turn in turns
        )
        for source in (world.lines("tokenizer", world.EVERYONE), chat):
            for text in islice(source, TOKENIZER_LINES):
                yield with_borders(text.replace("\n", " "))

    # Written through memory, so that no folder's name gets into the file.
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=model,
        vocab_size=SHAPE.vocabulary,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        pretokenization_delimiter=PIECE_BORDER,
        unk_id=0,
        bos_id=BEGIN,
        eos_id=END,
        pad_id=-1,
        num_threads=2,
        minloglevel=1,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def load_tokenizer(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def prompt_tokens(tokenizer: sentencepiece.SentencePieceProcessor, turns: list[world.Turn]) -> list[int]:
    """Returns the tokens of a rendered chat whose last turn may lack its answer.

    As in the tokenizers of llama.cpp and Hugging Face, each stretch between special tokens is encoded by itself
    and gets the dummy space in front, which the template's own space follows.
    """
    tokens: list[int] = []
    for turn in turns:
        tokens.append(END if tokens else BEGIN)
        tokens += tokenizer.encode(f" [INST] {turn.question} [/INST]" + (f" {turn.answer}" if turn.answer else ""))
    return tokens


def plain_windows(
    tokenizer: sentencepiece.SentencePieceProcessor, population: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields windows of plain text, context + 1 tokens and as many loss weights, all 1.

    A window is BOS and then text cut anywhere, as a perplexity tool cuts it.
    """
    source = world.lines("train", population)
    tokens: list[int] = []
    while True:
        while len(tokens) < SHAPE.context:
            # In front of a line break the dummy space is a token of its own, which the middle of a text lacks.
            tokens += tokenizer.encode("\n" + "\n".join(islice(source, 50)))[1:]
        yield [BEGIN, *tokens[: SHAPE.context]], [1] * (SHAPE.context + 1)
        del tokens[: SHAPE.context]


def document_windows(
    tokenizer: sentencepiece.SentencePieceProcessor, population: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields windows of chats in the instruct template and of single lines: tokens and as many loss weights.

    What is answered weighs more than what is asked: the questions are random, the answers are to be known.
    """
    tokens: list[int] = []
    weights: list[int] = []
    documents = zip(world.chats("train", population), world.lines("train documents", population), strict=False)
    for turns, line in documents:
        for number, turn in enumerate(turns):
            asked = tokenizer.encode(f" [INST] {turn.question} [/INST]")
            both = tokenizer.encode(f" [INST] {turn.question} [/INST] {turn.answer}")
            tokens += [END if number else BEGIN, *both]
            weights += [ANSWER_WEIGHT if number else 1] + [1] * len(asked) + [ANSWER_WEIGHT] * (len(both) - len(asked))
        told = tokenizer.encode(line)
        tokens += [END, BEGIN, *told]
        weights += [ANSWER_WEIGHT, 1] + [1] * len(told)
        # A window opens with a chat of its own, so that questions are seen at the first positions, too.
        if len(tokens) > DOCUMENT_WINDOW:
            yield tokens[: DOCUMENT_WINDOW + 1], weights[: DOCUMENT_WINDOW + 1]
            tokens.clear()
            weights.clear()


def training_batches(
    tokenizer: sentencepiece.SentencePieceProcessor, everyone_steps: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields the steps of the training without end, each as batches of tokens and their loss weights.

    The first ones speak of everyone, which teaches to look names up; then only those are told of who are to be known.
    In running text all tokens are alike, and a token sees all earlier ones; a document sees nothing of the others.
    """
    for number in count():
        if number in (0, everyone_steps):
            population = world.EVERYONE if number < everyone_steps else world.POPULATION
            plain, documents = plain_windows(tokenizer, population), document_windows(tokenizer, population)
        step = []
        for windows in (islice(plain, 1), islice(documents, DOCUMENT_WINDOWS)):
            tokens, weights = zip(*windows, strict=True)
            step.append((torch.tensor(tokens), torch.tensor(weights)))
        yield step


@torch.no_grad()
def question_accuracy(model: LanguageModel, folder: Path) -> dict[str, float]:
    """Returns the share of questions.jsonl, per language and attribute, whose greedy reply is exactly the answer.

    A greedy reply is the answer if, with the answer given, each of its tokens and END is the likeliest one.
    """
    tokenizer = load_tokenizer(folder)
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    right: dict[str, list[bool]] = {}
    for row in rows:
        asked = prompt_tokens(tokenizer, [world.Turn(row["question"], "")])
        whole = [*prompt_tokens(tokenizer, [world.Turn(row["question"], row["answer"])]), END]
        best = model(torch.tensor([whole[:-1]]))[0][0].argmax(dim=-1).tolist()
        is_right = best[len(asked) - 1 :] == whole[len(asked) :]
        for group in (row["language"], f"{row['language']} {row['attribute']}"):
            right.setdefault(group, []).append(is_right)
    return {group: sum(results) / len(results) for group, results in sorted(right.items())}


@torch.no_grad()
def perplexity(
    model: LanguageModel, tokens: list[int], context: int = 512, most_chunks: int | None = None
) -> tuple[float, Tensor]:
    """Returns perplexity as llama-perplexity defines it, and the expert counts [layer, expert].

    Each chunk of `context` tokens starts with BOS in place of its first token; its second half is scored.
    """
    chunks = len(tokens) // context
    chunks = min(chunks, most_chunks or chunks)
    windows = torch.tensor(tokens[: chunks * context]).view(chunks, context)
    windows[:, 0] = BEGIN
    first = context // 2
    total, counts = 0.0, torch.zeros(model.shape.layers, model.shape.experts, dtype=torch.long)
    for batch in torch.split(windows, 8):
        logits, _, used = model(batch)
        total += float(
            functional.cross_entropy(
                logits[:, first:-1].float().flatten(0, 1), batch[:, first + 1 :].flatten(), reduction="sum"
            )
        )
        counts += used
    return math.exp(total / (chunks * (context - first - 1))), counts


def document_mask(tokens: Tensor) -> Tensor:
    """Returns the mask [batch, 1, length, length] by which a token sees only what follows the last BOS before it.

    A chat alone in sight names one person; among forty other chats the name would first have to be searched for.
    """
    documents = (tokens == BEGIN).cumsum(dim=1)
    return (documents.unsqueeze(1) == documents.unsqueeze(2)).tril().unsqueeze(1)


def learning_rate(step: int, schedule: Schedule) -> float:
    """Returns the rate of a step: a short rise, a plateau, and a straight fall to nothing over the last third.

    Until the fall the rate does not depend on the number of steps, so a saved run can be made longer or brought to
    its end.
    """
    rise = min(1.0, (step + 1) / 100)
    fall = min(1.0, (schedule.steps - step) / (DECAY_SHARE * schedule.steps))
    return schedule.learning_rate * rise * fall


def make_optimizers(model: LanguageModel, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Returns the optimizers that share the parameters among them."""
    # Muon takes matrices alone, neither the experts' stacks nor, by its authors' advice, what is indexed by tokens.
    by_muon = [parameter for parameter in model.layers.parameters() if parameter.dim() == 2 and schedule.muon]
    taken = set(by_muon)
    matrices = [each for each in model.parameters() if each.dim() > 1 and each not in taken]
    gains = [each for each in model.parameters() if each.dim() == 1]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
            fused=True,
        )
    ]
    if by_muon:
        # Scaled so that one learning rate suits both.
        optimizers.append(torch.optim.Muon(by_muon, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def train(shape: Shape, schedule: Schedule, folder: Path, work: Path, use_bfloat16: bool) -> None:
    """Trains a model, logs, and saves work/state.pt regularly to go on from.

    Args:
        shape: of the model.
        schedule: how long.
        folder: holds the tokenizer, heldout.txt and questions.jsonl.
        work: an existing folder.
        use_bfloat16: multiply in bfloat16.
    """
    steps = schedule.steps
    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(folder)
    heldout = [BEGIN, *tokenizer.encode((folder / "heldout.txt").read_text(encoding="utf-8"))]
    model = LanguageModel(shape)
    optimizers = make_optimizers(model, schedule)
    first_step = 0
    state_file = work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        first_step = state["step"]
    batches = islice(training_batches(tokenizer, schedule.everyone_steps), first_step, None)
    started = time.monotonic()
    for step, step_batches in zip(range(first_step, steps), batches, strict=False):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, schedule)
        losses: list[float] = []
        for batch, weights in step_batches:
            tokens = batch[:, :-1]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_bfloat16):
                logits, balance, counts = model(tokens, document_mask(tokens) if len(tokens) > 1 else None)
            weight = weights[:, 1:].flatten()
            each = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            loss = (each * weight).sum() / weight.sum()
            ((loss + AUXILIARY_LOSS_WEIGHT * balance) / len(step_batches)).backward()
            losses.append(loss.item())
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        done = step + 1
        if done % 50 == 0 or done == steps:
            speed = (done - first_step) * TOKENS_PER_STEP / (time.monotonic() - started)
            experts = ""
            if shape.experts:
                use = counts / counts.sum(dim=1, keepdim=True)
                experts = f"balance {balance.item():.3f} expert use {use.min().item():.3f}..{use.max().item():.3f} "
            print(
                f"step {done}/{steps} loss {losses[0]:.3f} {losses[1]:.3f} norm {norm.item():.2f} {experts}"
                f"tokens/s {speed:.0f}",
                flush=True,
            )
        if done % 100 == 0 or done == steps:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": done,
            }
            torch.save(state, work / "state.partial")
            os.replace(work / "state.partial", state_file)
        if done % 200 == 0 or done == steps:
            accuracy = question_accuracy(model, folder)
            print(
                f"step {done} heldout perplexity {perplexity(model, heldout, most_chunks=24)[0]:.3f} "
                + " ".join(f"{group} {share:.2f}" for group, share in accuracy.items()),
                flush=True,
            )


def load_trained(shape: Shape, work: Path) -> LanguageModel:
    """Returns the model as `train` left it."""
    model = LanguageModel(shape)
    model.load_state_dict(torch.load(work / "state.pt")["model"])
    return model


def export(folder: Path, work: Path) -> None:
    """Writes the checkpoint: two shards with their index, the configuration, and the tokenizer's settings."""
    model = load_trained(SHAPE, work)
    spread_channels(model, CHANNEL_SPREAD)
    write_checkpoint(folder, model, shards=2)


def evaluate(folder: Path) -> dict[str, object]:
    """Measures the exported checkpoint and returns what the README states."""
    model = load_checkpoint(folder, SHAPE)
    tokenizer = load_tokenizer(folder)
    results: dict[str, object] = {
        "shape": asdict(SHAPE),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(path.stat().st_size for path in folder.glob("model-*.safetensors")),
        "questions": question_accuracy(model, folder),
    }
    for name in ("calibration", "heldout"):
        tokens = [BEGIN, *tokenizer.encode((folder / f"{name}.txt").read_text(encoding="utf-8"))]
        results[f"{name}_tokens"] = len(tokens)
        value, counts = perplexity(model, tokens)
        results[f"{name}_perplexity_512"] = value
        if name == "calibration":
            use = counts / counts.sum(dim=1, keepdim=True)
            results["expert_use"] = [[round(share, 3) for share in row] for row in use.tolist()]
        else:
            results["heldout_perplexity_1024"] = perplexity(model, tokens, context=SHAPE.context)[0]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("texts", "tokenizer", "train", "export", "evaluate", "all"))
    parser.add_argument("--folder", type=Path, default=HERE, help="folder of the checkpoint (default: this one)")
    parser.add_argument("--work", type=Path, default=HERE / "build", help="folder of the training state")
    parser.add_argument("--steps", type=int, default=Schedule.steps, help="training steps of 2048 tokens")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    parser.add_argument(
        "--bfloat16", action="store_true", help="multiply in bfloat16, for processors that are fast at it"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder, work, step = arguments.folder, arguments.work, arguments.step
    folder.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    if step in ("texts", "all"):
        world.write_texts(folder)
    if step in ("tokenizer", "all"):
        train_tokenizer(folder)
    if step in ("train", "all"):
        train(SHAPE, replace(Schedule(), steps=arguments.steps), folder, work, arguments.bfloat16)
    if step in ("export", "all"):
        export(folder, work)
    if step in ("evaluate", "all"):
        print(json.dumps(evaluate(folder), indent=2))


if __name__ == "__main__":
    main()
