import csv
import json
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from scipy.stats import chi2

from rayrec.data import sample
from rayrec.data.sample import Oracle, Query, SampleConfig, write_shop
from rayrec.data.sample_choice import ACTION_NAMES, CART, PURCHASE, VIEW, Chooser, State, probabilities
from rayrec.data.sample_dirt import BOT_EVENTS, BOT_ID, TRUNCATED_LINE
from rayrec.data.sample_events import simulate
from rayrec.data.sample_images import Look, draw
from rayrec.data.sample_world import CATEGORIES, COLOURS, DAY_S, END_S, World
from rayrec.errors import DataError, ResourceError, UsageError

SMALL = SampleConfig(users=600, items=240, events=18_000, seed=3, image_size=32)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "shop"
    return folder, write_shop(folder, SMALL)


@pytest.fixture(scope="module")
def dirty_shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "dirty"
    config = SampleConfig(users=600, items=240, events=18_000, seed=3, image_size=32, dirty=True)
    return folder, write_shop(folder, config)


@pytest.fixture(scope="module")
def rows(shop):
    return read_rows(shop[0] / "events.csv")


@pytest.fixture(scope="module")
def histories(rows):
    """Visitor to events (item, action, time in s), from the file alone."""
    by_visitor = defaultdict(list)
    for row in rows:
        by_visitor[row["user_id"] or "session:" + row["session_id"]].append(
            (row["item_id"], row["action"], epoch_s(row["timestamp"]))
        )
    return by_visitor


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def epoch_s(iso: str) -> int:
    return int(np.datetime64(iso.removesuffix("Z"), "s").astype(int))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- files


def test_same_config_writes_the_same_bytes(tmp_path):
    config = SampleConfig(users=40, items=24, events=600, seed=7, dirty=True, image_size=32)
    write_shop(tmp_path / "a", config)
    write_shop(tmp_path / "b", config)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_seed_is_another_shop(tmp_path):
    for seed in (1, 2):
        write_shop(tmp_path / str(seed), SampleConfig(users=40, items=24, events=600, seed=seed, image_size=16))
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one["events.csv"] != two["events.csv"]
    assert one["items.csv"] != two["items.csv"]


def test_counts_are_as_configured(shop, rows):
    folder, report = shop
    items = read_rows(folder / "items.csv")
    assert len(rows) == report.rows == report.events == 18_000
    assert len({row["user_id"] for row in rows} - {""}) == report.users == 600
    assert len(items) == len(list((folder / "images").glob("*.jpg"))) == report.items == 240
    assert report.dirt == {}
    anonymous = [row["session_id"] for row in rows if not row["user_id"]]
    assert 0.02 < len(anonymous) / len(rows) < 0.04
    assert all(anonymous)
    assert len(set(anonymous)) == report.anonymous


def test_ids_are_padded_strings_and_titles_name_the_colour(shop):
    items = read_rows(shop[0] / "items.csv")
    assert all(len(item["item_id"]) == 6 for item in items)
    assert any(item["item_id"].startswith("0") for item in items)
    assert all(item["title"].split()[0].lower() in COLOURS for item in items)
    assert {item["category"] for item in items} == {category.name for category in CATEGORIES}
    assert all(float(item["price"]) > 0 for item in items)


def test_log_is_in_order_and_no_row_repeats(rows, histories):
    times = [row["timestamp"] for row in rows]
    assert times == sorted(times)
    assert times[-1] < "2026-01-01T00:00:00Z"
    assert len({tuple(row.values()) for row in rows}) == len(rows)
    for events in histories.values():
        assert (np.diff([time for *_, time in events]) >= 5).all()


def test_cold_items_have_a_picture_and_no_history(shop, rows):
    folder, report = shop
    cold = json.loads((folder / "truth.json").read_text())["cold_items"]
    assert len(cold) == report.cold_items == 12
    assert not set(cold) & {row["item_id"] for row in rows}
    for item_id in cold:
        with Image.open(folder / "images" / f"{item_id}.jpg") as picture:
            assert picture.size == (32, 32)


def test_a_purchase_has_its_price_and_follows_interest_in_the_item(rows, histories, shop):
    price = {item["item_id"]: item["price"] for item in read_rows(shop[0] / "items.csv")}
    for row in rows:
        bought = row["action"] == "purchase"
        assert row["price"] == (price[row["item_id"]] if bought else "")
        assert row["quantity"] in (("1", "2", "3") if bought else ("",))
    for events in histories.values():
        seen = set()
        for item, action, _ in events:
            assert action == "view" or item in seen
            seen.add(item)


