"""WordPiece of a tokenizer.json (BERT and the embedding models after it) → llama.cpp's vocabulary of kind `bert`."""

from __future__ import annotations

from pathlib import Path

from gguf.constants import GGUFValueType as ValueType
from gguf.constants import TokenType

from localmix.errors import InputError
from localmix.sources.base import MetaValue, array, boolean, text
from localmix.sources.documents import shown
from localmix.sources.tokenizers.pre_tokenizers import members
from localmix.sources.tokenizers.tokenizer_json import FastTokenizer
from localmix.sources.tokenizers.vocabulary import ADDED_SCORE, SPACE, Vocabulary, padding_notes, require_distinct

# What a token starts with that goes on a word.
_CONTINUED = "##"


def convert_word_piece(folder: Path, tokenizer: FastTokenizer, size: int, notes: list[str]) -> dict[str, MetaValue]:
    """A WordPiece tokenizer as key-values.

    llama.cpp marks the start of a word where the file marks its continuation: `word` → `▁word`, `##s` → `s`.

    Args:
        size: rows of the embedding; the vocabulary is padded to it.
        notes: grows by padding and left-out tokens.

    Raises:
        InputError: broken, or not BERT's way to split.
    """
    prefix = tokenizer.model.get("continuing_subword_prefix", _CONTINUED)
    if prefix != _CONTINUED:
        raise InputError(f"{tokenizer.path} continues a word with {shown(prefix)}, not with {_CONTINUED} as BERT does.")
    normalizer = _normalizer(tokenizer)
    splits = [step.get("type") for step in members(tokenizer.document.get("pre_tokenizer"), "pretokenizers")]
    if splits != ["BertPreTokenizer"]:
        raise InputError(f"{tokenizer.path} splits a text by {shown(splits)}, not as BERT and llama.cpp do.")
    vocabulary = Vocabulary.padding(size)
    for number, token in enumerate(tokenizer.tokens):
        if token:
            vocabulary.put(number, token, 0.0, TokenType.NORMAL)
    for added in tokenizer.added:
        vocabulary.put_added(added, ADDED_SCORE)
    notes += padding_notes(folder, vocabulary, list(tokenizer.outside))
    vocabulary.tokens = [
        token
        if kind == TokenType.CONTROL
        else token.removeprefix(_CONTINUED)
        if token.startswith(_CONTINUED)
        else SPACE + token
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    ]
    require_distinct(folder, vocabulary)
    return {
        "tokenizer.ggml.model": text("bert"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.tokens": array(ValueType.STRING, vocabulary.tokens),
        "tokenizer.ggml.token_type": array(ValueType.INT32, vocabulary.kinds),
        **normalizer,
    }


def _normalizer(tokenizer: FastTokenizer) -> dict[str, MetaValue]:
    """Whether letters become lower case and lose their accents; llama.cpp does the rest of BERT's steps itself."""
    found: dict[str, MetaValue] = {}
    for step in members(tokenizer.document.get("normalizer"), "normalizers"):
        if step.get("type") != "BertNormalizer" or not step.get("clean_text") or not step.get("handle_chinese_chars"):
            raise InputError(
                f"{tokenizer.path} changes a text by {shown(step)}, not as BERT and llama.cpp do.",
                "Convert it with `localmix convert --upstream`.",
            )
        for name in ("lowercase", "strip_accents"):
            if isinstance(step.get(name), bool):
                found[f"tokenizer.ggml.normalizer.{name}"] = boolean(step[name])
    return found
