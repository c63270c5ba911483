"""The catalogue while it is served: what a shop says of its items, in every replica, with a real model."""

from __future__ import annotations

import base64
import io
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinyshop
from PIL import Image
from webclient import Client

from rayrec.bundle import Bundle
from rayrec.config import ServeConfig
from rayrec.errors import BundleError, UsageError
from rayrec.model import scorer as scorer_module
from rayrec.serving.app import load_version
from rayrec.serving.editing import editor
from rayrec.serving.live import Loaded
from rayrec.serving.pictures import fetched
from rayrec.serving.problems import ProblemError
from rayrec.serving.scorer import load_scorer
from rayrec.serving.web import create_app
from rayrec.settings import with_settings
from rayrec.state import State, open_state
from rayrec.training.local import train_alone
from rayrec.training.publish import write_bundle

RED = {"title": "red thing 3", "category": "red", "brand": "odd", "price": 4.0}
WITHIN_S = 1.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("shop")
    (folder / "checkpoint").mkdir()
    dataset = tinyshop.write(folder / "dataset", users=30)
    config = tinyshop.tiny("train.epochs=1", "train.cnn_lr=1")  # so that a few steps teach it colours
    fit = train_alone(dataset, config, folder / "checkpoint")
    place = str(folder / "bundles")
    return write_bundle(folder / "checkpoint", place, dataset, dataset.catalogue(), config, fit.job.followers)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    """What the replicas share."""
    state = open_state(f"sqlite:///{tmp_path}/state.db")
    yield state
    state.close()


Start = Callable[..., Client]


@pytest.fixture
def start(bundle: Bundle, tmp_path: Path) -> Iterator[Start]:
    """Starts replicas that share a state."""
    clients = []

    def start(*settings: str) -> Client:
        def load(version: str) -> Loaded:
            return load_version(str(bundle.path.parent), version, load_scorer)

        loaded = load(bundle.version)
        config = with_settings(ServeConfig(diversity=0), settings)
        app = create_app(
            *(loaded.scorer, open_state(f"sqlite:///{tmp_path}/state.db"), config),
            model=bundle.version, image_of=loaded.image_of, edit=loaded.edit, load=load,
        )  # fmt: skip
        clients.append(Client(app))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def client(start: Start) -> Client:
    return start()


def jpeg(colour: tuple[int, int, int], side: int = 64, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(stream, kind)
    return stream.getvalue()


def put(client: Client, item_id: str, **facts: Any) -> dict[str, Any]:
    answer = client.request("PUT", f"/v1/items/{item_id}", json=facts)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def soon(what: Callable[[], bool]) -> None:
    """`what` is true within the second that is promised; a busy machine is given a little more."""
    deadline = time.monotonic() + 5 * WITHIN_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def item(client: Client, item_id: str) -> dict[str, Any] | None:
    answer = client.get(f"/v1/items/{item_id}")
    return answer.json() if answer.status_code == 200 else None


def listed(client: Client, **asked: Any) -> dict[str, Any]:
    """Everything that a visitor may be shown, by item."""
    answer = client.post("/v1/recommend", {"user_id": "u", "k": 200, "events": LOOKED, **asked})
    assert answer.status_code == 200, answer.text
    return {one["item_id"]: one for one in answer.json()["items"]}


LOOKED = [{"item_id": "red-1", "action": "view"}, {"item_id": "red-2", "action": "view"}]


def test_a_new_price_is_live_everywhere(client: Client, start: Start) -> None:
    other = start()
    assert put(client, "red-4", price=0.5) == {
        "item_id": "red-4", "known": True, "changed": {"price": 0.5}, "image": False
    }  # fmt: skip
    for replica in (client, other):
        soon(lambda replica=replica: (item(replica, "red-4") or {})["price"] == 0.5)
        assert item(replica, "red-4")["title"] == "red thing 4", "what was not said stays"
        cheap = listed(replica, filters={"price": {"max": 0.9}})
        assert list(cheap) == ["red-4"]
    assert item(start(), "red-4")["price"] == 0.5, "a replica that starts later knows from the first"


def test_a_new_item_is_shown_found_and_pictured(client: Client) -> None:
    assert item(client, "fresh") is None
    data = "data:image/png;base64," + base64.b64encode(jpeg(tinyshop.COLOURS["red"], kind="PNG")).decode()
    said = put(client, "fresh", **RED | {"title": "Sparkling lampshade"}, image=data)
    assert (said["known"], said["image"]) == (False, True)
    soon(lambda: item(client, "fresh") is not None)
    shown = listed(client)["fresh"]
    assert (shown["title"], shown["price"], shown["brand"]) == ("Sparkling lampshade", 4.0, "odd")
    assert "new" in shown["sources"]
    picture = client.get(shown["image"])
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(picture.content)).format == "JPEG"
    found = listed(client, scene="search", context={"query": "sparkling lampshed"})
    assert next(iter(found)) == "fresh"
    answer = client.post("/v1/recommend", {"scene": "item", "context": {"item_id": "fresh"}})
    assert answer.status_code == 200
    assert answer.json()["items"]


