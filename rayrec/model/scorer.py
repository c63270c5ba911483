"""A trained model at work: numpy histories in, numpy vectors, scores and rankings out.

In: a model, the item vectors and the transition counts. It must not know where they are stored, nor the web.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from rayrec.catalogue import Catalogue
from rayrec.config import SCRATCH
from rayrec.followers import Followers, longer
from rayrec.history import HistoryBatch
from rayrec.model.backbone import pretrained
from rayrec.model.candidates import Memory, retrieve
from rayrec.model.encoders import ItemTable
from rayrec.model.history_tensors import HistoryTensors
from rayrec.model.paper import PaperModel
from rayrec.model.recommender import Recommender, read_pictures

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Scorer:
    """Ranks items for visitors; the same object judges in evaluation and answers in serving.

    vectors_ND: [N + 1, D] float32, row 0 zeros. vectors_on: the device that keeps them, the model's if None.
    followers: what follows what.
    fused: rank by the fusion; without it by inner product alone (always so for the paper's model).
    """

    def __init__(
        self,
        model: Recommender | PaperModel,
        catalogue: Catalogue,
        vectors_ND: Floats,
        followers: Followers,
        clock: str,
        *,
        fused: bool = True,
        vectors_on: torch.device | None = None,
    ) -> None:
        self.model = model.eval()
        self.catalogue = catalogue
        self.vectors_ND = vectors_ND
        self.cooccurrence = followers.next
        self.clock = clock
        self.heads = model.heads
        self.max_len = model.config.model.max_len
        self.actions = model.config.model.actions
        self.reads_moment = isinstance(model, Recommender) and model.fusion.moment is not None
        self.fused = fused and isinstance(model, Recommender)
        self._memory = Memory(followers)
        self._warm_N = catalogue.n_train > 0
        self._popular_N = np.argsort(-catalogue.n_train[1:], kind="stable") + 1
        self._device = next(model.parameters()).device
        self._vector_ND = torch.from_numpy(np.require(vectors_ND, np.float32, "W")).to(vectors_on or self._device)

    def over(self, catalogue: Catalogue, row_R: Ints, pixels: Mapping[int, npt.NDArray[np.uint8]]) -> Scorer:
        """The same model after a shop's edits: `row_R` are the rows that changed or are new, all others stay.

        pixels: new pictures ([H, W, 3]) by row. Raises UsageError if they need a pretrained network that is not here.
        """
        later, n_rows = copy.copy(self), len(catalogue) + 1
        config, before = self.model.config.model, self.model
        image_item_M = np.array(sorted(pixels), np.int64)
        picture_MX = before.items.picture_MX[:0]
        if config.use_image and pixels:
            whole = pretrained(config.image_backbone) if config.image_backbone != SCRATCH else None
            picture_MX = read_pictures(config, np.stack([pixels[row] for row in image_item_M.tolist()]), whole)
        else:
            image_item_M = image_item_M[:0]
        items = ItemTable(catalogue, image_item_M, picture_MX, like=before.items)
        later.model = before.over(items if config.use_attributes else items.without_attributes())
        row = torch.from_numpy(row_R)
        vector_ND = torch.zeros(n_rows, self._vector_ND.shape[1])
        vector_ND[: len(self._vector_ND)] = self._vector_ND
        vector_ND[row] = later.model.encode_anew(row, vector_ND[row], before)  # type: ignore[arg-type]
        later.catalogue, later.vectors_ND, later._vector_ND = catalogue, vector_ND.numpy(), vector_ND
        later._memory = self._memory.over(n_rows)
        later.cooccurrence = longer(self.cooccurrence, n_rows)
        later._warm_N = catalogue.n_train > 0
        later._popular_N = np.argsort(-catalogue.n_train[1:], kind="stable") + 1
        return later

    @torch.inference_mode()
    def user_vectors(self, history: HistoryBatch) -> Floats:
        """What each visitor wants next. [B, D] float32."""
        return self.model.encode_users(HistoryTensors.of(history, self._device), self._vector_ND).cpu().numpy()

    def fuse(self, history: HistoryBatch, user_BD: Floats, candidates_BC: Ints, heads: Mapping[str, float]) -> Floats:
        """Weighted mean of the heads' probabilities; -inf for padding. [B, C] float32.

        heads: weight of each head, for example {"next": 0.7, "purchase": 0.3}; a head that this model lacks is
        answered by "next", as is one whose action it never met in training. Raises ValueError if no weight is positive.
        """
        total = sum(heads.values())
        if total <= 0:
            raise ValueError("the weights of the heads must add up to more than 0")
        follow_BCF = self._memory.features(history, candidates_BC)
        logit_BCH = self._logits(history, user_BD, candidates_BC, follow_BCF)
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
        model_BN = self._by_model(user_BD)
        if not self.fused:
            return model_BN if isinstance(self.model, PaperModel) else self._cold_last(model_BN)
        candidates_BC, follow_BCF = self._retrieve(history, model_BN)
        logit_BC = self._logits(history, user_BD, candidates_BC, follow_BCF)[..., self._head(head)].cpu().numpy()
        real_BC = candidates_BC > 0
        lowest_B1 = np.where(real_BC, logit_BC, np.inf).min(1, keepdims=True)
        below_BN = model_BN - model_BN.max(1, keepdims=True) + lowest_B1 - 1.0
        np.put_along_axis(below_BN, candidates_BC, np.where(real_BC, logit_BC, -np.inf), axis=1)
        below_BN[:, 0] = -np.inf
        return below_BN

    def candidates(self, history: HistoryBatch) -> tuple[Ints, Floats]:
        """What retrieval returns, and what its features by memory are. [B, C] int64, [B, C, FOLLOW_FEATURES]."""
        return self._retrieve(history, self._by_model(self.user_vectors(history)))

    @torch.inference_mode()
    def _by_model(self, user_BD: Floats) -> Floats:
        """Inner products with every item; -inf for padding. [B, N + 1] float32."""
        # By torch, since a second pool of threads (numpy's) would fight with its own.
        model_BN: Floats = (torch.from_numpy(user_BD).to(self._vector_ND.device) @ self._vector_ND.T).cpu().numpy()
        model_BN[:, 0] = -np.inf
        return model_BN

    def _cold_last(self, model_BN: Floats) -> Floats:
        """Cold items below all others: the first stage was not taught how seldom they are chosen; the fusion is."""
        real_BN = model_BN[:, 1:]
        spread_B1 = real_BN.max(1, keepdims=True) - real_BN.min(1, keepdims=True) + 1
        return np.where(self._warm_N, model_BN, model_BN - spread_B1)

    def _retrieve(self, history: HistoryBatch, model_BN: Floats) -> tuple[Ints, Floats]:
        remembered = self._memory.ask(history)
        k = self.model.config.model.candidates
        candidates_BC = retrieve(history, model_BN, remembered, self._popular_N, self._warm_N, k)
        return candidates_BC, self._memory.features(history, candidates_BC)

    def logits(self, history: HistoryBatch, candidates_BC: Ints) -> Floats:
        """Raw logits of every head, before calibration; padding is not masked. [B, C, heads] float32."""
        follow_BCF = self._memory.features(history, candidates_BC)
        return self._logits(history, self.user_vectors(history), candidates_BC, follow_BCF).cpu().numpy()

    def _head(self, head: str) -> int:
        return self.heads.index(head) if head in self.heads else 0

    @torch.inference_mode()
    def _logits(self, history: HistoryBatch, user_BD: Floats, candidates_BC: Ints, follow_BCF: Floats) -> torch.Tensor:
        def move(values: npt.NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

        return self.model.fuse(
            HistoryTensors.of(history, self._device),
            move(user_BD),
            move(candidates_BC),
            self._vector_ND,
            move(follow_BCF),
        )