def test_a_large_log_is_sharded(tmp_path, monkeypatch):
    config = SampleConfig(users=40, items=24, events=1000, image_size=16)
    write_shop(tmp_path / "whole", config)
    monkeypatch.setattr(sample, "ONE_FILE_ROWS", 999)
    monkeypatch.setattr(sample, "SHARD_ROWS", 400)
    write_shop(tmp_path / "shards", config)
    shards = sorted((tmp_path / "shards" / "events").iterdir())
    read = [read_rows(path) for path in shards]
    assert [len(rows) for rows in read] == [400, 400, 200]
    assert list(chain(*read)) == read_rows(tmp_path / "whole" / "events.csv")


def test_many_events_of_few_users_make_a_longer_log():
    world, log = simulate(SampleConfig(users=2, items=24, events=3000))
    assert world.days > 56
    assert len(log.time_s_E) == 3000
    assert world.start_s <= log.time_s_E.min()
    assert log.time_s_E.max() < END_S


def test_one_event_is_a_shop_too():
    _, log = simulate(SampleConfig(users=1, items=12, events=1))
    assert len(log.item_E) == 1


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"users": 0}, "users is 0"),
        ({"items": 5}, "items is 5"),
        ({"events": 10}, "10 events for 2000 users"),
        ({"seed": -1}, "seed is -1"),
        ({"image_size": 4000}, "at most 512"),
    ],
)
def test_impossible_config_is_refused(values, says):
    with pytest.raises(UsageError, match=says):
        SampleConfig(**values)


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("dear to me")
    with pytest.raises(UsageError, match="not an empty folder"):
        write_shop(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_place_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_shop(tmp_path / "file" / "shop", SMALL)


def test_an_interrupted_sample_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_shop(tmp_path / "shop", SampleConfig(users=5, items=12, events=50))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the rule of choice


def _state(world: World, events: list[tuple[int, int, int]]) -> State:
    state = State.empty(1)
    for item, action, time_s in events:
        state.advance(world, np.array([0]), np.array([item]), np.array([action]), np.array([time_s]))
    return state


def _situations(world: World) -> dict[str, tuple[list[tuple[int, int, int]], int]]:
    start = world.start_s + 9 * 3600
    shoe = int(np.flatnonzero((world.category_N == 0) & (world.launch_N <= 0))[0])
    tea = int(np.flatnonzero((world.category_N == 8) & (world.launch_N <= 0))[0])
    return {
        "first event": ([], start),
        "after a view": ([(shoe, VIEW, start)], start + 40),
        "after a cart": ([(shoe, VIEW, start), (shoe, CART, start + 9)], start + 60),
        "after a purchase": ([(shoe, CART, start), (shoe, PURCHASE, start + 9)], start + 60),
        "new session, full cart": ([(shoe, CART, start)], start + DAY_S),
        "new session, tea is used up": ([(tea, PURCHASE, start), (shoe, CART, start + 60)], start + 8 * DAY_S),
        "last day": ([(shoe, VIEW, END_S - 60)], END_S - 10),
    }


@pytest.mark.parametrize("situation", range(7))
def test_drawn_frequencies_match_the_stated_probabilities(situation):
    world, _ = simulate(SampleConfig(users=1, items=90, events=1, seed=4))
    events, time_s = list(_situations(world).values())[situation]
    n = 40_000
    visitor_B, time_B = np.zeros(n, np.int64), np.full(n, time_s)
    state = _state(world, events)
    p = probabilities(world, visitor_B[:1], state, time_B[:1])[0]
    chooser = Chooser(world, visitor_B, np.random.default_rng(situation))
    item_B, _ = chooser.draw(state.take(np.zeros(n, np.int64)), time_B)
    assert p.sum() == pytest.approx(1)
    counts = np.bincount(item_B, minlength=len(p))
    assert counts[p == 0].sum() == 0
    often = p * n >= 10
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(p[often], p[~often].sum()) * n
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    assert chi2.sf(statistic, len(observed) - 1) > 1e-3


def test_the_routes_show_in_the_probabilities():
    world, _ = simulate(SampleConfig(users=1, items=90, events=1, seed=4))
    p = {
        name: probabilities(world, np.array([0]), _state(world, events), np.array([time_s]))[0]
        for name, (events, time_s) in _situations(world).items()
    }
    shoe, tea = (int(np.flatnonzero((world.category_N == k) & (world.launch_N <= 0))[0]) for k in (0, 8))
    goes_with_shoes = np.isin(world.category_N, [1, 2])
    assert p["after a cart"][shoe] > 0.25
    assert p["new session, full cart"][shoe] > 0.2
    assert p["new session, tea is used up"][tea] > 0.5
    assert p["after a purchase"][goes_with_shoes].sum() > 0.55
    assert p["first event"][world.launch_N > 0].sum() == 0
    assert (p["last day"][world.launch_N >= world.days] == 0).all()
    assert p["last day"][(world.launch_N > 0) & (world.launch_N < world.days)].min() > 0


# ---------------------------------------------------------------- the oracle


def _queries(histories, visitors, timed=True):
    return [
        Query(
            name,
            [item for item, *_ in histories[name][:-1]],
            [action for _, action, _ in histories[name][:-1]],
            [time * 1000 for *_, time in histories[name][:-1]],
            histories[name][-1][2] * 1000 if timed else None,
        )
        for name in visitors
    ]


def test_oracle_is_calibrated_on_the_log(shop, histories):
    """If p is the truth, p(what came) less the sum of p squared has mean zero."""
    oracle = Oracle.open(shop[0])
    visitors, items = list(histories), oracle.world.item_id
    p = oracle.scores_batch(_queries(histories, visitors), items)
    came = np.array([items.index(histories[name][-1][0]) for name in visitors])
    surprise = p[np.arange(len(p)), came] - (p**2).sum(1)
    assert p.sum(1) == pytest.approx(1)
    assert abs(surprise.mean()) < 3 * surprise.std() / np.sqrt(len(surprise))


def test_oracle_beats_markov_beats_popular(shop, histories):
    oracle = Oracle.open(shop[0])
    items = oracle.world.item_id
    index = {item: place for place, item in enumerate(items)}
    popular, follows = np.zeros(len(items)), np.zeros((len(items), len(items)))
    for events in histories.values():
        past = [index[item] for item, *_ in events[:-1]]
        np.add.at(popular, past, 1)
        np.add.at(follows, (past[:-1], past[1:]), 1)
    visitors = [name for name, events in histories.items() if len(events) >= 3]
    came = np.array([index[histories[name][-1][0]] for name in visitors])
    last = np.array([index[histories[name][-2][0]] for name in visitors])
    scores = {
        "oracle": oracle.scores_batch(_queries(histories, visitors), items),
        "timeless": oracle.scores_batch(_queries(histories, visitors, timed=False), items),
        "markov": follows[last] + popular / (2 * popular.sum()),
        "popular": np.tile(popular, (len(visitors), 1)),
    }
    ndcg = {}
    for name, score in scores.items():
        rank = (score >= score[np.arange(len(came)), came][:, None]).sum(1)
        ndcg[name] = np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean()
    assert ndcg["oracle"] > ndcg["timeless"] > ndcg["markov"] + 0.05
    assert ndcg["markov"] > ndcg["popular"] + 0.1


def test_visitors_differ_and_their_tastes_are_in_the_truth(shop):
    oracle = Oracle.open(shop[0])
    affinity = oracle.affinity(oracle.world.visitor[:200], oracle.world.item_id)
    best = affinity.argmax(1)
    assert len(set(best.tolist())) > 60
    assert Counter(best.tolist()).most_common(1)[0][1] < 30


def test_scores_of_one_are_the_row_of_the_batch(shop, histories):
    oracle = Oracle.open(shop[0])
    queries = _queries(histories, list(histories)[:20]) + _queries(histories, list(histories)[20:40], timed=False)
    wanted = [*oracle.world.item_id[:50], "no such item"]
    batch = oracle.scores_batch(queries, wanted)
    for row, query in zip(batch, queries, strict=True):
        one = oracle.scores(
            query.user_id, query.item_ids, query.actions, query.times_ms, wanted, next_time_ms=query.next_time_ms
        )
        assert one == pytest.approx(row)
        assert one[-1] == 0


def test_oracle_passes_over_what_is_no_event_of_the_shop(shop):
    oracle = Oracle.open(shop[0])
    items = oracle.world.item_id
    time_ms = (oracle.world.start_s + 1000) * 1000
    plain = oracle.scores("u000001", [items[0]], ["view"], [time_ms], items, time_ms + 60_000)
    noisy = oracle.scores(
        "u000001", [items[0], "unknown", items[5]], ["view", "view", "hide"], [time_ms] * 3, items, time_ms + 60_000
    )
    assert (plain == noisy).all()


def test_oracle_of_an_empty_history_and_no_time(shop):
    oracle = Oracle.open(shop[0])
    assert oracle.scores("u000001", [], [], [], oracle.world.item_id).sum() == pytest.approx(1)
    assert oracle.scores_batch([], oracle.world.item_id).shape == (0, SMALL.items)


def test_truth_comes_back_as_it_was(shop):
    world, _ = simulate(SMALL)
    again = Oracle.open(shop[0]).world
    assert again.to_json() == world.to_json()
    visitor_B = np.arange(5)
    assert (again.weights(visitor_B) == world.weights(visitor_B)).all()
    assert (again.cell_end_DC == world.cell_end_DC).all()


def test_oracle_of_another_folder_says_what_is_wrong(tmp_path, shop):
    with pytest.raises(UsageError, match="rayrec sample"):
        Oracle.open(tmp_path)
    (tmp_path / "truth.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="not the truth"):
        Oracle.open(tmp_path)
    with pytest.raises(DataError, match="'stranger' is not of this sample"):
        Oracle.open(shop[0]).affinity(["stranger"], ["000001"])


# ---------------------------------------------------------------- pictures


def test_a_glance_tells_category_and_colour(shop):
    """Nearest centroid on 16 x 16 pixels, learned on half the items and asked about the other half."""
    world, _ = simulate(SMALL)
    pictures = [Image.open(shop[0] / "images" / f"{item_id}.jpg").resize((16, 16)) for item_id in world.item_id]
    pixels = np.stack([np.asarray(picture, float) for picture in pictures])
    from_backdrop = np.abs(pixels - pixels[:, :1, :1]).sum(3)
    inside = from_backdrop[:, 4:13, 3:13, None] > 60
    hue = (pixels[:, 4:13, 3:13] * inside).sum((1, 2)) / inside.sum((1, 2))
    learn = np.arange(len(pixels)) % 2 == 0

    def accuracy(features, labels):
        features = features.reshape(len(features), -1)
        kinds = np.unique(labels)
        centroids = np.stack([features[learn & (labels == kind)].mean(0) for kind in kinds])
        nearest = ((features[~learn, None] - centroids) ** 2).sum(2).argmin(1)
        return (kinds[nearest] == labels[~learn]).mean()

    assert accuracy(from_backdrop / from_backdrop.max((1, 2), keepdims=True), world.category_N) > 0.6
    assert accuracy(hue, world.colour_N) > 0.6


def test_every_attribute_changes_the_picture():
    plain = Look(category=3, colour=0, style=0, material=1, brand=0, tier=0)
    pixels = np.asarray(draw(plain, 64, seed=5), int)
    for name in ("category", "colour", "style", "material", "brand", "tier"):
        other = Look(**{**vars(plain), name: getattr(plain, name) + 1})
        assert np.abs(np.asarray(draw(other, 64, seed=5), int) - pixels).max() > 10, name


# ---------------------------------------------------------------- dirt


def test_each_kind_of_dirt_is_there_as_often_as_truth_says(dirty_shop, rows):
    folder, report = dirty_shop
    dirt = json.loads((folder / "truth.json").read_text())["dirt"]
    assert dirt == report.dirt
    text = (folder / "events.csv").read_text()
    assert text.endswith("\n" + TRUNCATED_LINE)
    soiled = list(csv.DictReader(text.splitlines()[:-1]))
    clean = Counter(tuple(row.values()) for row in rows)
    extra = Counter(tuple(row.values()) for row in soiled)
    assert not clean - extra  # no clean row was lost
    added = [dict(zip(rows[0], row, strict=True)) for row in (extra - clean).elements()]
    found = {
        "duplicate": [row for row in added if tuple(row.values()) in clean],
        "empty_item": [row for row in added if not row["item_id"]],
        "empty_visitor": [row for row in added if not row["user_id"] and not row["session_id"]],
        "bad_time": [row for row in added if row["timestamp"] == "yesterday"],
        "empty_time": [row for row in added if row["timestamp"] == ""],
        "future_time": [row for row in added if row["timestamp"] > "2026" and row["timestamp"][0] == "2"],
        "ancient_time": [row for row in added if row["timestamp"].startswith("1970")],
        "unknown_action": [row for row in added if row["action"] not in ACTION_NAMES],
        "bad_quantity": [row for row in added if row["quantity"] and int(row["quantity"]) > 100_000],
        "bad_price": [row for row in added if row["price"].startswith("-")],
        "bot": [row for row in added if row["user_id"] == BOT_ID],
    }
    counts = {kind: len(of_kind) for kind, of_kind in found.items()}
    assert counts == {kind: dirt[kind] for kind in counts}
    assert sum(counts.values()) == len(added) == report.rows - report.events - 1
    assert set(dirt) - set(counts) == {"truncated_line", "image_cut_short", "image_is_text"}
    assert len({row["timestamp"][:13] for row in found["bot"]}) == 1
    assert dirt["bot"] == BOT_EVENTS


def test_two_pictures_cannot_be_read(dirty_shop):
    def broken(path):
        try:
            Image.open(path).load()
        except (UnidentifiedImageError, OSError):
            return True
        return False

    assert sum(broken(path) for path in (dirty_shop[0] / "images").iterdir()) == 2
