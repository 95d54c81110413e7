"""tokenizer.model and the files beside it, broken ones; what good ones become is held against upstream's fixtures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from localmix.errors import InputError, UsageError
from localmix.sources.tokenizers import read_tokenizer
from tests.checkpoints import CHAT_TEMPLATE, TOKENIZER_PIECES, Shape, edit_json, write_checkpoint

ROWS = TOKENIZER_PIECES + 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", Shape(layers=1, experts=1, shards=1))


def read(folder: Path, size: int = ROWS, **config: Any) -> dict[str, Any]:
    found = read_tokenizer(folder, config, size, {ROWS: {"eot": 7}})
    return {key: value.value for key, value in found.metadata.items()}


def tokenizer_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tokenizer_config.json", lambda content: content.update(changes))


def added(**tokens: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "added_tokens.json").write_text(json.dumps(tokens))


def without_bytes(folder: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=24,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / "tokenizer.model").unlink(), "has no tokenizer.model"),
    "another kind": (
        lambda f: ((f / "tokenizer.model").unlink(), (f / "tokenizer.json").write_text("{}")),
        "tokenizer.json has no model",
    ),
    "empty": (lambda f: (f / "tokenizer.model").write_bytes(b""), "not a sentencepiece model"),
    "garbage": (lambda f: (f / "tokenizer.model").write_bytes(b"garbage" * 99), "not a sentencepiece model"),
    "cut off": (
        lambda f: (f / "tokenizer.model").write_bytes((f / "tokenizer.model").read_bytes()[:3000]),
        "not a sentencepiece model",
    ),
    "a pointer": (
        lambda f: (f / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer",
    ),
    "no byte tokens": (without_bytes, "has 0 of 256 byte tokens"),
    "config broken": (lambda f: (f / "tokenizer_config.json").write_text("{"), "not valid JSON"),
    "added broken": (lambda f: (f / "added_tokens.json").write_text("[1]"), "holds list"),
    "added negative": (added(x=-3), "token 'x' has the id -3"),
    "added text": (added(x="3"), "token 'x' has the id '3'"),
    "added twice": (added(x=TOKENIZER_PIECES, **{"<s>": TOKENIZER_PIECES + 1}), "1 and 385 are both '<s>'"),
    "added half a character": (added(**{"\ud800": TOKENIZER_PIECES}), "not valid Unicode"),
    "decoder is a list": (tokenizer_config(added_tokens_decoder=[1]), "added_tokens_decoder is not an object"),
    "decoder key": (tokenizer_config(added_tokens_decoder={"x": {"content": "y"}}), "'y' has the id 'x'"),
    "decoder huge key": (
        tokenizer_config(added_tokens_decoder={"9" * 5000: {"content": "y"}}),
        "'y' has the id '999",
    ),
    "decoder entry": (tokenizer_config(added_tokens_decoder={"3": "y"}), "added token '3' has no content"),
    "template is a number": (tokenizer_config(chat_template=3), "the chat template is not text"),
    "template list": (tokenizer_config(chat_template=["x"]), "the chat template is not text"),
    "template half a character": (tokenizer_config(chat_template="\ud800"), "the chat template is not text"),
    "template file": (
        lambda f: (
            tokenizer_config(chat_template=None)(f),
            (f / "chat_template.jinja").write_bytes(b"\xff\xfe"),
        ),
        "chat_template.jinja is not UTF-8",
    ),
    "special in tokenizer.json outside": (
        lambda f: (f / "tokenizer.json").write_text('{"added_tokens": [{"id": 99999, "content": "<s>"}]}'),
        "tokenizer.json: the bos token is 99999",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tokenizers(folder: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    damage, problem = BROKEN[case]
    damage(folder)
    capfd.readouterr()
    with pytest.raises(InputError, match=problem) as caught:
        read(folder)
    assert str(folder) in caught.value.message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["bos", "eos", "unk", "pad"])
@pytest.mark.parametrize("token_id", [ROWS, 2**31, -2])
def test_special_ids_outside_the_vocabulary(folder: Path, kind: str, token_id: int) -> None:
    with pytest.raises(InputError, match=f"the {kind} token is {token_id}, the vocabulary has {ROWS}"):
        read(folder, **{f"{kind}_token_id": token_id})


def test_minus_one_means_none(folder: Path) -> None:
    found = read_tokenizer(folder, {"pad_token_id": -1, "bos_token_id": 1}, ROWS, {})
    assert "tokenizer.ggml.padding_token_id" not in found.metadata
    assert any("the pad token is -1" in note for note in found.notes)


def test_name_of_a_way_to_split(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer.model is of another kind\."):
        read_tokenizer(folder, {}, ROWS, {}, "smollm")


def test_more_tokens_than_rows(folder: Path) -> None:
    with pytest.raises(InputError, match="has 384 tokens, the embedding only 383 rows"):
        read(folder, TOKENIZER_PIECES - 1)


def test_fewer_tokens_than_rows_are_padded_and_said(folder: Path) -> None:
    found = read_tokenizer(folder, {}, ROWS, {})
    assert found.metadata["tokenizer.ggml.tokens"].value[-1] == f"[PAD{ROWS - 1}]"
    assert found.metadata["tokenizer.ggml.token_type"].value[-4:] == [5] * 4
    assert found.notes == [
        f"{folder}: the embedding has {ROWS} rows for {TOKENIZER_PIECES} tokens; 4 are padded with unused tokens."
    ]


def test_tokens_without_a_row_are_left_out_and_said(folder: Path) -> None:
    added(**{"<pad>": ROWS})(folder)
    found = read_tokenizer(folder, {}, ROWS, {})
    assert "<pad>" not in found.metadata["tokenizer.ggml.tokens"].value
    assert "1 added tokens have no row in the embedding and are left out: '<pad>'" in found.notes[0]


def test_extra_tokens_of_a_vocabulary_of_that_size(folder: Path) -> None:
    assert read(folder)["tokenizer.ggml.eot_token_id"] == 7
    assert "tokenizer.ggml.eot_token_id" not in read(folder, ROWS + 1)


@pytest.mark.parametrize("where", ["config", "jinja", "json", "bare jinja"])
def test_chat_template_from_every_place(folder: Path, where: str) -> None:
    tokenizer_config(chat_template=CHAT_TEMPLATE if where == "config" else None)(folder)
    if "jinja" in where:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    if where == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    if where == "bare jinja":
        (folder / "tokenizer_config.json").unlink()
    assert read(folder)["tokenizer.chat_template"] == CHAT_TEMPLATE


def test_further_chat_templates_as_files(folder: Path) -> None:
    tokenizer_config(chat_template=None)(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    found = read(folder)
    assert found["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert found["tokenizer.chat_template.tool_use"] == "tools"
    assert found["tokenizer.chat_templates"] == ["tool_use"]


def test_what_is_put_around_a_text(folder: Path) -> None:
    """tokenizer.json's templates win over the flags of tokenizer_config.json."""
    item = {"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}
    template = {"type": "TemplateProcessing", "single": list(item), "pair": []}
    for processor in (template, {"type": "Sequence", "processors": [{"type": "Other"}, template]}):
        (folder / "tokenizer.json").write_text(json.dumps({"post_processor": processor}))
        assert read(folder)["tokenizer.ggml.add_eos_token"] is True
    for odd in (None, 3, [], {"processors": 3}, {"type": "TemplateProcessing", "single": [3, None], "pair": {}}):
        (folder / "tokenizer.json").write_text(json.dumps({"post_processor": odd, "added_tokens": odd}))
        assert read(folder)["tokenizer.ggml.add_eos_token"] is False
