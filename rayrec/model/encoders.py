"""Encoders: an item's id, picture and attributes to a vector; a visitor's events to a vector.

In: item rows, `HistoryTensors`. Out: vectors of width D. They must not know losses, files or Ray.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rayrec.catalogue import Catalogue, Ragged
from rayrec.config import SCRATCH, ModelConfig
from rayrec.model.backbone import HEAD, above, layers
from rayrec.model.shared_ids import SharedIds
from rayrec.schema import TITLE_BUCKETS

MAX_CODES = 16
GAP_BUCKETS = 32
PICTURE_GAIN = 0.1
"""Adam moves every weight by about the learning rate, and a weight of the CNN moves all items at once: damp it."""


class ItemTable(nn.Module):
    """What is known of every item, as buffers that move with the model and are not saved with it.

    category_NK, title_NK  [N + 1, K] int64  codes, 0 padding
    brand_N, price_N       [N + 1] int64     brand code, price bucket
    *_rarity_NK            [N + 1, K] float32  how rare each code of category, brand and title is, see `rarity`
    price_scaled_N         [N + 1] float32   price as the dataset scales it
    price_z_N              [N + 1] float32   price as it is, z-scored; 0 where unknown
    log_popularity_N       [N + 1] float32   log(1 + training events), z-scored
    warm_N                 [N + 1] bool      has training events: only then does the id say anything
    image_row_N            [N + 1] int64     row in picture_MX, -1 without a picture
    picture_MX             [M, ...]          what the picture encoder reads: pixels [M, 3, S, S] uint8, or what the
                                             frozen layers of a pretrained network made of them

    known: the attributes that any item has; to encode those which none has would cost a tenth of a step.

    like: a table of the catalogue that was trained on, whose measures of all items together (how rare a code is, the
    mean price) hold here too: a code that it never met is unknown.
    """

    category_NK: Tensor
    title_NK: Tensor
    category_rarity_NK: Tensor
    brand_rarity_NK: Tensor
    title_rarity_NK: Tensor
    brand_N: Tensor
    price_N: Tensor
    price_scaled_N: Tensor
    price_z_N: Tensor
    log_popularity_N: Tensor
    warm_N: Tensor
    image_row_N: Tensor
    picture_MX: Tensor
    known: tuple[str, ...]

    def __init__(
        self,
        catalogue: Catalogue,
        image_item_M: np.ndarray,
        picture_MX: Tensor,
        like: ItemTable | None = None,
    ) -> None:
        super().__init__()
        popularity = np.log1p(catalogue.n_train.astype(np.float64))
        image_row_N = np.full(len(catalogue) + 1, -1, np.int64)
        image_row_N[image_item_M] = np.arange(len(image_item_M))
        category_NK, title_NK = _codes(catalogue.category), _codes(catalogue.title)
        brand_N = torch.from_numpy(catalogue.brand)
        if like is None:
            self.idf = {"category": idf(category_NK), "brand": idf(brand_N[:, None]), "title": idf(title_NK)}
            self.spread = {"price": _spread(catalogue.price), "popularity": _spread(popularity)}
        else:
            self.idf, self.spread = like.idf, like.spread
            category_NK, title_NK, brand_N = (
                codes.where(codes < len(self.idf[name]), 0)
                for name, codes in (("category", category_NK), ("title", title_NK), ("brand", brand_N))
            )
        for name, tensor in {
            "category_NK": category_NK,
            "title_NK": title_NK,
            "brand_N": brand_N,
            "category_rarity_NK": rarity(category_NK, self.idf["category"]),
            "brand_rarity_NK": rarity(brand_N[:, None], self.idf["brand"]),
            "title_rarity_NK": rarity(title_NK, self.idf["title"]),
            "price_N": torch.from_numpy(catalogue.price_bucket),
            "price_scaled_N": torch.from_numpy(catalogue.price_scaled),
            "price_z_N": torch.from_numpy(np.nan_to_num(_zscore(catalogue.price, self.spread["price"]))),
            "log_popularity_N": torch.from_numpy(_zscore(popularity, self.spread["popularity"])),
            "warm_N": torch.from_numpy(catalogue.n_train > 0),
            "image_row_N": torch.from_numpy(image_row_N),
            "picture_MX": picture_MX,
        }.items():
            self.register_buffer(name, tensor, persistent=False)
        known = (name for name, codes in self.attributes().items() if bool((codes > 0).any()))
        self.known: tuple[str, ...] = tuple(known) if like is None else like.known

    def tagged(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Categories, brand and title words: codes [N + 1, K], their rarity, and how many codes there are."""
        codes = (self.category_NK, self.brand_N[:, None], self.title_NK)
        rarities = (self.category_rarity_NK, self.brand_rarity_NK, self.title_rarity_NK)
        n_codes = (len(self.idf[name]) for name in ("category", "brand", "title"))
        return zip(codes, rarities, n_codes, strict=True)

    def attributes(self) -> dict[str, Tensor]:
        """Codes of each attribute, by the name of what encodes it."""
        return {"category": self.category_NK, "title": self.title_NK, "brand": self.brand_N, "price": self.price_N}

    def without_attributes(self) -> ItemTable:
        """The same table, which knows categories, brands, prices and titles no more."""
        codes = ("category_NK", "category_rarity_NK", "title_NK", "title_rarity_NK", "brand_N", "brand_rarity_NK")
        for name in (*codes, "price_N", "price_scaled_N", "price_z_N"):
            setattr(self, name, torch.zeros_like(getattr(self, name)))  # the old ones are the catalogue's own memory
        self.known = ()
        return self


