"""Encoders: each picture once, ids only where they say something, vectors that depend on nothing but the item."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tinyshop
import torch

from rayrec.catalogue import Catalogue
from rayrec.history import encode_history
from rayrec.model.behaviour import last_BD
from rayrec.model.encoders import ItemEncoder, ItemTable, shrink
from rayrec.model.history_tensors import HistoryTensors
from rayrec.model.recommender import NextItems, Recommender, build
from rayrec.schema import ACTION_CODE, IMAGE_SCHEMA

VIEW = ACTION_CODE["view"]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.from_table(tinyshop.item_table(tinyshop.sequence_table()))


def model_of(catalogue: Catalogue, *settings: str) -> Recommender:
    torch.manual_seed(0)
    table = tinyshop.image_table(catalogue.table, 16).select(IMAGE_SCHEMA.names)
    pixels = np.stack([np.frombuffer(p, np.uint8).reshape(16, 16, 3) for p in table["pixels"].to_pylist()])
    model = build(tinyshop.tiny(*settings), catalogue, table["item_index"].to_numpy(), pixels)
    assert isinstance(model, Recommender)
    return model


def history(*visits: list[int], max_len: int = 10) -> HistoryTensors:
    items = [item for visit in visits for item in visit]
    offsets = np.cumsum([0, *map(len, visits)])
    times = np.arange(len(items)) * 60_000
    return HistoryTensors.of(
        encode_history(items, np.full(len(items), VIEW), times, offsets, max_len=max_len, clock="time")
    )


def pictures_encoded(model: Recommender) -> list[tuple[list[int], bool]]:
    """Grows by the items of each call for pictures, and whether they are encoded with gradient."""
    calls: list[tuple[list[int], bool]] = []
    encode = type(model.item_encoder).images

    def images(items: ItemTable, item_M: torch.Tensor) -> torch.Tensor:
        calls.append((item_M.tolist(), torch.is_grad_enabled()))
        return encode(model.item_encoder, items, item_M)

    model.item_encoder.images = images  # type: ignore[method-assign]
    return calls


def next_items(*visits: list[int]) -> NextItems:
    past = history(*[visit[:-1] for visit in visits])
    target = torch.zeros_like(past.item_BL)
    for row, visit in enumerate(visits):
        target[row, : len(visit) - 1] = torch.tensor(visit[1:])
    return NextItems(past, target)


@pytest.mark.parametrize("sampled", [0, 8])
def test_each_distinct_picture_of_a_batch_is_encoded_once(catalogue: Catalogue, sampled: int) -> None:
    model = model_of(catalogue, f"train.negatives={sampled}", "train.image_budget=1000").train()
    encoded = pictures_encoded(model)
    model(next_items([1, 2, 3, 2, 1], [2, 3, 4, 7], [1, 1, 1]))  # five distinct items; 7 has no picture
    (taught,) = (item_M for item_M, graded in encoded if graded)
    assert len(set(taught)) == len(taught)
    assert {1, 2, 3, 4} <= set(taught)
    assert 7 not in taught


def test_the_budget_is_shared_by_what_was_met_and_what_might_have_been(catalogue: Catalogue) -> None:
    model = model_of(catalogue, "train.image_budget=5").train()
    met, others = 0, 0
    for _ in range(20):
        encoded = pictures_encoded(model)
        model(next_items([1, 2, 3, 4, 5, 6]))
        (taught,) = (item_M for item_M, graded in encoded if graded)
        assert 3 <= len(taught) <= 5
        met += sum(item <= 6 for item in taught)
        others += sum(item > 6 for item in taught)
    assert met >= 20 * 3
    assert others > 20


def test_what_might_have_been_pulls_with_the_weight_of_all_it_stands_for(catalogue: Catalogue) -> None:
    """The mean gradient of the CNN with a budget is the direction it has when every picture is encoded."""

    def gradient(model: Recommender) -> torch.Tensor:
        model.zero_grad()
        model(next_items([1, 2, 3, 4, 5, 6], [8, 9, 10, 11, 12])).backward()
        assert model.item_encoder.cnn is not None
        grad = model.item_encoder.cnn.project.weight.grad
        assert grad is not None
        return grad.flatten()

    quiet = ("model.dropout=0", "model.id_dropout=0")
    whole = model_of(catalogue, "train.image_budget=1000", *quiet).train()
    some = model_of(catalogue, "train.image_budget=12", *quiet).train()
    for model in (whole, some):
        model.item_encoder.refresh_images(model.items)
    mean = torch.stack([gradient(some) for _ in range(300)]).mean(0)
    assert torch.cosine_similarity(gradient(whole), mean, dim=0) > 0.95


def test_some_pictures_enter_the_table_in_turn(catalogue: Catalogue) -> None:
    model = model_of(catalogue).train()
    with_picture = int((model.items.image_row_N >= 0).sum())
    for round in range(1, -(-with_picture // 4) + 1):
        model.item_encoder.refresh_images(model.items, some=4)
        assert int(model.item_encoder.image_ND.any(1).sum()) == min(with_picture, 4 * round)


def test_without_a_budget_no_picture_is_encoded_in_a_step(catalogue: Catalogue) -> None:
    model = model_of(catalogue, "train.image_budget=0").train()
    encoded = pictures_encoded(model)
    model(next_items([1, 2, 3]))
    assert encoded == []


def test_an_encoded_picture_teaches_the_cnn_and_enters_the_table(catalogue: Catalogue) -> None:
    model = model_of(catalogue, "train.image_budget=6", "train.image_refresh=1").train()
    assert model.item_encoder.cnn is not None
    encoded = pictures_encoded(model)
    model(next_items([1, 2, 3])).backward()
    assert model.item_encoder.cnn.layers[0].weight.grad.abs().sum() > 0
    assert model.item_encoder.image_ND.any(1).nonzero().squeeze(1).tolist() == sorted(
        {item for item_M, _ in encoded for item in item_M}
    )


def test_activations_computed_again_give_the_same_gradients_and_are_not_kept(catalogue: Catalogue) -> None:
    quiet = ("model.dropout=0", "model.id_dropout=0", "train.image_budget=all", "model.cnn_channels=[8,8]")
    gradients, kept = [], []
    for recompute in (0, 5):
        model = model_of(catalogue, f"train.image_recompute={recompute}", *quiet).train()
        assert model.item_encoder.cnn is not None
        sizes: dict[int, int] = {}  # of what the CNN keeps for its backward pass, by where it lies
        with torch.autograd.graph.saved_tensors_hooks(
            lambda kept, sizes=sizes: sizes.__setitem__(kept.data_ptr(), kept.nbytes) or kept, lambda kept: kept
        ):
            vector_MD = model.item_encoder.images(model.items, torch.nonzero(model.items.image_row_N >= 0).squeeze(1))
        del vector_MD
        kept.append(sum(sizes.values()))
        model(next_items([1, 2, 3, 2, 1], [2, 3, 4, 7])).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert kept[1] < kept[0] / 5


def test_vectors_of_all_items_come_in_parts(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(catalogue)
    whole = model.encode_items()
    monkeypatch.setattr("rayrec.model.recommender.ROWS_AT_ONCE", 7)
    torch.testing.assert_close(model.encode_items(), whole)
    assert whole.shape == (tinyshop.N_ITEMS + 1, 16)


def test_a_vector_of_an_item_does_not_depend_on_its_company(catalogue: Catalogue) -> None:
    model = model_of(catalogue).eval()
    with torch.no_grad():
        together = model.item_encoder.images(model.items, torch.tensor([1, 12, 23, 34]))
        alone = model.item_encoder.images(model.items, torch.tensor([12]))
        model.refresh()
        rows = model.item_encoder(model.items, torch.tensor([5, 9]))
        everything = model.item_encoder(model.items)
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(everything[[5, 9]], rows, atol=1e-6, rtol=1e-5)


def test_encode_items_is_the_forward_pass_of_evaluation_and_leaves_the_mode(catalogue: Catalogue) -> None:
    model = model_of(catalogue).train()
    vector_ND = model.encode_items()
    assert model.training
    assert model.item_encoder.training
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(vector_ND, model.item_encoder(model.items), atol=0, rtol=0)
    assert vector_ND.shape == (tinyshop.N_ITEMS + 1, 16)


def test_padding_has_a_zero_vector(catalogue: Catalogue) -> None:
    model = model_of(catalogue).train()
    assert not model.encode_items()[0].any()
    assert not model.item_encoder(model.items, torch.tensor([0, 3]))[0].any()


def test_the_id_of_an_item_without_training_events_is_never_used(catalogue: Catalogue) -> None:
    model = model_of(catalogue)
    before_ND = model.encode_items()
    with torch.no_grad():
        model.item_encoder.id.weight[1:] += 100.0
    moved_N = (model.encode_items() - before_ND).abs().amax(1) > 1
    assert moved_N.nonzero().squeeze(1).tolist() == [
        item for item in range(1, tinyshop.N_ITEMS + 1) if item not in tinyshop.COLD
    ]


def test_ids_are_hidden_in_training_only(catalogue: Catalogue) -> None:
    model = model_of(catalogue, "model.id_dropout=0.5", "model.use_image=false", "model.use_attributes=false")
    warm = model.items.warm_N.nonzero().squeeze(1)
    model.train()
    hidden = (model.item_encoder(model.items)[warm] == 0).all(1).float().mean()
    assert 0.2 < float(hidden) < 0.8
    model.eval()
    assert (model.item_encoder(model.items)[warm] != 0).any(1).all()


@pytest.mark.parametrize("part", ["image", "attribute"])
def test_parts_are_hidden_in_training_only(catalogue: Catalogue, part: str) -> None:
    other = "use_attributes" if part == "image" else "use_image"
    model = model_of(catalogue, f"model.{part}_dropout=0.5", "model.use_id=false", f"model.{other}=false")
    whole_ND = model.encode_items()
    model.train()
    with torch.no_grad():
        seen_ND = model.item_encoder(model.items)
    had = whole_ND.any(1)
    hidden = ~seen_ND[had].any(1)
    assert 0.2 < float(hidden.float().mean()) < 0.8
    torch.testing.assert_close(seen_ND[had][~hidden], whole_ND[had][~hidden])


def test_items_without_attributes_have_an_id_alone(catalogue: Catalogue) -> None:
    bare = tinyshop.tiny("model.use_image=false", "model.use_attributes=false").model
    items = ItemTable(catalogue, np.empty(0, np.int64), torch.empty(0, 3, 8, 8, dtype=torch.uint8))
    encoder = ItemEncoder(bare, tinyshop.N_ITEMS, 5, 3).eval()
    torch.testing.assert_close(encoder(items)[1], encoder.id.weight[1])


def test_shrinking_averages() -> None:
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    pixels[0, :2, :2] = [[[0, 0, 8], [0, 0, 8]], [[0, 0, 0], [0, 0, 0]]]
    out = shrink(pixels, 2)
    assert out.shape == (2, 3, 2, 2)
    assert out[0, 2].tolist() == [[4, 0], [0, 0]]
    assert not out[1].any()


def test_padding_does_not_change_a_user_vector(catalogue: Catalogue) -> None:
    model = model_of(catalogue).eval()
    vector_ND = model.encode_items()
    alone = model.encode_users(history([1, 2, 3]), vector_ND)
    beside_longer = model.encode_users(history([1, 2, 3], [4, 5, 6, 7, 8, 9]), vector_ND)
    torch.testing.assert_close(alone[0], beside_longer[0], atol=1e-6, rtol=1e-5)


def test_no_history_has_a_zero_vector(catalogue: Catalogue) -> None:
    model = model_of(catalogue).eval()
    vector_BD = model.encode_users(history([], [1, 2]), model.encode_items())
    assert not vector_BD[0].any()
    assert vector_BD[1].any()


def test_the_lstm_reads_the_gap_and_the_action(catalogue: Catalogue) -> None:
    model = model_of(catalogue).eval()
    vector_ND = model.encode_items()
    past = history([1, 2])
    slow = dataclasses.replace(past, gap_s_BL=past.gap_s_BL * 1000)
    bought = dataclasses.replace(past, action_BL=torch.full_like(past.action_BL, ACTION_CODE["purchase"]))
    base = model.encode_users(past, vector_ND)
    assert not torch.equal(base, model.encode_users(slow, vector_ND))
    assert not torch.equal(base, model.encode_users(bought, vector_ND))


def test_last_takes_the_last_real_entry() -> None:
    values_BLD = torch.arange(12.0).view(2, 3, 2)
    assert last_BD(values_BLD, torch.tensor([2, 0])).tolist() == [[2.0, 3.0], [0.0, 0.0]]


def test_tensors_are_trimmed_to_the_longest_history() -> None:
    assert history([1], [1, 2, 3]).item_BL.shape == (2, 3)
    assert history([], []).item_BL.shape == (2, 1)
