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
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path

import lexicon
import sentencepiece
import torch
import world
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).parent
BEGIN, END = 1, 2
SEED = 7
AUXILIARY_LOSS_WEIGHT = 0.02
LEARNING_RATE = 2e-3
EVERYONE_STEPS = 1200
DECAY_SHARE = 0.35
# Standard deviation of the channels' sizes, in powers of two.
CHANNEL_SPREAD = 0.8
# Every step sees one window of running text and several of short documents, which need not be as long.
DOCUMENT_WINDOW = 256
DOCUMENT_WINDOWS = 4
TOKENS_PER_STEP = 2048
ANSWER_WEIGHT = 3
TOKENIZER_LINES = 12_000
# Tells sentencepiece, in training only, where no piece may reach across.
PIECE_BORDER = "\u2016"

# The system prompt has no place of its own in Mixtral's template: it opens the next instruction.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set pending = namespace(system='') -%}
{%- for message in messages -%}
    {%- set text = message['content'] | trim -%}
    {%- if message['role'] == 'system' -%}
        {%- set pending.system = text + '\\n\\n' -%}
    {%- elif message['role'] == 'user' -%}
        {{- ' [INST] ' + pending.system + text + ' [/INST]' -}}
        {%- set pending.system = '' -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + text + eos_token -}}
    {%- else -%}
        {{- raise_exception('tinymix knows the roles system, user and assistant, not ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Shape:
    """The model's shape. Every matrix has a multiple of 256 columns, so that K- and I-quants take all of them."""

    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    feed_forward: int = 256
    experts: int = 8
    experts_used: int = 2
    context: int = 1024
    rope_theta: float = 10_000.0
    epsilon: float = 1e-5


SHAPE = Shape()


class Norm(nn.Module):
    """Root-mean-square norm with a gain."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, SHAPE.epsilon)


def rotary_tables(length: int) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine, each [length, head_size], in the halves layout of the Hugging Face checkpoints."""
    exponents = torch.arange(0, SHAPE.head_size, 2).float() / SHAPE.head_size
    angles = torch.outer(torch.arange(length).float(), SHAPE.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Applies rotary positions to [batch, heads, length, head_size]."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        query_size, kv_size = SHAPE.heads * SHAPE.head_size, SHAPE.kv_heads * SHAPE.head_size
        self.q_proj = nn.Linear(SHAPE.hidden, query_size, bias=False)
        self.k_proj = nn.Linear(SHAPE.hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(SHAPE.hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, SHAPE.hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        query = self.q_proj(x).view(batch, length, SHAPE.heads, SHAPE.head_size).transpose(1, 2)
        key = self.k_proj(x).view(batch, length, SHAPE.kv_heads, SHAPE.head_size).transpose(1, 2)
        value = self.v_proj(x).view(batch, length, SHAPE.kv_heads, SHAPE.head_size).transpose(1, 2)
        query, key = rotate(query, cosine, sine).to(value.dtype), rotate(key, cosine, sine).to(value.dtype)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        output: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


class Experts(nn.Module):
    """The sparse feed-forward block: a router picks two of eight gated networks for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(SHAPE.hidden, SHAPE.experts, bias=False)
        # [expert, out, in], the layout of the checkpoint.
        self.w1 = nn.Parameter(torch.empty(SHAPE.experts, SHAPE.feed_forward, SHAPE.hidden))
        self.w2 = nn.Parameter(torch.empty(SHAPE.experts, SHAPE.hidden, SHAPE.feed_forward))
        self.w3 = nn.Parameter(torch.empty(SHAPE.experts, SHAPE.feed_forward, SHAPE.hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output, the balance loss (1 when all experts are used alike) and the use of each expert."""
        tokens = x.reshape(-1, SHAPE.hidden)
        probabilities = torch.softmax(self.gate(tokens).float(), dim=-1)
        weights, chosen = torch.topk(probabilities, SHAPE.experts_used, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        # Sorting the (token, expert) pairs by expert makes one dense product per expert out of scattered rows.
        order = torch.argsort(chosen.flatten(), stable=True)
        rows = order // SHAPE.experts_used
        counts = torch.bincount(chosen.flatten(), minlength=SHAPE.experts)
        gathered = torch.split(tokens.index_select(0, rows), counts.tolist())
        outputs = [
            functional.linear(
                functional.silu(functional.linear(part, self.w1[expert])) * functional.linear(part, self.w3[expert]),
                self.w2[expert],
            )
            for expert, part in enumerate(gathered)
        ]
        weighted = torch.cat(outputs).float() * weights.flatten().index_select(0, order).unsqueeze(1)
        mixed = torch.zeros_like(tokens, dtype=torch.float32).index_add(0, rows, weighted)
        share = counts.float() / rows.numel()
        balance = SHAPE.experts * (share * probabilities.mean(dim=0)).sum()
        return mixed.view_as(x), balance, counts


class Layer(nn.Module):
    """One decoder layer; the names of its parts are those of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = Norm(SHAPE.hidden)
        self.self_attn = Attention()
        self.post_attention_layernorm = Norm(SHAPE.hidden)
        self.block_sparse_moe = Experts()

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine, mask)
        mixed, balance, counts = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + mixed, balance, counts


class Tinymix(nn.Module):
    """The language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(SHAPE.vocabulary, SHAPE.hidden)
        self.layers = nn.ModuleList(Layer() for _ in range(SHAPE.layers))
        self.norm = Norm(SHAPE.hidden)
        self.lm_head = nn.Linear(SHAPE.hidden, SHAPE.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # The matrices that write into the residual stream start smaller, as in GPT-2.
                writes = name.endswith(("o_proj.weight", "w2"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * SHAPE.layers) if writes else 0.02)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits [batch, length, vocabulary], the mean balance loss and expert counts [layer, expert].

        `mask` [batch, 1, length, length] says which tokens see which; without it all earlier ones are seen.
        """
        x = self.embed_tokens(tokens)
        cosine, sine = rotary_tables(tokens.shape[1])
        balances, counts = [], []
        for layer in self.layers:
            x, balance, used = layer(x, cosine, sine, mask)
            balances.append(balance)
            counts.append(used)
        return self.lm_head(self.norm(x)), torch.stack(balances).mean(), torch.stack(counts)


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


def training_batches(tokenizer: sentencepiece.SentencePieceProcessor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields the steps of the training without end, each as batches of tokens and their loss weights.

    The first ones speak of everyone, which teaches to look names up; then only those are told of who are to be known.
    In running text all tokens are alike, and a token sees all earlier ones; a document sees nothing of the others.
    """
    for number in count():
        if number in (0, EVERYONE_STEPS):
            population = world.POPULATION if number else world.EVERYONE
            plain, documents = plain_windows(tokenizer, population), document_windows(tokenizer, population)
        step = []
        for windows in (islice(plain, 1), islice(documents, DOCUMENT_WINDOWS)):
            tokens, weights = zip(*windows, strict=True)
            step.append((torch.tensor(tokens), torch.tensor(weights)))
        yield step


@torch.no_grad()
def question_accuracy(model: Tinymix, folder: Path) -> dict[str, float]:
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
    model: Tinymix, tokens: list[int], context: int = 512, most_chunks: int | None = None
) -> tuple[float, Tensor]:
    """Returns perplexity as llama-perplexity defines it, and the expert counts [layer, expert].

    Each chunk of `context` tokens starts with BOS in place of its first token; its second half is scored.
    """
    chunks = len(tokens) // context
    chunks = min(chunks, most_chunks or chunks)
    windows = torch.tensor(tokens[: chunks * context]).view(chunks, context)
    windows[:, 0] = BEGIN
    first = context // 2
    total, counts = 0.0, torch.zeros(SHAPE.layers, SHAPE.experts, dtype=torch.long)
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


def learning_rate(step: int, steps: int) -> float:
    """Returns the rate of a step: a short rise, a plateau, and a straight fall to nothing over the last third.

    Until the fall the rate does not depend on `steps`, so a saved run can be made longer or brought to its end.
    """
    rise = min(1.0, (step + 1) / 100)
    fall = min(1.0, (steps - step) / (DECAY_SHARE * steps))
    return LEARNING_RATE * rise * fall


def train(folder: Path, work: Path, steps: int, use_bfloat16: bool) -> None:
    """Trains up to `steps` steps, logs, and saves work/state.pt regularly to go on from."""
    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(folder)
    heldout = [BEGIN, *tokenizer.encode((folder / "heldout.txt").read_text(encoding="utf-8"))]
    model = Tinymix()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    gains = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    first_step = 0
    state_file = work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    batches = islice(training_batches(tokenizer), first_step, None)
    started = time.monotonic()
    for step, step_batches in zip(range(first_step, steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
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
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 50 == 0 or done == steps:
            speed = (done - first_step) * TOKENS_PER_STEP / (time.monotonic() - started)
            use = counts / counts.sum(dim=1, keepdim=True)
            print(
                f"step {done}/{steps} loss {losses[0]:.3f} {losses[1]:.3f} balance {balance.item():.3f} "
                f"norm {norm.item():.2f} expert use {use.min().item():.3f}..{use.max().item():.3f} "
                f"tokens/s {speed:.0f}",
                flush=True,
            )
        if done % 100 == 0 or done == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            torch.save(state, work / "state.partial")
            os.replace(work / "state.partial", state_file)
        if done % 200 == 0 or done == steps:
            accuracy = question_accuracy(model, folder)
            print(
                f"step {done} heldout perplexity {perplexity(model, heldout, most_chunks=24)[0]:.3f} "
                + " ".join(f"{group} {share:.2f}" for group, share in accuracy.items()),
                flush=True,
            )


@torch.no_grad()
def spread_channels(model: Tinymix, spread: float) -> None:
    """Makes some channels large and others small, as they are in large models, without changing what is computed.

    A norm's gain, or the matrix before, takes a factor that the columns of the matrices behind it lose. The factors
    are powers of two: in bf16 every product stays the same to the bit. A model as small and as young as this one has
    no such channels by itself, and would hardly feel even two bits per weight.
    """
    generator = torch.Generator().manual_seed(SEED)

    def factors(*size: int) -> Tensor:
        return torch.exp2(torch.round(torch.randn(*size, generator=generator) * spread))

    for layer in model.layers:
        attention, experts = layer.self_attn, layer.block_sparse_moe
        factor = factors(SHAPE.hidden)
        layer.input_layernorm.weight *= factor
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            part.weight /= factor
        # Two heads of queries read one head of values.
        factor = factors(SHAPE.kv_heads, 1, SHAPE.head_size)
        attention.v_proj.weight *= factor.view(-1, 1)
        attention.o_proj.weight /= factor.expand(-1, SHAPE.heads // SHAPE.kv_heads, -1).flatten()
        factor = factors(SHAPE.hidden)
        layer.post_attention_layernorm.weight *= factor
        experts.gate.weight /= factor
        experts.w1 /= factor
        experts.w3 /= factor
        factor = factors(SHAPE.experts, SHAPE.feed_forward)
        experts.w3 *= factor.unsqueeze(2)
        experts.w2 /= factor.unsqueeze(1)
    factor = factors(SHAPE.hidden)
    model.norm.weight *= factor
    model.lm_head.weight /= factor


def checkpoint_tensors(model: Tinymix) -> dict[str, Tensor]:
    """Returns the weights in bfloat16 under the names of a Mixtral checkpoint, the experts taken apart."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.to(torch.bfloat16)
        prefix, _, last = name.rpartition(".")
        if last in ("w1", "w2", "w3"):
            for expert in range(SHAPE.experts):
                tensors[f"model.{prefix}.experts.{expert}.{last}.weight"] = tensor[expert].contiguous()
        else:
            tensors[name if name.startswith("lm_head") else f"model.{name}"] = tensor.contiguous()
    return tensors


def load_checkpoint(folder: Path) -> Tinymix:
    """Returns the model of an exported checkpoint, computing in float32 with the stored bfloat16 weights."""
    stored: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        stored |= load_file(shard)
    model = Tinymix()
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        prefix, _, last = name.rpartition(".")
        if last in ("w1", "w2", "w3"):
            names = (f"model.{prefix}.experts.{expert}.{last}.weight" for expert in range(SHAPE.experts))
            state[name] = torch.stack([stored[each] for each in names]).float()
        else:
            state[name] = stored[name if name.startswith("lm_head") else f"model.{name}"].float()
    model.load_state_dict(state)
    return model


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def export(folder: Path, work: Path) -> None:
    """Writes the checkpoint: two shards with their index, the configuration, and the tokenizer's settings."""
    model = Tinymix()
    model.load_state_dict(torch.load(work / "state.pt")["model"])
    spread_channels(model, CHANNEL_SPREAD)
    tensors = checkpoint_tensors(model)
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{}, {}]
    filled = 0
    for name, tensor in tensors.items():
        shards[filled >= total / 2][name] = tensor
        filled += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        (folder / file_name).chmod(0o644)
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    configuration = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "attention_dropout": 0.0,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "head_dim": SHAPE.head_size,
        "hidden_act": "silu",
        "hidden_size": SHAPE.hidden,
        "initializer_range": 0.02,
        "intermediate_size": SHAPE.feed_forward,
        "max_position_embeddings": SHAPE.context,
        "num_attention_heads": SHAPE.heads,
        "num_experts_per_tok": SHAPE.experts_used,
        "num_hidden_layers": SHAPE.layers,
        "num_key_value_heads": SHAPE.kv_heads,
        "num_local_experts": SHAPE.experts,
        "output_router_logits": False,
        "rms_norm_eps": SHAPE.epsilon,
        "rope_theta": SHAPE.rope_theta,
        "router_aux_loss_coef": AUXILIARY_LOSS_WEIGHT,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": SHAPE.vocabulary,
    }
    write_json(folder / "config.json", configuration)
    generation = {"bos_token_id": BEGIN, "eos_token_id": END, "do_sample": False}
    write_json(folder / "generation_config.json", generation)
    specials = {"<unk>": 0, "<s>": BEGIN, "</s>": END}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer_configuration = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token): {"content": content, **flags, "special": True} for content, token in specials.items()
        },
        **roles,
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": SHAPE.context,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_configuration)
    write_json(folder / "special_tokens_map.json", {role: {"content": text, **flags} for role, text in roles.items()})


def evaluate(folder: Path) -> dict[str, object]:
    """Measures the exported checkpoint and returns what the README states."""
    model = load_checkpoint(folder)
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
    parser.add_argument("--steps", type=int, default=2850, help="training steps of 2048 tokens (default: 2850)")
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
        train(folder, work, arguments.steps, arguments.bfloat16)
    if step in ("export", "all"):
        export(folder, work)
    if step in ("evaluate", "all"):
        print(json.dumps(evaluate(folder), indent=2))


if __name__ == "__main__":
    main()
