"""The moment at which a visitor asks, as a model reads it: how long after the last event, and at which hour.

In: `HistoryTensors`. Out: codes, and what is learned of each. It must not know what it changes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rayrec.history import MAX_GAP_S
from rayrec.model.history_tensors import HistoryTensors

SINCE_CODES = 3 + int(math.log2(MAX_GAP_S / 60))
"""Unknown, less than a minute, and one for each power of two of minutes."""
HOUR_CODES = 1 + 24


def asked(history: HistoryTensors) -> tuple[Tensor, Tensor]:
    """Codes of the moment at which each visitor asks. [B] int64 each."""
    return _since_code(history.since_s_B), (history.now_hour_B + 1).long()


def _since_code(since_s: Tensor) -> Tensor:
    minutes = since_s / 60
    code = torch.where(minutes < 1, 1, 2 + minutes.clamp(min=1).log2().long())
    return torch.where(since_s < 0, 0, code)


class Moment(nn.Module):
    """A vector for a moment. It is zeros for what is not told, and for what training never met: a visitor who comes
    back after longer than anyone did is ranked as one of whom the moment is not known.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.since, self.hour = nn.Embedding(SINCE_CODES, width, 0), nn.Embedding(HOUR_CODES, width, 0)
        nn.init.zeros_(self.since.weight)
        nn.init.zeros_(self.hour.weight)

    def forward(self, code: tuple[Tensor, Tensor]) -> Tensor:
        """Codes of any one shape -> [..., width]."""
        vector: Tensor = self.since(code[0]) + self.hour(code[1])
        return vector
