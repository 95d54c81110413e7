"""A checkpoint's tokenizer → the `tokenizer.*` key-values of a GGUF file.

tokenizer.model is taken where there is one, else tokenizer.json; tokenizer_config.json, added_tokens.json,
config.json and the chat templates say the rest. Nothing is executed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localmix.errors import InputError, UsageError
from localmix.sources.base import MetaValue, boolean, u32
from localmix.sources.documents import read_optional_object
from localmix.sources.tokenizers.bpe import convert_bpe
from localmix.sources.tokenizers.chat_templates import read_chat_templates
from localmix.sources.tokenizers.pre_tokenizers import check_name
from localmix.sources.tokenizers.sentencepiece import MODEL, read_sentencepiece
from localmix.sources.tokenizers.special import FAST, SPECIAL_KEYS, read_special_tokens, require_ids
from localmix.sources.tokenizers.tokenizer_json import BPE, UNIGRAM, read_fast_tokenizer
from localmix.sources.tokenizers.unigram import convert_unigram
from localmix.sources.tokenizers.vocabulary import CONFIG
from localmix.sources.tokenizers.wordpiece import convert_word_piece


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary as GGUF key-values.

    Attributes:
        metadata: the `tokenizer.*` key-values.
        notes: padding and left-out tokens, for the user.
    """

    metadata: dict[str, MetaValue]
    notes: list[str] = field(default_factory=list)


def has_tokenizer(folder: Path) -> bool:
    """Whether there is any tokenizer in the folder, of a kind that can be read or not."""
    return any(os.path.exists(folder / name) for name in (MODEL, FAST))


def read_tokenizer(
    folder: Path,
    config: Mapping[str, Any],
    size: int,
    extra_tokens: Mapping[int, Mapping[str, int]],
    pre: str | None = None,
) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        folder: the checkpoint.
        config: content of config.json.
        size: rows of the embedding; the vocabulary is padded to it.
        extra_tokens: special tokens of vocabularies of a certain size (`Architecture.extra_tokens`).
        pre: llama.cpp's name for the way that a BPE splits, instead of recognising it.

    Raises:
        InputError: missing, broken, of a kind that is not converted, or of another model.
        UsageError: llama.cpp has no `pre` of that name, or the tokenizer is no BPE of tokenizer.json.
    """
    if pre is not None:
        check_name(pre)
    notes: list[str] = []
    tokenizer_config = read_optional_object(folder / CONFIG)
    fast = read_optional_object(folder / FAST)
    if os.path.exists(folder / MODEL):
        _refuse_pre(pre, folder / MODEL)
        metadata = read_sentencepiece(folder, tokenizer_config, size, notes)
        special = read_special_tokens(folder, config, tokenizer_config, fast, size, notes)
    elif os.path.exists(folder / FAST):
        tokenizer = read_fast_tokenizer(folder, fast, tokenizer_config, size)
        special = read_special_tokens(folder, config, tokenizer_config, fast, size, notes)
        if tokenizer.kind == BPE:
            metadata = convert_bpe(folder, tokenizer, size, notes, pre)
        elif tokenizer.kind == UNIGRAM:
            _refuse_pre(pre, tokenizer.path)
            metadata = convert_unigram(folder, tokenizer, size, notes)
        else:
            _refuse_pre(pre, tokenizer.path)
            metadata = convert_word_piece(folder, tokenizer, size, notes)
            require_ids(folder, special, needed=("bos", "sep"))
        require_ids(folder, special)
        # What is not said is not put there: some of llama.cpp's pre-tokenizers do it by default.
        metadata |= {f"tokenizer.ggml.add_{kind}_token": boolean(False) for kind in ("bos", "eos")}
    else:
        raise InputError(f"{folder} has no {MODEL} and no {FAST}.", "Download the tokenizer's files of this model.")
    metadata |= special.metadata
    metadata |= {SPECIAL_KEYS[kind]: u32(number) for kind, number in extra_tokens.get(size, {}).items()}
    metadata |= read_chat_templates(folder, tokenizer_config)
    return Tokenizer(metadata, notes)


def _refuse_pre(pre: str | None, path: Path) -> None:
    """Refuse a name for the way of splitting, of a tokenizer that llama.cpp knows no such ways of."""
    if pre is not None:
        raise UsageError(f"--pre is for BPE tokenizers of a {FAST}; {path} is of another kind.", "Leave it out.")
