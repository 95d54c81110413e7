"""The draft model of the examples: small, of tinymix's vocabulary, and as good at guessing as its README says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from localmix.conversation import chat_template
from localmix.convert import convert
from localmix.native.chooser import Chooser
from localmix.native.model import CachedText, Context, Model
from localmix.native.speculative import ModelDrafter, Speculation, check_vocabulary
from localmix.sampling import Sampling
from tests.conftest import ROOT, TINYMIX

DRAFT = ROOT / "examples" / "tinymix-draft"
GREEDY = Sampling(temperature=0, repeat_penalty=1)
CONTEXT = 256


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("draft") / "tinymix-draft-BF16.gguf"
    convert(DRAFT, path)
    return path


def stated(figure: str) -> float:
    """A percentage of the README, from the row of its table that begins so."""
    found = re.search(rf"\| {re.escape(figure)} \| ([\d.]+) %", (DRAFT / "README.md").read_text(encoding="utf-8"))
    assert found, f"the README has no row {figure!r}"
    return float(found[1])


def questions() -> list[str]:
    lines = (TINYMIX / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["question"] for line in lines]


def prompt(model: Model, question: str) -> list[int]:
    template = model.chat_template()
    assert template is not None
    text = chat_template.render(template, [{"role": "user", "content": question}], bos="<s>", eos="</s>")
    return [int(token) for token in model.tokenize(text, add_special=False, parse_special=True)]


def greedy_reply(text: CachedText, tokens: list[int]) -> list[int]:
    """What the model says: always its likeliest token, until it ends."""
    context = text.context
    text.feed(tokens)
    reply: list[int] = []
    while not reply or not context.model.ends_generation(reply[-1]):
        reply.append(int(context.logits()[-1].argmax()))
        text.append([reply[-1]])
    return reply


def test_it_is_small() -> None:
    # what Python and a training leave behind lies in folders
    assert sum(path.stat().st_size for path in DRAFT.iterdir() if path.is_file()) <= 3_000_000


def test_its_tokens_are_those_of_tinymix(draft: Path, tinymix_bf16: Path) -> None:
    assert (DRAFT / "tokenizer.model").read_bytes() == (TINYMIX / "tokenizer.model").read_bytes()
    with Model(tinymix_bf16, vocabulary_only=True) as large, Model(draft, vocabulary_only=True) as small:
        check_vocabulary(large, small)
        assert large.vocabulary == small.vocabulary
        assert large.chat_template() == small.chat_template()


def test_it_agrees_with_tinymix_as_often_as_the_readme_says(draft: Path, tinymix_bf16: Path) -> None:
    same = total = 0
    with (
        Model(tinymix_bf16) as large,
        Model(draft) as small,
        Context(large, context_length=CONTEXT, threads=1) as speaking,
        Context(small, context_length=CONTEXT, threads=1) as guessing,
    ):
        text = CachedText(speaking)
        for question in questions()[::2]:
            asked = prompt(large, question)
            reply = greedy_reply(text, asked)
            whole = [*asked, *reply]
            guessing.clear()
            guessing.decode(whole[:-1], np.arange(len(whole) - 1), 0, True)
            guesses = guessing.logits().argmax(axis=1)[len(asked) - 1 :]
            same += int(np.count_nonzero(guesses == reply))
            total += len(reply)
    assert 100 * same / total == pytest.approx(stated("tokens of the answers to `questions.jsonl`"), abs=0.5)


def test_speculation_with_it_says_what_tinymix_says(draft: Path, tinymix_bf16: Path) -> None:
    drafted = accepted = 0
    with (
        Model(tinymix_bf16) as large,
        Model(draft) as small,
        Context(large, context_length=CONTEXT, threads=1) as speaking,
        Context(small, context_length=CONTEXT, threads=1) as guessing,
    ):
        text = CachedText(speaking)
        speculation = Speculation(text, ModelDrafter(guessing), length=4, adaptive=False)
        for question in questions()[::12]:
            asked = prompt(large, question)
            expected = greedy_reply(text, asked)
            text.feed(asked)
            assert list(speculation.generate(Chooser(GREEDY), 64)) == expected
            drafted, accepted = drafted + speculation.drafted, accepted + speculation.accepted
    assert drafted > 100 and accepted / drafted > 0.8
