"""An embedding model that needs no training: a BERT whose weights are set by hand so that it counts words.

Every word has a random direction, as long as the word is rare. The single layer passes them through, the mean adds
them up. So the vectors of two texts are as alike as their words are, weighed by rarity: enough to find the passage that
a question is about, in every language whose words or signs it was given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from tests.checkpoints import to_storage, write_shard

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DIRECTIONS = 254
# two more that only take up the rest of each vector's length: a layer norm gives all the same one
HIDDEN = DIRECTIONS + 2


def write_word_embedder(folder: Path, texts: Sequence[str]) -> Path:
    """Write the checkpoint, with the words of `texts` as its vocabulary."""
    folder.mkdir(parents=True)
    tokenizer = _tokenizer(texts)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    names = ("pad", "unk", "cls", "sep", "mask")
    settings = {f"{name}_token": token for name, token in zip(names, SPECIAL, strict=True)}
    _write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    _write_json(
        folder / "config.json",
        {
            "model_type": "bert",
            "architectures": ["BertModel"],
            "hidden_size": HIDDEN,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "vocab_size": tokenizer.get_vocab_size(),
            "type_vocab_size": 2,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
            "torch_dtype": "float32",
        },
    )
    pooling = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    _write_json(folder / "modules.json", [{"path": "", "type": "sentence_transformers.models.Transformer"}, pooling])
    (folder / "1_Pooling").mkdir()
    _write_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    tensors = _tensors(_words(tokenizer, texts))
    write_shard(folder / "model.safetensors", {name: ("F32", to_storage(value, "F32")) for name, value in tensors})
    return folder


def _tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # whole words, and Chinese signs: a word in pieces would count several times
    pieces = [made.pre_tokenizer.pre_tokenize_str(made.normalizer.normalize_str(text)) for text in texts]
    words = sorted({word for text in pieces for word, _ in text})
    made.model = models.WordPiece({token: number for number, token in enumerate((*SPECIAL, *words))}, unk_token="[UNK]")
    made.add_special_tokens(list(SPECIAL))
    special = [(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=special
    )
    return made


def _words(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """The vector of each token; those of special tokens are nothing, like those of words that every text has."""
    found = [set(encoding.ids) for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    random = np.random.default_rng(1)
    vectors = np.zeros((tokenizer.get_vocab_size(), HIDDEN))
    for token in range(len(SPECIAL), len(vectors)):
        rarity = math.log(len(texts) / max(1, sum(token in ids for ids in found))) / math.log(len(texts))
        directions = random.choice((-1.0, 1.0), DIRECTIONS)
        vectors[token, :DIRECTIONS] = rarity * (directions - directions.mean())
    rest = HIDDEN - np.square(vectors).sum(axis=1)
    vectors[:, -2] = np.sqrt(np.maximum(rest, 0) / 2)
    vectors[:, -1] = -vectors[:, -2]
    return vectors


def _tensors(words: npt.NDArray[np.float64]) -> Iterable[tuple[str, npt.NDArray[Any]]]:
    matrix, vector, ones = np.zeros((HIDDEN, HIDDEN)), np.zeros(HIDDEN), np.ones(HIDDEN)
    yield "embeddings.word_embeddings.weight", words
    yield "embeddings.position_embeddings.weight", np.zeros((512, HIDDEN))
    yield "embeddings.token_type_embeddings.weight", np.zeros((2, HIDDEN))
    norms = {"embeddings": ones, "encoder.layer.0.attention.output": ones}
    norms["encoder.layer.0.output"] = np.append(np.ones(DIRECTIONS), (0, 0))
    for name, gain in norms.items():
        yield f"{name}.LayerNorm.weight", gain
        yield f"{name}.LayerNorm.bias", vector
    attention = [f"attention.self.{name}" for name in ("query", "key", "value")]
    for name in (*attention, "attention.output.dense", "intermediate.dense", "output.dense"):
        yield f"encoder.layer.0.{name}.weight", matrix
        yield f"encoder.layer.0.{name}.bias", vector


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
