"""The numpy distribution against llama.cpp's own samplers, and a grammar in front of both."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from localmix.errors import InputError, UsageError
from localmix.native.chooser import Chooser, ChosenTokens
from localmix.native.gbnf import Grammar
from localmix.native.library import api
from localmix.native.model import CachedText, Context, Model
from localmix.sampling import Sampling

SETTINGS = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=0, repeat_penalty=1),
    Sampling(temperature=1, top_k=0, top_p=1, repeat_penalty=1),
    Sampling(temperature=0.7, top_k=0, top_p=0.8),
    Sampling(temperature=1.3, top_k=7, top_p=1, min_p=0.2, repeat_penalty=1.5),
    Sampling(temperature=2, top_k=0, top_p=1, min_p=0.05, repeat_last=3, repeat_penalty=0.5),
    Sampling(temperature=1, top_k=5, top_p=0.5, repeat_last=0),
    Sampling(temperature=1, top_k=1),
    Sampling(temperature=1, top_k=10**6, top_p=0.0),
]


@pytest.fixture(scope="module")
def model(random_model: Path) -> Iterator[Model]:
    with Model(random_model) as model:
        yield model


def llama_probabilities(logits: NDArray[np.float32], recent: list[int], settings: Sampling) -> NDArray[np.float64]:
    """What llama.cpp's samplers, each one called by itself, leave of a row of logits."""
    llama = api()
    penalty = (settings.repeat_last, settings.repeat_penalty, 0, 0)
    parts = [llama.llama_sampler_init_penalties(len(logits), *penalty)]
    if settings.temperature > 0:
        parts += [
            llama.llama_sampler_init_top_k(settings.top_k),
            llama.llama_sampler_init_top_p(settings.top_p, 1),
            llama.llama_sampler_init_min_p(settings.min_p, 1),
            llama.llama_sampler_init_temp(settings.temperature),
            llama.llama_sampler_init_dist(1),
        ]
    else:
        parts.append(llama.llama_sampler_init_greedy())
    data = (llama.llama_token_data * len(logits))()
    for token, logit in enumerate(logits):
        data[token].id, data[token].logit = token, float(logit)
    array = llama.llama_token_data_array(data=data, size=len(logits), selected=-1, sorted=False)
    for token in recent:
        llama.llama_sampler_accept(parts[0], token)
    for part in parts:
        llama.llama_sampler_apply(part, ctypes.byref(array))
        llama.llama_sampler_free(part)
    result = np.zeros(len(logits))
    if settings.temperature <= 0:
        result[array.data[array.selected].id] = 1
    else:
        for place in range(array.size):
            result[array.data[place].id] = array.data[place].p
    return result


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_distribution_is_that_of_llama_cpp(settings: Sampling) -> None:
    random = np.random.default_rng(3)
    for size in (30, 3000):
        logits = (random.standard_normal(size) * 3).astype(np.float32)
        recent = random.integers(0, size, 20).tolist()
        ours = Chooser(settings).probabilities(logits, recent)
        theirs = llama_probabilities(logits, recent, settings)
        assert ours.sum() == pytest.approx(1)
        assert np.array_equal(ours > 0, theirs > 0)
        assert np.allclose(ours, theirs, atol=2e-6)


def test_draws_follow_the_distribution() -> None:
    chances = np.asarray([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    chooser = Chooser(Sampling(seed=5))
    draws = np.bincount([chooser.draw(chances) for _ in range(20_000)], minlength=6)
    assert draws[[0, 2, 5]].sum() == 0
    expected = 20_000 * chances[[1, 3, 4]]
    assert ((draws[[1, 3, 4]] - expected) ** 2 / expected).sum() < 13.8  # 2 degrees of freedom, p = 0.001
    first, second = Chooser(Sampling(seed=5)), Chooser(Sampling(seed=5))
    assert [first.draw(chances) for _ in range(9)] == [second.draw(chances) for _ in range(9)]


def test_a_grammar_comes_before_the_cuts(model: Model) -> None:
    logits = np.zeros(model.vocabulary.size, np.float32)
    tokens = {text: token for token, text in enumerate(model.token_texts())}
    a, b, the = tokens[b"a"], tokens[b"b"], tokens[b"the"]
    logits[[the, a, b]] = 9, 2, 1
    with Grammar(model, 'root ::= ("a" | "b") "e"') as grammar:
        chooser = Chooser(Sampling(temperature=1, top_k=2, top_p=1, repeat_penalty=1), grammar)
        chances = chooser.probabilities(logits, [])
        assert set(np.flatnonzero(chances)) == {a, b}
        assert chances[a] / chances[b] == pytest.approx(np.e)
        with pytest.raises(ValueError, match="does not allow"):
            chooser.accept(the)
        chooser.accept(a)
        assert set(np.flatnonzero(chooser.probabilities(logits, []))) <= {tokens[b"e"], tokens[b"<0x65>"]}
        chooser.accept(tokens[b"e"])
        assert np.flatnonzero(chooser.probabilities(logits, [])).tolist() == [model.vocabulary.eos]
        chooser.accept(model.vocabulary.eos)


def test_a_text_of_a_grammar(model: Model) -> None:
    with Context(model, context_length=256, threads=1) as context:
        for seed in range(5):
            text = CachedText(context)
            context.clear()
            text.feed([1, 20, 30])
            with Grammar(model, 'root ::= [0-9]{3} ("中" | [x-z])+ "."') as grammar:
                chooser = Chooser(Sampling(temperature=1, seed=seed, top_k=3), grammar)
                tokens = list(text.generate(ChosenTokens(chooser, text), 40))
            said = b"".join(model.piece(token) for token in tokens).decode(errors="ignore")
            assert said[:3].isdigit() and set(said[3:]) <= set("中xyz.")
            if model.ends_generation(tokens[-1]):
                assert said.endswith(".")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "empty"),
        ("root ::= (", r"expecting '\)' at its end"),
        ('start ::= "a"', "root"),
        ("root ::= missing", "missing|ndefined"),
        ('root ::= root "a"', "recursion"),
        ('root ::= "a"{9999}', "repetitions"),
        ('root ::= "a"\0', "no text"),
    ],
)
def test_a_grammar_that_does_not_parse_is_a_sentence(model: Model, source: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Grammar(model, source)


def test_a_grammar_that_no_token_can_follow(tmp_path: Path) -> None:
    from tests.random_model import write_random_model

    path = write_random_model(tmp_path / "m.gguf", byte_tokens=False, layers=1, experts=0)
    with Model(path) as model, Grammar(model, 'root ::= "Z"') as grammar:
        chooser = Chooser(Sampling(), grammar)
        with pytest.raises(InputError, match="none of the model's tokens"):
            chooser.probabilities(np.zeros(model.vocabulary.size, np.float32), [])
