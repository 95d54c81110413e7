"""BPE of a tokenizer.json: of bytes (GPT-2, Llama 3, Qwen), or of characters with ▁ for spaces (Llama 2, Gemma)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gguf.constants import GGUFValueType as ValueType
from gguf.constants import TokenType

from localmix.errors import InputError
from localmix.sources.base import MetaValue, array, boolean, text
from localmix.sources.documents import shown
from localmix.sources.tokenizers.pre_tokenizers import members, puts_space, recognise
from localmix.sources.tokenizers.sentencepiece import pieces_metadata
from localmix.sources.tokenizers.tokenizer_json import FastTokenizer
from localmix.sources.tokenizers.vocabulary import (
    ADDED_SCORE,
    SPACE,
    Vocabulary,
    padding_notes,
    require_bytes,
    require_distinct,
)

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

# llama.cpp's merges are written as two tokens with a space between; a space within a token becomes this.
_SPACE_IN_MERGE = chr(256 + ord(" "))

# llama.cpp's BPE that takes characters, with ▁ for spaces, instead of bytes; it splits at line ends only.
_CHARACTERS = "sarvam-moe"


def convert_bpe(
    folder: Path, tokenizer: FastTokenizer, size: int, notes: list[str], pre: str | None
) -> dict[str, MetaValue]:
    """A BPE tokenizer as key-values.

    Args:
        size: rows of the embedding; the vocabulary is padded to it.
        notes: grows by padding and left-out tokens.
        pre: llama.cpp's name for the way it splits, instead of recognising it.

    Raises:
        InputError: broken, or split in a way that llama.cpp does not know.
    """
    tokenizer.refuse_options("continuing_subword_prefix", "end_of_word_suffix")
    merges = _merges(tokenizer)
    metaspace = None if pre else _metaspace(tokenizer)
    vocabulary = Vocabulary.padding(size)
    for number, token in enumerate(tokenizer.tokens):
        if token:
            byte = metaspace is not None and _BYTE.fullmatch(token)
            vocabulary.put(number, token, 0.0, TokenType.BYTE if byte else TokenType.NORMAL)
    for added in tokenizer.added:
        vocabulary.put_added(added, ADDED_SCORE)
    notes += padding_notes(folder, vocabulary, list(tokenizer.outside))
    require_distinct(folder, vocabulary)
    if metaspace is None:
        name = pre or recognise(tokenizer.path, tokenizer.document, bool(tokenizer.model.get("ignore_merges")))
        return _merged(vocabulary, name, merges)
    require_bytes(tokenizer.path, vocabulary)
    unknown = tokenizer.unknown_id()
    if unknown is not None:
        vocabulary.kinds[unknown] = int(TokenType.UNKNOWN)
    ranks = _ranks(vocabulary, merges)
    if ranks is not None:
        for number, token in enumerate(vocabulary.tokens):
            if vocabulary.kinds[number] == TokenType.NORMAL:
                vocabulary.scores[number] = -float(ranks.get(token, len(merges)))
        return pieces_metadata(vocabulary) | {"tokenizer.ggml.add_space_prefix": boolean(metaspace)}
    if metaspace:
        raise InputError(
            f"{tokenizer.path}: its merges are not those of a sentencepiece model, and it puts a space before a text; "
            "llama.cpp has no such tokenizer.",
        )
    return _merged(vocabulary, _CHARACTERS, merges)


def _merged(vocabulary: Vocabulary, pre: str, merges: Sequence[tuple[str, str]]) -> dict[str, MetaValue]:
    """A vocabulary that merges neighbours in the order of a list."""
    return {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(pre),
        "tokenizer.ggml.tokens": array(ValueType.STRING, vocabulary.tokens),
        "tokenizer.ggml.token_type": array(ValueType.INT32, vocabulary.kinds),
        "tokenizer.ggml.merges": array(
            ValueType.STRING,
            (f"{left.replace(' ', _SPACE_IN_MERGE)} {right.replace(' ', _SPACE_IN_MERGE)}" for left, right in merges),
        ),
    }


def _merges(tokenizer: FastTokenizer) -> list[tuple[str, str]]:
    """The pairs that are merged, first ones first; written as "a b" or, in newer files, as ["a", "b"]."""
    entries = tokenizer.model.get("merges")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{tokenizer.path} has no merges.", "Download the file again.")
    known = set(tokenizer.tokens)
    merges: list[tuple[str, str]] = []
    for number, entry in enumerate(entries):
        pair = entry.split(" ") if isinstance(entry, str) else entry
        # Both sides and what they make are tokens, or the file is not what the tokenizer was trained to.
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(side, str) and side in known for side in pair)
            or pair[0] + pair[1] not in known
        ):
            raise InputError(
                f"{tokenizer.path}: merge {number} ({shown(entry)}) is not of two tokens that make a third.",
                "Download the file again.",
            )
        merges.append((pair[0], pair[1]))
    return merges


def _metaspace(tokenizer: FastTokenizer) -> bool | None:
    """Whether a space is put before a text, for a tokenizer of characters; None for one of bytes.

    Spaces become ▁ either in the normalizer (Llama 2, Gemma) or in the pre_tokenizer (Mistral, newer Llama 2).
    """
    prefix, replaced = False, False
    added = {token.content for token in tokenizer.added}
    for step in members(tokenizer.document.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif step.get("type") == "Replace" and (step.get("pattern"), step.get("content")) == ({"String": " "}, SPACE):
            replaced = True
        else:
            return None
    for step in members(tokenizer.document.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace" and step.get("replacement") == SPACE and not replaced:
            prefix, replaced = prefix or puts_space(step), True
            if step.get("split", True) and any(SPACE in token[1:] for token in tokenizer.tokens if token not in added):
                return None
        # Gemma's file splits at spaces that its normalizer has replaced: it does nothing.
        elif not (step.get("type") == "Split" and step.get("pattern") == {"String": " "} and replaced):
            return None
    return prefix if replaced and tokenizer.model.get("byte_fallback") else None


def _ranks(vocabulary: Vocabulary, merges: Sequence[tuple[str, str]]) -> dict[str, int] | None:
    """Where each token stands in the order of merging; None unless the merges are those of a sentencepiece model.

    There any two neighbours are merged that make a token, the best token first. So every way to cut a token into
    two must be in the list, all ways of one token together.
    """
    ranks: dict[str, int] = {}
    previous = ""
    for rank, (left, right) in enumerate(merges):
        made = left + right
        if made != previous and ranks.setdefault(made, rank) != rank:
            return None
        previous = made
    normal = {
        token for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind == TokenType.NORMAL
    }
    listed = set(merges)
    for token in normal:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in normal and pair[1] in normal and pair not in listed:
                return None
    return ranks
