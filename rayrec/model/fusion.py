"""Fusion: scores of (visitor, candidate) from crossed features, so that taste changes the order of items.

In: history, user vector, candidates and what is known of them. Out: logits per head. It must not know retrieval.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayrec.config import ModelConfig
from rayrec.model.candidates import FOLLOW_FEATURES, NOTHING_FOLLOWED
from rayrec.model.encoders import ItemTable, looked_up
from rayrec.model.history_tensors import HistoryTensors
from rayrec.model.moment import Moment, asked
from rayrec.schema import ACTION_CODE, HEAD_ACTIONS, HEADS

TOUCHES = ("view", "click", "cart", "favorite", "purchase")
DECAYS = (0.9, 0.5)
"""How fast the past fades, an event back, in what a visitor is thought to like: taste, and the mood of the moment."""
N_FEATURES = 10 + FOLLOW_FEATURES + 4 * len(DECAYS) + len(TOUCHES)


@dataclass(frozen=True)
class Candidates:
    """Items to be ranked for each of B visitors, and what is known of them because others met them.

    item_BC        [B, C] int64    0 is padding
    vector_BCD     [B, C, D] float32
    follow_BCF     [B, C, FOLLOW_FEATURES] float32  how they followed the visitor's items in the past
    popularity_BC  [B, C] float32  see `ItemTable.log_popularity_N`
    is_cold_BC     [B, C] bool     nobody has met them
    """

    item_BC: Tensor
    vector_BCD: Tensor
    follow_BCF: Tensor
    popularity_BC: Tensor
    is_cold_BC: Tensor

    @classmethod
    def of(cls, items: ItemTable, item_BC: Tensor, vector_ND: Tensor, follow_BCF: Tensor) -> Candidates:
        """As they are."""
        vector_BCD = looked_up(vector_ND, item_BC)
        return cls(item_BC, vector_BCD, follow_BCF, items.log_popularity_N[item_BC], ~items.warm_N[item_BC])

    def as_cold(self, chosen_BC: Tensor, vector_XD: Tensor, items: ItemTable) -> Candidates:
        """The same, where those of `chosen_BC` ([B, C] bool) are as if nobody had met them.

        vector_XD: [X, D] float32, the vectors of the X chosen, row by row.
        """
        nothing_F = torch.tensor(NOTHING_FOLLOWED, device=chosen_BC.device)
        vector_BCD = self.vector_BCD.clone()
        vector_BCD[chosen_BC] = vector_XD
        return replace(
            self,
            vector_BCD=vector_BCD,
            follow_BCF=torch.where(chosen_BC[..., None], nothing_F, self.follow_BCF),
            popularity_BC=torch.where(chosen_BC, items.log_popularity_N[0], self.popularity_BC),  # that of no events
            is_cold_BC=self.is_cold_BC | chosen_BC,
        )


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
        self.moment = Moment(config.fusion_width) if config.use_moment else None
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
        candidates: Candidates,
        past_BLD: Tensor,
    ) -> Tensor:
        """Logits [B, C, heads]; padding candidates get a value that the caller must mask.

        past_BLD: vectors of the history's items.
        """
        feature_BCF = self.features(items, history, user_BD, candidates, past_BLD)
        crossed, rectified, dropped = self.hidden
        hidden_BCW = crossed(feature_BCF)
        if self.moment is not None:  # as one more feature would, one for each moment
            hidden_BCW = hidden_BCW + self.moment(asked(history))[:, None]
        hidden_BCW = dropped(rectified(hidden_BCW))
        next_BC1 = self._own(feature_BCF, hidden_BCW, slice(0, 1))
        # What a rare action teaches must not pull at "next": it moves its own weights alone.
        difference_BCH = self._own(feature_BCF.detach(), hidden_BCW.detach(), slice(1, None))
        return torch.cat([next_BC1, next_BC1.detach() + difference_BCH], -1)

    def _own(self, feature_BCF: Tensor, hidden_BCW: Tensor, heads: slice) -> Tensor:
        plain = F.linear(feature_BCF, self.linear.weight[heads], self.linear.bias[heads])
        return plain + F.linear(hidden_BCW, self.out.weight[heads], self.out.bias[heads])

    def features(
        self,
        items: ItemTable,
        history: HistoryTensors,
        user_BD: Tensor,
        candidates: Candidates,
        past_BLD: Tensor,
    ) -> Tensor:
        """[B, C, F] float32: how the candidate fits the visitor, each number at about unit scale.

        Few large operations: a served list is a few hundred candidates of one visitor, where each costs its call.
        """
        candidate_BC, real_BL = candidates.item_BC, history.item_BL > 0
        steps_back_BL = (history.length_B[:, None] - 1 - torch.arange(real_BL.shape[1], device=real_BL.device)).clamp(0)
        met_BTC = _met(history, candidate_BC, steps_back_BL)
        times_BC, touched_BTC = met_BTC[:, 0], met_BTC[:, 2:]
        dot_BC, like_last_BC, attended_BC = self._products(
            user_BD, candidates.vector_BCD, past_BLD, real_BL, history.length_B
        )
        price_BC = items.price_scaled_N[candidate_BC]
        columns = [
            dot_BC,
            candidates.follow_BCF.transpose(1, 2),
            candidates.popularity_BC,
            times_BC > 0,
            met_BTC[:, 1],
            torch.log1p(times_BC),
            price_BC,
            like_last_BC,
            attended_BC,
            candidates.is_cold_BC,
            torch.log1p(history.length_B.float())[:, None].expand_as(dot_BC) / 4,
            touched_BTC > 0,
        ]
        weight_BLW = torch.stack([decay**steps_back_BL * real_BL for decay in DECAYS], -1)
        weight_BLW = weight_BLW / weight_BLW.sum(1, keepdim=True).clamp(min=1e-6)
        usual_price_BW = (items.price_scaled_N[history.item_BL][..., None] * weight_BLW).sum(1)
        affinities = [_affinities(*tags, candidate_BC, history.item_BL, weight_BLW) for tags in items.tagged()]
        for w in range(len(DECAYS)):
            columns.append((price_BC - usual_price_BW[:, w, None]).abs())
            columns += [affinity_BCW[..., w] for affinity_BCW in affinities]
        # Features beside one another would be written number by number: they are laid down one after another.
        feature_BFC = torch.cat([(c if c.ndim == 3 else c[:, None]).float() for c in columns], 1)
        return feature_BFC.transpose(1, 2)

    def _products(
        self, user_BD: Tensor, vector_BCD: Tensor, past_BLD: Tensor, real_BL: Tensor, length_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each candidate: its inner product with the visitor's vector, its cosine to the last item, and its inner
        product with what it attends to of the history. [B, C] each.
        """
        last_BD = past_BLD[torch.arange(len(past_BLD), device=past_BLD.device), (length_B - 1).clamp(min=0)]
        key_BDL, scale = self.query(past_BLD).transpose(1, 2), vector_BCD.shape[-1] ** -0.5
        hidden_B1L = (~real_BL)[:, None, :] * -1e4
        attention_BCL = torch.baddbmm(hidden_B1L, vector_BCD, key_BDL, alpha=scale).softmax(2)
        # Attention's mean of vectors, times a vector, is attention's mean of products. Padding's vector is zeros, so
        # that nothing is attended to without a history.
        others_BKD = torch.cat([user_BD[:, None], last_BD[:, None], past_BLD], 1)
        dot_BC1, last_BC1, past_BCL = (vector_BCD @ others_BKD.transpose(1, 2)).split([1, 1, past_BLD.shape[1]], 2)
        lengths_BC = vector_BCD.norm(dim=-1) * last_BD.norm(dim=-1, keepdim=True)
        return dot_BC1[..., 0], last_BC1[..., 0] / lengths_BC.clamp(min=1e-6), (attention_BCL * past_BCL).sum(2)


