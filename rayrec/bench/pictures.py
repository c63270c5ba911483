"""`rayrec bench images`: a picture beside every log row, against each distinct picture of a batch once.

In: how many log rows, how many rounds. Out: samples a second and bytes moved of both. The model, the batches and the
loss are the same; only the way of the pixels differs. The naive form is what the founding paper describes: the log
joined with the pictures, a tensor beside every row through Ray Data, each row's picture encoded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayrec.bench.dataset_made import N_ITEMS, draw_items
from rayrec.cluster import connect, cpus, quiet_data
from rayrec.config import ModelConfig
from rayrec.model.encoders import ImageCNN
from rayrec.progress import step

BATCH = 512
BLOCK = 16 * BATCH
SIZE = 32
N_USERS = 1_000
LR = 0.01

Batch = dict[str, Tensor]


class WantsByPicture(nn.Module):
    """Does this visitor want the item in this picture? A vector a visitor, the small preset's CNN a picture."""

    def __init__(self) -> None:
        super().__init__()
        config = ModelConfig()
        self.user = nn.Embedding(N_USERS, config.width)
        self.cnn = ImageCNN(config.cnn_channels, config.width)

    def beside_rows(self, batch: Batch) -> Tensor:
        """Naive: encode the picture of every row. Columns user, label, pixels [B, S, S, 3]."""
        return self._loss(self.cnn(batch["pixels"].permute(0, 3, 1, 2)), batch)

    def once_each(self, batch: Batch, pixels_MCSS: Tensor) -> Tensor:
        """Ours: encode each distinct picture of the batch once. Columns user, label, item."""
        distinct, place = batch["item"].unique(return_inverse=True)
        return self._loss(self.cnn(pixels_MCSS[distinct - 1])[place], batch)

    def _loss(self, item_BD: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits((self.user(batch["user"]) * item_BD).sum(1), batch["label"])


def run(events: int, rounds: int) -> dict[str, Any]:
    """Train an epoch over `events` log rows both ways, `rounds` times in turn; prints and answers the medians."""
    connect()
    quiet_data()
    torch.set_num_threads(max(1, cpus() - 1))  # a CPU is left for Ray Data, on both sides
    rng = np.random.default_rng(0)
    pixels_MHWC = rng.integers(0, 256, (N_ITEMS, SIZE, SIZE, 3), np.uint8)
    log = ray.data.from_arrow([log_rows(min(BLOCK, events - start), rng) for start in range(0, events, BLOCK)])
    held = ray.put(pixels_MHWC)
    joined = log.map_batches(lambda rows: with_pixels(rows, ray.get(held)), batch_format="numpy", batch_size=BATCH)
    pixels_MCSS = torch.from_numpy(pixels_MHWC).permute(0, 3, 1, 2).contiguous()

    def epoch(name: str, limit: int = events) -> dict[str, float]:
        torch.manual_seed(0)
        model = WantsByPicture()
        if name == "naive":
            return _epoch(model, joined.limit(limit), model.beside_rows)
        return _epoch(model, log.limit(limit), partial(model.once_each, pixels_MCSS=pixels_MCSS))

    found: dict[str, list[dict[str, float]]] = {"naive": [], "ours": []}
    for name in found:
        epoch(name, limit=BATCH)  # the first one starts Ray's workers
    for round_ in range(rounds):
        for name, runs in found.items():
            one = epoch(name)
            runs.append(one)
            step(f"round {round_ + 1}: {name:<6}{one['rows_per_s']:10.0f} rows/s{one['bytes_per_row']:9.0f} bytes/row")
    median = {name: {k: statistics.median(one[k] for one in runs) for k in runs[0]} for name, runs in found.items()}
    faster = median["ours"]["rows_per_s"] / median["naive"]["rows_per_s"]
    lighter = median["naive"]["bytes_per_row"] / median["ours"]["bytes_per_row"]
    step(
        f"{events} rows, {SIZE}x{SIZE} pictures: {faster:.1f} times the rows a second, {lighter:.0f} times fewer bytes"
    )
    return {
        "bench": "images",
        "events": events,
        "cpus": cpus(),
        "rounds": found,
        "median": median,
        "times_faster": round(faster, 2),
        "times_fewer_bytes": round(lighter, 1),
    }


def log_rows(n: int, rng: np.random.Generator) -> pa.Table:
    """Log rows: who, what, and whether it was wanted."""
    return pa.table(
        {
            "user": rng.integers(0, N_USERS, n),
            "item": draw_items(n, rng),
            "label": (rng.random(n) < 0.2).astype(np.float32),
        }
    )


def with_pixels(rows: dict[str, np.ndarray], pixels_MHWC: np.ndarray) -> dict[str, np.ndarray]:
    """The rows, each with its item's picture beside it."""
    return {**rows, "pixels": pixels_MHWC[rows["item"] - 1]}


def _epoch(model: WantsByPicture, rows: Any, loss_of: Callable[[Batch], Tensor]) -> dict[str, float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    n_rows = size_bytes = 0
    started = time.perf_counter()
    for batch in rows.iter_torch_batches(batch_size=BATCH):
        n_rows += len(batch["user"])
        size_bytes += sum(column.nbytes for column in batch.values())
        optimizer.zero_grad()
        loss_of(batch).backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    return {"rows_per_s": n_rows / seconds, "bytes_per_row": size_bytes / n_rows, "seconds": seconds}
