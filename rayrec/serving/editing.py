"""How a shop's edits of its items reach the model of a bundle. In: an opened bundle. Out: a `live.Edit`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from rayrec.bundle import Bundle
from rayrec.config import ImageConfig
from rayrec.data.edits import edited
from rayrec.data.images import ImageRejected, decode
from rayrec.data.items import AttributeEncoder
from rayrec.errors import RayrecError
from rayrec.model.scorer import Scorer
from rayrec.ranking.retrieval import Ints
from rayrec.serving.live import Edit
from rayrec.settings import from_dict
from rayrec.state.protocol import ItemEdit

log = logging.getLogger(__name__)


def editor(bundle: Bundle) -> Edit:
    """Edits are encoded as the bundle's training encoded its items: words, prices and pictures alike."""
    vocab = {name: bundle.json(f"vocab/{name}.json") for name in ("categories", "brands")}
    encoder = AttributeEncoder.from_dict(bundle.json("vocab/encoder.json"), vocab)
    images = from_dict(ImageConfig, bundle.json("vocab/images.json"))

    def edit(scorer: Scorer, edits: Sequence[ItemEdit], pictures: Mapping[str, bytes]) -> tuple[Scorer, Ints]:
        facts = {one.item_id: one.facts for one in edits}
        catalogue, row_R = edited(scorer.catalogue, facts, set(pictures), encoder)
        pixels = {}
        for item_id, data in pictures.items():
            try:
                pixels[catalogue.index[item_id]] = decode(data, images)
            except ImageRejected as error:  # it was checked when it was put, by the limits of then
                log.error("the picture of an item is not read (%s)", error.reason)
        try:
            return scorer.over(catalogue, row_R, pixels), row_R
        except RayrecError as error:  # the network that reads pictures is not installed where this replica runs
            log.error("new pictures are not read: %s", error)
            return scorer.over(catalogue, row_R, {}), row_R

    return edit
