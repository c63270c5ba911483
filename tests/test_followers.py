"""What a model knows of what follows what."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import tinyshop

from rayrec.data.dataset import Dataset
from rayrec.followers import Followers
from rayrec.training.survey import survey


def test_only_the_strongest_followers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrec.followers.FOLLOWERS_KEPT", 3)
    counts = sp.csr_array(np.tile(np.arange(9), (9, 1)))
    kept = Followers(counts, counts).kept().near
    assert kept.dtype == np.float32
    assert kept.indices.reshape(-1, 3).tolist() == [[6, 7, 8]] * 9
    assert kept.data.reshape(-1, 3).tolist() == [[6, 7, 8]] * 9


def test_training_and_serving_know_the_same_strongest(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = tinyshop.write(tmp_path)
    whole = survey(Dataset.open(dataset.path), tinyshop.N_ITEMS, tinyshop.tiny())
    monkeypatch.setattr("rayrec.followers.FOLLOWERS_KEPT", 2)
    cut = survey(Dataset.open(dataset.path), tinyshop.N_ITEMS, tinyshop.tiny())
    for followers, before in ((cut.first_stage, whole.first_stage), (cut.everything, whole.everything)):
        assert np.diff(before.near.indptr).max() > 2
        assert np.diff(followers.near.indptr).max() == 2
