"""The founding model, to the letter: CNN on the picture, LSTM on the behaviour, concatenated, one sigmoid.

In: histories and items. Out: one logit a pair. One Dense layer over a concatenation is a sum of a term of the item
and a term of the visitor: every visitor gets the same order of items. It is kept as a baseline that shows this.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayrec.config import Config
from rayrec.model.encoders import ItemTable, as_float
from rayrec.model.history_tensors import HistoryTensors
from rayrec.model.losses import nothing
from rayrec.schema import ACTION_CODE

N_BEHAVIOUR = 10
FLAGS = ("view", "cart", "favorite", "purchase")
IMAGE_SIZE = 128


@dataclass(frozen=True)
class Pairs:
    """A training batch: did this visitor want this item?

    history: of B visitors. visitor_P: [P] int64 row of the history. item_P: [P] int64. label_P: [P] float32.
    """

    history: HistoryTensors
    visitor_P: Tensor
    item_P: Tensor
    label_P: Tensor

    def __len__(self) -> int:
        return len(self.label_P)


class ReluLSTM(nn.Module):
    """An LSTM whose candidate and output activations are ReLU, as Keras' LSTM(units, activation="relu")."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input = nn.Linear(width, 4 * hidden)
        self.recurrent = nn.Linear(hidden, 4 * hidden, bias=False)
        nn.init.orthogonal_(self.recurrent.weight)

    def forward(self, step_BLF: Tensor, real_BL: Tensor) -> Tensor:
        """[B, L, F] and a mask -> the state after the last real step, [B, hidden]; padding leaves it as it is."""
        gates_BLG = self.input(step_BLF)
        state_BH = cell_BH = step_BLF.new_zeros(len(step_BLF), self.hidden)
        for place in range(step_BLF.shape[1]):
            i, f, g, o = (gates_BLG[:, place] + self.recurrent(state_BH)).chunk(4, 1)
            cell = torch.sigmoid(f) * cell_BH + torch.sigmoid(i) * F.relu(g)
            real_B1 = real_BL[:, place, None]
            cell_BH = torch.where(real_B1, cell, cell_BH)
            state_BH = torch.where(real_B1, torch.sigmoid(o) * F.relu(cell), state_BH)
        return state_BH


