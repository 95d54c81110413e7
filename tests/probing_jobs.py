"""Jobs that tests run in a `worker` child, because they load a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from localmix.native.devices import PROCESSOR
from localmix.native.model import Context, Model
from localmix.optimization.probing import PerturbedModel
from localmix.sources.open import open_source
from localmix.tensor_types import TensorType
from localmix.worker import Channel


def predictions(
    channel: Channel, path: Path, types: dict[str, TensorType]
) -> tuple[list[np.ndarray], dict[str, float]]:
    """Logits of a few tokens before, while and after weights have other types, and what those lost."""
    with (
        open_source(path) as source,
        Model(path, placement=PROCESSOR, mmap=False, repack=False) as model,
        Context(model, context_length=256, threads=1) as context,
    ):
        perturbed = PerturbedModel(model, source, None, threads=1)
        tokens = np.arange(3, 35)

        def run() -> np.ndarray:
            context.clear()
            context.decode(tokens, np.arange(len(tokens)), logits=True)
            return np.array(context.logits())

        before = run()
        lost = perturbed.perturb(types)
        while_perturbed = run()
        perturbed.restore(list(types))
        return [before, while_perturbed, run()], lost
