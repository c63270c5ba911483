"""The default model: item encoder, LSTM and fusion, and what every kind of model can do.

In: batches. Out: losses, user and item vectors, logits. It must not know files or Ray.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rayrec.catalogue import Catalogue
from rayrec.config import SCRATCH, Config, ModelConfig
from rayrec.model.backbone import below, encode, pretrained, reading_size
from rayrec.model.behaviour import Behaviour, last_BD
from rayrec.model.encoders import Fresh, ItemEncoder, ItemTable, PretrainedCNN, looked_up, shrink
from rayrec.model.fusion import Candidates, Fusion, teaches
from rayrec.model.history_tensors import HistoryTensors
from rayrec.model.losses import bpr_max, full_softmax, gbce, listwise, nothing, sampled_softmax
from rayrec.model.negatives import NegativeSampler, how_many
from rayrec.model.paper import PaperModel
from rayrec.model.shared_ids import Send, SharedIds
from rayrec.schema import HEADS

READS_A_STEP = 2
"""Of the table of ids: what was met or chosen, and what might have been."""
ROWS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class NextItems:
    """A training batch of the first stage: after each event, the item that came next.

    target_BL: [B, L] int64, 0 where there is none or it is withheld.
    """

    history: HistoryTensors
    target_BL: Tensor

    def __len__(self) -> int:
        return len(self.target_BL)


@dataclass(frozen=True)
class Lists:
    """A training batch of the second stage: candidates that retrieval returned, and which one came next.

    candidate_BC: [B, C] int64, 0 padding. follow_BCF: [B, C, FOLLOW_FEATURES], see `candidates.Memory`.
    target_B: [B] int64, place of the right one in its list. action_B: [B] int64, what was done with it
    (schema.ACTION_CODE).
    """

    history: HistoryTensors
    candidate_BC: Tensor
    follow_BCF: Tensor
    target_B: Tensor
    action_B: Tensor

    def __len__(self) -> int:
        return len(self.target_B)

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        own = (self.candidate_BC, self.follow_BCF, self.target_B, self.action_B)
        return sum(tensor.nbytes for tensor in (*own, *vars(self.history).values()))


class Recommender(nn.Module):
    """Retrieval by inner product (item encoder and LSTM), then fusion over what was retrieved."""

    heads: tuple[str, ...] = HEADS

    def __init__(self, config: Config, items: ItemTable, n_train_N: Tensor) -> None:
        super().__init__()
        self.config = config
        self.items = items
        n_items = len(items.brand_N) - 1
        n_categories, n_brands = int(items.category_NK.max()) + 1, int(items.brand_N.max()) + 1
        self.item_encoder = ItemEncoder(config.model, n_items, n_categories, n_brands)
        self.behaviour = Behaviour(config.model)
        self.fusion = Fusion(config.model)
        train = config.train
        self.item_encoder.recompute = train.image_recompute
        if self.item_encoder.id is not None:
            self.item_encoder.id.sparse = train.id_optimizer == "rowwise_adagrad"
        self.sampler = NegativeSampler(n_train_N, 0.0 if train.loss == "gbce" else train.negative_alpha)
        self.sampled = how_many(int((n_train_N > 0).sum()), train)
        # Set where workers hold different pictures, see `fit.Peers.exchange`.
        self.exchange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        # The fusion trains on frozen vectors; they are set when the first stage is done.
        self.vector_ND: Tensor | None = None

    def forward(self, batch: NextItems | Lists | None, scale_K: Tensor | None = None) -> Tensor:
        """The batch's loss. One entry for both stages, so that a data-parallel wrapper sees every call.

        None costs nothing. scale_K: of each of the means that make up the loss, see `targets`.
        """
        if batch is None:
            return self._nothing()
        loss_K = self._retrieval_loss(batch)[None] if isinstance(batch, NextItems) else self._fusion_losses(batch)
        return (loss_K if scale_K is None else loss_K * scale_K).sum()

    def targets(self, batch: NextItems | Lists | None) -> Tensor:
        """Over how many targets each of the means that make up the loss is taken: one mean, or one a head. [K]."""
        if batch is None:
            return torch.zeros(1 if self.vector_ND is None else len(HEADS), device=self.items.brand_N.device)
        if isinstance(batch, NextItems):
            return (batch.target_BL > 0).sum()[None].float()
        return teaches(batch.action_B).float().sum(0)

    def _retrieval_loss(self, batch: NextItems) -> Tensor:
        real_BL = batch.target_BL > 0
        target_P = batch.target_BL[real_BL]
        if not len(target_P):
            return self._nothing()
        past_BL = batch.history.item_BL
        n_past = past_BL.numel()
        used = torch.cat([past_BL.flatten(), target_P])
        negative_M = self.sampler(self.sampled).to(target_P.device) if self.sampled else None
        other_M = self._warm() if negative_M is None else negative_M
        fresh_used, fresh_other = self._pictures(used, other_M)
        row_R, place = used.unique(return_inverse=True)
        used_D = self.item_encoder(self.items, row_R, fresh_used)[place]
        user_BLD = self.behaviour(used_D[:n_past].view(*past_BL.shape, -1), batch.history)
        user_PD, target_PD = user_BLD[real_BL], used_D[n_past:]
        other_MD = self.item_encoder(self.items, other_M, fresh_other)
        if negative_M is None:
            return full_softmax(user_PD, target_PD, other_MD)
        scored = (user_PD, target_PD, other_MD, target_P, negative_M)
        if self.config.train.loss == "bpr_max":
            return bpr_max(*scored)
        if self.config.train.loss == "gbce":
            return gbce(*scored, n_items=int(self.items.warm_N.sum()))
        return sampled_softmax(*scored, self.sampler.log_q_N.to(target_P.device))

    def _nothing(self) -> Tensor:
        if isinstance(self.item_encoder.id, SharedIds) and self.vector_ND is None:
            self.item_encoder.id.takes_no_part(READS_A_STEP)
        return nothing(self, self.sparse_parameters())

    def _warm(self) -> Tensor:
        return torch.nonzero(self.items.warm_N).squeeze(1)

    def _pictures(self, used_P: Tensor, other_M: Tensor) -> tuple[Fresh | None, Fresh | None]:
        """Pictures encoded with gradient: of what was met and chosen, and of what might have been.

        They are `image_budget` items, half of them among `used_P`, half among `other_M`, or all of both; the rest comes
        from the encoder's table, and so do all without a budget. The gradient of the others is scaled to the share in
        which the used ones were drawn. With the used ones alone the CNN would learn to raise every picture's score:
        what is chosen pulls up, and nothing pulls down.
        """
        encoder, budget = self.item_encoder, self.config.train.image_budget
        if encoder.cnn is None or not budget or not len(self.items.picture_MX):
            return None, None
        if budget == "all" or encoder.frozen_features:  # a projection is cheap
            budget = 2 * len(self.items.image_row_N)
        else:
            encoder.refresh_images(self.items, some=self.config.train.image_refresh)
        used_M, used_share = self._some_with_picture(used_P, -(-budget // 2))
        other_M, other_share = self._some_with_picture(other_M, budget // 2)
        fresh_M, place = torch.cat([used_M, other_M]).unique(return_inverse=True)
        fresh_MD = encoder.images(self.items, fresh_M)
        encoder.cache(fresh_M, fresh_MD)
        used_MD, other_MD = fresh_MD[place].split([len(used_M), len(other_M)])
        return Fresh(used_M, used_MD), Fresh(other_M, other_MD, used_share / max(other_share, 1e-9))

    def _some_with_picture(self, item_P: Tensor, n: int) -> tuple[Tensor, float]:
        """At most `n` distinct items that have a picture, at random, and which share of all those they are."""
        distinct = item_P.unique()
        distinct = distinct[self.items.image_row_N[distinct] >= 0]
        chosen = distinct[torch.randperm(len(distinct), device=distinct.device)[:n]]
        return chosen, len(chosen) / max(1, len(distinct))

    def _fusion_losses(self, batch: Lists) -> Tensor:
        assert self.vector_ND is not None, "set vector_ND before training the fusion"
        config, history = self.config.model, batch.history
        if self.training and config.use_moment:  # so that a visitor of whom it is not known can be ranked as well
            history = history.forgetting(config.moment_dropout)
        with torch.no_grad():
            user_BD = self.encode_users(history, self.vector_ND)
        candidates = Candidates.of(self.items, batch.candidate_BC, self.vector_ND, batch.follow_BCF)
        if self.training and config.cold_dropout:
            candidates = self._some_as_cold(candidates, history)
        past_BLD = looked_up(self.vector_ND, history.item_BL)
        logit_BCH = self.fusion(self.items, history, user_BD, candidates, past_BLD)
        logit_BCH = logit_BCH.masked_fill((batch.candidate_BC == 0)[..., None], -1e4)
        weight_BH = teaches(batch.action_B).float()
        losses = [listwise(logit_BCH[..., h], batch.target_B, weight_BH[:, h]) for h in range(len(HEADS))]
        return torch.stack(losses)

    @torch.no_grad()
    def _some_as_cold(self, candidates: Candidates, history: HistoryTensors) -> Candidates:
        """A share of the candidates that the visitor has not met, at random, as if nobody else had.

        An item without events is never a target, and would teach that what is new is never chosen.
        """
        item_BC = candidates.item_BC
        is_met_BC = (item_BC[..., None] == history.item_BL[:, None]).any(2)
        chosen_BC = (torch.rand(item_BC.shape, device=item_BC.device) < self.config.model.cold_dropout) & ~is_met_BC
        row_R, place_X = item_BC[chosen_BC].unique(return_inverse=True)
        return candidates.as_cold(chosen_BC, self.item_encoder(self.items, row_R, with_ids=False)[place_X], self.items)

    def train(self, mode: bool = True) -> Recommender:
        """As every module's; once the vectors are frozen the first stage stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.vector_ND is not None:
            self.item_encoder.eval()
            self.behaviour.eval()
        return self

    def refresh(self) -> None:
        """Bring what is cached between steps (picture vectors) up to date with the weights."""
        self.item_encoder.refresh_images(self.items)
        self.share_pictures()

    def share_pictures(self) -> None:
        """Where workers hold different pictures: tell the others of what this one encoded since, and hear of theirs.

        Every worker calls it at the same place.
        """
        encoder = self.item_encoder
        if self.exchange is None or encoder.cnn is None:
            return
        item_M = torch.nonzero(encoder.news_N).squeeze(1)
        item_M, vector_MD = self.exchange(item_M, encoder.image_ND[item_M])
        encoder.cache(item_M, vector_MD)
        encoder.news_N.zero_()

    @torch.no_grad()
    def encode_items(self) -> Tensor:
        """Vectors of all items, row 0 zeros. [N + 1, D] float32; in main memory where workers share the ids."""
        was_training = self.training
        self.eval()
        self.refresh()
        rows_N = torch.arange(len(self.items.brand_N), device=self.items.brand_N.device)
        # In parts: what a vector is the sum of takes as much memory as the vectors, several times over.
        kept_on = torch.device("cpu") if isinstance(self.item_encoder.id, SharedIds) else rows_N.device
        parts = (self.item_encoder(self.items, part).to(kept_on) for part in rows_N.split(ROWS_AT_ONCE))
        vector_ND = torch.cat(list(parts))
        self.train(was_training)
        return vector_ND

    def share_ids(self, rank: int, world: int, send: Send) -> SharedIds:
        """Keep of the table of ids the part of one of `world` workers, who get the rest from each other."""
        assert self.item_encoder.id is not None
        self.item_encoder.id = shared = SharedIds(self.item_encoder.id.weight, rank, world, send)
        return shared

    def passing(self) -> dict[str, Tensor]:
        """What lives between steps and is no weight: for going on in the middle of an epoch. Own copies."""
        if self.item_encoder.cnn is None:
            return {}
        return {"image_ND": self.item_encoder.image_ND.clone(), "refreshed": torch.tensor(self.item_encoder.refreshed)}

    def take_up(self, passing: Mapping[str, Tensor]) -> None:
        """Go on with what `passing` gave."""
        if passing:
            self.item_encoder.image_ND.copy_(passing["image_ND"])
            self.item_encoder.refreshed = int(passing["refreshed"])

    def over(self, items: ItemTable) -> Recommender:
        """The same weights over another table of items, in which each item has the row that it had, to serve it."""
        later = copy.copy(self)
        encoder = self.item_encoder.over(len(items.brand_N))
        later._modules = {**self._modules, "items": items, "item_encoder": encoder}
        return later

    @torch.no_grad()
    def encode_anew(self, row_R: Tensor, vector_RD: Tensor, before: Recommender) -> Tensor:
        """Vectors of items that changed since `before`; of a picture that is not in this table, as it was. [R, D].

        row_R: [R] int64. vector_RD: those of before; zeros for an item that is new.
        """
        was_R = row_R * (row_R < len(before.items.brand_N))
        # An item's vector is a sum: what it has beside id and attributes is its picture.
        picture_RD = vector_RD - before.item_encoder(before.items, was_R)
        if self.item_encoder.cnn is not None:
            pictured = torch.nonzero(self.items.image_row_N[row_R] >= 0).squeeze(1)
            picture_RD[pictured] = self.item_encoder.images(self.items, row_R[pictured])
        return self.item_encoder(self.items, row_R) + picture_RD

    def encode_users(self, history: HistoryTensors, vector_ND: Tensor) -> Tensor:
        """What each visitor wants next. [B, D] float32; zeros without history."""
        return last_BD(self.behaviour(looked_up(vector_ND, history.item_BL), history), history.length_B)

    def fuse(
        self, history: HistoryTensors, user_BD: Tensor, candidate_BC: Tensor, vector_ND: Tensor, follow_BCF: Tensor
    ) -> Tensor:
        """Logits of every head. [B, C, heads]."""
        candidates = Candidates.of(self.items, candidate_BC, vector_ND, follow_BCF)
        return self.fusion(self.items, history, user_BD, candidates, looked_up(vector_ND, history.item_BL))

    def calibrated(self, logit_BCH: Tensor) -> Tensor:
        """Probabilities in (0, 1), in the order of the logits."""
        calibration_H2 = self.fusion.calibration_H2
        return torch.sigmoid(logit_BCH * calibration_H2[:, 0] + calibration_H2[:, 1])

    def slow_parameters(self) -> tuple[list[nn.Parameter], float]:
        """Those that learn at a share of the rate, and which: pretrained layers, or a CNN of our own."""
        cnn, train = self.item_encoder.cnn, self.config.train
        if isinstance(cnn, PretrainedCNN):
            return list(cnn.upper.parameters()), train.image_lr
        return list(cnn.parameters()) if cnn is not None else [], train.cnn_lr

    def sparse_parameters(self) -> list[nn.Parameter]:
        """Tables whose gradients are sparse."""
        table = self.item_encoder.id
        return list(table.parameters()) if table is not None and table.sparse else []

    def stage_parameters(self, stage: str) -> list[nn.Parameter]:
        """The parameters that a stage trains: the fusion's own, or all others."""
        fusion = list(self.fusion.parameters())
        return fusion if stage == "fusion" else [p for p in self.parameters() if all(p is not q for q in fusion)]


