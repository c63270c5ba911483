"""The dataset as workers open it: all of them the same one, or none of them any.

In: where it lies, and the fingerprint of the one that is meant. Out: the dataset. It must not know what it is for.
"""

from __future__ import annotations

from rayrec.data.dataset import Dataset
from rayrec.errors import DataError, RayrecError
from rayrec.training.loop import Together

ADVICE = "every node must see the same files; name a place that all nodes share"


def opened_by_all(path: str, fingerprint: str, workers: Together) -> Dataset:
    """The dataset at `path`, if every worker finds the one with `fingerprint` there ("": whichever there is).

    Called by every worker at the same place. Raises DataError on all of them, which names the first that finds another
    one or cannot open any: who did not hear of it would wait for that worker in what they do together.
    """
    dataset, why, other = None, "", False
    try:
        dataset = Dataset.open(path)
        other = bool(fingerprint) and dataset.fingerprint() != fingerprint
    except (RayrecError, OSError) as error:
        if workers.world == 1:
            raise
        why = f" ({error})"
    own = [rank == workers.rank for rank in range(workers.world)]
    told = workers.sum([float(mine and trouble) for trouble in (other, dataset is None) for mine in own])
    if without := [rank for rank in range(workers.world) if told[workers.world + rank]]:
        raise DataError(f"{path}: worker {without[0]} cannot open the dataset there{why}: {ADVICE}")
    if others := [rank for rank in range(workers.world) if told[rank]]:
        raise DataError(
            f"{path}: worker {others[0]} finds another dataset there than the one that the training was started with: "
            f"{ADVICE}"
        )
    assert dataset is not None
    return dataset
