"""A checkpoint's sentencepiece tokenizer → the `tokenizer.*` key-values of a GGUF file.

Read are tokenizer.model, added_tokens.json, tokenizer_config.json, tokenizer.json (for ids and what is added
to a text), chat templates, and config.json's ids. What wins over what is llama.cpp's converter's choice, so
that both write the same vocabulary.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType as ValueType
from gguf.constants import TokenType

from localmix.errors import InputError
from localmix.sources.base import MetaValue, array, boolean, text, u32
from localmix.sources.documents import listed, read_optional_object, shown
from localmix.sources.positional import read_whole

MODEL = "tokenizer.model"
_CONFIG = "tokenizer_config.json"
_FAST = "tokenizer.json"

_MODEL_LIMIT = 64 * 2**20
_TEMPLATE_LIMIT = 2**20

# Scores that put added tokens after every learned piece, and padding after those.
_ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0

# Kinds of special tokens: the name in the files → the GGUF key of its id.
SPECIAL_KEYS: Mapping[str, str] = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
    "prefix": "tokenizer.ggml.prefix_token_id",
    "suffix": "tokenizer.ggml.suffix_token_id",
    "middle": "tokenizer.ggml.middle_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
}
_EVERY_MODEL = ("bos", "eos", "unk", "sep", "pad", "mask")

# Kinds that can be put around a text by themselves, and the key of that flag.
_ADD_KEYS: Mapping[str, str] = {
    "bos": "tokenizer.ggml.add_bos_token",
    "eos": "tokenizer.ggml.add_eos_token",
    "sep": "tokenizer.ggml.add_sep_token",
}

# Added tokens that are control tokens although their entry does not say so.
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)


@dataclass
class _Vocabulary:
    """The three lists that describe a vocabulary, all of the same length."""

    tokens: list[str]
    scores: list[float]
    kinds: list[int]

    def put(self, token_id: int, token: str, score: float, kind: int) -> None:
        self.tokens[token_id], self.scores[token_id], self.kinds[token_id] = token, score, kind


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
    return any(os.path.exists(folder / name) for name in (MODEL, _FAST))


def read_tokenizer(
    folder: Path,
    config: Mapping[str, Any],
    size: int,
    extra_tokens: Mapping[int, Mapping[str, int]],
) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        folder: the checkpoint.
        config: content of config.json.
        size: rows of the embedding; the vocabulary is padded to it.
        extra_tokens: special tokens of vocabularies of a certain size (`Architecture.extra_tokens`).

    Raises:
        InputError: missing, broken, of another kind, or of another model.
    """
    notes: list[str] = []
    tokenizer_config = read_optional_object(folder / _CONFIG)
    fast = read_optional_object(folder / _FAST)
    vocabulary = _read_pieces(folder, size)
    _put_added_tokens(folder, tokenizer_config, vocabulary, notes)
    _require_loadable(folder, vocabulary)
    metadata = {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.tokens": array(ValueType.STRING, vocabulary.tokens),
        "tokenizer.ggml.scores": array(ValueType.FLOAT32, vocabulary.scores),
        "tokenizer.ggml.token_type": array(ValueType.INT32, vocabulary.kinds),
    }
    ids = _special_ids(folder, config, tokenizer_config, fast, size, notes)
    ids |= extra_tokens.get(size, {})
    metadata |= {SPECIAL_KEYS[kind]: u32(token_id) for kind, token_id in ids.items()}
    added = _added_around_text(tokenizer_config, fast)
    metadata |= {_ADD_KEYS[kind]: boolean(value) for kind, value in added.items()}
    space_prefix = tokenizer_config.get("add_prefix_space")
    if isinstance(space_prefix, bool):
        metadata["tokenizer.ggml.add_space_prefix"] = boolean(space_prefix)
    metadata |= _chat_templates(folder, tokenizer_config)
    return Tokenizer(metadata, notes)


def _read_pieces(folder: Path, size: int) -> _Vocabulary:
    """The learned pieces, padded to `size` with tokens that no text contains."""
    from sentencepiece import SentencePieceProcessor

    path = folder / MODEL
    if not os.path.exists(path):
        if os.path.exists(folder / _FAST):
            raise InputError(
                f"{folder} has only {_FAST}; vocabularies other than sentencepiece are not converted yet.",
                f"If the model has a {MODEL}, put it beside {_FAST}.",
            )
        raise InputError(f"{folder} has no {MODEL}.", "Download the tokenizer's files of this model.")
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(read_whole(path, _MODEL_LIMIT))
        pieces = [processor.IdToPiece(token_id) for token_id in range(processor.GetPieceSize())]
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path} is not a sentencepiece model.", "Download the file again.") from error
    if len(pieces) > size:
        raise InputError(
            f"{path} has {len(pieces)} tokens, the embedding only {size} rows.",
            "They belong to different models, or an adapter that enlarges the embedding is not merged yet.",
        )
    vocabulary = _Vocabulary(
        [f"[PAD{token_id}]" for token_id in range(size)],
        [_PADDING_SCORE] * size,
        [int(TokenType.UNUSED)] * size,
    )
    kinds = (
        (processor.IsUnknown, TokenType.UNKNOWN),
        (processor.IsControl, TokenType.CONTROL),
        (processor.IsUnused, TokenType.UNUSED),
        (processor.IsByte, TokenType.BYTE),
    )
    for token_id, piece in enumerate(pieces):
        kind = next((kind for holds, kind in kinds if holds(token_id)), TokenType.NORMAL)
        vocabulary.put(token_id, piece, processor.GetScore(token_id), int(kind))
    return vocabulary


