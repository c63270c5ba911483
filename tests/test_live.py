"""Another model takes the place of the one that is served, or is refused; requests go on all the while."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import numpy as np
import pytest
from shopfake import FakeScorer, catalogue
from webclient import Client

from rayrec.config import ServeConfig
from rayrec.errors import BundleError, UsageError
from rayrec.history import HistoryBatch
from rayrec.serving.live import ACTIVE_MODEL, Live, Loaded, Model
from rayrec.serving.web import create_app
from rayrec.state import State, open_state


class Broken(FakeScorer):
    """Fails on candidates, or gives no numbers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def fuse(
        self, history: HistoryBatch, user_BD: np.ndarray, candidates_BC: np.ndarray, heads: Mapping[str, float]
    ) -> np.ndarray:
        if self.how == "raises":
            raise RuntimeError("no scores today")
        return np.full(candidates_BC.shape, 7.0 if self.how == "beyond" else np.nan, np.float32)


VERSIONS = {
    "v1": lambda: FakeScorer(),
    "v2": lambda: FakeScorer(catalogue(per_style=24)),
    "raises": lambda: Broken("raises"),
    "beyond": lambda: Broken("beyond"),
    "nan": lambda: Broken("nan"),
    "empty": lambda: FakeScorer(catalogue(per_style=0)),
}


def load(version: str) -> Loaded:
    if version == "damaged":
        raise BundleError("damaged: model.safetensors does not match its hash")
    if version == "strange":
        raise KeyError("weights")
    if version not in VERSIONS:
        raise UsageError(f"{version}: no such bundle")
    return Loaded(VERSIONS[version](), None)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/state.db"


def live_of(state: State) -> Live:
    return Live(Model("v1", load("v1"), ServeConfig()), ServeConfig(), state, load)


@pytest.fixture
def live(url: str) -> Iterator[Live]:
    state = open_state(url)
    yield live_of(state)
    state.close()


def test_another_model_takes_its_place_here_and_in_the_other_replicas(live: Live, url: str) -> None:
    other = live_of(open_state(url))
    asyncio.run(other.follow())
    assert other.model.version == "v1", "nobody was told anything yet"
    assert asyncio.run(live.activate("v2")) == "v1"
    assert (live.model.version, len(live.model.catalogue)) == ("v2", 72)
    asyncio.run(other.follow())
    assert other.model.version == "v2"
    other.state.close()


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("raises", "the model fails on a first request"),
        ("beyond", "scores that are no probabilities"),
        ("nan", "scores that are no probabilities"),
        ("damaged", "does not match its hash"),
        ("strange", "cannot be loaded"),
    ],
)
def test_a_broken_one_is_refused_and_the_old_one_goes_on(live: Live, version: str, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        asyncio.run(live.activate(version))
    assert live.model.version == "v1"
    assert live.state.setting(ACTIVE_MODEL) is None, "nor does another replica hear of it"


def test_a_replica_that_cannot_follow_goes_on_and_tries_once(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    live.state.put_setting(ACTIVE_MODEL, "damaged")
    for _ in range(3):
        asyncio.run(live.follow())
    assert live.model.version == "v1"
    assert sum("refused model damaged" in record.message for record in caplog.records) == 1
    live.state.put_setting(ACTIVE_MODEL, "v2")
    asyncio.run(live.follow())
    assert live.model.version == "v2"


def test_a_version_that_is_not_there(live: Live) -> None:
    with pytest.raises(UsageError, match="no such bundle"):
        asyncio.run(live.activate("v9"))


def test_a_model_without_items_can_be_served(live: Live) -> None:
    asyncio.run(live.activate("empty"))
    assert len(live.model.catalogue) == 0


def test_a_server_of_one_model_loads_no_other(url: str) -> None:
    live = Live(Model("v1", load("v1"), ServeConfig()), ServeConfig(), open_state(url))
    with pytest.raises(BundleError, match="one model alone"):
        asyncio.run(live.activate("v2"))


# ---------------------------------------------------------------- over HTTP


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    client = Client(create_app(FakeScorer(), open_state(url), model="v1", load=load))
    yield client
    client.close()


def test_activation_over_http(client: Client) -> None:
    answer = client.post("/v1/models/v2:activate")
    assert (answer.status_code, answer.json()) == (200, {"model": "v2", "before": "v1"})
    assert client.get("/v1/status").json()["catalogue"] == 72
    assert client.post("/v1/recommend", {"k": 1}).json()["model"] == "v2"
    assert client.get("/v1/items/red-22").status_code == 200


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [
        ("damaged", 409, "does not match its hash; v1 goes on"),
        ("v9", 404, "no such bundle"),
        ("..%2Fsecret", 404, ""),
        (".hidden", 422, ""),
        ("a b", 422, ""),
    ],
)
def test_what_cannot_be_activated_is_a_problem(client: Client, version: str, status: int, words: str) -> None:
    answer = client.post(f"/v1/models/{version}:activate")
    assert answer.status_code == status
    assert words in answer.text
    assert client.get("/v1/status").json()["model"] == "v1"


def test_no_request_is_lost_while_models_change(client: Client) -> None:
    answers: list[httpx.Response] = []
    stop = threading.Event()

    def shop() -> None:
        while not stop.is_set():
            answers.append(client.post("/v1/recommend", {"session_id": "s", "k": 30}))

    shopper = threading.Thread(target=shop)
    shopper.start()
    for version in ["v2", "raises", "v1", "v2"]:
        client.post(f"/v1/models/{version}:activate")
        time.sleep(0.05)
    stop.set()
    shopper.join()
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["model"] for answer in answers} == {"v1", "v2"}
    assert all(len(answer.json()["items"]) == 30 for answer in answers)