def test_a_picture_is_seen_by_the_model(client: Client, bundle: Bundle, state: State) -> None:
    """A new item with a red picture is nearer to the red things than one with a blue picture, all else unknown."""
    for colour in ("red", "blue"):
        answer = client.request("PUT", f"/v1/items/{colour}-new/image", content=jpeg(tinyshop.COLOURS[colour]))
        assert answer.status_code == 200, answer.text
    soon(lambda: item(client, "blue-new") is not None and item(client, "red-new") is not None)
    edits = state.item_edits(0)
    pictures = {edit.item_id: state.item_picture(edit.item_id) or b"" for edit in edits}
    scorer, rows = editor(bundle)(load_scorer(bundle), edits, pictures)
    red, blue = scorer.vectors_ND[rows]
    names = scorer.catalogue.ids.tolist()
    pictured = [n for n, name in enumerate(names) if name.startswith("red-") and scorer.catalogue.has_image[n]]
    known = load_scorer(bundle).vectors_ND
    typical = known[[n for n in pictured if n < len(known)]].mean(0) - known[1:].mean(0)
    assert np.dot(red - blue, typical) > 0


def test_sold_out_gone_and_back(client: Client) -> None:
    assert "red-4" in listed(client)
    put(client, "red-4", in_stock=False)
    soon(lambda: "red-4" not in listed(client))
    answer = client.post("/v1/recommend", {"user_id": "u", "k": 200, "events": LOOKED}).json()
    assert answer["removed"]["stock"] == 1
    assert item(client, "red-4")["in_stock"] is False
    put(client, "red-4", in_stock=True)
    soon(lambda: "red-4" in listed(client))

    assert client.request("DELETE", "/v1/items/red-4").status_code == 200
    soon(lambda: item(client, "red-4") is None)
    assert "red-4" not in listed(client)
    assert client.get("/v1/items/red-4/image").status_code == 404
    assert client.request("DELETE", "/v1/items/red-4").status_code == 404
    put(client, "red-4")
    soon(lambda: "red-4" in listed(client))
    assert item(client, "red-4")["title"] == "red thing 4"


def test_events_before_the_item_count_once_it_is_there(client: Client) -> None:
    sent = {"events": [{"user_id": "early", "item_id": "fresh", "action": "purchase"}]}
    assert client.post("/v1/events", sent).json()["unknown_item"] == 1
    put(client, "fresh", **RED)
    soon(lambda: item(client, "fresh") is not None)
    answer = client.post("/v1/recommend", {"user_id": "early", "k": 200}).json()
    assert answer["removed"]["bought"] == 1
    assert answer["served_by"] == "model", "the item is a history like any other"


def test_a_model_that_is_activated_later_knows_them_too(client: Client, bundle: Bundle) -> None:
    put(client, "fresh", **RED)
    soon(lambda: item(client, "fresh") is not None)
    assert client.post(f"/v1/models/{bundle.version}:activate").status_code == 200
    assert item(client, "fresh") is not None


def test_what_visitors_do_now_reaches_the_others(client: Client, start: Start) -> None:
    """Two new items that one visitor looked at, the second after the first: on now, and what follows."""
    for item_id in ("fresh", "fresher"):
        put(client, item_id, category="grey")
    soon(lambda: item(client, "fresher") is not None)
    looks = [{"user_id": "one", "item_id": item_id, "action": "view"} for item_id in ("fresh", "fresher")]
    assert client.post("/v1/events", {"events": looks}).json()["accepted"] == 2
    for replica in (client, start()):
        soon(lambda replica=replica: "trending" in listed(replica)["fresher"]["sources"])
        asked = {"user_id": "two", "events": [{"item_id": "fresh", "action": "view"}]}
        assert "cooccurrence" in listed(replica, **asked)["fresher"]["sources"]
        assert "trending" not in listed(replica)["red-4"]["sources"]
        assert "cooccurrence" not in listed(replica)["fresher"]["sources"]
    put(client, "freshest", category="grey")
    soon(lambda: item(client, "freshest") is not None)
    assert "trending" in listed(client)["fresher"]["sources"], "an edit does not lose what is on"


