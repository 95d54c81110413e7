"""Small tokenizers of every kind, trained by Hugging Face's library on the spot, and what it makes of a text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from localmix.convert import convert
from localmix.native.model import Model
from tests.checkpoints import TOKENIZER, Shape, write_checkpoint

# Chinese, Japanese, Korean, emoji with joiners, digits, code, spaces, line ends, accents, control characters.
TEXT = (
    "The miller's wheel can't stop; WE'LL see that it's 3 33 333 3333 4444444 times.\n\n"
    "def f(x):\n    return {'a': x[0] ** 2, \"b\": None}  # tabs\there\r\n\r\n   trailing   \n"
    "磨坊主数了七袋大麦,把数字写在门上。ひらがなカタカナ 한국어 텍스트 12月31日～\n"
    "🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙 Ünïcödé naïve Straße Ωmega нещо на Български\n"
    "a\x00b\x01c\x1b[0m\x7f \u00a0nbsp\u3000wide…——======!!!??? $5.00 50% <b>x</b> camelCaseWord HTTPServer "
)

CORPUS = (
    TEXT,
    "the miller counts seven sacks of barley and writes the number on the door, 1234567 of them",
    "a river that is slow in summer carries every leaf to the same stone bridge, isn't it? I'll say we've",
    "夏天河水很慢,把每片叶子都带到同一座石桥。磨坊主数了七袋大麦。 camelCaseWord HTTPServer def return None",
    "    for x in range(10):\n        print(x)\n\n\n\t\t\tindented\n",
)

SPECIAL = ("<|begin|>", "<|end|>")


def byte_level(steps: Iterable[Any], *, whole_words: bool = False, vocabulary: int = 600) -> dict[str, Any]:
    """A tokenizer.json of byte-level BPE that splits by `steps`."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=whole_words))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return as_json(made)


def as_json(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def metaspace(*, prefix: bool, vocabulary: int = 700) -> dict[str, Any]:
    """A tokenizer.json of BPE over characters with ▁ for spaces, its merges learned by the library itself."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never", split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # line by line: llama.cpp splits there
    lines = [line for text in CORPUS[1:] for line in text.split("\n")]
    made.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    )
    found = as_json(made)
    found["added_tokens"] = found["added_tokens"][:3]
    return found


def converted_sentencepiece() -> dict[str, Any]:
    """The tokenizer.json that transformers makes of a sentencepiece model of the Llama 2 kind."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(TOKENIZER))
    pieces = [processor.IdToPiece(number) for number in range(processor.GetPieceSize())]
    scores = {piece: processor.GetScore(number) for number, piece in enumerate(pieces)}
    numbers = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (scores[piece], numbers[piece[:cut]], numbers[piece[cut:]], piece[:cut], piece[cut:])
        for number, piece in enumerate(pieces)
        if not processor.IsControl(number) and not processor.IsByte(number) and not processor.IsUnknown(number)
        for cut in range(1, len(piece))
        if piece[:cut] in numbers and piece[cut:] in numbers
    ]
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    made = tokenizers.Tokenizer(
        models.BPE(numbers, [merge[3:] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return as_json(made)


def word_piece(*, lowercase: bool, vocabulary: int = 400) -> dict[str, Any]:
    """A tokenizer.json of BERT."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return as_json(made)


def sentencepiece_charsmap() -> bytes:
    """sentencepiece's compiled table of replacements (nmt_nfkc), out of a model trained with it."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS[1:3] * 9), model_writer=model, model_type="char", vocab_size=60, minloglevel=2
    )
    normalizer = _field(model.getvalue(), 3)  # ModelProto.normalizer_spec
    return _field(normalizer, 2)  # NormalizerSpec.precompiled_charsmap


def _field(message: bytes, number: int) -> bytes:
    """The bytes of one length-delimited field of a protocol buffer."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while True:
        tag = varint()
        length = varint() if tag & 7 in (0, 2) else 4
        if tag & 7 == 0:
            continue
        if tag >> 3 == number:
            return message[place : place + length]
        place += length


def unigram(*, vocabulary: int = 400, charsmap: bytes = b"") -> dict[str, Any]:
    """A tokenizer.json of a Unigram model."""
    made = tokenizers.Tokenizer(models.Unigram())
    if charsmap:
        made.normalizer = normalizers.Precompiled(charsmap)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=vocabulary, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return as_json(made)


def size_of(document: dict[str, Any]) -> int:
    """Rows that an embedding needs for a tokenizer."""
    return tokenizers.Tokenizer.from_str(json.dumps(document)).get_vocab_size()


def write_model(folder: Path, document: dict[str, Any], **tokenizer_config: Any) -> Path:
    """A tiny checkpoint with this tokenizer.json, converted to a GGUF file."""
    shape = Shape(
        "llama",
        hidden=32,
        feed_forward=32,
        heads=2,
        layers=1,
        experts=0,
        shards=1,
        vocabulary=size_of(document),
        tied=True,
        config={"bos_token_id": ..., "eos_token_id": ...},
    )
    write_checkpoint(folder, shape)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    output = folder.with_suffix(".gguf")
    convert(folder, output, "f32", threads=1)
    return output


def ids_of_library(document: dict[str, Any], text: str, *, special: bool = False) -> list[int]:
    return list(tokenizers.Tokenizer.from_str(json.dumps(document)).encode(text, add_special_tokens=special).ids)


def ids_of_llama(model: Path, text: str, *, special: bool = False) -> list[int]:
    with Model(model, vocabulary_only=True) as loaded:
        return loaded.tokenize(text, add_special=special, parse_special=False).tolist()
