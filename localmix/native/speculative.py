"""Speculative decoding: cheap guesses at the next tokens, checked by the model all at once.

A drafter proposes some tokens; the model reads them in one batch, which costs little more than reading one where
memory is the limit, and takes those that it would have said itself. A proposed token x with the drafter's
probability q(x) and the model's p(x) is taken with probability min(1, p(x)/q(x)); at the first one refused, a token
is drawn from max(0, p − q) in its place, and behind proposals that were all taken, one more from p. What comes out is
distributed as if the model had spoken alone (Leviathan, Kalman, Matias: "Fast Inference from Transformers via
Speculative Decoding", 2023; Chen et al.: "Accelerating Large Language Model Decoding with Speculative Sampling",
2023). p and q are the distributions after penalties, cuts and temperature, which both go through alike.

Greedy decoding is the case where p is 1 for one token. Its tokens are those of the model alone as far as the model's
logits are: llama.cpp computes a batch with other kernels than a single token, and where two tokens are as good as
equally likely, the last digits decide. Deciding such tokens from a batch of one does not help: the cache that it
attends to was filled by batches.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localmix.errors import UsageError
from localmix.native.chooser import Chooser
from localmix.native.model import CachedText, Context, Model

LONGEST_DRAFT = 16  # how far an adaptive length grows
NGRAM_SIZES = (4, 3, 2)
_TIMED_STEPS = 32

Proposal = list[tuple[int, "NDArray[np.float64] | None"]]


class Drafter(Protocol):
    """Proposes how a text goes on."""

    def propose(self, tokens: Sequence[int], count: int, chooser: Chooser) -> Proposal:
        """Up to `count` tokens, each with the distribution it was drawn from; None stands for certainty."""


class ModelDrafter:
    """Lets a smaller model say how it would go on.

    Args:
        context: of the smaller model, as long as the larger one's.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._text = CachedText(context)

    def propose(self, tokens: Sequence[int], count: int, chooser: Chooser) -> Proposal:
        """As `Drafter.propose`."""
        proposal: Proposal = []
        text = list(tokens)
        self._text.feed(text)
        while True:
            chances = chooser.probabilities(self.context.logits()[-1], text)
            token = chooser.draw(chances)
            proposal.append((token, chances))
            if len(proposal) == count or self.context.model.ends_generation(token):
                return proposal
            text.append(token)
            self._text.append([token])


class NgramDrafter:
    """Looks up what followed when the text's last tokens stood in it before ("prompt lookup").

    Args:
        sizes: how many last tokens must be the same; the longer ones are tried first.
    """

    def __init__(self, sizes: Sequence[int] = NGRAM_SIZES) -> None:
        self._sizes = sizes
        self._seen: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}

    def propose(self, tokens: Sequence[int], count: int, chooser: Chooser) -> Proposal:
        """As `Drafter.propose`; empty where the last tokens are new."""
        text = list(tokens)
        if text[: len(self._seen)] != self._seen:  # another text
            self._seen, self._followers = [], {}
        for end in range(len(self._seen), len(text)):
            for size in self._sizes:
                if end >= size:  # the newest place wins
                    self._followers[tuple(text[end - size : end])] = end
        self._seen = text
        for size in self._sizes:
            place = self._followers.get(tuple(text[-size:]), len(text)) if len(text) >= size else len(text)
            if place < len(text):
                return [(token, None) for token in text[place : place + count]]
        return []


