"""Special tokens: their ids, and which of them are put around a text.

What wins over what is llama.cpp's converter's choice (gguf-py, `SpecialVocab`), so that both write the same, but for
one thing: there a ByteLevel step, which every byte-level tokenizer has, overrules `add_bos_token` (DeepSeek).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmix.errors import InputError
from localmix.sources.base import MetaValue, boolean, u32
from localmix.sources.documents import shown
from localmix.sources.tokenizers.pre_tokenizers import members
from localmix.sources.tokenizers.vocabulary import CONFIG

FAST = "tokenizer.json"

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


@dataclass(frozen=True)
class SpecialTokens:
    """Ids by kind (`SPECIAL_KEYS`), and whether bos, eos and sep are put around a text (absent: not said)."""

    ids: Mapping[str, int]
    added: Mapping[str, bool]

    @property
    def metadata(self) -> dict[str, MetaValue]:
        """The `tokenizer.*` key-values."""
        return {SPECIAL_KEYS[kind]: u32(number) for kind, number in self.ids.items()} | {
            _ADD_KEYS[kind]: boolean(value) for kind, value in self.added.items()
        }


def read_special_tokens(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    fast: Mapping[str, Any],
    size: int,
    notes: list[str],
) -> SpecialTokens:
    """The special tokens of a checkpoint.

    Args:
        config, tokenizer_config, fast: content of config.json, tokenizer_config.json, tokenizer.json.
        size: rows of the embedding.
        notes: grows by ids that mean none.

    Raises:
        InputError: an id outside the vocabulary.
    """
    kinds = (*_EVERY_MODEL, "cls")
    texts = {kind: found for kind in kinds if (found := _text_of(tokenizer_config.get(f"{kind}_token")))}
    added: dict[str, bool] = {}
    if fast:
        for kind, other in (("bos", "cls"), ("eos", "sep")):
            if kind not in texts and other in texts:
                texts[kind] = texts[other]
        for processor in members(fast.get("post_processor"), "processors"):
            _apply_processor(processor, texts, added)
    for kind in _ADD_KEYS:
        flag = tokenizer_config.get(f"add_{kind}_token")
        if isinstance(flag, bool):
            added.setdefault(kind, flag)
    return SpecialTokens(_ids(folder, config, texts, fast, size, notes), added)


def _text_of(entry: Any) -> str:
    """The text of a special token, given as a string or as an object with `content`; empty if there is none."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else ""


def _ids(
    folder: Path,
    config: Mapping[str, Any],
    texts: Mapping[str, str],
    fast: Mapping[str, Any],
    size: int,
    notes: list[str],
) -> dict[str, int]:
    """Ids by the token's text in tokenizer.json, else by number in config.json."""
    ids: dict[str, int] = {}
    entries = fast.get("added_tokens")
    by_text: dict[str, Any] = {}
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            by_text.setdefault(entry["content"], entry.get("id"))
    for kind in (*_EVERY_MODEL, *(["eot"] if "eot" in texts else [])):
        candidates = (
            (folder / FAST, by_text.get(texts.get(kind, ""))),
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


def _apply_processor(step: Mapping[str, Any], texts: dict[str, str], added: dict[str, bool]) -> None:
    """Let one step of the post_processor say what is put around a text, and which tokens those are."""
    kind = step.get("type")
    if kind == "RobertaProcessing":
        added |= dict.fromkeys(_ADD_KEYS, True)
        for name in ("cls", "sep"):
            pair = step.get(name)
            if name not in texts and isinstance(pair, list) and pair and isinstance(pair[0], str):
                texts[name] = pair[0]
    elif kind == "TemplateProcessing":
        _apply_template(step, texts, added)


def _apply_template(step: Mapping[str, Any], texts: dict[str, str], added: dict[str, bool]) -> None:
    """What a template says: `single` for one text, `pair` for two."""
    single, pair = _template(step, "single"), _template(step, "pair")
    first = single[0].special if len(single) > 1 else None
    last = single[-1].special if len(single) > 1 else None
    if first is not None:
        texts.setdefault("bos", first)
        texts.setdefault("cls", first)
        added["bos"] = first in (texts["bos"], texts["cls"])
    if last is not None:
        if last != texts.get("eos"):
            # What ends a text here is not what ends a turn of the chat.
            if "eos" in texts:
                texts.setdefault("eot", texts["eos"])
            texts["eos"] = last
        added["eos"] = True
    if not pair:
        return
    if first is not None and pair[0].special == first:
        pair = pair[1:]
    if last is not None and pair and pair[-1].special == last:
        pair = pair[:-1]
    if len(pair) > 2 and (pair[0].sequence, pair[-1].sequence) == ("A", "B"):
        between = [item.special for item in pair[1:-1]]
        ends = {texts.get("sep"), texts.get("eos")} - {None}
        added["sep"] = (between[0] in ends and last is None) or (len(between) == 2 and between[1] in ends)
        if added["sep"] and "eos" in texts:
            texts.setdefault("sep", texts["eos"])


@dataclass(frozen=True)
class _TemplateItem:
    """One place of a template: a special token or one of the texts, `A` or `B`."""

    special: str | None
    sequence: str | None


def _template(step: Mapping[str, Any], name: str) -> list[_TemplateItem]:
    def identity(item: Any, kind: str) -> str | None:
        inner = item.get(kind) if isinstance(item, dict) else None
        found = inner.get("id") if isinstance(inner, dict) else None
        return found if isinstance(found, str) else None

    items = step.get(name)
    return [
        _TemplateItem(identity(item, "SpecialToken"), identity(item, "Sequence"))
        for item in (items if isinstance(items, list) else [])
    ]


def require_ids(folder: Path, special: SpecialTokens, needed: tuple[str, ...] = ()) -> None:
    """Refuse tokens that are put around a text but have no id: llama.cpp would take another token, or abort.

    Args:
        needed: kinds that are put there whatever the files say.

    Raises:
        InputError: there is one.
    """
    for kind in _ADD_KEYS:
        if (kind in needed or special.added.get(kind)) and kind not in special.ids:
            raise InputError(
                f"{folder}: a {kind} token is put around a text, but nothing says which one it is.",
                f"Name it as {kind}_token in {CONFIG}.",
            )
