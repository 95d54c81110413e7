"""Text from models and files made harmless for a terminal.

Every control character is replaced by a visible symbol, one character at a time and without state: an escape
sequence loses its introducer, so the rest of it is plain text, also when it arrives split over two pieces.
"""

from __future__ import annotations

import re

# Tab and newline stay. The rest of C0, DEL and C1 drive the terminal; the bidirectional controls reorder
# what is read; U+2028 and U+2029 break lines that the caller believes whole.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def inert(text: str) -> str:
    """The text with control characters shown as symbols (`␛` for escape) and carriage returns dropped."""
    return _CONTROLS.sub(_symbol, text) if _CONTROLS.search(text) else text


def _symbol(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code == 0x0D:
        return ""
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"<U+{code:04X}>"


def inert_json(text: str) -> str:
    r"""A JSON document whose control characters are written as `\uXXXX`: the same data, harmless to show."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