def teaches(action_B: Tensor) -> Tensor:
    """Which heads an event of each action teaches: "next" always, and the head of its action. [B, H] bool."""
    columns = [torch.ones_like(action_B, dtype=torch.bool)]
    for actions in HEAD_ACTIONS.values():
        codes = torch.tensor([ACTION_CODE[action] for action in actions], device=action_B.device)
        columns.append(torch.isin(action_B, codes))
    return torch.stack(columns, -1)


def _met(history: HistoryTensors, candidate_BC: Tensor, steps_back_BL: Tensor) -> Tensor:
    """How each candidate was met in the history: how often, how recently, how often in each of TOUCHES.

    -> [B, T, C] float32.
    """
    item_BL = history.item_BL
    same_BLL = item_BL[:, :, None] == item_BL[:, None, :]
    is_newest_BL = ~same_BLL.triu(1).any(2)  # of an item that was met more than once, the last time
    events = [torch.ones_like(is_newest_BL), is_newest_BL / (1.0 + steps_back_BL)]
    events += [history.action_BL == ACTION_CODE[name] for name in TOUCHES]
    # Of all events of each event's item: sums of zeros and ones are exact, and all but one of the dates are zero.
    met_BTL = torch.stack([event_BL.float() for event_BL in events], 1) @ same_BLL.float()
    sorted_BL, event_BL = item_BL.sort(1)
    place_BC = torch.searchsorted(sorted_BL, candidate_BC.contiguous()).clamp(max=item_BL.shape[1] - 1)
    is_met_BC = (sorted_BL.gather(1, place_BC) == candidate_BC) & (candidate_BC > 0)
    event_B1C = event_BL.gather(1, place_BC)[:, None]
    return met_BTL.gather(2, event_B1C.expand(-1, met_BTL.shape[1], -1)) * is_met_BC[:, None]


def _affinities(
    code_NK: Tensor, rarity_NK: Tensor, n_codes: int, candidate_BC: Tensor, past_BL: Tensor, weight_BLW: Tensor
) -> Tensor:
    """By each of W weights of the history's items ([B, L, W]), the weighted mean of the cosine between their codes and
    the candidate's. [B, C, W] float32.
    """
    n_visitors, n_weights = len(past_BL), weight_BLW.shape[-1]
    first_B11 = n_codes * torch.arange(n_visitors, device=past_BL.device)[:, None, None]
    # Each visitor's taste for each code, one visitor's below the other's.
    past_BLKW = F.embedding(past_BL, rarity_NK)[..., None] * weight_BLW[:, :, None, :]
    taste_XW = weight_BLW.new_zeros(n_visitors * n_codes, n_weights)
    taste_XW.index_add_(0, (F.embedding(past_BL, code_NK) + first_B11).flatten(), past_BLKW.flatten(0, 2))
    code_XK = (F.embedding(candidate_BC, code_NK) + first_B11).flatten(0, 1)
    rarity_XK = F.embedding(candidate_BC, rarity_NK).flatten(0, 1)
    found_XW = F.embedding_bag(code_XK, taste_XW, per_sample_weights=rarity_XK, mode="sum")
    return found_XW.view(*candidate_BC.shape, n_weights)
