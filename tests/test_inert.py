"""Text of a model cannot drive the terminal, however it is cut."""

from __future__ import annotations

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from localmix.inert import inert, inert_json

ATTACKS = [
    "\x1b]52;c;cm0gLXJm\x07",  # clipboard
    "\x1b]8;;http://x\x1b\\click\x1b]8;;\x1b\\",  # hyperlink
    "\x1b[2J\x1b[H",  # clear the screen
    "\x9b31m",  # the one-byte form
    "\u202eevil\u202c \u2066x\u2069",  # right-to-left
    "\x1bP+q544e\x1b\\",
    "\x08\x08\x7f\x00\x0e",
    "safe\rfake",
]
DRIVING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]")


def test_attacks_are_shown_and_not_done() -> None:
    for attack in ATTACKS:
        assert not DRIVING.search(inert(attack))
    assert inert("\x1b[31mred") == "␛[31mred"


@given(st.lists(st.one_of(st.text(), st.sampled_from(ATTACKS))), st.integers(1, 5))
def test_cut_anywhere_it_is_the_same(pieces: list[str], size: int) -> None:
    whole = "".join(pieces)
    cut = "".join(inert(whole[start : start + size]) for start in range(0, len(whole), size))
    assert cut == inert(whole)
    assert not DRIVING.search(cut)


def test_plain_text_stays() -> None:
    text = "A [bold]tag[/bold], 中文, 👩‍🚀, naïve\n\ttab"
    assert inert(text) == text


@given(st.text())
def test_json_keeps_the_data(value: str) -> None:
    document = inert_json(json.dumps({"key": value}, ensure_ascii=False, indent=1))
    assert json.loads(document) == {"key": value}
    assert not DRIVING.search(document)
