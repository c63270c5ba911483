"""The visitor's side: events to what is wanted next, by a causal encoder over item vectors, actions and time gaps.

In: item vectors and `HistoryTensors`. Out: a vector of width D after each event. It must not know losses or files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rayrec.config import ModelConfig
from rayrec.model.history_tensors import HistoryTensors
from rayrec.schema import ACTIONS

GAP_BUCKETS = 32


class Behaviour(nn.Module):
    """What a visitor wants next, after each event: an LSTM, a GRU or a transformer over (item, action, time gap).

    The last item's vector is added to the output: the encoder then learns how the next item departs from the last.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.action = nn.Embedding(len(ACTIONS) + 1, width, padding_idx=0)
        self.gap = nn.Embedding(GAP_BUCKETS, width)
        nn.init.normal_(self.action.weight, std=0.02)
        nn.init.normal_(self.gap.weight, std=0.02)
        self.hide = EventDropout(config.event_dropout)
        self.normalise = nn.LayerNorm(width) if config.layer_norm else nn.Identity()
        self.dropout = VariationalDropout(config.dropout) if config.variational else nn.Dropout(config.dropout)
        self.encoder: nn.Module = Transformer(config) if config.encoder == "transformer" else Recurrent(config)
        self.project = nn.Linear(width if config.encoder == "transformer" else config.hidden_width, width)
        self.residual = nn.Parameter(torch.ones(()))

    def forward(self, item_BLD: Tensor, history: HistoryTensors) -> Tensor:
        """[B, L, D] item vectors -> [B, L, D]; entry l has read events 0..l."""
        gap_BL = torch.log2(history.gap_s_BL + 1).long().clamp_(max=GAP_BUCKETS - 1)
        step_BLD = self.hide(item_BLD) + self.action(history.action_BL) + self.gap(gap_BL)
        # A recurrence adds up bf16's rounding over every step (and not every CPU has a bf16 LSTM): keep it in float32.
        with torch.autocast(step_BLD.device.type, enabled=False):
            state_BLH = self.encoder(self.dropout(self.normalise(step_BLD.float())), history.length_B)
        return self.project(self.dropout(state_BLH)) + self.residual * item_BLD


class EventDropout(nn.Module):
    """Hides whole events of a training step, so that no single one is relied on."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, item_BLD: Tensor) -> Tensor:
        """[B, L, D] -> the same with events at zero; nothing is scaled up, since what is left is whole."""
        if not self.training or not self.share:
            return item_BLD
        return item_BLD * (torch.rand(item_BLD.shape[:2], device=item_BLD.device) >= self.share)[..., None]


class VariationalDropout(nn.Module):
    """Dropout with one mask for all steps of a sequence (Gal and Ghahramani 2016)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, step_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        if not self.training or not self.share:
            return step_BLD
        return step_BLD * F.dropout(torch.ones_like(step_BLD[:, :1]), self.share)


class Recurrent(nn.Module):
    """An LSTM or a GRU. Padding is never computed where it would be more than half of the work."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kind = nn.GRU if config.encoder == "gru" else nn.LSTM
        between = config.dropout if config.layers > 1 else 0.0
        self.layers = kind(config.width, config.hidden_width, config.layers, batch_first=True, dropout=between)

    def forward(self, step_BLD: Tensor, length_B: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, H]; entries of padding mean nothing."""
        longest = step_BLD.shape[1]
        length_B = length_B.cpu()
        if 2 * int(length_B.sum()) >= length_B.numel() * longest:
            state_BLH: Tensor = self.layers(step_BLD)[0]
            return state_BLH
        # Batches are bucketed by length, so this is for the few of a chunk that mix lengths, and for serving.
        packed = pack_padded_sequence(step_BLD, length_B.clamp(min=1), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.layers(packed)[0], batch_first=True, total_length=longest)[0]


class Transformer(nn.Module):
    """Causal self-attention with learned places (SASRec, Kang and McAuley 2018), normalised before each block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.place = nn.Embedding(config.max_len, width)
        nn.init.normal_(self.place.weight, std=0.02)
        self.blocks = nn.ModuleList(
            Block(width, config.hidden_width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.normalise = nn.LayerNorm(width)

    def forward(self, step_BLD: Tensor, length_B: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]. Padding lies behind what is real, where a causal mask keeps it from being seen."""
        places = torch.arange(step_BLD.shape[1], device=step_BLD.device)
        step_BLD = step_BLD + self.place(places)
        for block in self.blocks:
            step_BLD = block(step_BLD)
        normalised: Tensor = self.normalise(step_BLD)
        return normalised


class Block(nn.Module):
    """Attention and a feed-forward layer, each on top of what comes in."""

    def __init__(self, width: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.forward_layer = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, step_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        batch, longest, width = step_BLD.shape
        parts = self.query_key_value(self.before_attention(step_BLD))
        query, key, value = parts.view(batch, longest, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen_BHLD = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout.p if self.training else 0.0
        )
        step_BLD = step_BLD + self.dropout(self.out(seen_BHLD.transpose(1, 2).reshape(batch, longest, width)))
        return step_BLD + self.forward_layer(self.before_forward(step_BLD))


def last_BD(values_BLD: Tensor, length_B: Tensor) -> Tensor:
    """Each visitor's entry after the last real event; zeros without history. [B, L, D] -> [B, D]."""
    at_B = (length_B - 1).clamp(min=0)
    rows = torch.arange(len(at_B), device=at_B.device)
    return values_BLD[rows, at_B] * (length_B > 0)[:, None]
