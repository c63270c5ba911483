"""A tiny shop and a scorer whose answers are known: items near in vector are of one style."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from rayrec.catalogue import Catalogue
from rayrec.history import HistoryBatch
from rayrec.schema import ACTIONS, ITEM_SCHEMA

STYLES = ("red", "green", "blue")


def catalogue(per_style: int = 20, new_per_style: int = 2) -> Catalogue:
    """Items `red-0`, `red-1`, ..., `blue-19`; the last of each style are new. Item n costs n."""
    rows = []
    for style_code, style in enumerate(STYLES, start=1):
        for n in range(per_style):
            rows.append(
                {
                    "item_index": len(rows) + 1,
                    "item_id": f"{style}-{n}",
                    "title": f"{style.title()} thing {n}",
                    "category": f"{style}|things",
                    "brand": "even" if n % 2 == 0 else "odd",
                    "price": float(n + 1),
                    "in_catalogue": True,
                    "has_image": False,
                    "category_codes": [style_code],
                    "brand_code": 1 + n % 2,
                    "title_codes": [1],
                    "price_scaled": 0.0,
                    "price_bucket": 1,
                    "n_train": 0 if n >= per_style - new_per_style else 1000 - 40 * n + style_code,
                }
            )
    return Catalogue.from_table(pa.Table.from_pylist(rows, schema=ITEM_SCHEMA))


class FakeScorer:
    """Likes what is of the style of the newest events; within a style, lower numbers score higher.

    Item vectors are one-hot by style. `red-n` is followed by `red-(n + 1)`. Set `broken` to make it fail.
    """

    heads = ("next",)
    max_len = 8
    clock = "time"
    actions = ACTIONS
    reads_moment = True

    def __init__(self, items: Catalogue | None = None) -> None:
        self.catalogue = items if items is not None else catalogue()
        n = len(self.catalogue)
        style = [STYLES.index(item_id.split("-")[0]) for item_id in self.catalogue.ids[1:]]
        self.vectors_ND = np.zeros((n + 1, len(STYLES)), np.float32)
        self.vectors_ND[np.arange(1, n + 1), style] = 1.0
        number = np.array([0] + [int(item_id.split("-")[1]) for item_id in self.catalogue.ids[1:]], np.float32)
        self.charm_N = (1.0 / (2.0 + number)).astype(np.float32)
        follows = [m for m in range(1, n) if style[m - 1] == style[m]]
        self.cooccurrence = sp.csr_array(
            (np.ones(len(follows), np.float32), (follows, [m + 1 for m in follows])), shape=(n + 1, n + 1)
        )
        self.broken: str | None = None
        self.calls: list[int] = []

    def user_vectors(self, history: HistoryBatch) -> np.ndarray:
        self.calls.append(len(history))
        if self.broken == "user_vectors":
            raise RuntimeError("no user vectors today")
        age_BL = np.maximum(history.length_B[:, None] - 1 - np.arange(history.item_BL.shape[1]), 0)
        weight_BL = np.where(history.item_BL > 0, 0.5**age_BL, 0.0)
        return np.einsum("bl,bld->bd", weight_BL, self.vectors_ND[history.item_BL]).astype(np.float32)

    def fuse(
        self, history: HistoryBatch, user_BD: np.ndarray, candidates_BC: np.ndarray, heads: Mapping[str, float]
    ) -> np.ndarray:
        if self.broken == "fuse":
            raise RuntimeError("no scores today")
        taste_BC = np.einsum("bd,bcd->bc", user_BD, self.vectors_ND[candidates_BC])
        scores_BC = 1.0 / (1.0 + np.exp(-(taste_BC + self.charm_N[candidates_BC])))
        scores_BC[candidates_BC == 0] = -np.inf
        return scores_BC.astype(np.float32)


def load_fake(bundle: object = None) -> FakeScorer:
    """The shape of `rayrec.serving.scorer.load_scorer`, for servers started by tests."""
    return FakeScorer()


class SlowScorer(FakeScorer):
    """Takes a second a batch, in the process whose id stands in the file that RAYREC_TEST_SLOW names."""

    def user_vectors(self, history: HistoryBatch) -> np.ndarray:
        told = Path(os.environ["RAYREC_TEST_SLOW"])
        if told.is_file() and told.read_text() == str(os.getpid()):
            time.sleep(1)
        return super().user_vectors(history)


def load_slow(bundle: object = None) -> SlowScorer:
    return SlowScorer()
