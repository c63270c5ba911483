"""From a finished training to a bundle. In: the last checkpoint, the dataset. Out: a version folder, maybe live.

It must not know Ray, nor how the weights were found.
"""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.torch import load_file

from rayrec.bundle import Bundle, BundleWriter, publish, versions
from rayrec.catalogue import Catalogue
from rayrec.config import Config
from rayrec.data.dataset import Dataset
from rayrec.data.images import JPEG_QUALITY
from rayrec.errors import writing
from rayrec.followers import Followers
from rayrec.progress import Task
from rayrec.training.lineage import LINEAGE, lineage
from rayrec.training.tracking import draw_curves

THUMBNAILS = pa.schema([("item_index", pa.int32()), ("jpeg", pa.binary())])


def write_bundle(
    checkpoint: Path,
    bundles: str,
    dataset: Dataset,
    catalogue: Catalogue,
    config: Config,
    followers: Followers,
    *,
    live: bool = True,
    origin: dict[str, Any] | None = None,
) -> Bundle:
    """Write the bundle of a finished training, and make it the live version if `live`.

    checkpoint: folder with model.safetensors, vectors.npy and state.json. followers: counts of all training events, as
    `Survey.everything` has them. origin: its lineage, as it was when the training began; default: `dataset`, no parent.
    """
    history = json.loads((checkpoint / "state.json").read_text())["history"]
    with writing(bundles), BundleWriter(bundles, new_version(bundles)) as writer:
        writer.tensors(load_file(checkpoint / "model.safetensors"))
        writer.json("config.json", config.model_dump(mode="json"))
        writer.array("vectors.npy", np.load(checkpoint / "vectors.npy", allow_pickle=False).astype(np.float32))
        writer.matrix("cooccurrence/next", followers.next)
        writer.matrix("cooccurrence/near", followers.near)
        pq.write_table(catalogue.table, writer.file("items/items.parquet"))
        for name in ("categories", "brands", "encoder"):
            writer.json(f"vocab/{name}.json", dataset.vocab(name))
        writer.json("vocab/images.json", dataset.manifest["config"]["images"])
        write_thumbnails(dataset, writer.file("images/thumbnails.arrow"))
        writer.json(LINEAGE, origin or lineage(dataset, None))
        writer.json("metrics.json", {"training": history})
        draw_curves(history, writer.file("curves.png"))
        writer.file("MODEL_CARD.md").write_text(model_card(config, dataset, catalogue, history))
        bundle = writer.commit(
            clock=dataset.clock, items=len(catalogue), created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        )
    if live:
        publish(bundle)
    return bundle


def new_version(bundles: str) -> str:
    """A version that sorts after those that are there: the time, with a number if one was written this second."""
    stamp, taken = time.strftime("%Y%m%d-%H%M%S", time.gmtime()), set(versions(bundles))
    return next(name for n in range(1000) if (name := stamp if not n else f"{stamp}-{n:03d}") not in taken)


def write_thumbnails(dataset: Dataset, path: Path) -> None:
    """The pictures as JPEG, for the storefront: an Arrow file of THUMBNAILS. Memory holds a shard at a time."""
    n = int(dataset.manifest.get("counts", {}).get("images", 0))
    with pa.ipc.new_file(path, THUMBNAILS) as file, Task("bundle (pictures)", n or None) as task:
        for images in dataset.image_shards():
            encoded = []
            for pixels_HWC in images.pixels_MHWC:
                stream = io.BytesIO()
                Image.fromarray(pixels_HWC).save(stream, "JPEG", quality=JPEG_QUALITY)
                encoded.append(stream.getvalue())
                task.advance()
            file.write(pa.record_batch([images.item_M.astype(np.int32), encoded], schema=THUMBNAILS))


def model_card(config: Config, dataset: Dataset, catalogue: Catalogue, history: list[dict[str, Any]]) -> str:
    """What the model is, what it learned from and how well it did in validation, in Markdown."""
    counts = dataset.manifest.get("counts", {})
    rows = "\n".join(
        f"| {line['stage']}{'' if line.get('kept', True) else ' (not kept)'} | {line['epoch'] + 1} | "
        f"{line['loss']:.4f} | {line['valid_metrics_ndcg@10']:.4f} | {line['valid_next_ndcg@10']:.4f} |"
        for line in history
    )
    facts = "\n".join(f"- {name}: {value}" for name, value in counts.items())
    kind = (
        "The founding CNN + LSTM model: one Dense layer over a concatenation, so every visitor gets the same order."
        if config.model.kind == "paper"
        else "CNN item encoder and LSTM behaviour encoder for retrieval; a fusion over crossed features for ranking."
    )
    return f"""# Model card

{kind}

- preset: {config.preset}
- items: {len(catalogue)}, of which {int(catalogue.has_image.sum())} with a picture and \
{int((catalogue.n_train[1:] == 0).sum())} without a training event
- clock of the data: {dataset.clock}
{facts}

## Training

| stage | epoch | loss | validation NDCG@10, new items | validation NDCG@10, all items |
|---|---|---|---|---|
{rows}

`rayrec evaluate` adds the figures of the test split, with the floors beside them, to metrics.json.

## Use and limits

It ranks the items of one shop for its visitors. It has learned from what was shown in the past, and so from past
popularity: watch coverage and popularity bias in the evaluation. It knows no attribute of a person.
"""
