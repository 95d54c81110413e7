"""Whether a model can draft for another."""

from __future__ import annotations

from pathlib import Path

import pytest

from localmix.errors import UsageError
from localmix.serving.draft_check import check_draft


def test_only_a_model_of_the_same_vocabulary_drafts(tinymix_bf16: Path, random_model: Path) -> None:
    check_draft(tinymix_bf16, tinymix_bf16)
    with pytest.raises(UsageError, match=r"random.gguf cannot draft for tinymix-BF16.gguf: their vocabularies have"):
        check_draft(tinymix_bf16, random_model)