def build(
    config: Config,
    catalogue: Catalogue,
    image_item_M: np.ndarray | None = None,
    pixels_MHWC: np.ndarray | None = None,
    weights: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    keep: Path | None = None,
) -> Recommender | PaperModel:
    """The model that `config` describes, for the items of `catalogue`; with `weights`, a trained one.

    Without images (in serving) the picture encoder is there and encodes nothing; of a pretrained one nothing else is
    needed then. device: where its frozen layers work. keep: a folder for what they make of the pictures.
    """
    whole = None
    if image_item_M is None or pixels_MHWC is None:
        image_item_M, size = np.empty(0, np.int64), config.model.image_size
        picture_MX = torch.empty(0, 3, size, size, dtype=torch.uint8)
    else:
        if config.model.use_image and config.model.image_backbone != SCRATCH:
            whole = pretrained(config.model.image_backbone)
        picture_MX = read_pictures(config.model, pixels_MHWC, whole, device, keep)
    items = ItemTable(catalogue, image_item_M, picture_MX)
    if not config.model.use_attributes:
        items = items.without_attributes()
    kind = PaperModel if config.model.kind == "paper" else Recommender
    model = kind(config, items, torch.from_numpy(catalogue.n_train))
    if isinstance(model, Recommender) and isinstance(model.item_encoder.cnn, PretrainedCNN) and whole is not None:
        model.item_encoder.cnn.begin(whole.cpu(), model.items.picture_MX)
    if weights is not None:
        model.load_state_dict(dict(weights))
    return model


def read_pictures(
    config: ModelConfig,
    pixels_MHWC: np.ndarray,
    whole: nn.Sequential | None,
    device: torch.device | None = None,
    keep: Path | None = None,
) -> Tensor:
    """What the picture encoder reads of pictures, see `ItemTable.picture_MX`. whole: the pretrained network, if any."""
    if whole is None:
        return shrink(pixels_MHWC, config.image_size)
    small = shrink(pixels_MHWC, reading_size(pixels_MHWC.shape[1]))
    return encode(small, below(config.image_train, whole), device, keep)
