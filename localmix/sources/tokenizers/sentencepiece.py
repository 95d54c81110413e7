"""tokenizer.model, a sentencepiece model → llama.cpp's vocabulary of kind `llama`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType as ValueType
from gguf.constants import TokenType

from localmix.errors import InputError
from localmix.sources.base import MetaValue, array, boolean, text
from localmix.sources.positional import read_whole
from localmix.sources.tokenizers.vocabulary import (
    ADDED_SCORE,
    Vocabulary,
    padding_notes,
    read_added_tokens,
    require_bytes,
    require_distinct,
    require_rows,
)

MODEL = "tokenizer.model"

_MODEL_LIMIT = 64 * 2**20


def read_sentencepiece(
    folder: Path, tokenizer_config: Mapping[str, Any], size: int, notes: list[str]
) -> dict[str, MetaValue]:
    """The vocabulary of tokenizer.model and what was added to it, as key-values.

    Args:
        size: rows of the embedding; the vocabulary is padded to it.
        notes: grows by padding and left-out tokens.

    Raises:
        InputError: no sentencepiece model, of another model, or one that llama.cpp cannot use.
    """
    path = folder / MODEL
    vocabulary = _read_pieces(path, size)
    outside: list[str] = []
    for token in read_added_tokens(folder, tokenizer_config):
        if token.id < size:
            vocabulary.put_added(token, ADDED_SCORE)
        else:
            outside.append(token.content)
    notes += padding_notes(folder, vocabulary, outside)
    require_distinct(folder, vocabulary)
    require_bytes(path, vocabulary)
    metadata = pieces_metadata(vocabulary)
    space_prefix = tokenizer_config.get("add_prefix_space")
    if isinstance(space_prefix, bool):
        metadata["tokenizer.ggml.add_space_prefix"] = boolean(space_prefix)
    return metadata


def pieces_metadata(vocabulary: Vocabulary) -> dict[str, MetaValue]:
    """A vocabulary that merges neighbours into the piece of the highest score, as key-values."""
    return {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.tokens": array(ValueType.STRING, vocabulary.tokens),
        "tokenizer.ggml.scores": array(ValueType.FLOAT32, vocabulary.scores),
        "tokenizer.ggml.token_type": array(ValueType.INT32, vocabulary.kinds),
    }


def _read_pieces(path: Path, size: int) -> Vocabulary:
    """The learned pieces, padded to `size` with tokens that no text contains."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(read_whole(path, _MODEL_LIMIT))
        pieces = [processor.IdToPiece(number) for number in range(processor.GetPieceSize())]
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path} is not a sentencepiece model.", "Download the file again.") from error
    require_rows(path, len(pieces) - 1, size)
    vocabulary = Vocabulary.padding(size)
    kinds = (
        (processor.IsUnknown, TokenType.UNKNOWN),
        (processor.IsControl, TokenType.CONTROL),
        (processor.IsUnused, TokenType.UNUSED),
        (processor.IsByte, TokenType.BYTE),
    )
    for number, piece in enumerate(pieces):
        kind = next((kind for holds, kind in kinds if holds(number)), TokenType.NORMAL)
        vocabulary.put(number, piece, processor.GetScore(number), kind)
    return vocabulary
