"""Regular expressions as grammar (GBNF) of what stands between the quotes of a JSON string.

The plain part of the language, as JSON Schema recommends it: characters, classes, groups, alternatives and counts.
The characters that JSON writes with a backslash are written so in the grammar, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localmix.errors import UsageError

# A character of a JSON string. Halves of UTF-16 pairs are no characters.
JSON_CHARACTER = (
    r'[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt]'
    r' | "u" ([0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2}))'
)
ESCAPED = {'"': r"\"", "\\": r"\\", "\b": r"\b", "\f": r"\f", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
LARGEST = 0x10FFFF
MOST_REPEATED = 1000
DEPTH_LIMIT = 32

Ranges = list[tuple[int, int]]
DIGIT: Ranges = [(48, 57)]
WORD: Ranges = [(48, 57), (65, 90), (95, 95), (97, 122)]
SPACE: Ranges = [(9, 13), (32, 32)]
_CLASSES = {"d": DIGIT, "w": WORD, "s": SPACE}
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}


def literal(text: str) -> str:
    """A text as a literal of the grammar."""
    escapes = {'"': r"\"", "\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
    return '"' + "".join(escapes.get(c) or (c if c >= " " else f"\\x{ord(c):02X}") for c in text) + '"'


def from_pattern(pattern: str) -> str:
    """The grammar of a regular expression; one without `^` or `$` may have any text before or behind.

    Raises:
        UsageError: the expression is broken or goes beyond the plain part of the language.
    """
    return _Parser(pattern).whole()


def other_than(names: Sequence[str], rule: Callable[[str], str]) -> str:
    """A quoted JSON string that is none of these names, its characters written as they are.

    Args:
        rule: gives a rule with a body its name.
    """
    return rf'"\"" {_other(names, rule)} "\""'


def _other(rests: Sequence[str], rule: Callable[[str], str]) -> str:
    """What may stand from here on, when the rest of each name is forbidden."""
    firsts = sorted({rest[0] for rest in rests if rest})
    plain = [c for c in firsts if c not in ESCAPED and c >= " "]
    # a first character that none of the names has is followed by anything; escapes are left to the names
    others = _characters(_complement([(ord(c), ord(c)) for c in (*plain, '"', "\\", *map(chr, range(32)), "\x7f")]))
    parts = [f"{others} char*"]
    parts += [f"{literal(c)} {_other([rest[1:] for rest in rests if rest[:1] == c], rule)}" for c in plain]
    body = " | ".join(parts)
    return rule(body) if "" in rests else f"({rule(body)})?"


class _Parser:
    """Reads an expression from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._place = 0
        self._depth = 0
        self._top_alternatives = 1

    def whole(self) -> str:
        start = self._take("^")
        body = self._alternatives()
        # `$` is only read at the very end, where the last alternative leaves it
        end = self._take("$")
        if self._place < len(self._pattern):
            raise self._refused(self._pattern[self._place])
        if self._top_alternatives > 1 and (start or end):
            raise self._refused("^ or $ of one alternative")
        return f"{'' if start else 'char* '}({body}){'' if end else ' char*'}"

    def _alternatives(self) -> str:
        self._depth += 1
        if self._depth > DEPTH_LIMIT:
            raise self._refused("groups nested so deep")
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        self._depth -= 1
        if self._depth == 0:
            self._top_alternatives = len(parts)
        return " | ".join(parts)

    def _sequence(self) -> str:
        parts = []
        while (c := self._peek()) and c not in "|)" and not (c == "$" and self._place == len(self._pattern) - 1):
            parts.append(self._atom() + self._count())
        return " ".join(parts) or '""'

    def _atom(self) -> str:
        c = self._next()
        if c == "(":
            if self._take("?") and not self._take(":"):
                raise self._refused("(?" + self._peek())
            body = self._alternatives()
            if not self._take(")"):
                raise self._refused("( without )")
            return f"({body})"
        if c == "[":
            return self._class()
        if c == ".":
            return _characters(_complement([(10, 10), (13, 13)]))
        if c == "\\":
            ranges, _ = self._escape()
            return _characters(ranges)
        if c in "^$*+?{}":
            raise self._refused(c)
        return _characters([(ord(c), ord(c))])

    def _escape(self) -> tuple[Ranges, bool]:
        """What stands behind a backslash, and whether it is one character."""
        c = self._next()
        if c.lower() in _CLASSES:
            ranges = _CLASSES[c.lower()]
            return (ranges if c.islower() else _complement(ranges)), False
        if c in _CONTROLS:
            c = _CONTROLS[c]
        elif c in "xu":
            length = 2 if c == "x" else 4
            digits = self._pattern[self._place : self._place + length]
            try:
                c = chr(int(digits, 16))
            except ValueError:
                raise self._refused(f"\\{c}{digits}") from None
            self._place += length
        elif c.isalnum():
            raise self._refused(f"\\{c}")
        return [(ord(c), ord(c))], True

    def _class(self) -> str:
        negated = self._take("^")
        ranges: Ranges = []
        while not self._take("]"):
            found, single = self._member()
            following = self._pattern[self._place : self._place + 2]
            if single and following[:1] == "-" and following != "-]":
                self._next()
                end, end_single = self._member()
                if not end_single or end[0][0] < found[0][0]:
                    raise self._refused("a range that goes backwards")
                found = [(found[0][0], end[0][0])]
            ranges += found
        ranges = _complement(ranges) if negated else ranges
        if not ranges:
            raise self._refused("an empty class")
        return _characters(ranges)

    def _member(self) -> tuple[Ranges, bool]:
        c = self._next()
        return self._escape() if c == "\\" else ([(ord(c), ord(c))], True)

    def _count(self) -> str:
        c = self._peek()
        count = ""
        if c and c in "*+?":
            count = self._next()
        elif c == "{":
            end = self._pattern.find("}", self._place)
            inside = self._pattern[self._place + 1 : end]
            numbers = inside.split(",")
            if end < 0 or len(numbers) > 2 or not numbers[0].isdecimal() or not (numbers[-1] or "0").isdecimal():
                raise self._refused(self._pattern[self._place :])
            if any(int(number) > MOST_REPEATED for number in numbers if number):
                raise self._refused(f"a count of more than {MOST_REPEATED}")
            if len(numbers) == 2 and numbers[1] and int(numbers[1]) < int(numbers[0]):
                raise self._refused("{" + inside + "}")
            self._place = end + 1
            count = "{" + inside + "}"
        if count and (self._peek() or " ") in "*+?{":  # lazy and possessive ones are no matter of what matches
            raise self._refused(count + self._peek())
        return count

    def _peek(self) -> str:
        return self._pattern[self._place : self._place + 1]

    def _next(self) -> str:
        c = self._peek()
        if not c:
            raise self._refused("an expression that ends too early")
        self._place += 1
        return c

    def _take(self, wanted: str) -> bool:
        if self._peek() != wanted:
            return False
        self._place += 1
        return True

    def _refused(self, what: str) -> UsageError:
        return UsageError(f"The pattern {self._pattern!r} has {what!r} at {self._place}, which is not supported.")


