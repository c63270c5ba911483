"""A trained model at work: numpy histories in, numpy vectors, scores and rankings out.

In: a model, the item vectors and the transition counts. It must not know where they are stored, nor the web.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from rayrec.catalogue import Catalogue
from rayrec.history import HistoryBatch
from rayrec.model.candidates import Transitions, retrieve
from rayrec.model.encoders import HistoryTensors
from rayrec.model.paper import PaperModel
from rayrec.model.recommender import Recommender

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Scorer:
    """Ranks items for visitors; the same object judges in evaluation and answers in serving.

    vectors_ND: [N + 1, D] float32, row 0 zeros. cooccurrence: [N + 1, N + 1] csr, what follows what.
    """

    def __init__(
        self,
        model: Recommender | PaperModel,
        catalogue: Catalogue,
        vectors_ND: Floats,
        cooccurrence: sp.csr_matrix,
        clock: str,
    ) -> None:
        self.model = model.eval()
        self.catalogue = catalogue
        self.vectors_ND = vectors_ND
        self.cooccurrence = cooccurrence
        self.clock = clock
        self.heads = model.heads
        self.max_len = model.config.model.max_len
        self._vector_ND = torch.as_tensor(np.ascontiguousarray(vectors_ND))
        self._transitions = Transitions(cooccurrence)
        self._popular_N = np.argsort(-catalogue.n_train[1:], kind="stable") + 1
        self._device = next(model.parameters()).device
        self._vector_ND = self._vector_ND.to(self._device)

    @torch.inference_mode()
    def user_vectors(self, history: HistoryBatch) -> Floats:
        """What each visitor wants next. [B, D] float32."""
        return self.model.encode_users(HistoryTensors.of(history, self._device), self._vector_ND).cpu().numpy()

    def fuse(
        self, history: HistoryBatch, user_BD: Floats, candidates_BC: Ints, heads: Mapping[str, float]
    ) -> Floats:
        """Weighted mean of the heads' probabilities; -inf for padding. [B, C] float32.

        heads: weight of each head, for example {"next": 0.7, "purchase": 0.3}; a head that this model lacks is
        answered by "next". Raises ValueError if no weight is positive.
        """
        total = sum(heads.values())
        if total <= 0:
            raise ValueError("the weights of the heads must add up to more than 0")
        logit_BCH = self._logits(history, user_BD, candidates_BC, self._follow_at(history, candidates_BC))
        probability_BCH = self.model.calibrated(logit_BCH).cpu().numpy()
        score_BC = np.zeros(candidates_BC.shape, np.float32)
        for head, weight in heads.items():
            score_BC += probability_BCH[..., self._head(head)] * np.float32(weight / total)
        return np.where(candidates_BC > 0, score_BC, -np.inf).astype(np.float32)

    def score(self, history: HistoryBatch, candidates_BC: Ints, head: str) -> Floats:
        """Probability in (0, 1) that each candidate is wanted. [B, C] float32."""
        return self.fuse(history, self.user_vectors(history), candidates_BC, {head: 1.0})

    def rank_all(self, history: HistoryBatch, head: str) -> Floats:
        """A score for every item: retrieved candidates in the fusion's order, all others below by inner product.

        -> [B, N + 1] float32; column 0 is -inf.
        """
        user_BD = self.user_vectors(history)
        model_BN = user_BD @ self.vectors_ND.T
        model_BN[:, 0] = -np.inf
        if isinstance(self.model, PaperModel):
            return model_BN
        count_BN, share_BN = self._transitions.scores(history)
        candidates_BC = retrieve(history, model_BN, count_BN, self._popular_N, self.model.config.model.candidates)
        follow_BC2 = np.stack(
            [np.take_along_axis(count_BN, candidates_BC, 1), np.take_along_axis(share_BN, candidates_BC, 1)], -1
        )
        logit_BC = self._logits(history, user_BD, candidates_BC, follow_BC2)[..., self._head(head)].cpu().numpy()
        logit_BC = np.where(candidates_BC > 0, logit_BC, np.inf)
        floor_B1 = logit_BC.min(1, keepdims=True)
        finite_BN = np.where(np.isfinite(model_BN), model_BN, -np.inf)
        below_BN = finite_BN - finite_BN.max(1, keepdims=True) + floor_B1 - 1.0
        np.put_along_axis(below_BN, candidates_BC, np.where(candidates_BC > 0, logit_BC, -np.inf), axis=1)
        below_BN[:, 0] = -np.inf
        return below_BN.astype(np.float32)

    def candidates(self, history: HistoryBatch) -> tuple[Ints, Floats]:
        """What retrieval returns, and each candidate's transition count and share. [B, C] int64, [B, C, 2]."""
        model_BN = self.user_vectors(history) @ self.vectors_ND.T
        count_BN, share_BN = self._transitions.scores(history)
        candidates_BC = retrieve(history, model_BN, count_BN, self._popular_N, self.model.config.model.candidates)
        take = [np.take_along_axis(values_BN, candidates_BC, 1) for values_BN in (count_BN, share_BN)]
        return candidates_BC, np.stack(take, -1)

    def _follow_at(self, history: HistoryBatch, candidates_BC: Ints) -> Floats:
        count_BN, share_BN = self._transitions.scores(history)
        take = [np.take_along_axis(values_BN, candidates_BC, 1) for values_BN in (count_BN, share_BN)]
        return np.stack(take, -1)

    def _head(self, head: str) -> int:
        return self.heads.index(head) if head in self.heads else 0

    @torch.inference_mode()
    def _logits(self, history: HistoryBatch, user_BD: Floats, candidates_BC: Ints, follow_BC2: Floats) -> torch.Tensor:
        def move(values: npt.NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

        return self.model.fuse(
            HistoryTensors.of(history, self._device),
            move(user_BD),
            move(candidates_BC),
            self._vector_ND,
            move(follow_BC2),
        )