def test_texts_can_be_taken_back(client: Client) -> None:
    assert put(client, "red-4", brand="")["changed"] == {"brand": None}
    soon(lambda: (item(client, "red-4") or {})["brand"] is None)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"price": -1}, "price"),
        ({"price": "nan"}, "price"),
        ({"price": True}, "price"),
        ({"in_stock": "no"}, "in_stock"),
        ({"titel": "x"}, "titel"),
        ({"image": "data:image/png;base64,###"}, "not base64"),
        ({"image": "data:image/png;base64,aGVsbG8="}, "not_an_image"),
        ({"image": "data:image/png,raw"}, "write it as"),
        ({"image": "https://elsewhere.example/x.jpg"}, "image_prefixes"),
        ({"image": "/etc/passwd"}, "image_prefixes"),
        ({"title": "a\x00b"}, "control characters"),
    ],
)
def test_bad_facts_are_refused_and_change_nothing(
    client: Client, state: State, facts: dict[str, Any], words: str
) -> None:
    answer = client.request("PUT", "/v1/items/red-4", json=facts)
    assert answer.status_code == 422
    assert words in answer.text
    assert state.item_edits(0) == []


def test_pictures_come_from_allowed_places_alone(start: Start, tmp_path: Path) -> None:
    pictures, secrets = tmp_path / "pictures", tmp_path / "secrets"
    for folder in (pictures, secrets):
        folder.mkdir()
        (folder / "a.jpg").write_bytes(jpeg((10, 200, 10)))
    (pictures / "link.jpg").symlink_to(secrets / "a.jpg")
    client = start(f"image_prefixes=[{pictures}/]")
    assert put(client, "fresh", image=f"{pictures}/a.jpg")["image"]
    for place in ("../secrets/a.jpg", "%2e%2e/secrets/a.jpg", "link.jpg", "none.jpg"):
        answer = client.request("PUT", "/v1/items/fresh", json={"image": f"{pictures}/{place}"})
        assert answer.status_code == 422, place
    assert client.request("PUT", "/v1/items/fresh", json={"image": f"{secrets}/a.jpg"}).status_code == 422


@pytest.mark.parametrize(
    "place",
    [
        "https://cdn.example/shop/../private/x.jpg",
        "https://cdn.example/shop/%2e%2e/private/x.jpg",
        "https://cdn.example/shop/..\\private",
        "https://cdn.example.evil.example/shop/x.jpg",
        "http://cdn.example/shop/x.jpg",
    ],
)
def test_a_prefix_cannot_be_left(place: str) -> None:
    with pytest.raises(ProblemError, match="image_prefixes"):
        fetched(place, ["https://cdn.example/shop/"])


def test_a_prefix_ends_in_a_slash() -> None:
    with pytest.raises(UsageError, match="must end in /"):
        with_settings(ServeConfig(), ["image_prefixes=[https://cdn.example]"])


def test_without_the_network_that_reads_pictures_the_rest_is_applied(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*arguments: Any) -> None:
        raise UsageError("efficientnet is not installed")

    monkeypatch.setattr(scorer_module, "read_pictures", missing)
    put(client, "fresh", **RED, image="data:image/jpeg;base64," + base64.b64encode(jpeg((1, 2, 3))).decode())
    soon(lambda: item(client, "fresh") is not None)
    assert "fresh" in listed(client)


def test_a_broken_version_is_refused_and_nobody_is_told_where_it_lies(bundle: Bundle, tmp_path: Path) -> None:
    good = load_version(str(bundle.path.parent), bundle.version, load_scorer)
    assert good.edit is not None
    shutil.copytree(bundle.path, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BundleError) as refused:
        load_version(str(tmp_path), "broken", load_scorer)
    assert "model.safetensors" in str(refused.value)
    assert str(tmp_path) not in str(refused.value)
    with pytest.raises(UsageError, match="there is no version 'other' beside the live one; there are broken"):
        load_version(str(tmp_path), "other", load_scorer)


def test_a_model_given_alone_takes_no_edits(bundle: Bundle, tmp_path: Path) -> None:
    alone = Client(create_app(load_scorer(bundle), open_state(f"sqlite:///{tmp_path}/alone.db")))
    refused = alone.request("PUT", "/v1/items/red-4", json={"price": 2})
    assert (refused.status_code, refused.json()["title"]) == (409, "Conflict")
    alone.close()