def _put_added_tokens(
    folder: Path, tokenizer_config: Mapping[str, Any], vocabulary: _Vocabulary, notes: list[str]
) -> None:
    """Tokens that were added after the pieces were learned; the later file wins."""
    size = len(vocabulary.tokens)
    outside: list[str] = []
    for token, token_id, special in _added_tokens(folder, tokenizer_config):
        if token_id >= size:
            outside.append(token)
            continue
        kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        vocabulary.put(token_id, token, _ADDED_SCORE, int(kind))
    if outside:
        notes.append(
            f"{folder}: {len(outside)} added tokens have no row in the embedding and are left out: "
            f"{listed(dict.fromkeys(outside), 3)}."
        )
    padding = sum(token == f"[PAD{token_id}]" for token_id, token in enumerate(vocabulary.tokens))
    if padding:
        notes.append(
            f"{folder}: the embedding has {size} rows for {size - padding} tokens; "
            f"{padding} are padded with unused tokens."
        )


def _added_tokens(folder: Path, tokenizer_config: Mapping[str, Any]) -> Iterator[tuple[str, int, bool]]:
    """Added tokens as (token, id, whether it controls the model instead of standing for text)."""
    path = folder / "added_tokens.json"
    for token, token_id in read_optional_object(path).items():
        yield token, _token_id(path, token, token_id), False
    path = folder / _CONFIG
    decoder = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise InputError(f"{path}: added_tokens_decoder is not an object.", "Download the file again.")
    for key, entry in decoder.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(content, str):
            raise InputError(f"{path}: added token {shown(key)} has no content.", "Download the file again.")
        number: object = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else key
        special = bool(entry.get("special")) or _LOOKS_SPECIAL.fullmatch(content) is not None
        # llama.cpp looks for tokens that stand for text in the text itself, where spaces are spaces.
        token = content if special else content.replace("▁", " ")
        yield token, _token_id(path, token, number), special


def _token_id(path: Path, token: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{path}: token {shown(token)} has the id {shown(value)}.", "Ids count from 0.")
    return value


def _require_loadable(folder: Path, vocabulary: _Vocabulary) -> None:
    """Refuse what would make the engine abort later: odd strings, a token twice, no bytes to fall back on."""
    seen: dict[str, int] = {}
    for token_id, token in enumerate(vocabulary.tokens):
        if not _is_text(token):
            raise InputError(f"{folder}: token {token_id} ({shown(token)}) is not valid Unicode.")
        if seen.setdefault(token, token_id) != token_id:
            raise InputError(
                f"{folder}: tokens {seen[token]} and {token_id} are both {shown(token)}.",
                "Repair added_tokens.json or tokenizer_config.json.",
            )
    count = vocabulary.kinds.count(int(TokenType.BYTE))
    if count != 256:
        raise InputError(
            f"{folder / MODEL} has {count} of 256 byte tokens; llama.cpp needs all of them for text that no "
            "other token covers.",
            "Only models trained with byte fallback can be converted.",
        )


def _is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: JSON can smuggle in halves of surrogate pairs."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _special_ids(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    fast: Mapping[str, Any],
    size: int,
    notes: list[str],
) -> dict[str, int]:
    """Ids of the special tokens: by the token's text in tokenizer.json, else by number in config.json."""
    ids: dict[str, int] = {}
    entries = fast.get("added_tokens")
    by_text: dict[str, Any] = {}
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            by_text.setdefault(entry["content"], entry.get("id"))
    for kind in _EVERY_MODEL:
        candidates = (
            (folder / _FAST, by_text.get(_special_text(tokenizer_config, kind) or "")),
            (folder / "config.json", config.get(f"{kind}_token_id")),
        )
        for path, value in candidates:
            # config.json may list several ends of text; the format holds one, so the engine's own list rules.
            if isinstance(value, bool) or not isinstance(value, int) or kind in ids:
                continue
            if value == -1:
                notes.append(f"{path}: the {kind} token is -1, which is read as none.")
            elif not 0 <= value < size:
                raise InputError(
                    f"{path}: the {kind} token is {shown(value)}, the vocabulary has {size} tokens.",
                    "Tokenizer and weights belong to different models.",
                )
            else:
                ids[kind] = value
    return ids