class PaperModel(nn.Module):
    """Conv 32 and 64 of 3x3 with ReLU and 2x2 max-pool, Dense 1024; LSTM 128, Dense 128, Dense 1024; Dense 1."""

    heads: tuple[str, ...] = ("next",)

    def __init__(self, config: Config, items: ItemTable, n_train_N: Tensor) -> None:
        super().__init__()
        self.config = config
        self.items = items
        self.image = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 30 * 30, 1024), nn.ReLU(),
        )  # fmt: skip
        self.lstm = ReluLSTM(N_BEHAVIOUR, 128)
        self.behaviour = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1024), nn.ReLU())
        self.out = nn.Linear(2048, 1)

    def forward(self, batch: Pairs | None, scale_K: Tensor | None = None) -> Tensor:
        """Binary cross-entropy; each distinct picture and history of the batch is encoded once.

        As `Recommender.forward`; the loss is one mean.
        """
        if batch is None:
            return nothing(self)
        distinct, place_P = batch.item_P.unique(return_inverse=True)
        logit_P = self._item_term(distinct)[place_P] + self._visitor_term(batch.history)[batch.visitor_P]
        loss = F.binary_cross_entropy_with_logits(logit_P + self.out.bias, batch.label_P)
        return loss if scale_K is None else loss * scale_K.sum()

    def targets(self, batch: Pairs | None) -> Tensor:
        """Over how many pairs the loss is a mean. [1]."""
        return torch.tensor([0.0 if batch is None else len(batch)], device=self.items.brand_N.device)

    def _item_term(self, item_R: Tensor) -> Tensor:
        """The item's part of the logit; an item without a picture is a black one. [R]."""
        row_R = self.items.image_row_N[item_R]
        black = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8, device=row_R.device)
        pixels = torch.where(
            (row_R >= 0)[:, None, None, None],
            self.items.picture_MX[row_R.clamp(min=0)] if len(self.items.picture_MX) else black,
            black,
        )
        return self.image(as_float(pixels)) @ self.out.weight[0, :1024]

    def _visitor_term(self, history: HistoryTensors) -> Tensor:
        state_BH = self.lstm(self.behaviour_numbers(history), history.item_BL > 0)
        return self.behaviour(state_BH) @ self.out.weight[0, 1024:]

    def behaviour_numbers(self, history: HistoryTensors) -> Tensor:
        """The ten numbers of an event. [B, L, 10] float32.

        Flags of view, cart, favourite and purchase; log time gap; sine and cosine of the hour; price z-score; log
        popularity; seen before.
        """
        angle_BL = history.hour_BL * (2 * torch.pi / 24)
        clock_BL = (history.hour_BL >= 0).float()
        return torch.stack(
            [
                *((history.action_BL == ACTION_CODE[name]).float() for name in FLAGS),
                torch.log1p(history.gap_s_BL),
                torch.sin(angle_BL) * clock_BL,
                torch.cos(angle_BL) * clock_BL,
                self.items.price_z_N[history.item_BL],
                self.items.log_popularity_N[history.item_BL],
                history.seen_BL.float(),
            ],
            -1,
        )

    def refresh(self) -> None:
        """Nothing is cached between steps."""

    def passing(self) -> dict[str, Tensor]:
        """Nothing lives between steps."""
        return {}

    def take_up(self, passing: Mapping[str, Tensor]) -> None:
        """As `Recommender.take_up`."""

    def slow_parameters(self) -> tuple[list[nn.Parameter], float]:
        """None."""
        return [], 1.0

    def sparse_parameters(self) -> list[nn.Parameter]:
        """None."""
        return []

    @torch.no_grad()
    def encode_items(self) -> Tensor:
        """The item's term beside a one, so that an inner product with `encode_users` gives the logit. [N + 1, 2]."""
        n_rows = len(self.items.brand_N)
        rows = torch.arange(n_rows, device=self.items.brand_N.device)
        term_N = torch.cat([self._item_term(part) for part in rows.split(64)])
        vector_N2 = torch.stack([term_N, torch.ones_like(term_N)], 1)
        vector_N2[0] = 0
        return vector_N2

    def over(self, items: ItemTable) -> PaperModel:
        """As `Recommender.over`."""
        later = copy.copy(self)
        later._modules = {**self._modules, "items": items}
        return later

    @torch.no_grad()
    def encode_anew(self, row_R: Tensor, vector_RD: Tensor, before: PaperModel) -> Tensor:
        """As `Recommender.encode_anew`: of an item it knows the picture alone."""
        again_R = (self.items.image_row_N[row_R] >= 0) | (row_R >= len(before.items.brand_N))
        term_R = torch.where(again_R, self._item_term(row_R), vector_RD[:, 0])
        return torch.stack([term_R, torch.ones_like(term_R)], 1)

    def encode_users(self, history: HistoryTensors, vector_ND: Tensor) -> Tensor:
        """A one beside the visitor's term and the bias. [B, 2]."""
        term_B = self._visitor_term(history) + self.out.bias
        return torch.stack([torch.ones_like(term_B), term_B], 1)

    def fuse(
        self, history: HistoryTensors, user_BD: Tensor, candidate_BC: Tensor, vector_ND: Tensor, follow_BCF: Tensor
    ) -> Tensor:
        """Logits: the sum of both terms. [B, C, 1]."""
        return vector_ND[candidate_BC] @ user_BD[:, :, None]

    def calibrated(self, logit_BCH: Tensor) -> Tensor:
        """Probabilities: the paper's own sigmoid."""
        return torch.sigmoid(logit_BCH)

    def stage_parameters(self, stage: str) -> Iterator[nn.Parameter]:
        """All parameters: there is one stage."""
        return self.parameters()
