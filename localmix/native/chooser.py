"""The next token's distribution, in numpy: for what needs to see it and not only a token drawn from it.

The steps and their order are those of `native.model.Sampler`, which hands them to llama.cpp; a grammar comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localmix.errors import InputError
from localmix.native.gbnf import Grammar
from localmix.native.model import CachedText, Context
from localmix.sampling import Sampling

_LIKELY = 64  # how many tokens a grammar is asked about at first


class Chooser:
    """Turns logits into a distribution over the vocabulary, and draws from it.

    Args:
        settings: penalties, cuts and temperature; its seed starts the random numbers.
        grammar: what the text may go on with; `accept` tells it.
    """

    def __init__(self, settings: Sampling, grammar: Grammar | None = None) -> None:
        self._settings = settings
        self._grammar = grammar
        self._random = np.random.default_rng(settings.seed)

    def without_grammar(self) -> Chooser:
        """The same settings and random numbers for a text that need not follow the grammar."""
        free = Chooser(self._settings)
        free._random = self._random
        return free

    def probabilities(self, logits: NDArray[np.float32], recent: Sequence[int]) -> NDArray[np.float64]:
        """The distribution of the next token, one value for each of the vocabulary.

        Args:
            logits: one row.
            recent: the tokens so far, or at least the last `repeat_last` of them.

        Raises:
            InputError: the grammar allows none of the model's tokens.
        """
        settings = self._settings
        values = logits.astype(np.float64)
        if settings.repeat_penalty != 1 and settings.repeat_last > 0 and len(recent):
            seen = np.unique(recent[-settings.repeat_last :])
            values[seen] *= np.where(values[seen] <= 0, settings.repeat_penalty, 1 / settings.repeat_penalty)
        result = np.zeros(len(values))
        greedy = settings.temperature <= 0
        tokens = self._largest(values, 1 if greedy else settings.top_k)
        if greedy:
            result[tokens[0]] = 1
            return result
        if settings.top_p < 1:
            reached = np.cumsum(_softmax(values[tokens])) >= settings.top_p
            tokens = tokens[: int(reached.argmax()) + 1 if reached.any() else len(tokens)]
        if settings.min_p > 0:
            tokens = tokens[values[tokens] >= values[tokens[0]] + np.log(settings.min_p)]
        result[tokens] = _softmax(values[tokens] / settings.temperature)
        return result

    def draw(self, probabilities: NDArray[np.float64]) -> int:
        """A token from a distribution, which need not sum to 1."""
        if self._settings.temperature <= 0:
            return int(probabilities.argmax())
        sums = np.cumsum(probabilities)
        place = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return min(place, int(np.flatnonzero(probabilities)[-1]))  # rounding may lead beyond the end

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self._random.random() < probability)

    def accept(self, token: int) -> None:
        """Tell the grammar how the text went on."""
        if self._grammar is not None:
            self._grammar.accept(token)

    def _largest(self, values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
        """The `count` tokens of the largest values that the grammar allows (0 for all), the largest first."""
        if not 0 < count < len(values):
            count = len(values)
        if self._grammar is None:
            return _sorted_largest(values, count)
        # most of what is likely is allowed, and asking about the whole vocabulary takes long
        for many in (min(count + _LIKELY, len(values)), len(values)):
            likely = _sorted_largest(values, many)
            likely = likely[self._grammar.allowed(likely)]
            if len(likely) >= count:
                return likely[:count]
        if not len(likely):
            raise InputError("The grammar asks for characters that none of the model's tokens has.")
        return likely


class ChosenTokens:
    """A sampler of a text's tokens with a Chooser."""

    def __init__(self, chooser: Chooser, text: CachedText) -> None:
        self._chooser = chooser
        self._text = text

    def sample(self, context: Context) -> int:
        """Choose from the last row of logits, and tell the grammar."""
        token = self._chooser.draw(self._chooser.probabilities(context.logits()[-1], self._text.tokens))
        self._chooser.accept(token)
        return token


def _sorted_largest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    if count == 1:
        return np.asarray([values.argmax()])
    if count < len(values):
        part = np.argpartition(values, -count)[-count:]
        return part[np.argsort(-values[part], kind="stable")]
    return np.argsort(-values, kind="stable")


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of values whose first is the largest."""
    powers = np.exp(values - values[0])
    scaled: NDArray[np.float64] = powers / powers.sum()
    return scaled
