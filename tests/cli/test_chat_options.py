"""`localmix chat` through pipes: its options, sessions, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import CommandLine

QUICK = ("--threads", "1", "--max-tokens", "3", "--ctx", "256")


def ask(localmix: CommandLine, *options: str, expect: int = 0) -> object:
    run = localmix("chat", "-p", "Hello", "--json", *QUICK, *options, expect=expect)
    return run.json


def test_a_session_goes_on_and_reads_nothing_twice(localmix: CommandLine) -> None:
    first = localmix("chat", "-p", "The quick brown fox", "--session", "s", "--json", *QUICK).json
    second = localmix("chat", "-p", "And then?", "--continue", "--json", *QUICK).json
    assert second["cached_tokens"] >= first["prompt_tokens"]
    saved = json.loads((localmix.home / "sessions" / "s.json").read_text())
    assert [turn["content"] for turn in saved["turns"]][::2] == ["The quick brown fox", "And then?"]
    assert (localmix.home / "sessions" / "s.kv").exists()
    (localmix.home / "sessions" / "s.kv").write_bytes(b"damaged")
    third = localmix("chat", "-p", "More", "--session", "s", "--json", *QUICK).json
    assert third["cached_tokens"] == 0
    localmix("chat", "-p", "Hello", *QUICK)
    assert len(list((localmix.home / "sessions").glob("*.json"))) == 1  # one question is not kept unasked


def test_another_model_takes_the_text_and_not_the_state(localmix: CommandLine) -> None:
    localmix("chat", "-p", "Hello", "--session", "s", *QUICK)
    localmix("quantize", "Q8_0", "fox")
    answer = localmix("chat", "fox:Q8_0", "-p", "More", "--continue", "--json", *QUICK).json
    assert answer["model"].endswith("fox-Q8_0.gguf")
    assert answer["cached_tokens"] == 0
    assert answer["prompt_tokens"] > 10


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


@pytest.mark.parametrize(
    ("prepare", "options", "code", "words"),
    [
        (None, ("--continue",), 2, "No conversation was saved yet"),
        (None, ("--continue", "--session", "x"), 2, "two conversations"),
        (None, ("--session", "../x"), 2, "cannot be the name"),
        (None, ("--grammar", "none.gbnf"), 5, "none.gbnf"),
        (write("g", b"root ::= \xff"), ("--grammar", "g"), 3, "no UTF-8"),
        (write("g", b"root ::= ["), ("--grammar", "g"), 2, "grammar"),
        (write("s", b"{"), ("--json-schema", "s"), 3, "no JSON"),
        (write("s", b"{}"), ("--json-schema", "s", "--grammar", "s"), 2, "exclude each other"),
        (None, ("--chat-template", "no.jinja"), 5, "no.jinja"),
        (write("t", b"{{ nothing("), ("--chat-template", "t"), 3, "The given chat template fails"),
        (None, ("--draft-tokens", "4"), 2, "needs --draft"),
        (None, ("--draft", "ngram", "--draft-tokens", "0"), 2, "neither auto"),
        (None, ("--draft", "nobody"), 2, "nobody"),
        (None, ("--min-p", "2"), 2, "--min-p"),
    ],
)
def test_what_is_refused(
    localmix: CommandLine, prepare: Callable[[Path], None] | None, options: tuple[str, ...], code: int, words: str
) -> None:
    if prepare:
        prepare(localmix.folder)
    assert words in localmix.fails("chat", "-p", "Hello", *QUICK, *options, expect=code)


def test_a_conversation_has_no_grammar(localmix: CommandLine) -> None:
    # a stdin that is a terminal is what makes it a conversation; here the check that comes before it
    from localmix.cli.chat import _grammar
    from localmix.errors import UsageError

    with pytest.raises(UsageError, match="--grammar needs one question"):
        _grammar(Path("g"), None, None)


def test_a_damaged_session_is_named_and_the_one_before_goes_on(localmix: CommandLine) -> None:
    localmix("chat", "-p", "Hello", "--session", "good", *QUICK)
    (localmix.home / "sessions" / "bad.json").write_text("{")
    run = localmix("chat", "-p", "More", "--continue", "--json", *QUICK)
    assert "bad.json is damaged" in run.err
    assert run.json["text"]  # one document, in spite of that
    assert "bad.json is damaged" in localmix.fails("chat", "-p", "x", "--session", "bad", *QUICK, expect=3)


def test_a_session_of_a_model_that_is_gone(localmix: CommandLine) -> None:
    localmix("chat", "-p", "Hello", "--session", "s", *QUICK)
    path = localmix.home / "sessions" / "s.json"
    path.write_text(path.read_text().replace("fox-BF16", "gone"))
    assert "which is gone" in localmix.fails("chat", "-p", "x", "--continue", *QUICK, expect=3)
    assert localmix("chat", "fox", "-p", "x", "--continue", *QUICK).code == 0


def test_replies_follow_a_schema(localmix: CommandLine) -> None:
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    (localmix.folder / "schema.json").write_text(json.dumps(schema))
    options = ("--json-schema", "schema.json", "--threads", "1", "--max-tokens", "60")
    reply = json.loads(localmix("chat", "-p", "Is it?", *options).out)
    assert isinstance(reply["yes"], bool)


def test_replies_follow_a_grammar(localmix: CommandLine) -> None:
    (localmix.folder / "g.gbnf").write_text('root ::= "## A **title**\\n\\n- one\\n- two"')
    run = localmix("chat", "-p", "x", "--grammar", "g.gbnf", "--threads", "1")
    assert run.out == "## A **title**\n\n- one\n- two\n"


def test_a_template_of_ones_own(localmix: CommandLine) -> None:
    (localmix.folder / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    plain = ask(localmix, "--chat-template", "t.jinja")
    usual = ask(localmix)
    assert plain["prompt_tokens"] < usual["prompt_tokens"]  # type: ignore[index]


def test_drafts_are_counted(localmix: CommandLine) -> None:
    document = localmix("chat", "-p", "fox " * 20, "--json", "--draft", "ngram", "--threads", "1", "--temperature", "0",
                        "--repeat-penalty", "1", "--max-tokens", "60").json  # fmt: skip
    assert document["drafted"] >= document["accepted"] >= 0
    plain = localmix("chat", "-p", "fox " * 20, "--json", "--threads", "1", "--temperature", "0",
                     "--repeat-penalty", "1", "--max-tokens", "60").json  # fmt: skip
    assert document["text"] == plain["text"]
    assert plain["drafted"] == 0 and plain["acceptance"] is None
