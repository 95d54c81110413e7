"""A vocabulary while it is put together: tokens, scores and kinds, and the tokens that were added to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from localmix.errors import InputError
from localmix.sources.documents import listed, read_optional_object, shown

CONFIG = "tokenizer_config.json"
ADDED = "added_tokens.json"

# Scores that put added tokens after every learned piece, and padding after those.
ADDED_SCORE = -1000.0
PADDING_SCORE = -10000.0

SPACE = "▁"

# Added tokens that are control tokens although their entry does not say so.
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)


@dataclass(frozen=True)
class AddedToken:
    """A token beside the learned ones.

    Attributes:
        content: its text.
        id: its number.
        special: it controls the model instead of standing for text.
    """

    content: str
    id: int
    special: bool


@dataclass
class Vocabulary:
    """The three lists that describe a vocabulary, all of the same length."""

    tokens: list[str]
    scores: list[float]
    kinds: list[int]

    @classmethod
    def padding(cls, size: int) -> Vocabulary:
        """A vocabulary of tokens that no text contains, to be filled."""
        return cls(
            [f"[PAD{token_id}]" for token_id in range(size)], [PADDING_SCORE] * size, [int(TokenType.UNUSED)] * size
        )

    def put(self, token_id: int, token: str, score: float, kind: TokenType) -> None:
        self.tokens[token_id], self.scores[token_id], self.kinds[token_id] = token, score, int(kind)

    def put_added(self, token: AddedToken, score: float) -> None:
        """Put an added token in its place; one that stands for text as it is looked for there."""
        kind = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
        # llama.cpp looks for tokens that stand for text in the text itself, where spaces are spaces.
        content = token.content if token.special else token.content.replace(SPACE, " ")
        self.put(token.id, content, score, kind)


def require_rows(path: Path, highest: int, size: int) -> None:
    """Raise InputError when tokens up to the id `highest` have no row in an embedding of `size` rows."""
    if highest >= size:
        raise InputError(
            f"{path} has {highest + 1} tokens, the embedding only {size} rows.",
            "They belong to different models, or an adapter that enlarges the embedding is not merged yet.",
        )


def read_added_tokens(folder: Path, tokenizer_config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """The tokens of added_tokens.json and of tokenizer_config.json, which wins."""
    path = folder / ADDED
    for content, number in read_optional_object(path).items():
        yield AddedToken(content, token_id(path, content, number), False)
    path = folder / CONFIG
    decoder = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise InputError(f"{path}: added_tokens_decoder is not an object.", "Download the file again.")
    for key, entry in decoder.items():
        found: object = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else key
        yield added_token(path, entry, key, found)


def added_token(path: Path, entry: Any, name: object, number: object) -> AddedToken:
    """One entry that describes an added token.

    Args:
        path, name: where it stands, for messages.
        number: its id, not checked yet.

    Raises:
        InputError: it has no text, or an id that is none.
    """
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(content, str):
        raise InputError(f"{path}: added token {shown(name)} has no content.", "Download the file again.")
    special = bool(entry.get("special")) or _LOOKS_SPECIAL.fullmatch(content) is not None
    return AddedToken(content, token_id(path, content, number), special)


def token_id(path: Path, token: str, value: object) -> int:
    """A token's id, checked to be one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{path}: token {shown(token)} has the id {shown(value)}.", "Ids count from 0.")
    return value


def padding_notes(folder: Path, vocabulary: Vocabulary, outside: list[str]) -> list[str]:
    """What the user should know: tokens without a row, and rows without a token."""
    notes: list[str] = []
    if outside:
        notes.append(
            f"{folder}: {len(outside)} added tokens have no row in the embedding and are left out: "
            f"{listed(dict.fromkeys(outside), 3)}."
        )
    size = len(vocabulary.tokens)
    padding = sum(token == f"[PAD{number}]" for number, token in enumerate(vocabulary.tokens))
    if padding:
        notes.append(
            f"{folder}: the embedding has {size} rows for {size - padding} tokens; "
            f"{padding} are padded with unused tokens."
        )
    return notes


def require_distinct(folder: Path, vocabulary: Vocabulary) -> None:
    """Refuse what would make the engine abort later: strings that are no text, a token twice."""
    seen: dict[str, int] = {}
    for number, token in enumerate(vocabulary.tokens):
        if not is_text(token):
            raise InputError(f"{folder}: token {number} ({shown(token)}) is not valid Unicode.")
        if seen.setdefault(token, number) != number:
            raise InputError(
                f"{folder}: tokens {seen[token]} and {number} are both {shown(token)}.",
                "Repair added_tokens.json, tokenizer_config.json or tokenizer.json.",
            )


def require_bytes(path: Path, vocabulary: Vocabulary) -> None:
    """Refuse a vocabulary that llama.cpp would abort with at the first text that no token covers."""
    count = vocabulary.kinds.count(int(TokenType.BYTE))
    if count != 256:
        raise InputError(
            f"{path} has {count} of 256 byte tokens; llama.cpp needs all of them for text that no other token covers.",
            "Only models trained with byte fallback can be converted.",
        )


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: JSON can smuggle in halves of surrogate pairs."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