def _spread(values_N: npt.NDArray[Any]) -> tuple[float, float] | None:
    """Mean and deviation of rows from 1 on; what is unknown (NaN) counts for nothing. None if all of it is."""
    known_M = values_N[1:][np.isfinite(values_N[1:])].astype(np.float64)
    return (float(known_M.mean()), float(known_M.std()) or 1.0) if len(known_M) else None


def _zscore(values_N: npt.NDArray[Any], spread: tuple[float, float] | None) -> npt.NDArray[np.float32]:
    """At mean 0 and deviation 1; what is unknown stays NaN."""
    if spread is None:
        return np.zeros(len(values_N), np.float32)
    return ((values_N - spread[0]) / spread[1]).astype(np.float32)


def _codes(lists: Ragged) -> Tensor:
    """Code lists as a matrix [N + 1, K] int64, K at most MAX_CODES, 0 padding."""
    length_N = np.minimum(np.diff(lists.offsets), MAX_CODES)
    width = max(1, int(length_N.max(initial=1)))
    real_NK = np.arange(width) < length_N[:, None]
    codes_NK = np.zeros(real_NK.shape, np.int64)
    codes_NK[real_NK] = lists.values[(lists.offsets[:-1, None] + np.arange(width))[real_NK]]
    return torch.from_numpy(codes_NK)


def idf(code_NK: Tensor) -> Tensor:
    """Inverse document frequency of each code up to the greatest; 0 for padding. [V] float32."""
    count_V = torch.bincount(code_NK.flatten())
    idf_V = torch.log(len(code_NK) / (1.0 + count_V)).clamp(min=0)
    idf_V[0] = 0
    return idf_V


def rarity(code_NK: Tensor, idf_V: Tensor) -> Tensor:
    """Weight of each code of each item: its inverse document frequency, each item at length 1. [N + 1, K] float32.

    The products of two items' weights, summed over the codes they share, are their TF-IDF cosine (Salton and Buckley
    1988): to share a rare code says more than to share one that half of the catalogue has. Padding weighs 0.

    >>> code_NK = torch.tensor([[0, 0], [1, 2], [1, 0], [1, 3]])
    >>> rarity(code_NK, idf(code_NK)).tolist()
    [[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]]
    """
    weight_NK = idf_V[code_NK]
    return weight_NK / weight_NK.norm(dim=1, keepdim=True).clamp(min=1e-6)


def shrink(pixels_MHWC: np.ndarray, size: int, rows: int = 256) -> Tensor:
    """Average images down to `size` x `size`. [M, H, H, 3] uint8 -> [M, 3, size, size] uint8."""
    out = torch.empty(len(pixels_MHWC), 3, size, size, dtype=torch.uint8)
    for start in range(0, len(pixels_MHWC), rows):
        part = torch.from_numpy(pixels_MHWC[start : start + rows]).permute(0, 3, 1, 2)
        if part.shape[-1] != size:
            part = F.interpolate(part.float(), (size, size), mode="area").round_().to(torch.uint8)
        out[start : start + rows] = part
    return out


def as_float(pixels_MCSS: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return pixels_MCSS.float().mul_(2 / 255).sub_(1)


DIRECTIONS, MEASURED = 64, 4096
"""Directions of a pretrained network's features that are read, and of how many pictures at most they are found."""
LEAST_DEVIATION = 0.01
"""Of a direction over all pictures: one that hardly varies is left small, and one that never does is 0."""


class ImageCNN(nn.Module):
    """Convolutions of stride 2 with batch-independent normalisation, averaged over the picture.

    GroupNorm rather than BatchNorm: a vector must not depend on what else is in the batch, nor differ between
    training and serving.
    """

    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.project = nn.Linear(2 * channels[-1], width)

    def forward(self, pixels_MCSS: Tensor) -> Tensor:
        """[M, 3, S, S] uint8 -> [M, D] float32."""
        maps = self.layers(as_float(pixels_MCSS))
        return self.project(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1))


