"""tokenizer.json: the model, its vocabulary and added tokens, checked, before the kind decides what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmix.errors import InputError
from localmix.sources.documents import shown
from localmix.sources.tokenizers.special import FAST
from localmix.sources.tokenizers.vocabulary import AddedToken, added_token, read_added_tokens, require_rows, token_id

_AGAIN = "Download the file again."

BPE, UNIGRAM, WORD_PIECE = "BPE", "Unigram", "WordPiece"


@dataclass(frozen=True)
class FastTokenizer:
    """A tokenizer.json.

    Attributes:
        path: the file.
        document: its whole content.
        model: the `model` in it.
        kind: BPE, UNIGRAM or WORD_PIECE.
        tokens: id → token, holes included as "".
        scores: id → log-probability, for UNIGRAM.
        added: added tokens that have a row in the embedding; they win over learned ones of their id.
        outside: added tokens that have none.
    """

    path: Path
    document: Mapping[str, Any]
    model: Mapping[str, Any]
    kind: str
    tokens: Sequence[str]
    scores: Sequence[float]
    added: Sequence[AddedToken]
    outside: Sequence[str]

    def refuse_options(self, *names: str) -> None:
        """Raise InputError when the model sets one of these options, which llama.cpp does not have."""
        for name in names:
            value = self.model.get(name)
            if value:
                raise InputError(f"{self.path}: the tokenizer sets {name} to {shown(value)}, which llama.cpp lacks.")

    def unknown_id(self) -> int | None:
        """The id of the token for what no other covers, given by number or by text."""
        number = self.model.get("unk_id")
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(self.tokens):
            return number
        text = self.model.get("unk_token")
        if not isinstance(text, str):
            return None
        if text in self.tokens:
            return self.tokens.index(text)
        return next((token.id for token in self.added if token.content == text), None)


def read_fast_tokenizer(
    folder: Path, document: Mapping[str, Any], tokenizer_config: Mapping[str, Any], size: int
) -> FastTokenizer:
    """Check a tokenizer.json.

    Args:
        document: its content.
        size: rows of the embedding.

    Raises:
        InputError: broken, of a kind that is not converted, or of another model.
    """
    path = folder / FAST
    model = document.get("model")
    if not isinstance(model, dict):
        raise InputError(f"{path} has no model.", _AGAIN)
    kind = _kind(path, model)
    scored = _scored(path, model) if kind == UNIGRAM else []
    numbered = _numbered(path, model) if kind != UNIGRAM else {}
    learned = [*((piece, number) for number, (piece, _) in enumerate(scored)), *numbered.items()]
    if not learned:
        raise InputError(f"{path} has an empty vocabulary.", _AGAIN)
    numbers = dict(learned)
    highest = max(numbers.values())
    require_rows(path, highest, size)
    tokens = [""] * (highest + 1)
    for piece, number in learned:
        if tokens[number]:
            raise InputError(f"{path}: {shown(tokens[number])} and {shown(piece)} both have the id {number}.", _AGAIN)
        tokens[number] = piece
    added: dict[int, AddedToken] = {}
    outside: list[str] = []
    # tokenizer.json decides; the other files fill in what it leaves out.
    for token in (*read_added_tokens(folder, tokenizer_config), *_listed(path, document)):
        if token.id >= size:
            outside.append(token.content)
        elif numbers.get(token.content, token.id) == token.id:
            added[token.id] = token
    return FastTokenizer(
        path,
        document,
        model,
        kind,
        tokens,
        [score for _, score in scored],
        [added[number] for number in sorted(added)],
        outside,
    )


def _kind(path: Path, model: Mapping[str, Any]) -> str:
    """The kind of model; files of old versions do not name it."""
    kind = model.get("type")
    if kind is None:
        kind = BPE if "merges" in model else UNIGRAM if isinstance(model.get("vocab"), list) else WORD_PIECE
    if kind not in (BPE, UNIGRAM, WORD_PIECE):
        raise InputError(
            f"{path}: tokenizers of type {shown(kind)} are not converted.",
            f"Known are {BPE}, {UNIGRAM}, {WORD_PIECE}, and sentencepiece's tokenizer.model.",
        )
    return str(kind)


def _numbered(path: Path, model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        raise InputError(f"{path}: the vocabulary is not an object.", _AGAIN)
    for piece, number in vocab.items():
        token_id(path, piece, number)
    return vocab


def _scored(path: Path, model: Mapping[str, Any]) -> list[tuple[str, float]]:
    vocab = model.get("vocab")
    found: list[tuple[str, float]] = []
    for entry in vocab if isinstance(vocab, list) else [None]:
        if (
            not isinstance(entry, list)
            or len(entry) != 2
            or not isinstance(entry[0], str)
            or isinstance(entry[1], bool)
            or not isinstance(entry[1], int | float)
            or not abs(entry[1]) < 1e30
        ):
            raise InputError(f"{path}: the vocabulary is not a list of tokens with scores.", _AGAIN)
        found.append((entry[0], float(entry[1])))
    return found


def _listed(path: Path, document: Mapping[str, Any]) -> list[AddedToken]:
    entries = document.get("added_tokens") or []
    if not isinstance(entries, list):
        raise InputError(f"{path}: added_tokens is not a list.", _AGAIN)
    return [
        added_token(path, entry, number, entry.get("id") if isinstance(entry, dict) else None)
        for number, entry in enumerate(entries)
    ]
