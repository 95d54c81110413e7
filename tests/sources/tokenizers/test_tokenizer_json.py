"""tokenizer.json of every kind: llama.cpp makes the tokens that Hugging Face's library makes; broken ones stop."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from localmix.errors import InputError, UsageError
from localmix.native.model import Model
from localmix.sources.tokenizers import read_tokenizer
from tests.checkpoints import TOKENIZER, edit_json
from tests.commands import CommandLine
from tests.small_tokenizers import (
    SPECIAL,
    TEXT,
    byte_level,
    converted_sentencepiece,
    ids_of_library,
    ids_of_llama,
    metaspace,
    sentencepiece_charsmap,
    size_of,
    unigram,
    word_piece,
    write_model,
)


def gpt2() -> dict[str, Any]:
    return byte_level([pre_tokenizers.ByteLevel(add_prefix_space=False)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def read(folder: Path, document: Any, size: int | None = None, pre: str | None = None, **config: Any) -> dict[str, Any]:
    (folder / "tokenizer.json").write_text(document if isinstance(document, str) else json.dumps(document))
    rows = size_of(document) if size is None else size
    found = read_tokenizer(folder, config, rows, {}, pre)
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in found.metadata.items()}


def same_ids(model: Path, document: dict[str, Any], text: str = TEXT, *, special: bool = False) -> None:
    for line in (text, *text.split("\n")):
        assert ids_of_llama(model, line, special=special) == ids_of_library(document, line, special=special)


def test_byte_level(tmp_path: Path) -> None:
    document = gpt2()
    same_ids(write_model(tmp_path / "model", document), document)


def test_merges_as_pairs_and_as_text_are_the_same(folder: Path) -> None:
    document = gpt2()
    pairs = read(folder, document)
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    assert read(folder, document) == pairs
    del document["model"]["type"]  # as old files leave it out
    assert read(folder, document) == pairs


@pytest.mark.parametrize("where", ["normalizer", "pre_tokenizer"])
def test_converted_sentencepiece(tmp_path: Path, where: str) -> None:
    """The same tokens as the library makes, and the same as from the tokenizer.model it was converted from."""
    document = converted_sentencepiece()
    if where == "pre_tokenizer":
        document["normalizer"] = None
        document["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
    model = write_model(tmp_path / "model", document, bos_token="<s>", eos_token="</s>")
    # The library's Metaspace puts no space before a text that starts with one; sentencepiece and llama.cpp do.
    text = TEXT if where == "normalizer" else "\n".join(line.lstrip(" ") for line in TEXT.split("\n"))
    same_ids(model, document, text, special=True)
    original = tmp_path / "original"
    original.mkdir()
    (original / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    theirs = read_tokenizer(original, {}, size_of(document), {}).metadata
    ours = read_tokenizer(tmp_path / "model", {}, size_of(document), {}).metadata
    for key in ("model", "pre", "tokens", "token_type"):
        assert ours[f"tokenizer.ggml.{key}"] == theirs[f"tokenizer.ggml.{key}"]
    with Model(model, vocabulary_only=True) as loaded:
        assert loaded.vocabulary.add_bos and not loaded.vocabulary.add_eos


def test_metaspace_with_merges_of_its_own(tmp_path: Path) -> None:
    document = metaspace(prefix=False)
    same_ids(write_model(tmp_path / "model", document), document)


def test_metaspace_that_llama_cpp_lacks(folder: Path) -> None:
    with pytest.raises(InputError, match=r"llama\.cpp has no such tokenizer"):
        read(folder, metaspace(prefix=True))


@pytest.mark.parametrize("lowercase", [True, False])
def test_word_piece(tmp_path: Path, lowercase: bool) -> None:
    document = word_piece(lowercase=lowercase)
    model = write_model(tmp_path / "model", document, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    # Where accents are stripped, llama.cpp takes Korean syllables apart and keeps the first letter only.
    text = "".join(letter for letter in TEXT if not (lowercase and "가" <= letter <= "힣"))
    same_ids(model, document, text, special=True)


def test_unigram_with_a_table_of_replacements(tmp_path: Path) -> None:
    document = unigram(charsmap=sentencepiece_charsmap())
    model = write_model(tmp_path / "model", document, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    same_ids(model, document, TEXT.replace("\x00", ""), special=True)  # NUL is unknown to llama.cpp here


def test_unigram(tmp_path: Path) -> None:
    document = unigram()
    model = write_model(tmp_path / "model", document, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    # Without a table of replacements only a space is one for llama.cpp.
    text = TEXT.replace("\t", " ").replace("\u3000", " ").replace("\u00a0", " ").replace("\x00", "").replace("\r", "")
    for line in text.split("\n"):
        assert ids_of_llama(model, line, special=True) == ids_of_library(document, line, special=True)


def test_special_tokens_are_found_in_a_text(tmp_path: Path) -> None:
    document = gpt2()
    document["added_tokens"].append(
        {**document["added_tokens"][0], "id": size_of(document), "content": "<tool>", "special": False}
    )
    model = write_model(tmp_path / "model", document, bos_token=SPECIAL[0], eos_token=SPECIAL[1])
    text = f"{SPECIAL[0]}the<tool> miller{SPECIAL[1]}"
    with Model(model, vocabulary_only=True) as loaded:
        assert loaded.tokenize(text, add_special=False, parse_special=True).tolist() == ids_of_library(document, text)
        assert loaded.ends_generation(1) and not loaded.vocabulary.add_bos


def test_kinds_of_added_tokens(folder: Path) -> None:
    document = gpt2()
    rows = size_of(document)
    document["added_tokens"] += [
        {"id": rows, "content": "<|looks_special|>", "special": False},
        {"id": rows + 1, "content": "▁▁", "special": False},
    ]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(rows + 2): {"content": "<more>"}, "0": {"content": "other"}}})
    )
    (folder / "added_tokens.json").write_text(json.dumps({"<far>": rows + 9}))
    (folder / "tokenizer.json").write_text(json.dumps(document))
    found = read_tokenizer(folder, {}, rows + 4, {})
    tokens = found.metadata["tokenizer.ggml.tokens"].value
    kinds = found.metadata["tokenizer.ggml.token_type"].value
    assert tokens[rows:] == ["<|looks_special|>", "  ", "<more>", f"[PAD{rows + 3}]"]
    assert kinds[rows:] == [3, 4, 4, 5]
    assert (tokens[0], kinds[0]) == (SPECIAL[0], 3)
    assert ["1 added tokens have no row" in found.notes[0], "1 are padded" in found.notes[1]] == [True, True]


def test_name_given_by_hand(folder: Path) -> None:
    document = gpt2()
    document["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(InputError, match="not known here") as caught:
        read(folder, document)
    assert str(folder) in caught.value.message
    assert read(folder, document, pre="smollm")["pre"] == "smollm"


@pytest.mark.parametrize("make", [unigram, lambda: word_piece(lowercase=True)])
def test_name_for_a_tokenizer_of_another_kind(folder: Path, make: Callable[[], dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match=r"--pre is for BPE tokenizers of a tokenizer.json; .* is of another kind"):
        read(folder, make(), pre="smollm")


def test_name_on_the_command_line(tmp_path: Path) -> None:
    write_model(tmp_path / "model", gpt2())
    edit_json(tmp_path / "model" / "tokenizer.json", change("pre_tokenizer", {"type": "Whitespace"}))
    localmix = CommandLine(tmp_path / "home", tmp_path)
    assert "localmix convert --pre NAME" in localmix.fails("convert", "model", expect=3)
    assert "no pre-tokenizer 'spiral'" in localmix.fails("convert", "model", "--pre", "spiral", expect=2)
    made = localmix("convert", "model", "--pre", "smollm", "--json").json["path"]
    with Model(Path(made), vocabulary_only=True) as loaded:
        assert loaded.metadata("tokenizer.ggml.pre") == "smollm"


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set the value at a path such as `model.vocab`; `...` removes it."""

    def damage(document: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            document = document[parent]
        if value is ...:
            del document[last]
        else:
            document[last] = value

    return damage


BROKEN: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None], str]] = {
    "no model": (gpt2, change("model", ...), "has no model"),
    "model is a list": (gpt2, change("model", []), "has no model"),
    "another type": (gpt2, change("model.type", "WordLevel"), "of type 'WordLevel' are not converted"),
    "vocabulary is a list": (gpt2, change("model.vocab", ["a"]), "vocabulary is not an object"),
    "vocabulary is empty": (gpt2, change("model.vocab", {}), "empty vocabulary"),
    "id is text": (gpt2, change("model.vocab.x", "3"), "token 'x' has the id '3'"),
    "id is negative": (gpt2, change("model.vocab.x", -1), "token 'x' has the id -1"),
    "id is huge": (gpt2, change("model.vocab.x", 10**12), "has 1000000000001 tokens, the embedding only"),
    "id twice": (gpt2, change("model.vocab.xx", 7), "both have the id 7"),
    "half a character": (gpt2, change("model.vocab", {"\ud800": 0, "a": 1, "aa": 2}), "merge 0"),
    "no merges": (gpt2, change("model.merges", ...), "has no merges"),
    "merges of three": (gpt2, change("model.merges", ["a b c"]), "merge 0 .'a b c'. is not"),
    "merges of strangers": (gpt2, change("model.merges", [["a", "ŋŋŋ"]]), "merge 0"),
    "merges are numbers": (gpt2, change("model.merges", [3]), "merge 0 .3. is not"),
    "end of word": (gpt2, change("model.end_of_word_suffix", "</w>"), "sets end_of_word_suffix to '</w>'"),
    "added tokens are an object": (gpt2, change("added_tokens", {"a": 1}), "added_tokens is not a list"),
    "added token without text": (gpt2, change("added_tokens", [{"id": 3}]), "added token 0 has no content"),
    "added token without id": (gpt2, change("added_tokens", [{"content": "x"}]), "token 'x' has the id None"),
    "added token is text": (gpt2, change("added_tokens", ["x"]), "added token 0 has no content"),
    "token twice": (
        gpt2,
        change("added_tokens", [{"id": 0, "content": "yy"}, {"id": 1, "content": "yy"}]),
        "both 'yy'",
    ),
    "byte tokens missing": (
        converted_sentencepiece,
        lambda d: [d["model"]["vocab"].pop(f"<0x{byte:02X}>") for byte in range(9)],
        "has 247 of 256 byte tokens",
    ),
    "no separator": (lambda: word_piece(lowercase=True), change("post_processor", None), "a bos token is put around"),
    "accents kept otherwise": (
        lambda: word_piece(lowercase=True),
        change("normalizer", {"type": "NFKC"}),
        "changes a text by {'type': 'NFKC'}",
    ),
    "Chinese not split": (
        lambda: word_piece(lowercase=True),
        change("normalizer.handle_chinese_chars", False),
        "not as BERT",
    ),
    "other words": (lambda: word_piece(lowercase=True), change("pre_tokenizer.type", "Whitespace"), "not as BERT"),
    "other prefix": (
        lambda: word_piece(lowercase=True),
        change("model.continuing_subword_prefix", "@@"),
        "continues a word with '@@', not with ##",
    ),
    "vocabulary of Unigram is empty": (unigram, change("model.vocab", []), "empty vocabulary"),
    "vocabulary of Unigram is an object": (unigram, change("model.vocab", {}), "not a list of tokens with scores"),
    "scores are text": (unigram, change("model.vocab", [["a", "b"]]), "not a list of tokens with scores"),
    "scores are infinite": (unigram, change("model.vocab", [["a", float("inf")]]), "not a list of tokens with scores"),
    "no unknown": (unigram, change("model.unk_id", None), "has no unknown token"),
    "bytes in Unigram": (unigram, change("model.byte_fallback", True), "sets byte_fallback"),
    "normalizer of Unigram": (unigram, change("normalizer", {"type": "NFKC"}), "no step 'NFKC' in its normalizer"),
    "spaces of Unigram": (unigram, change("pre_tokenizer", None), "does not mark spaces"),
    "split of Unigram": (unigram, change("pre_tokenizer", {"type": "Digits"}), "no step 'Digits'"),
    "table not base64": (
        unigram,
        change("normalizer", {"type": "Precompiled", "precompiled_charsmap": "?"}),
        "not base64",
    ),
    "table cut off": (
        unigram,
        change("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAEAAAAA"}),
        "precompiled_charsmap is cut off",
    ),
}
MADE: dict[Callable[[], dict[str, Any]], dict[str, Any]] = {}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(folder: Path, case: str) -> None:
    make, damage, problem = BROKEN[case]
    document = copy.deepcopy(MADE.setdefault(make, make()))
    rows = size_of(document)
    damage(document)
    with pytest.raises(InputError, match=problem) as caught:
        read(folder, document, rows)
    assert str(folder) in caught.value.message and len(caught.value.message) < 600


