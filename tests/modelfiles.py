"""What Ollama does with a Modelfile and its template, as far as ours use it: written from its documentation and from
Go's, and independent of `localmix.export`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Parsed:
    """The instructions of a Modelfile."""

    model: str = ""
    template: str = ""
    system: str = ""
    parameters: list[tuple[str, str]] = field(default_factory=list)


def parse_modelfile(text: str) -> Parsed:
    """Read instructions: one a line, values bare, in quotes, or in three quotes over several lines; nothing is escaped.

    As Ollama's parser, which takes a value to its end of line, and on where a quote is still open.
    """
    parsed = Parsed()
    lines = iter(text.split("\n"))
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        value = value.lstrip(" \t")
        key = ""
        if name.upper() == "PARAMETER":
            key, _, value = value.partition(" ")
            assert re.fullmatch(r"[A-Za-z0-9_]+", key), line
        while (content := _unquoted(value.strip())) is None:
            value += "\n" + next(lines)
        content = "".join(character for character in content if character.isprintable() or character in "\n\t\r")
        match name.upper():
            case "FROM":
                parsed.model = content
            case "TEMPLATE":
                parsed.template = content
            case "SYSTEM":
                parsed.system = content
            case "PARAMETER":
                parsed.parameters.append((key, content))
            case _:
                raise AssertionError(f"no instruction: {line}")
    assert parsed.model
    return parsed


def _unquoted(text: str) -> str | None:
    """The value, or None while its quote is open."""
    for quote in ('"""', '"'):
        if text.startswith(quote):
            return text[len(quote) : -len(quote)] if len(text) >= 2 * len(quote) and text.endswith(quote) else None
    return text


_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\$?[\w.$]+|:=|\(|\)|,)')


def run_template(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Ollama's Go template gives for a conversation; knows if, else, range, end, eq, not, len and slice."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    parts = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)
    given = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    root = {"System": system, "Messages": given}
    text, rest = _block(parts, 0, root, {"$": root}, True)
    assert rest == len(parts)
    return text


def _block(parts: list[str], at: int, dot: Any, names: dict[str, Any], live: bool) -> tuple[str, int]:
    """Run up to the `else` or `end` that closes this block; where that stands."""
    written = ""
    while at < len(parts):
        part = parts[at]
        if not part.startswith("{{"):
            written += part if live else ""
            at += 1
            continue
        words = _words(part[2:-2])
        if words[0] in ("else", "end"):
            return written, at
        if words[0] in ("if", "range"):
            run = _if if words[0] == "if" else _range
            text, at = run(parts, at, dot, names, live)
            written += text
            continue
        value = _value(words, dot, names) if live else ""
        written += str(value) if live else ""
        at += 1
    return written, at


def _words(action: str) -> list[str]:
    found, place = [], 0
    action = action.strip()
    while place < len(action):
        match = _TOKEN.match(action, place)
        assert match, action[place:]
        found.append(match[1])
        place = match.end()
    return found


def _if(parts: list[str], at: int, dot: Any, names: dict[str, Any], live: bool) -> tuple[str, int]:
    written, open_branch = "", live
    words = _words(parts[at][2:-2])
    while True:
        condition = words[words.index("if") + 1 :] if "if" in words else []
        taken = open_branch and (not condition or bool(_value(condition, dot, names)))
        text, at = _block(parts, at + 1, dot, names, taken)
        written += text
        open_branch = open_branch and not taken
        words = _words(parts[at][2:-2])
        if words == ["end"]:
            return written, at + 1


def _range(parts: list[str], at: int, dot: Any, names: dict[str, Any], live: bool) -> tuple[str, int]:
    words = _words(parts[at][2:-2])
    assert words[2] == "," and words[4] == ":="
    items = _value(words[5:], dot, names) if live else []
    written = ""
    _, end = _block(parts, at + 1, dot, names, False)
    for index, item in enumerate(items):
        text, _ = _block(parts, at + 1, item, {**names, words[1]: index, words[3]: item}, True)
        written += text
    return written, end + 1


def _value(words: list[str], dot: Any, names: dict[str, Any]) -> Any:
    values: list[Any] = []
    place = 0
    while place < len(words):
        word = words[place]
        if word == "(":
            depth, end = 1, place + 1
            while depth:
                depth += {"(": 1, ")": -1}.get(words[end], 0)
                end += 1
            values.append(_value(words[place + 1 : end - 1], dot, names))
            place = end
            continue
        values.append(_operand(word, dot, names))
        place += 1
    head, *arguments = values
    return head(*arguments) if callable(head) else head


def _operand(word: str, dot: Any, names: dict[str, Any]) -> Any:
    functions = {
        "eq": lambda a, b: a == b,
        "not": lambda a: not a,
        "len": len,
        "slice": lambda items, start: items[start:],
    }
    if word in functions:
        return functions[word]
    if word.startswith('"'):
        return re.sub(r"\\[uU]([0-9a-f]{4}(?:[0-9a-f]{4})?)", lambda match: chr(int(match[1], 16)), word[1:-1])
    if word.isdigit():
        return int(word)
    if word.startswith("."):
        return dot[word[1:]]
    name, _, key = word.partition(".")
    return names[name][key] if key else names[name]
