"""Whether a model can draft for another: llama-server itself would go on without drafts, and not say so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localmix.worker import Channel


def check_draft(model: Path, draft: Path) -> None:
    """Refuse a draft model whose tokens mean something else.

    Raises:
        UsageError: the vocabularies differ.
        InputError: one of the models cannot be read.
    """
    from localmix import worker

    worker.run(compare, model, draft)


def compare(_: Channel, model: Path, draft: Path) -> None:
    """The child's job."""
    from localmix.native.model import Model
    from localmix.native.speculative import check_vocabulary

    with Model(model, vocabulary_only=True) as larger, Model(draft, vocabulary_only=True) as smaller:
        check_vocabulary(larger, smaller)