class Speculation:
    """Generates with a model and a drafter.

    Args:
        text: the model's text.
        drafter: who proposes.
        length: tokens of a proposal; where an adaptive one starts.
        adaptive: 2 more after a proposal that was taken whole, else 1 less, at least 1.

    Attributes:
        drafted, accepted: tokens proposed, and those of them taken, in the last `generate`.

    Raises:
        UsageError: the model cannot forget single tokens (a recurrent one).
    """

    def __init__(self, text: CachedText, drafter: Drafter, *, length: int = 4, adaptive: bool = True) -> None:
        model = text.context.model
        if model.recurrent:
            raise UsageError(f"{model.path.name} cannot take tokens back: speculative decoding is not for it.")
        self.drafted = self.accepted = 0
        self._text = text
        self._drafter = drafter
        self._first_length = max(1, length)
        self._adaptive = adaptive
        self._single_seconds: deque[float] = deque(maxlen=_TIMED_STEPS)

    @property
    def single_seconds(self) -> float | None:
        """Median time in which the model read one token: what a token takes without speculation, at least."""
        return statistics.median(self._single_seconds) if self._single_seconds else None

    def generate(self, chooser: Chooser, limit: int) -> Iterator[int]:
        """As `CachedText.generate`; the text must have been fed."""
        text, context = self._text, self._text.context
        ends = context.model.ends_generation
        free = chooser.without_grammar()
        self.drafted = self.accepted = 0
        length = self._first_length
        longest = max(length, LONGEST_DRAFT)
        last = chooser.draw(chooser.probabilities(context.logits()[-1], text.tokens))
        chooser.accept(last)
        yield last
        made = 1
        while made < limit and not ends(last) and len(text.tokens) < context.length:
            # a reply's second token comes without a proposal, so that there is a time to compare with
            room = min(limit - made, context.length - len(text.tokens)) - 1 if made > 1 else 0
            wanted = min(length, room)
            proposal = self._drafter.propose([*text.tokens, last], wanted, free) if wanted > 0 else []
            before = len(text.tokens)
            started = time.monotonic()
            text.append([last, *(token for token, _ in proposal)])
            context.synchronize()
            if not proposal:
                self._single_seconds.append(time.monotonic() - started)
            said = self._check(proposal, chooser, before)
            taken = sum(token == proposed for token, (proposed, _) in zip(said, proposal, strict=False))
            text.truncate(before + len(said))
            if proposal:
                self.drafted += len(proposal)
                self.accepted += taken
                if self._adaptive:
                    length = min(length + 2, longest) if taken == len(proposal) else max(length - 1, 1)
            yield from said
            made += len(said)
            last = said[-1]

    def _check(self, proposal: Proposal, chooser: Chooser, before: int) -> list[int]:
        """What the model says: the proposed tokens that it takes, and one of its own (none behind an end)."""
        logits = self._text.context.logits()
        tokens = self._text.tokens  # with the whole proposal behind the first `before + 1`
        said: list[int] = []
        for row, (token, draft) in enumerate(proposal):
            chances = chooser.probabilities(logits[row], tokens[: before + 1 + row])
            share = chances[token] if draft is None else chances[token] / draft[token]
            taken = chooser.chance(float(share))
            if not taken:
                if draft is None:
                    chances[token] = 0
                else:
                    chances = np.maximum(chances - draft, 0)
                token = chooser.draw(chances)
            chooser.accept(token)
            said.append(token)
            if not taken or self._text.context.model.ends_generation(token):
                return said
        token = chooser.draw(chooser.probabilities(logits[len(proposal)], tokens))
        chooser.accept(token)
        return [*said, token]


def check_vocabulary(model: Model, draft: Model) -> None:
    """Refuse a draft model whose tokens mean something else.

    Raises:
        UsageError: the vocabularies differ; the sentence names the first difference.
    """
    names = f"{draft.path.name} cannot draft for {model.path.name}"
    hint = "A draft model is a smaller one with the same tokenizer."
    if model.vocabulary.size != draft.vocabulary.size:
        sizes = f"their vocabularies have {draft.vocabulary.size} and {model.vocabulary.size} tokens"
        raise UsageError(f"{names}: {sizes}.", hint)
    for token, (ours, theirs) in enumerate(zip(model.token_texts(), draft.token_texts(), strict=True)):
        if ours != theirs:
            shown = f"{theirs.decode('utf-8', 'replace')!r} and {ours.decode('utf-8', 'replace')!r}"
            raise UsageError(f"{names}: token {token} is {shown}.", hint)
    for name in ("bos", "eos", "eot"):
        if getattr(model.vocabulary, name) != getattr(draft.vocabulary, name):
            raise UsageError(f"{names}: they have different {name.upper()} tokens.", hint)
