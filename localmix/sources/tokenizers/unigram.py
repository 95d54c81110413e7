"""Unigram of a tokenizer.json (T5, XLM-RoBERTa) → llama.cpp's vocabulary of kind `t5`."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType as ValueType
from gguf.constants import TokenType

from localmix.errors import InputError
from localmix.sources.base import MetaValue, array, boolean, text
from localmix.sources.documents import shown
from localmix.sources.tokenizers.pre_tokenizers import members, puts_space
from localmix.sources.tokenizers.tokenizer_json import FastTokenizer
from localmix.sources.tokenizers.vocabulary import SPACE, Vocabulary, padding_notes, require_distinct


def convert_unigram(folder: Path, tokenizer: FastTokenizer, size: int, notes: list[str]) -> dict[str, MetaValue]:
    """A Unigram tokenizer as key-values.

    Args:
        size: rows of the embedding; the vocabulary is padded to it.
        notes: grows by padding and left-out tokens.

    Raises:
        InputError: broken, or with steps that llama.cpp does not have.
    """
    tokenizer.refuse_options("byte_fallback")
    unknown = tokenizer.unknown_id()
    if unknown is None:
        raise InputError(f"{tokenizer.path} has no unknown token, which llama.cpp needs for a Unigram model.")
    charsmap, merges_spaces = _normalizer(tokenizer)
    prefix, splits_at_spaces = _pre_tokenizer(tokenizer)
    vocabulary = Vocabulary.padding(size)
    for number, (token, score) in enumerate(zip(tokenizer.tokens, tokenizer.scores, strict=True)):
        vocabulary.put(number, token, score, TokenType.NORMAL)
    for added in tokenizer.added:
        learned = added.id < len(tokenizer.scores)
        vocabulary.put_added(added, tokenizer.scores[added.id] if learned else 0.0)
    vocabulary.kinds[unknown] = int(TokenType.UNKNOWN)
    notes += padding_notes(folder, vocabulary, list(tokenizer.outside))
    require_distinct(folder, vocabulary)
    metadata = {
        "tokenizer.ggml.model": text("t5"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.tokens": array(ValueType.STRING, vocabulary.tokens),
        "tokenizer.ggml.scores": array(ValueType.FLOAT32, vocabulary.scores),
        "tokenizer.ggml.token_type": array(ValueType.INT32, vocabulary.kinds),
        "tokenizer.ggml.add_space_prefix": boolean(prefix),
        "tokenizer.ggml.remove_extra_whitespaces": boolean(merges_spaces or splits_at_spaces),
    }
    if charsmap:
        metadata["tokenizer.ggml.precompiled_charsmap"] = array(ValueType.UINT8, charsmap)
    return metadata


def _normalizer(tokenizer: FastTokenizer) -> tuple[bytes, bool]:
    """The table of replacements, empty without one, and whether several spaces become one."""
    charsmap, merges_spaces = b"", False
    for step in members(tokenizer.document.get("normalizer"), "normalizers"):
        if step.get("type") == "Precompiled" and not charsmap:
            charsmap = _charsmap(tokenizer.path, step)
        elif step.get("type") == "Replace" and step.get("pattern") == {"Regex": " {2,}"}:
            merges_spaces = True
        elif step.get("type") != "Strip":
            raise _unknown(tokenizer, "normalizer", step)
    return charsmap, merges_spaces


def _charsmap(path: Path, step: Mapping[str, Any]) -> bytes:
    """sentencepiece's compiled table; llama.cpp walks it unchecked, so its first number is checked here."""
    try:
        table = b64decode(step["precompiled_charsmap"] or "", validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise InputError(f"{path}: precompiled_charsmap is not base64.", "Download the file again.") from error
    trie = int.from_bytes(table[:4], "little")
    if table and (len(table) < 4 or trie % 4 or trie + 4 >= len(table) or table[-1]):
        raise InputError(f"{path}: precompiled_charsmap is cut off.", "Download the file again.")
    return table


def _pre_tokenizer(tokenizer: FastTokenizer) -> tuple[bool, bool]:
    """Whether a space is put before a text, and whether it is split at spaces, so that their number is lost."""
    prefix, splits = False, False
    found = False
    for step in members(tokenizer.document.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "WhitespaceSplit":
            splits = True
        elif step.get("type") == "Metaspace" and step.get("replacement") == SPACE:
            prefix, found = puts_space(step), True
        else:
            raise _unknown(tokenizer, "pre_tokenizer", step)
    if not found:
        raise InputError(f"{tokenizer.path}: its pre_tokenizer does not mark spaces with {SPACE}, as llama.cpp does.")
    return prefix, splits


def _unknown(tokenizer: FastTokenizer, place: str, step: Mapping[str, Any]) -> InputError:
    return InputError(
        f"{tokenizer.path}: llama.cpp's Unigram has no step {shown(step.get('type'))} in its {place}.",
        "Convert it with `localmix convert --upstream`.",
    )
