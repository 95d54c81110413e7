"""How far a model's predictions are from those of a reference: the Kullback-Leibler divergence, token by token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence of a model from its reference, in nats per scored token.

    Attributes:
        mean, error: the mean over the tokens, and its standard error.
        median, percentile_99, maximum: of the tokens' values.
        same_top: share of the tokens, 0 to 1, for which both hold the same one likeliest.
        same_top_error: standard error of that share.
    """

    mean: float
    error: float
    median: float
    percentile_99: float
    maximum: float
    same_top: float
    same_top_error: float
