"""From a bundle to what ranks. In: an opened bundle. Out: a `model.scorer.Scorer`."""

from __future__ import annotations

from functools import partial

from rayrec.bundle import Bundle
from rayrec.model.recommender import build
from rayrec.model.scorer import Scorer


def load_scorer(bundle: Bundle) -> Scorer:
    """The scorer of a bundle, on the CPU; the item vectors stay memory-mapped."""
    model = build(bundle.config, bundle.catalogue, weights=bundle.tensors())
    return Scorer(model, bundle.catalogue, bundle.vectors_ND, bundle.followers, bundle.clock)


def open_scorer(path: str) -> Scorer:
    """Verify the bundle at `path` and load its scorer."""
    return load_scorer(Bundle.open(path))


def scorer_maker(path: str) -> partial[Scorer]:
    """A picklable maker of the bundle's scorer, for workers."""
    return partial(open_scorer, path)
