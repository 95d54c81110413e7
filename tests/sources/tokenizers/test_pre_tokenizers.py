"""Every known way to split: llama.cpp makes the same tokens under that name as Hugging Face's library does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, pre_tokenizers

from localmix.errors import InputError, UsageError
from localmix.sources.tokenizers.pre_tokenizers import (
    NAMES,
    PRE_TOKENIZERS,
    PreTokenizer,
    check_name,
    recognise,
)
from tests.small_tokenizers import TEXT, byte_level, ids_of_library, ids_of_llama, write_model

PATH = Path("tokenizer.json")
ROWS = {f"{row.name}{number}": row for number, row in enumerate(PRE_TOKENIZERS)}


def steps_of(row: PreTokenizer) -> list[Any]:
    """The library's steps for a row."""
    special = {
        "Punctuation, contiguous": pre_tokenizers.Punctuation("contiguous"),
        r"\p{N}": pre_tokenizers.Digits(individual_digits=True),
        r"\p{N}+": pre_tokenizers.Digits(individual_digits=False),
    }
    steps = [special.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in row.steps]
    return [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


@pytest.mark.parametrize("name", ROWS)
def test_llama_cpp_splits_alike(tmp_path: Path, name: str) -> None:
    row = ROWS[name]
    document = byte_level(steps_of(row), whole_words=row.whole_words)
    assert recognise(PATH, document, row.whole_words) == row.name
    model = write_model(tmp_path / "model", document)
    for line in (TEXT, *TEXT.splitlines(keepends=True)):
        assert ids_of_llama(model, line) == ids_of_library(document, line)


def test_rows_differ() -> None:
    """A definition has one name, and each is one that llama.cpp has."""
    assert len({(row.steps, row.whole_words) for row in PRE_TOKENIZERS}) == len(PRE_TOKENIZERS)
    assert {row.name for row in PRE_TOKENIZERS} <= NAMES


@pytest.mark.upstream
def test_names_are_those_of_llama_cpp(upstream: Path) -> None:
    source = (upstream.parent / "src" / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    assert set(re.findall(r'tokenizer_pre == "([^"]+)"', source)) == NAMES


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(expression: str, **changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False, **changes}


def bytes_step(**changes: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False, **changes}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    ("definition", "whole_words", "name"),
    [
        # as the published files write them
        (sequence(split(QWEN2), bytes_step()), False, "qwen2"),
        (sequence(split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), bytes_step()), True, "llama-bpe"),
        (
            sequence(split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"), behavior="Removed", invert=True), bytes_step()),
            False,
            "dbrx",
        ),
        ({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}, False, "gpt-2"),
        (sequence({"type": "Digits", "individual_digits": True}, bytes_step(use_regex=True)), False, "smollm"),
        (
            sequence(
                split(r"\p{N}{1,3}"),
                split("[一-龥぀-ゟ゠-ヿ]+"),
                split(
                    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
                    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
                ),
                bytes_step(),
            ),
            False,
            "deepseek-v3",
        ),
        (
            sequence(
                split("[\r\n]"),
                split(r"\s?\p{L}+"),
                split(r"\s?\p{P}+"),
                split("[一-龥ࠀ-一가-퟿]+"),
                {"type": "Digits", "individual_digits": True},
                bytes_step(),
            ),
            False,
            "deepseek-coder",
        ),
        (
            sequence(
                {"type": "Punctuation", "behavior": "Contiguous"},
                bytes_step(use_regex=True),
                {"type": "Digits", "individual_digits": False},
                split("[0-9][0-9][0-9]"),
            ),
            False,
            "falcon",
        ),
        (
            sequence(
                split(
                    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
                    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
                    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                bytes_step(),
            ),
            False,
            "gpt-4o",
        ),
        (
            sequence(
                split(
                    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
                    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
                    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                bytes_step(),
            ),
            True,
            "tekken",
        ),
    ],
)
def test_published_definitions(definition: dict[str, Any], whole_words: bool, name: str) -> None:
    for normalizer in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        document = {"pre_tokenizer": definition, "normalizer": normalizer}
        assert recognise(PATH, document, whole_words) == name


@pytest.mark.parametrize(
    ("definition", "problem"),
    [
        (None, "not known here: None"),
        ({"type": "Whitespace"}, "not known here: {'type': 'Whitespace'}"),
        (sequence(split(r"\w+"), bytes_step()), r"'\\\\w\+'"),
        (sequence(split(QWEN2)), "not known"),
        (sequence(split(QWEN2, behavior="MergedWithNext"), bytes_step()), "not known"),
        (sequence(split(QWEN2), bytes_step(add_prefix_space=True)), "not known"),
        (sequence(split(QWEN2), bytes_step(), bytes_step()), "not known"),
        ({"type": "Sequence", "pretokenizers": 3}, "not known"),
        (sequence(split(3), bytes_step()), "not known"),  # type: ignore[arg-type]
    ],
)
def test_unknown_definitions_stop(definition: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        recognise(PATH, {"pre_tokenizer": definition}, False)
    assert "--pre NAME" in caught.value.hint


def test_known_split_with_other_merging_stops() -> None:
    with pytest.raises(InputError, match="with ignore_merges true"):
        recognise(PATH, {"pre_tokenizer": sequence(split(QWEN2), bytes_step())}, True)


def test_changed_text_stops() -> None:
    document = {"pre_tokenizer": sequence(split(QWEN2), bytes_step()), "normalizer": {"type": "Lowercase"}}
    with pytest.raises(InputError, match="changes a text before it is split: 'Lowercase'"):
        recognise(PATH, document, False)


def test_name_of_choice(tmp_path: Path) -> None:
    check_name("qwen2")
    with pytest.raises(UsageError, match="no pre-tokenizer 'spiral'"):
        check_name("spiral")


def test_definitions_are_what_the_library_writes() -> None:
    """A definition read back from the library has the same canonical form."""
    step = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2), "removed", invert=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = step
    assert recognise(PATH, json.loads(made.to_str()), False) == "qwen2"
