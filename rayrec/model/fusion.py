"""Fusion: scores of (visitor, candidate) from crossed features, so that taste changes the order of items.

In: history, user vector, candidates and what is known of them. Out: logits per head. It must not know retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rayrec.config import ModelConfig
from rayrec.model.behaviour import HistoryTensors
from rayrec.model.candidates import FOLLOW_FEATURES
from rayrec.model.encoders import ItemTable
from rayrec.schema import ACTION_CODE, HEAD_ACTIONS, HEADS

TOUCHES = ("view", "click", "cart", "favorite", "purchase")
DECAYS = (0.9, 0.5)
"""How fast the past fades, an event back, in what a visitor is thought to like: taste, and the mood of the moment."""
N_FEATURES = 10 + FOLLOW_FEATURES + 4 * len(DECAYS) + len(TOUCHES)


class Fusion(nn.Module):
    """An MLP over `features`, on top of the inner product of user and item vectors.

    Every feature of taste is crossed with the candidate, where a concatenation of vectors would be additive; target
    attention follows DIN (Zhou et al. 2018). The element-wise product of both vectors (DCN-V2, Wang et al. 2021) was
    an input too: with the few lists that are withheld it learned them by heart. The last layer starts at zero, so that
    training departs from the order of retrieval.

    The head of an action is "next" plus a difference that starts at zero: a rare action borrows from "next", and one
    that never taught answers exactly as "next" does.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.width, config.width, bias=False)
        nn.init.eye_(self.query.weight)
        self.hidden = nn.Sequential(nn.Linear(N_FEATURES, config.fusion_width), nn.ReLU(), nn.Dropout(0.1))
        self.out = nn.Linear(config.fusion_width, len(HEADS))
        self.linear = nn.Linear(N_FEATURES, len(HEADS))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.weight[0, 0] = 1.0
        # Maps a list's logits to probabilities; fitted once training is done, it keeps the order.
        self.calibration_H2: Tensor
        self.register_buffer("calibration_H2", torch.tensor([[1.0, 0.0]]).repeat(len(HEADS), 1))

    def forward(
        self,
        items: ItemTable,
        history: HistoryTensors,
        user_BD: Tensor,
        candidate_BC: Tensor,
        vector_ND: Tensor,
        follow_BCF: Tensor,
    ) -> Tensor:
        """Logits [B, C, heads]; padding candidates get a value that the caller must mask.

        follow_BCF: [B, C, FOLLOW_FEATURES], how the candidate followed the visitor's items in the past.
        """
        vector_BCD, past_BLD = vector_ND[candidate_BC], vector_ND[history.item_BL]
        feature_BCF = self.features(items, history, user_BD, candidate_BC, vector_BCD, past_BLD, follow_BCF)
        hidden_BCW = self.hidden(feature_BCF)
        next_BC1 = self._own(feature_BCF, hidden_BCW)[..., :1]
        # What a rare action teaches must not pull at "next": it moves its own weights alone.
        difference_BCH = self._own(feature_BCF.detach(), hidden_BCW.detach())[..., 1:]
        return torch.cat([next_BC1, next_BC1.detach() + difference_BCH], -1)

    def _own(self, feature_BCF: Tensor, hidden_BCW: Tensor) -> Tensor:
        return self.linear(feature_BCF) + self.out(hidden_BCW)

    def features(
        self,
        items: ItemTable,
        history: HistoryTensors,
        user_BD: Tensor,
        candidate_BC: Tensor,
        vector_BCD: Tensor,
        past_BLD: Tensor,
        follow_BCF: Tensor,
    ) -> Tensor:
        """[B, C, F] float32: how the candidate fits the visitor, each number at about unit scale."""
        real_BL = history.item_BL > 0
        steps_back_BL = (history.length_B[:, None] - 1 - torch.arange(real_BL.shape[1], device=real_BL.device)).clamp(0)

        match_BCL = (candidate_BC[:, :, None] == history.item_BL[:, None, :]) & real_BL[:, None, :]
        match_BCL = match_BCL.float()
        recency_BC = (match_BCL / (1.0 + steps_back_BL[:, None, :])).amax(2)
        # One product counts all matches and those of each action: sums of zeros and ones are exact.
        touch = [torch.ones_like(real_BL), *(history.action_BL == ACTION_CODE[name] for name in TOUCHES)]
        count_BC, *touched = (match_BCL @ torch.stack(touch, -1).float()).unbind(-1)

        dot_BC = (vector_BCD @ user_BD[:, :, None]).squeeze(2)
        last_BD = past_BLD[torch.arange(len(past_BLD)), (history.length_B - 1).clamp(min=0)]
        attention_BCL = (vector_BCD @ self.query(past_BLD).transpose(1, 2)) / vector_BCD.shape[-1] ** 0.5
        attention_BCL = attention_BCL.masked_fill(~real_BL[:, None, :], -1e4).softmax(2) * real_BL[:, None, :]
        attended_BC = ((attention_BCL @ past_BLD) * vector_BCD).sum(2)

        columns = [
            dot_BC,
            *follow_BCF.unbind(-1),
            items.log_popularity_N[candidate_BC],
            (count_BC > 0).float(),
            recency_BC,
            torch.log1p(count_BC),
            items.price_scaled_N[candidate_BC],
            _cosine(vector_BCD, last_BD[:, None]),
            attended_BC,
            (~items.warm_N[candidate_BC]).float(),
            torch.log1p(history.length_B.float())[:, None].expand_as(dot_BC) / 4,
            *(count > 0 for count in touched),
        ]
        weights = [decay**steps_back_BL * real_BL for decay in DECAYS]
        weights = [weight_BL / weight_BL.sum(1, keepdim=True).clamp(min=1e-6) for weight_BL in weights]
        affinities = [
            _affinities(code_NK, rarity_NK, n_codes, candidate_BC, history.item_BL, weights)
            for code_NK, rarity_NK, n_codes in items.tagged()
        ]
        for weight_BL, *of_decay in zip(weights, *affinities, strict=True):
            usual_price_B = (items.price_scaled_N[history.item_BL] * weight_BL).sum(1)
            columns += [(items.price_scaled_N[candidate_BC] - usual_price_B[:, None]).abs(), *of_decay]
        return torch.stack([column.float() for column in columns], -1)


def teaches(action_B: Tensor) -> Tensor:
    """Which heads an event of each action teaches: "next" always, and the head of its action. [B, H] bool."""
    columns = [torch.ones_like(action_B, dtype=torch.bool)]
    for actions in HEAD_ACTIONS.values():
        codes = torch.tensor([ACTION_CODE[action] for action in actions], device=action_B.device)
        columns.append(torch.isin(action_B, codes))
    return torch.stack(columns, -1)


def _affinities(
    code_NK: Tensor,
    rarity_NK: Tensor,
    n_codes: int,
    candidate_BC: Tensor,
    past_BL: Tensor,
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """By each of `weights` ([B, L]) the weighted mean over the history of the cosine between its codes and the
    candidate's. [B, C] float32 each.
    """
    past_code_BX, past_rarity_BLK = code_NK[past_BL].flatten(1), rarity_NK[past_BL]
    code_BX, rarity_BCK = code_NK[candidate_BC].flatten(1), rarity_NK[candidate_BC]
    found = []
    for weight_BL in weights:
        taste_BV = weight_BL.new_zeros(len(past_BL), n_codes)
        taste_BV.scatter_add_(1, past_code_BX, (weight_BL[:, :, None] * past_rarity_BLK).flatten(1))
        found.append((taste_BV.gather(1, code_BX).view_as(rarity_BCK) * rarity_BCK).sum(2))
    return found


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-6)