def _special_text(tokenizer_config: Mapping[str, Any], kind: str) -> str | None:
    """The text of a special token, given as a string or as an object with `content`."""
    entry = tokenizer_config.get(f"{kind}_token")
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _added_around_text(tokenizer_config: Mapping[str, Any], fast: Mapping[str, Any]) -> dict[str, bool]:
    """Whether bos, eos and sep are put around a text; tokenizer.json's template wins over the flags."""
    added = _added_by_template(tokenizer_config, fast.get("post_processor"))
    for kind in _ADD_KEYS:
        flag = tokenizer_config.get(f"add_{kind}_token")
        if isinstance(flag, bool):
            added.setdefault(kind, flag)
    return added


def _added_by_template(tokenizer_config: Mapping[str, Any], processor: Any) -> dict[str, bool]:
    """What the templates of tokenizer.json say: `single` for one text, `pair` for two."""
    added: dict[str, bool] = {}
    if not isinstance(processor, dict):
        return added
    processors = processor.get("processors", [processor])
    for entry in processors if isinstance(processors, list) else []:
        if not isinstance(entry, dict) or entry.get("type") != "TemplateProcessing":
            continue
        bos, eos = _special_text(tokenizer_config, "bos"), _special_text(tokenizer_config, "eos")
        sep, cls = _special_text(tokenizer_config, "sep"), _special_text(tokenizer_config, "cls")
        single, pair = _template(entry, "single"), _template(entry, "pair")
        first = single[0].special if len(single) > 1 else None
        last = single[-1].special if len(single) > 1 else None
        if first is not None:
            added["bos"] = first in (bos, cls) or bos is None
        if last is not None:
            added["eos"] = last == eos or eos is None
        if first is not None and pair and pair[0].special == first:
            pair = pair[1:]
        if last is not None and pair and pair[-1].special == last:
            pair = pair[:-1]
        if len(pair) > 2 and (pair[0].sequence, pair[-1].sequence) == ("A", "B"):
            between = [item.special for item in pair[1:-1]]
            ends = {sep, eos} - {None}
            added["sep"] = (between[0] in ends and last is None) or (len(between) == 2 and between[1] in ends)
    return added


@dataclass(frozen=True)
class _TemplateItem:
    """One place of a template: a special token or one of the texts, `A` or `B`."""

    special: str | None
    sequence: str | None


def _template(entry: Mapping[str, Any], name: str) -> list[_TemplateItem]:
    def identity(item: Any, kind: str) -> str | None:
        inner = item.get(kind) if isinstance(item, dict) else None
        found = inner.get("id") if isinstance(inner, dict) else None
        return found if isinstance(found, str) else None

    items = entry.get(name)
    return [
        _TemplateItem(identity(item, "SpecialToken"), identity(item, "Sequence"))
        for item in (items if isinstance(items, list) else [])
    ]


def _chat_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, MetaValue]:
    """The chat template, and further ones by name.

    Raises:
        InputError: of a kind that is no template, too big, or not text.
    """
    path = folder / _CONFIG
    found: Any = tokenizer_config.get("chat_template")
    if found is None:
        path, found = _template_beside(folder)
    if found is None:
        return {}
    choices = found if isinstance(found, list) else [{"name": "default", "template": found}]
    metadata: dict[str, MetaValue] = {}
    names: set[str] = set()
    for choice in choices:
        name = choice.get("name") if isinstance(choice, dict) else None
        template = choice.get("template") if isinstance(choice, dict) else None
        if not isinstance(name, str) or not isinstance(template, str) or not _is_text(template):
            raise InputError(f"{path}: the chat template is not text.", "Download the file again.")
        name = re.sub("[^A-Za-z0-9]", "_", name)
        if name == "default":
            metadata["tokenizer.chat_template"] = text(template)
        elif name:
            names.add(name)
            metadata[f"tokenizer.chat_template.{name}"] = text(template)
    if names:
        metadata["tokenizer.chat_templates"] = array(ValueType.STRING, sorted(names))
    return metadata


def _template_beside(folder: Path) -> tuple[Path, Any]:
    """The chat template in a file of its own, and where it was found."""
    path = folder / "chat_template.jinja"
    if os.path.exists(path):
        further = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        if not further:
            return path, _template_text(path)
        return path, [
            {"name": name, "template": _template_text(file)}
            for name, file in [("default", path), *((file.stem, file) for file in further)]
        ]
    path = folder / "chat_template.json"
    return path, read_optional_object(path).get("chat_template")


def _template_text(path: Path) -> str:
    try:
        return read_whole(path, _TEMPLATE_LIMIT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8.", "Download the file again.") from error
