"""implicit's item neighbours (BM25, cosine, TF-IDF): what goes together, whatever the order."""

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import implicit.nearest_neighbours
import numpy as np
import pandas as pd
from scipy import sparse

LENGTH = 100
data, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])

train = pd.read_parquet(data / "train.parquet")
n_items = int(train["item"].max()) + 1
user = train["user_id"].astype("category").cat.codes.to_numpy()
counts = sparse.csr_matrix((np.ones(len(train), np.float32), (user, train["item"])), shape=(user.max() + 1, n_items))
started = time.process_time()
kind = getattr(implicit.nearest_neighbours, settings["kind"])
model = kind(K=settings["neighbours"])
model.fit(counts, show_progress=False)
fitted = time.process_time()
spent_s = 0.0
for split in ("valid", "test"):
    asked = pd.read_parquet(data / f"ask-{split}.parquet")
    items = asked["items"].explode().astype(np.int64)
    row = np.repeat(np.arange(len(asked)), asked["items"].str.len())
    known = (items < n_items).to_numpy()
    past = sparse.csr_matrix(
        (np.ones(known.sum(), np.float32), (row[known], items[known])), shape=(len(asked), n_items)
    )
    begun = time.monotonic()
    found, scores = model.recommend(np.arange(len(asked)), past, N=LENGTH, filter_already_liked_items=True)
    spent_s += time.monotonic() - begun
    lists = pd.DataFrame(
        {
            "user_id": asked["user_id"],
            "items": np.maximum(found, 0).tolist(),
            "scores": np.where(found < 0, -np.inf, scores).tolist(),
        }
    )
    lists.to_parquet(out / f"lists-{split}.parquet")
facts = {
    "version": f"implicit {version('implicit')}",
    "train_cpu_s": fitted - started,
    "lists_s": spent_s,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}
(out / "facts.json").write_text(json.dumps(facts))