def test_odd_processors_change_nothing(folder: Path) -> None:
    document = gpt2()
    for odd in (
        None,
        3,
        [],
        {"type": "Sequence", "processors": 3},
        {"type": "TemplateProcessing", "single": [3, None], "pair": {}},
    ):
        document["post_processor"] = odd
        assert read(folder, json.dumps(document), 600)["add_bos_token"] is False


def test_flags_say_what_is_put_around_a_text(folder: Path) -> None:
    document = gpt2()
    document["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    assert [read(folder, document)[f"add_{kind}_token"] for kind in ("bos", "eos")] == [False, False]
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": SPECIAL[0], "add_bos_token": True}))
    assert [read(folder, document)[f"add_{kind}_token"] for kind in ("bos", "eos")] == [True, False]
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    with pytest.raises(InputError, match="a bos token is put around a text, but nothing says which"):
        read(folder, document)


def test_roberta_puts_tokens_around_a_text(folder: Path) -> None:
    document = gpt2()
    document["post_processor"] = {"type": "RobertaProcessing", "cls": [SPECIAL[0], 0], "sep": [SPECIAL[1], 1]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}))
    found = read(folder, document)
    assert [found[f"add_{kind}_token"] for kind in ("bos", "eos", "sep")] == [True, True, True]
    assert found["seperator_token_id"] == 1


def test_end_of_a_text_that_is_not_the_end_of_a_turn(folder: Path) -> None:
    """The template ends a text with another token than tokenizer_config.json names as eos."""
    document = gpt2()
    item: list[dict[str, Any]] = [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": SPECIAL[0]}}]
    document["post_processor"] = {"type": "TemplateProcessing", "single": item, "pair": []}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[1]}))
    found = read(folder, document, 600)
    assert (found["eos_token_id"], found["eot_token_id"], found["add_eos_token"]) == (0, 1, True)