def _complement(ranges: Ranges) -> Ranges:
    found: Ranges = []
    start = 0
    for low, high in sorted(ranges):
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    if start <= LARGEST:
        found.append((start, LARGEST))
    return found


def _characters(ranges: Ranges) -> str:
    """One character of these ranges, as JSON writes it."""
    forbidden = [(0, 31), (34, 34), (92, 92), (127, 127), (0xD800, 0xDFFF)]
    plain = _complement(_complement(ranges) + forbidden)
    escaped = [text for c, text in ESCAPED.items() if any(low <= ord(c) <= high for low, high in ranges)]
    if not escaped and len(plain) == 1 and plain[0][0] == plain[0][1]:
        return literal(chr(plain[0][0]))
    parts = [literal(text) for text in escaped]
    if plain:
        parts.insert(0, "[" + "".join(_range(low, high) for low, high in plain) + "]")
    if not parts:
        raise UsageError("A pattern asks for a character that a JSON text cannot have as it is.")
    return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"


def _range(low: int, high: int) -> str:
    return _in_class(low) if low == high else f"{_in_class(low)}-{_in_class(high)}"


def _in_class(code: int) -> str:
    if chr(code).isascii() and chr(code).isalnum():
        return chr(code)
    return f"\\x{code:02X}" if code < 256 else f"\\u{code:04X}" if code < 65536 else f"\\U{code:08X}"