class PretrainedCNN(nn.Module):
    """The upper layers of a pretrained network, and a projection of what tells its features of the pictures apart.

    That is their first DIRECTIONS principal components, each scaled to deviation 1: a shop has too few pictures to
    learn a projection of all HEAD features. Centre and directions are those of the features at the start, and are saved
    with the weights: a vector does not depend on what else is in the batch.
    """

    centre_F: Tensor
    whiten_FW: Tensor

    def __init__(self, train: str, width: int) -> None:
        super().__init__()
        self.learns = train
        self.upper = above(train, layers())
        self.project = nn.Linear(DIRECTIONS, width)
        self.register_buffer("centre_F", torch.zeros(HEAD))
        self.register_buffer("whiten_FW", torch.zeros(HEAD, DIRECTIONS))

    @torch.no_grad()
    def begin(self, whole: nn.Sequential, picture_MX: Tensor, batch: int = 256) -> None:
        """Take the weights of the upper layers, and find centre and directions."""
        self.upper.load_state_dict(above(self.learns, whole).state_dict())
        if not len(picture_MX):
            return
        some_MX = picture_MX[:: -(-len(picture_MX) // MEASURED)]
        feature_MF = torch.cat([self.features(part) for part in some_MX.split(batch)])
        self.centre_F.copy_(feature_MF.mean(0))
        n = min(DIRECTIONS, len(feature_MF))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, length_W, direction_FW = torch.svd_lowrank(feature_MF - self.centre_F, q=n, niter=4)
        deviation_W = (length_W / len(feature_MF) ** 0.5).clamp(min=LEAST_DEVIATION)
        self.whiten_FW[:, :n] = direction_FW / deviation_W

    def features(self, picture_MX: Tensor) -> Tensor:
        """[M, ...] -> [M, F] float32."""
        return self.upper(picture_MX if picture_MX.dtype == torch.uint8 else picture_MX.float())

    def forward(self, picture_MX: Tensor) -> Tensor:
        """[M, ...], see `ItemTable` -> [M, D] float32."""
        return self.project((self.features(picture_MX) - self.centre_F) @ self.whiten_FW)


def picture_encoder(config: ModelConfig) -> ImageCNN | PretrainedCNN:
    """The picture encoder that `config` asks for, its weights random."""
    if config.image_backbone == SCRATCH:
        return ImageCNN(config.cnn_channels, config.width)
    return PretrainedCNN(config.image_train, config.width)


def looked_up(vector_ND: Tensor, item_X: Tensor) -> Tensor:
    """Rows of a table that may lie on another device than those who ask: [N + 1, D], [...] int64 -> [..., D]."""
    return F.embedding(item_X.to(vector_ND.device), vector_ND).to(item_X.device)


def _only(vector_RD: Tensor, wanted_R: Tensor) -> Tensor:
    """The other rows at zero; mostly there are none, and then nothing is computed."""
    return vector_RD if bool(wanted_R.all()) else vector_RD * wanted_R[:, None]


@dataclass(frozen=True)
class Fresh:
    """Picture vectors that were encoded in this step, with gradient: [M] distinct items, [M, D].

    scale: of their gradient.
    """

    item_M: Tensor
    vector_MD: Tensor
    scale: float = 1.0

    def onto(self, vector_RD: Tensor, row_R: Tensor, n_rows: int) -> Tensor:
        """The same values, with the gradient of those of `row_R` that are fresh."""
        place_N = torch.full((n_rows,), -1, device=row_R.device)
        place_N[self.item_M] = torch.arange(len(self.item_M), device=row_R.device)
        place_R = place_N[row_R]
        fresh_F = torch.nonzero(place_R >= 0).squeeze(1)
        zero_MD = (self.vector_MD - self.vector_MD.detach()) * self.scale
        # A sum into few rows: to index a whole table with gradient costs a sort of it.
        return vector_RD.index_add(0, fresh_F, zero_MD[place_R[fresh_F]])


class ItemEncoder(nn.Module):
    """An item's vector: id + picture + categories + brand + price bucket + title words, summed.

    The id of an item without training events is never used (its embedding would be noise), and in training ids are
    hidden at random, so that content learns to carry cold items (DropoutNet, Volkovs et al. 2017). Pictures and
    attributes can be hidden as well, so that none of the parts relies on another that may be missing (ModDrop,
    Neverova et al. 2016).
    """

    def __init__(self, config: ModelConfig, n_items: int, n_categories: int, n_brands: int) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.id: nn.Embedding | SharedIds | None = None
        if config.use_id:
            self.id = nn.Embedding(n_items + 1, width, padding_idx=0)
        self.cnn = picture_encoder(config) if config.use_image else None
        self.recompute = 0  # pictures at a time, see train.image_recompute
        self.frozen_features = isinstance(self.cnn, PretrainedCNN) and not len(self.cnn.upper)
        if config.use_attributes:
            self.category = nn.EmbeddingBag(max(2, n_categories), width, padding_idx=0, mode="mean")
            self.title = nn.EmbeddingBag(TITLE_BUCKETS, width, padding_idx=0, mode="mean")
            self.brand = nn.Embedding(max(2, n_brands), width, padding_idx=0)
            self.price = nn.Embedding(11, width, padding_idx=0)
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                nn.init.normal_(module.weight, std=width**-0.5 / 2)
                with torch.no_grad():
                    module.weight[0] = 0
        # The table of picture vectors is filled by refresh_images(); a step updates what it encodes, and some in turn.
        self.image_ND: Tensor
        self.refreshed = 0
        n_cached = n_items + 1 if config.use_image else 0
        self.register_buffer("image_ND", torch.zeros(n_cached, width), persistent=False)
        self.news_N: Tensor  # what was encoded since other workers heard of it
        self.register_buffer("news_N", torch.zeros(n_cached, dtype=torch.bool), persistent=False)

    def over(self, n_rows: int) -> ItemEncoder:
        """The same weights, for as many items, of which no picture has been encoded."""
        later = copy.copy(self)
        later._buffers = {**self._buffers, "image_ND": torch.zeros(1, self.config.width).expand(n_rows, -1)}
        return later

    def images(self, items: ItemTable, item_M: Tensor) -> Tensor:
        """Picture vectors, with gradient, of items that have a picture. [M] int64 -> [M, D]."""
        picture_MX = items.picture_MX[items.image_row_N[item_M]]
        # float: mixed precision computes in bf16, the table is float32.
        return self._encoded(picture_MX).float() * PICTURE_GAIN

    def _encoded(self, picture_MX: Tensor) -> Tensor:
        """By the CNN; where `recompute` says so, in parts of which only the pictures are kept (Chen et al. 2016)."""
        assert self.cnn is not None
        if not self.recompute or not torch.is_grad_enabled():
            return self.cnn(picture_MX)
        parts = (checkpoint(self.cnn, part, use_reentrant=False) for part in picture_MX.split(self.recompute))
        return torch.cat(list(parts))

    def cache(self, item_M: Tensor, vector_MD: Tensor) -> None:
        """Put picture vectors into the table."""
        self.image_ND[item_M] = vector_MD.detach()
        self.news_N[item_M] = True

    @torch.no_grad()
    def refresh_images(self, items: ItemTable, some: int = 0, batch: int = 512) -> None:
        """Encode every picture anew into the table that `forward` reads, or the next `some` in turn."""
        if self.cnn is None:
            return
        item_M = torch.nonzero(items.image_row_N >= 0).squeeze(1)
        if some and some < len(item_M):
            place_S = torch.arange(self.refreshed, self.refreshed + some, device=item_M.device) % len(item_M)
            self.refreshed = (self.refreshed + some) % len(item_M)
            item_M = item_M[place_S]
        else:
            self.refreshed = 0
        for part_M in item_M.split(batch):
            self.cache(part_M, self.images(items, part_M))

    def forward(
        self, items: ItemTable, row_R: Tensor | None = None, fresh: Fresh | None = None, *, with_ids: bool = True
    ) -> Tensor:
        """Vectors of the items in `row_R` ([R] int64; all N + 1 if None). -> [R, D] float32; padding gives zeros.

        Picture vectors are the table's; those of `fresh`, which it has as well, pass a gradient on. with_ids: False
        gives what the vectors would be if nobody had met the items.
        """
        rows = torch.arange(len(items.brand_N), device=items.brand_N.device) if row_R is None else row_R
        vector_RD = torch.zeros(len(rows), self.config.width, device=rows.device)
        if self.id is not None and with_ids:
            vector_RD = vector_RD + self._hidden(self.id(rows * items.warm_N[rows]), self.config.id_dropout)
        if self.cnn is not None:
            image_RD = self.image_ND[rows]
            if fresh is not None:
                image_RD = fresh.onto(image_RD, rows, len(self.image_ND))
            vector_RD = vector_RD + self._hidden(image_RD, self.config.image_dropout)
        if self.config.use_attributes and items.known:
            codes = items.attributes()
            parts = [getattr(self, name)(codes[name][rows]) for name in items.known]
            vector_RD = vector_RD + self._hidden(reduce(torch.add, parts), self.config.attribute_dropout)
        return _only(vector_RD, rows > 0)

    def _hidden(self, part_RD: Tensor, share: float) -> Tensor:
        """Some rows at zero, in training; nothing is scaled up, since what is left is whole."""
        if not self.training or not share:
            return part_RD
        return part_RD * (torch.rand(len(part_RD), device=part_RD.device) >= share)[:, None]
