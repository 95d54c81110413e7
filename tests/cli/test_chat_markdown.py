"""Markdown as lines: what is drawn, what can still change, and that nothing of it drives the terminal."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

from localmix.cli.markdown import Block, blocks, decided, foreseen, lines
from localmix.inert import inert

DOCUMENT = """# Title of *things*

Some **bold** and *italic* and `code` text with a [link](http://x.y/z) that goes on for long enough to wrap.

1. First **item**
2. Second item with

   more text
   ```python
   def f(x):
       return "a" + x  # comment
   ```
3. Third
   - nested one
   - nested two

- **注意：**请不要这样做，中文的宽度应该是正确的，这一行很长很长很长，Hello混合English文字。

| Name | 数量 |
|---|--:|
| Wilma | 47 |

> quote one
> quote two
---
```
plain\ttab
```
The end: 2 * 3 = 6, *args and **kwargs.
"""


def drawn(source: str, width: int = 60) -> list[Text]:
    """All lines of a source, with a blank one between blocks."""
    found: list[Text] = []
    for place, block in enumerate(blocks(source)):
        found += [Text()] * bool(place and not block.follows) + lines(block, width)
    return found


def plain(source: str, width: int = 60) -> str:
    return "\n".join(line.plain for line in drawn(source, width))


def test_a_document() -> None:
    assert (
        plain(DOCUMENT, 40)
        == """Title of things

Some bold and italic and code text with
a link (http://x.y/z) that goes on for
long enough to wrap.

1. First item
2. Second item with

   more text
   ── python ───────────────────────────
   def f(x):
       return "a" + x  # comment
   ─────────────────────────────────────
3. Third
   • nested one
   • nested two

• 注意：请不要这样做，中文的宽度应该是正
  确的，这一行很长很长很长，Hello混合
  English文字。

Name    数量
────────────
Wilma     47

│ quote one
│ quote two

────────────────────────────────────────

────────────────────────────────────────
plain   tab
────────────────────────────────────────

The end: 2 * 3 = 6, *args and **kwargs."""
    )


def styles(source: str) -> list[str]:
    return [str(span.style) for line in drawn(source) for span in line.spans]


def test_emphasis_closes_beside_chinese_punctuation() -> None:
    assert plain("**注意：**请") == "注意：请"
    assert "bold" in styles("**注意：**请")
    assert plain("他说**“好”**吗") == "他说“好”吗"


def test_code_is_highlighted_and_whole() -> None:
    long = "x = [" + ", ".join(map(str, range(60))) + "]"
    found = drawn(f"```python\n{long}\n```", 80)
    assert found[1].plain == long  # not broken: it can be copied
    assert len(found[1].spans) > 60


def test_a_line_without_end_is_broken_after_some_rows() -> None:
    found = drawn("```\n" + "x" * 1000 + "\n```", 40)
    assert [len(line) for line in found[1:-1]] == [160] * 6 + [40]


@given(st.text("ab中文，。《（-", max_size=120), st.integers(10, 30))
def test_lines_are_broken_where_they_may_be(text: str, width: int) -> None:
    block = Block(text.strip(" -") or "x", "paragraph")
    found = [line.plain for line in lines(block, width)]
    assert all(cell_len(line) <= width for line in found)
    assert "".join("".join(found).split()) == "".join(block.source.split())
    for before, after in pairwise(found):
        if after and before and after[0] in "，。" and len(before) > 1:
            # only where the whole line is one run of them
            assert before.strip("，。《（") == "" or cell_len(before) >= width - 1


@given(st.text("ab* `_-1.\n#|>[]()~你，", max_size=200), st.integers(1, 9))
@settings(max_examples=300)
def test_cut_into_pieces_it_is_the_same(source: str, size: int) -> None:
    """What `blocks` calls finished is never drawn otherwise when more comes."""
    whole = [line.plain for line in drawn(source)]
    found: list[str] = []
    pending, before, first = "", None, True
    for start in range(0, len(source) + size, size):
        pending += source[start : start + size]
        final = start + size >= len(source) + size
        parts = blocks(pending if final else decided(pending), before)
        finished = parts if final else parts[:-1]
        for block in finished:
            found += [""] * (not first and not block.follows) + [line.plain for line in lines(block, 60)]
            before, first = block, False
        pending = pending[sum(len(block.source) for block in finished) :]
    squeezed = "".join("".join(found).split())
    assert re.sub(r"\d+\.", "", squeezed) == re.sub(r"\d+\.", "", "".join("".join(whole).split()))


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("This is **bo", "This is bo"),
        ("This is **", "This is"),
        ("This is *it", "This is it"),
        ("a `cod", "a cod"),
        ("2 * 3", "2 * 3"),
        ("See [the li", "See "),
        ("See [the link](http://x", "See "),
        ("Items:\n-", "Items:"),
        ("Items:\n1", "Items:"),
        ("Text\n##", "Text"),
        ("```pyth", ""),
        ("| a | b |", ""),
        ("| a | b |\n|--", ""),
    ],
)
def test_marks_that_are_not_decided_yet_are_not_shown(source: str, shown: str) -> None:
    assert plain(foreseen(decided(source))) == shown.strip()


ATTACKS = [
    "\x1b]52;c;cm0gLXJm\x07",
    "\x1b[2J",
    "\x9b31m",
    "\u202eevil\u202c",
    "&#27;[2J",
    "&#x202e;x",
    "&#155;",
    "\\\x1b[31m",
]
PLACES = [
    "{}",
    "**{}**",
    "`{}`",
    "# {}",
    "```{}\n{}\n```",
    "[{}](http://x/{})",
    "![{}]({})",
    "- {}",
    "> {}",
    "|{}|\n|-|\n|{}|",
    "<b {}>",
    "    {}",
]


@pytest.mark.parametrize("place", PLACES)
def test_nothing_drives_the_terminal(place: str) -> None:
    driving = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]")
    for attack in ATTACKS:
        source = inert(place.replace("{}", attack))
        for text in (source, foreseen(source)):
            assert not driving.search(plain(text)), attack


def test_rich_markup_and_html_are_text() -> None:
    assert plain("[red]x[/red] <script>alert(1)</script>") == "[red]x[/red] <script>alert(1)</script>"
    assert plain("<div>\nx\n</div>") == "<div>\nx\n</div>"


def test_nothing_disappears() -> None:
    assert plain("See [the source][1].\n\n[1]: http://x/y") == "See [the source][1].\n\n[1]: http://x/y"
    assert plain("a\n===\n---") == "a\n===\n\n" + "─" * 40


def test_a_list_that_goes_on_is_one_list() -> None:
    first, *_ = blocks("3. a\n4. b\n")
    second, third = blocks("4. b\n9. c\n", first)
    assert (second.number, third.number, second.follows) == (4, 5, True)
    assert [line.plain for line in lines(third, 40)] == ["5. c"]
