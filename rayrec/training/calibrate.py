"""Calibration: the fusion's logits to probabilities. Platt's two numbers a head, which keep every order.

In: a trained model and rows of `examples`. Out: the model's calibration is set. It must not know files or Ray.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import torch
from scipy.optimize import minimize

from rayrec.model.fusion import teaches
from rayrec.model.recommender import Recommender
from rayrec.model.scorer import Scorer
from rayrec.training.batches import history_of

NEGATIVES = 100
MAX_ROWS = 2000
MIN_ROWS = 20
LEAST_SCALE = 1e-3
"""Logits that know nothing, or the wrong way round, would be scaled to nothing, and float32 makes ties of them all."""


def calibrate(model: Recommender, scorer: Scorer, chunks: Iterable[pa.Table], seed: int) -> None:
    """Fit each head so that its sigmoid is the chance of the next item among 100 drawn uniformly.

    A head with fewer than MIN_ROWS rows of its own (too few carts, say) takes the numbers of "next".
    (Platt 1999, without his smoothing of the labels.)
    """
    tables = list(chunks)
    if not tables:
        return
    rows = pa.concat_tables(tables)[:MAX_ROWS]
    rng = np.random.default_rng(seed)
    history = history_of(rows, scorer.max_len, scorer.clock)
    target_B1 = np.asarray(rows["target"], np.int64)[:, None]
    negative_BM = rng.integers(1, len(scorer.catalogue) + 1, (len(rows), NEGATIVES))
    logit_BCH = scorer.logits(history, np.concatenate([target_B1, negative_BM], 1))
    own_BH = teaches(torch.from_numpy(np.asarray(rows["target_action"], np.int64))).numpy()
    fitted = _platt(logit_BCH[..., 0])
    fitted_H2 = [
        _platt(logit_BCH[own_BH[:, h], :, h]) if h and own_BH[:, h].sum() >= MIN_ROWS else fitted
        for h in range(len(scorer.heads))
    ]
    model.fusion.calibration_H2.copy_(torch.tensor(np.array(fitted_H2, np.float32)))


def _platt(logit_BC: np.ndarray) -> tuple[float, float]:
    """Scale (at least LEAST_SCALE) and shift that minimise the log loss; column 0 holds the right items."""
    label_BC = np.zeros(logit_BC.shape)
    label_BC[:, 0] = 1

    def loss(x: np.ndarray) -> float:
        z_BC = max(np.exp(x[0]), LEAST_SCALE) * logit_BC + x[1]
        return float(np.mean(np.logaddexp(0, z_BC) - label_BC * z_BC))

    best = minimize(loss, np.array([0.0, -4.0]), method="Nelder-Mead", options={"maxiter": 200}).x
    return max(float(np.exp(best[0])), LEAST_SCALE), float(best[1])
