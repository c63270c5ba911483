"""Which pictures a worker of a training holds. In: a dataset, settings, which worker of how many. Out: its pictures.

It must not know what is learned of them.
"""

from __future__ import annotations

import numpy as np

from rayrec.config import SCRATCH, Config
from rayrec.data.dataset import Dataset, Images
from rayrec.model.encoders import shrink


def held_images(dataset: Dataset, config: Config, rank: int, world: int) -> Images | None:
    """All pictures, or by `train.image_held` those of every `world`-th shard; None if the model sees none.

    Where the model reads them smaller than they are stored, they are small: of stored ones, one shard is held at a
    time. A pretrained network and the paper's model read them as stored.
    """
    if not config.model.use_image:
        return None
    if config.model.kind == "paper" or config.model.image_backbone != SCRATCH:
        return dataset.images()
    part = (rank, world) if config.train.image_held == "share" else (0, 1)
    size = config.model.image_size
    small = [
        Images(shard.item_M, shrink(shard.pixels_MHWC, size).permute(0, 2, 3, 1).numpy())
        for shard in dataset.image_shards(*part)
    ]
    return Images.of(small) if small else Images(np.empty(0, np.int64), np.empty((0, size, size, 3), np.uint8))
