"""Markdown of a reply as lines for a terminal.

A reply comes in pieces, so the source is cut where nothing that follows can change what is before
(`decided`, `blocks`), and what is still open is shown as it will most likely be (`foreseen`): without the marks
that only the next characters decide about.

Nothing of the source reaches the terminal but as text: HTML is shown, links name their address, and what
entities stand for (`&#8238;` is a bidirectional control) is made inert like the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from localmix.inert import inert

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import StateInline
    from markdown_it.tree import SyntaxTreeNode

_STYLES = {
    "strong": "bold",
    "em": "italic",
    "s": "strike",
    "code_inline": "bold cyan",
    "address": "dim",
    "link": "underline",
    "h1": "bold underline",
    "h2": "bold",
    "mark": "dim",
}
_LISTS = ("bullet_list", "ordered_list")
_RULE_CELLS = 40
_LEAST_CELLS = 10  # of a column of text, however deep it lies in lists

_CODE_LINES = 4  # rows of the screen that a line of code may take: more could not be drawn again
# First signs of a list, a heading, a rule or a fence at the end of a source: with the next character they may be
# none, and the block before may go on.
_FIRST_SIGNS = re.compile(r"^[ \t]*(?:[-*+_>|#`~]{1,6}|\d{1,9}[.)]?)[ \t]*\Z", re.MULTILINE)
# The end of a block whose meaning the next characters decide: a fence, a row of a table, a link.
_UNDECIDED = re.compile(
    r"(?:^|\n)[ \t]*(?:`{1,3}[^`\n]*|~{1,3}[^~\n]*|\|[^\n]*)\Z"
    r"|!?\[[^\]\n]{0,200}(?:\](?:\([^)\n]{0,300})?)?\Z"
)
# a table is known by its second line
_TABLE_HEAD = re.compile(r"\s*\|[^\n]*\n?[-:| \t]*")
_FORESEEN = 200  # characters after which a mark that is not closed is taken for itself


@dataclass(frozen=True)
class Block:
    """A part of the source that is drawn by itself: a top-level block, or one item of a top-level list.

    Attributes:
        type: markdown-it's name of it; of an item, the name of its list.
        number: of an item; the source's own number counts for the first one of a list only.
        follows: it is an item after another one of the same list: no blank line between them.
    """

    source: str
    type: str
    number: int = 1
    follows: bool = False


def blocks(source: str, before: Block | None = None) -> list[Block]:
    """The blocks of a source; only the last one can still change when more is appended.

    Args:
        before: the block that was cut off in front of this source: a list may go on here.
    """
    starts = [0, *(match.end() for match in re.finditer("\n", source))]
    found: list[tuple[int, Block]] = []
    for node in _tree(source).children:
        assert node.map is not None
        if node.type not in _LISTS:
            found.append((node.map[0], Block("", node.type)))
            continue
        goes_on = not found and before is not None and before.type == node.type
        first = before.number + 1 if goes_on and before else _first(node)
        for place, item in enumerate(node.children):
            assert item.map is not None
            found.append((item.map[0], Block("", node.type, first + place, goes_on or place > 0)))
    begins = [0, *(starts[line] for line, _ in found[1:]), len(source)]
    return [
        dataclasses.replace(block, source=source[begin:end])
        for (_, block), begin, end in zip(found, begins, begins[1:], strict=False)
    ]


def _first(node: SyntaxTreeNode) -> int:
    return int(node.attrs.get("start", 1))


def decided(source: str) -> str:
    """A source that is to go on, without the signs at its end that could still mean one thing or another."""
    return _FIRST_SIGNS.sub("", source)


def foreseen(source: str) -> str:
    """An open block as it will most likely go on: emphasis and code are closed, undecided marks held back."""
    last = _tree(source)
    while last.children and last.type != "inline":
        last = last.children[-1]
    if last.type in ("fence", "code_block"):
        return re.sub(r"(?:^|\n)[ \t]*(?:`{1,3}[^`\n]*|~{1,3}[^~\n]*)\Z", "", source)
    if _TABLE_HEAD.fullmatch(source):
        return ""
    source = _UNDECIDED.sub("", source)
    start = max(source.rfind("\n") + 1, len(source) - _FORESEEN)
    line = source[start:].rstrip("*_`~").rstrip()
    if line.count("`") % 2:
        line += "`"
    else:
        spoken = re.sub("`[^`]*`", "", line)
        if spoken.count("**") % 2:
            line += "**"
        elif len(re.findall(r"(?<![\w*\\])\*(?=[^\s*])", spoken)) > len(re.findall(r"(?<=[^\s*\\])\*(?!\*)", spoken)):
            line += "*"
    return source[:start] + line


def lines(block: Block, width: int) -> list[Text]:
    """The lines of a block; only lines of code, which are worth copying whole, may be longer than the width.

    Args:
        width: cells for text.
    """
    drawn: list[Text] = []
    for place, node in enumerate(_tree(block.source).children):
        if place:
            drawn.append(Text())
        drawn += _lines(node, max(width, _LEAST_CELLS), block.number)
    return drawn


def _lines(node: SyntaxTreeNode, width: int, number: int | None = None) -> list[Text]:
    if node.type == "heading":
        return _wrapped(_inline(node, _STYLES.get(node.tag, "bold")), width)
    if node.type in ("fence", "code_block"):
        return _code(node.content, node.info.split()[0] if node.info.split() else "", width)
    if node.type in _LISTS:
        return list(_list(node, width, number))
    if node.type == "blockquote":
        mark = Text("│ ", _STYLES["mark"])
        return [Text.assemble(mark, line) for line in _stacked(node.children, max(width - 2, _LEAST_CELLS))]
    if node.type == "hr":
        return [Text("─" * min(width, _RULE_CELLS), _STYLES["mark"])]
    if node.type == "table":
        return _table(node, width)
    return _wrapped(_inline(node), width)


def _stacked(nodes: Sequence[SyntaxTreeNode], width: int) -> list[Text]:
    """Blocks one under the other, with a blank line where two paragraphs meet."""
    drawn: list[Text] = []
    for place, node in enumerate(nodes):
        if place and node.type == nodes[place - 1].type == "paragraph":
            drawn.append(Text())
        drawn += _lines(node, width)
    return drawn


def _list(node: SyntaxTreeNode, width: int, number: int | None) -> Iterator[Text]:
    first = _first(node) if number is None else number
    for place, item in enumerate(node.children):
        mark = f"{first + place}. " if node.type == "ordered_list" else "• "
        indent = " " * len(mark)
        drawn = _stacked(item.children, max(width - len(mark), _LEAST_CELLS)) or [Text()]
        for row, line in enumerate(drawn):
            yield Text.assemble(indent if row else mark, line) if line or not row else line


def _table(node: SyntaxTreeNode, width: int) -> list[Text]:
    import rich.box
    import rich.table

    drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    rows = [row for part in node.children for row in part.children]
    for cell in rows[0].children:
        side = str(cell.attrs.get("style", "")).removeprefix("text-align:")
        drawn.add_column(
            _inline(cell, "bold"),
            justify="right" if side == "right" else "center" if side == "center" else "left",
            overflow="fold",
        )
    for row in rows[1:]:
        drawn.add_row(*map(_inline, row.children))
    return [Text.from_ansi(line) for line in _painted(drawn, width).splitlines()]


def _painted(table: object, width: int) -> str:
    console = Console(width=width, force_terminal=True, color_system="standard", no_color=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _code(code: str, language: str, width: int) -> list[Text]:
    language = inert(language)[:_RULE_CELLS]
    cells = min(width, _RULE_CELLS)
    title = f"── {language} " if language else ""
    mark = _STYLES["mark"]
    # the line that still grows is coloured by itself: the others need not be looked at again
    whole, newline, rest = code.rpartition("\n")
    drawn = [*(_highlighted(whole, language) if newline else ()), *(_highlighted(rest, language) if rest else ())]
    return [
        Text(title + "─" * max(cells - cell_len(title), 0), mark),
        *(part for line in drawn for part in line.divide(range(_CODE_LINES * width, len(line), _CODE_LINES * width))),
        Text("─" * cells, mark),
    ]


@functools.lru_cache(maxsize=16)
def _highlighted(code: str, language: str) -> tuple[Text, ...]:
    from rich.syntax import Syntax

    # the terminal's own colours: readable on a dark and on a light ground
    syntax = Syntax("", language or "text", theme="ansi_dark", background_color="default")
    text = syntax.highlight(inert(code))
    text.expand_tabs(4)
    text.style = Style()
    return tuple(text.split("\n", allow_blank=True))[: code.count("\n") + 1]


def _inline(node: SyntaxTreeNode, style: str = "") -> Text:
    text = Text(style=style)
    for child in node.children:
        for part in child.children if child.type == "inline" else [child]:
            _append(text, part, Style())
    return text


def _append(text: Text, node: SyntaxTreeNode, style: Style) -> None:
    if node.type in ("softbreak", "hardbreak"):
        text.append("\n")  # models mean the lines they write: verses, addresses
    elif node.type in ("strong", "em", "s"):
        for child in node.children:
            _append(text, child, style + Style.parse(_STYLES[node.type]))
    elif node.type == "link":
        start = len(text)
        for child in node.children:
            _append(text, child, style + Style.parse(_STYLES["link"]))
        address = inert(str(node.attrs.get("href", "")))
        if address and address.removeprefix("mailto:") != text.plain[start:]:
            text.append(f" ({address})", Style.parse(_STYLES["address"]))
    elif node.type == "image":
        text.append(f"{inert(node.content) or 'image'} ({inert(str(node.attrs.get('src', '')))})", style)
    elif node.type == "code_inline":
        text.append(inert(node.content), style + Style.parse(_STYLES["code_inline"]))
    else:
        text.append(inert(node.content), style)


# Lines are broken after spaces and between Chinese, Japanese or Korean letters, but no line begins with what
# closes or ends with what opens.
_CLOSING = frozenset("，。、；：？！）》」』】〕〉…—～·’”,.;:?!)]}%’”")
_OPENING = frozenset("（《「『【〔〈“‘([{")


def _wrapped(text: Text, width: int) -> list[Text]:
    text.expand_tabs(4)
    drawn: list[Text] = []
    for paragraph in text.split("\n", allow_blank=True):
        plain = paragraph.plain
        breaks = list(_breaks(plain, width))
        for part in paragraph.divide(breaks) if breaks else [paragraph]:
            part.rstrip()
            drawn.append(part)
    while drawn and not drawn[-1].plain:
        drawn.pop()
    return drawn


def _breaks(plain: str, width: int) -> Iterator[int]:
    """Offsets at which new lines begin."""
    start = cells = 0
    chance = 0  # the last place where the line may be broken
    for place, letter in enumerate(plain):
        size = cell_len(letter)
        if place > start and _breakable(plain[place - 1], letter):
            chance = place
        if cells + size > width and letter != " ":
            begin = chance if chance > start else place
            if begin > start:
                yield begin
                start, cells = begin, cell_len(plain[begin:place])
        cells += size


def _breakable(before: str, after: str) -> bool:
    if after == " ":
        return False
    if before in " -":
        return before == " " or after.isalpha()
    return (_wide(before) or _wide(after)) and after not in _CLOSING and before not in _OPENING


def _wide(letter: str) -> bool:
    return letter >= "\u1100" and unicodedata.east_asian_width(letter) in "WF"


@functools.lru_cache(maxsize=4)
def _tree(source: str) -> SyntaxTreeNode:
    from markdown_it.tree import SyntaxTreeNode

    return SyntaxTreeNode(_parser().parse(source))


@functools.lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    # a line of dashes under a text is the start of a list as long as it grows, and nobody's heading;
    # what defines a link shows nothing, and text that disappears is worse than a link that is none
    parser.disable(["lheading", "reference"])
    parser.inline.ruler.at("emphasis", _emphasis)
    return parser


def _emphasis(state: StateInline, silent: bool) -> bool:
    """CommonMark's rule, but beside Chinese letters punctuation does not keep `**` from closing or opening.

    In `**注意：**请` CommonMark sees no end of the emphasis, since the marks stand between punctuation and a
    letter. Languages that write no spaces need the rule of
    https://github.com/tats-u/markdown-cjk-friendly instead.
    """
    from markdown_it.rules_inline.state_inline import Delimiter

    marker = state.src[state.pos]
    if silent or marker not in "*_":
        return False
    scanned = state.scanDelims(state.pos, marker == "*")
    opens, closes = scanned.can_open, scanned.can_close
    end = state.pos + scanned.length
    before = state.src[state.pos - 1] if state.pos else " "
    after = state.src[end] if end < state.posMax else " "
    if marker == "*" and (_wide(before) or _wide(after)):
        opens, closes = not after.isspace(), not before.isspace()
    for _ in range(scanned.length):
        state.push("text", "", 0).content = marker
        state.delimiters.append(
            Delimiter(ord(marker), scanned.length, len(state.tokens) - 1, -1, open=opens, close=closes)
        )
    state.pos = end
    return True
