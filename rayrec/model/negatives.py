"""Sampling of negative items. In: training counts. Out: item indices and their log probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from rayrec.config import TrainConfig

SAMPLED = 2048


def how_many(n_warm: int, train: TrainConfig) -> int:
    """The negatives that a batch shares, of so many items with training events; 0 is a softmax over all of these.

    >>> [how_many(n, TrainConfig()) for n in (15_000, 15_001)]
    [0, 2048]
    """
    if train.negatives:
        return train.negatives
    return 0 if train.loss == "softmax" and n_warm <= train.full_softmax_below else SAMPLED


class NegativeSampler:
    """Draws items with probability proportional to count ** alpha, among items with training events."""

    def __init__(self, n_train_N: Tensor, alpha: float = 0.5) -> None:
        weight_N = n_train_N.double().clamp(min=0) ** alpha * (n_train_N > 0)
        total = weight_N.sum().clamp(min=1e-12)
        cumulative_N = weight_N.cumsum(0)
        self.cumulative_N = cumulative_N / cumulative_N[-1].clamp(min=1e-12)  # ends with exactly 1
        self.log_q_N = (weight_N / total).clamp(min=1e-12).log().float()

    def __call__(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """[n] int64 item indices, drawn with replacement."""
        draw = torch.rand(n, generator=generator, dtype=torch.float64)
        return torch.searchsorted(self.cumulative_N, draw, right=True)
