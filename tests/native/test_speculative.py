"""Speculation: greedy it says what the model says, sampling it says it as often; and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from localmix.errors import UsageError
from localmix.native.chooser import Chooser
from localmix.native.gbnf import Grammar
from localmix.native.model import CachedText, Context, Model, Sampler
from localmix.native.speculative import (
    Drafter,
    ModelDrafter,
    NgramDrafter,
    Proposal,
    Speculation,
    check_vocabulary,
)
from localmix.sampling import Sampling
from tests.random_model import write_random_model

GREEDY = Sampling(temperature=0, repeat_penalty=1)
PROMPT = [1, *range(20, 60), *range(20, 40)]


class Fixed(Drafter):
    """Proposes one token again and again, and notes how many it was asked for."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.asked: list[int] = []

    def propose(self, tokens: Sequence[int], count: int, chooser: Chooser) -> Proposal:
        self.asked.append(count)
        return [(self.token, None)] * count


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Context]]:
    """A small dense model, one that is like it, and a copy."""
    folder = tmp_path_factory.mktemp("speculative")
    with ExitStack() as stack:
        found = {}
        values = np.random.default_rng(5).standard_normal((64, 64)) / 16
        for name in ("target", "like", "same"):
            change = {"blk.0.attn_output.weight": values} if name == "like" else {}
            path = write_random_model(
                folder / f"{name}.gguf", layers=1, hidden=64, feed_forward=64, experts=0, context=256, change=change
            )
            model = stack.enter_context(Model(path))
            found[name] = stack.enter_context(Context(model, context_length=256, threads=1))
        yield found


@pytest.fixture
def text(contexts: dict[str, Context]) -> CachedText:
    contexts["target"].clear()
    text = CachedText(contexts["target"])
    text.feed(PROMPT)
    return text


def plain(text: CachedText, settings: Sampling, limit: int) -> list[int]:
    with Sampler(text.context.model, settings) as sampler:
        for token in text.tokens:
            sampler.accept(token)
        return list(text.generate(sampler, limit))


def draw_drafters(contexts: dict[str, Context]) -> list[Drafter]:
    for name in ("like", "same"):
        contexts[name].clear()
    drafters: list[Drafter] = [ModelDrafter(contexts["like"]), ModelDrafter(contexts["same"])]
    return [*drafters, NgramDrafter(), NgramDrafter((1,)), Fixed(30)]


@pytest.mark.parametrize("settings", [GREEDY, Sampling(temperature=0, repeat_penalty=1.3)], ids=["free", "penalty"])
def test_greedy_is_token_for_token_that_of_the_model(
    contexts: dict[str, Context], text: CachedText, settings: Sampling
) -> None:
    expected = plain(text, settings, 60)
    for drafter, adaptive in itertools.product(draw_drafters(contexts), (True, False)):
        text.feed(PROMPT)
        speculation = Speculation(text, drafter, adaptive=adaptive)
        assert list(speculation.generate(Chooser(settings), 60)) == expected
        assert text.tokens == [*PROMPT, *expected][: len(text.tokens)] and len(text.tokens) >= len(PROMPT) + 59
        assert 0 <= speculation.accepted <= speculation.drafted
        if isinstance(drafter, ModelDrafter) and drafter.context is contexts["same"]:
            assert speculation.accepted == speculation.drafted > 30
        if isinstance(drafter, Fixed):
            assert speculation.accepted < speculation.drafted


def test_the_length_adapts(contexts: dict[str, Context], text: CachedText) -> None:
    said = plain(text, GREEDY, 1)[0]
    never = next(token for token in range(100, 200) if token != said)
    wrong = Fixed(never)
    text.feed(PROMPT)
    list(Speculation(text, wrong).generate(Chooser(GREEDY), 12))
    assert wrong.asked[:6] == [4, 3, 2, 1, 1, 1]
    text.feed(PROMPT)
    wrong.asked.clear()
    list(Speculation(text, wrong, length=3, adaptive=False).generate(Chooser(GREEDY), 12))
    assert set(wrong.asked[:6]) == {3} and wrong.asked[-1] <= 3

    asked: list[int] = []

    class Right(ModelDrafter):
        def propose(self, tokens: Sequence[int], count: int, chooser: Chooser) -> Proposal:
            asked.append(count)
            return super().propose(tokens, count, chooser)

    contexts["same"].clear()
    text.feed(PROMPT)
    list(Speculation(text, Right(contexts["same"])).generate(Chooser(GREEDY), 90))
    assert asked[:5] == [4, 6, 8, 10, 12]


def test_limit_and_end_of_the_context(contexts: dict[str, Context], text: CachedText) -> None:
    for limit in (1, 2, 3, 7, 20):
        text.feed(PROMPT)
        contexts["same"].clear()
        tokens = list(Speculation(text, ModelDrafter(contexts["same"])).generate(Chooser(GREEDY), limit))
        assert len(tokens) == limit
    text.feed(PROMPT)
    expected = plain(text, GREEDY, 1000)
    assert len(expected) >= 256 - len(PROMPT)
    for drafter in draw_drafters(contexts):
        text.feed(PROMPT)
        assert list(Speculation(text, drafter).generate(Chooser(GREEDY), 1000)) == expected


def test_a_reply_left_in_the_middle_leaves_a_true_cache(contexts: dict[str, Context], text: CachedText) -> None:
    expected = plain(text, GREEDY, 30)
    for stop in range(1, 12):
        text.feed(PROMPT)
        said = list(itertools.islice(Speculation(text, NgramDrafter((1,))).generate(Chooser(GREEDY), 99), stop))
        assert said == expected[:stop]
        assert text.tokens == [*PROMPT, *expected][: len(text.tokens)]
        text.feed(PROMPT + said)
        assert plain(text, GREEDY, 5) == expected[stop : stop + 5]


def exact_chances(text: CachedText, prompt: list[int], settings: Sampling, length: int) -> dict[tuple[int, ...], float]:
    """The probability of every text of so many tokens behind the prompt, by the model alone."""
    chooser = Chooser(settings)
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for said, chance in found.items():
            text.feed([*prompt, *said])
            chances = chooser.probabilities(text.context.logits()[-1], [*prompt, *said])
            for token in np.flatnonzero(chances):
                longer[(*said, int(token))] = chance * float(chances[token])
        found = longer
    return found


@pytest.mark.parametrize("kind", ["like", "same", "ngram"])
def test_sampling_keeps_the_distribution(contexts: dict[str, Context], text: CachedText, kind: str) -> None:
    settings = Sampling(temperature=2, top_k=3, top_p=0.95, repeat_penalty=1.2, repeat_last=8, seed=11)
    length, runs = 5, 1000  # the first two tokens come without a proposal
    prompt = [*PROMPT, *plain(text, Sampling(temperature=1, top_k=2, repeat_penalty=1, seed=2), 60)]
    expected = exact_chances(text, prompt, settings, length)
    drafter: Drafter = NgramDrafter((1,)) if kind == "ngram" else ModelDrafter(contexts[kind])
    if kind != "ngram":
        contexts[kind].clear()
    speculation = Speculation(text, drafter, length=3, adaptive=False)
    chooser = Chooser(settings)
    counts: dict[tuple[int, ...], int] = dict.fromkeys(expected, 0)
    drafted = accepted = 0
    for _ in range(runs):
        text.feed(prompt)
        counts[tuple(speculation.generate(chooser, length + 2))[:length]] += 1
        drafted, accepted = drafted + speculation.drafted, accepted + speculation.accepted
    assert accepted > runs / 4
    assert accepted < 0.9 * drafted or kind == "same"
    # texts that are rarer than 5 in all runs count together
    usual = {said: chance * runs for said, chance in expected.items() if chance * runs >= 5}
    rest = runs - sum(usual.values())
    cells = [(counts[said], mean) for said, mean in usual.items()]
    cells.append((runs - sum(counts[said] for said in usual), rest))
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    assert freedom > 20
    # Wilson and Hilferty's approximation of the 99.9 % point
    most = freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < most


def test_a_grammar_and_a_draft_together(contexts: dict[str, Context], text: CachedText) -> None:
    for drafter in draw_drafters(contexts):
        text.feed(PROMPT)
        with Grammar(text.context.model, 'root ::= ("ab " [0-9]+ ";")+') as grammar:
            tokens = list(Speculation(text, drafter).generate(Chooser(Sampling(seed=1), grammar), 50))
        said = b"".join(text.context.model.piece(token) for token in tokens).decode()
        assert said.startswith("ab ") and set(said) <= set("ab 0123456789;")


def test_ngrams_propose_what_followed_last() -> None:
    drafter, chooser = NgramDrafter((2,)), Chooser(GREEDY)

    def proposed(tokens: list[int], count: int = 4) -> list[int]:
        return [token for token, _ in drafter.propose(tokens, count, chooser)]

    assert proposed([1, 2, 3, 4]) == []
    assert proposed([1, 2, 3, 4, 1, 2]) == [3, 4, 1, 2]
    assert proposed([1, 2, 3, 4, 1, 2, 9, 1, 2], 2) == [9, 1]
    assert proposed([5, 6]) == []
    assert proposed([7]) == []
    assert proposed([5, 6, 5, 6]) == [5, 6]


def test_another_vocabulary_is_refused(tmp_path: Path, contexts: dict[str, Context]) -> None:
    model = contexts["target"].model
    check_vocabulary(model, contexts["like"].model)
    shape = {"layers": 1, "hidden": 64, "feed_forward": 64, "experts": 0}
    larger = write_random_model(tmp_path / "larger.gguf", embedding_rows=300, **shape)  # type: ignore[arg-type]
    with Model(larger) as draft, pytest.raises(UsageError, match="have 300 and 277 tokens"):
        check_vocabulary(model, draft)
    data = larger.with_name("changed.gguf")
    data.write_bytes((contexts["target"].model.path).read_bytes().replace("▁the".encode(), "▁thy".encode()))
    with Model(data) as draft, pytest.raises(UsageError, match="token 265 is '▁thy' and '▁the'"):
        check_vocabulary(model, draft)
