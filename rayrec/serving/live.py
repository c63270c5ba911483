"""The model that a replica serves, and how it becomes another while requests go on.

In: versions, a loader of them, the shared state. Out: the live model. A new one is loaded and tried beside the old one
and then takes its place at once; one that fails is refused, and the old one goes on. It must not know routes or files.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import pyarrow as pa

from rayrec.catalogue import Catalogue
from rayrec.config import ServeConfig
from rayrec.errors import BundleError, RayrecError, StateError
from rayrec.evaluation.experiment import Experiment, reply, running
from rayrec.ranking.pipeline import Ranker
from rayrec.ranking.requests import Request
from rayrec.ranking.retrieval import Ints
from rayrec.ranking.scoring import Scorer
from rayrec.ranking.trends import Trends
from rayrec.state.protocol import Act, Happening, History, ItemEdit, Shown, State

log = logging.getLogger(__name__)

ACTIVE_MODEL: Final = "active_model"
"""The setting that names the version which all replicas serve."""

EDITS_AT_ONCE: Final = 1000
"""Of a shop's items that reach a model together; their new pictures are in memory at once."""

Image = tuple[bytes, str]
ImageOf = Callable[[int], Image | None]
"""Bytes and media type of an item's image, by item index."""


Edit = Callable[[Any, Sequence[ItemEdit], Mapping[str, bytes]], tuple[Scorer, Ints]]
"""From a scorer, a shop's edits and the new pictures among them by item id: the scorer after them, and which rows of
its catalogue changed ([R] int64)."""


class Loaded(NamedTuple):
    """What is read of a version. edit: how a shop's edits of its items reach it; None if they cannot."""

    scorer: Scorer
    image_of: ImageOf | None
    edit: Edit | None = None


Load = Callable[[str], Loaded]
"""From a version's name. Raises UsageError if there is none of that name, BundleError for one that is broken."""


class Model:
    """One version, with all that is derived from it.

    seq: the last of the shop's edits that it knows. picture_seq: of the items whose picture was put later, when.
    """

    def __init__(self, version: str, loaded: Loaded, config: ServeConfig) -> None:
        self.version, self.image_of, self._edit = version, loaded.image_of, loaded.edit
        self.ranker = Ranker(loaded.scorer, config, model=version)
        self.catalogue: Catalogue = loaded.scorer.catalogue
        self.cards = Cards(self.catalogue, with_images=loaded.image_of is not None)
        self.seq = 0
        self.picture_seq: Mapping[str, int] = {}

    @property
    def takes_edits(self) -> bool:
        """Whether a shop's edits of its items reach it."""
        return self._edit is not None

    def over(self, edits: Sequence[ItemEdit], pictures: Mapping[str, bytes]) -> Model:
        """The same after a shop's edits; this one stays as it is, for requests that are under way.

        pictures: of the items whose picture is new. Edits that fail are logged and left out, lest all later ones wait.
        """
        assert self._edit is not None, "ask takes_edits first"
        later = copy.copy(self)
        later.seq = edits[-1].seq
        try:
            scorer, row_R = self._edit(self.ranker.scorer, edits, pictures)
        except Exception:
            log.exception("%s: left out edits of %s", self.version, ", ".join(edit.item_id for edit in edits[:10]))
            return later
        pictured = {edit.item_id: edit.picture_seq for edit in edits if edit.picture_seq}
        later.picture_seq = {**self.picture_seq, **pictured}
        later.ranker, later.catalogue = self.ranker.over(scorer, row_R), scorer.catalogue
        later.cards = self.cards.over(scorer.catalogue, row_R, later.picture_seq)
        return later

    def try_out(self) -> None:
        """Answer a visitor of every scene, which also warms it up. Raises BundleError if that goes wrong."""
        ids = self.catalogue.ids[1:].tolist()
        if not ids:
            return
        acts = tuple(Act(item_id, "view", n) for n, item_id in enumerate(ids[:3]))
        scenes = self.ranker.config.scenes
        asked = [Request("nobody", scene, query=ids[0], events=acts, store=False) for scene in scenes]
        try:
            answers = self.ranker.recommend(asked, _Nobody())
        except Exception as error:
            raise BundleError(f"{self.version}: fails on a first request ({error})") from error
        for scene, answer in zip(scenes, answers, strict=True):
            if answer.served_by not in ("model", "query") or answer.without:
                what = answer.without[0] if answer.without else "model"
                raise BundleError(f"{self.version}: the {what} fails on a first request of scene '{scene}'")
            score = [item.score for item in answer.items]
            if score and not (max(score) > 0 and all(0 <= one <= 1 for one in score)):  # NaN is shown as 0
                raise BundleError(f"{self.version}: gives scores that are no probabilities, in scene '{scene}'")


class Trial(NamedTuple):
    """An experiment, and the model of its treatment."""

    experiment: Experiment
    model: Model


@dataclass
class Live:
    """The live model of one replica. Reading `model` is atomic: take it once for all that belongs together.

    trial: what a share of the visitors is served by, while an experiment runs.
    """

    model: Model
    config: ServeConfig
    state: State
    load: Load | None = None
    trial: Trial | None = None

    def __post_init__(self) -> None:
        self._swapping = threading.Lock()
        self._trends, self._counting = Trends(self.config.trend_hours), threading.Lock()
        self._refused: str | None = None
        self._refused_trial: Experiment | None = None

    def of(self, visitor: str | None) -> Model:
        """The model that this visitor is served by."""
        trial = self.trial
        if trial is None or visitor is None or trial.experiment.arm(visitor) == "control":
            return self.model
        return trial.model

    async def activate(self, version: str) -> str:
        """Make `version` the live one here, and tell the other replicas; the version that was live before.

        Raises as `Load`, BundleError for a model that fails on a first request, StateError.
        """
        before = self.model.version
        model = await asyncio.to_thread(self._ready, version)
        await asyncio.to_thread(self.state.put_setting, ACTIVE_MODEL, version)
        self.model = model
        return before

    async def follow(self) -> None:
        """Become what the state says, if another replica was told so. Raises StateError."""
        await self._follow_model()
        await self._follow_experiment()

    async def follow_trends(self) -> None:
        """Count what visitors did since this was last called. Raises StateError."""
        if self.config.trend_hours:
            happenings = await asyncio.to_thread(self.state.happenings, self._trends.seq)
            await asyncio.to_thread(self._count, happenings)

    def _count(self, happenings: Sequence[Happening]) -> None:
        with self._counting:
            self._trends.add(happenings)
        for model in (self.model, *([self.trial.model] if self.trial else [])):
            self._tell_trend(model)

    def _tell_trend(self, model: Model) -> Model:
        with self._counting:
            model.ranker.retriever.trend = self._trends.over(model.catalogue, time.time_ns() // 1_000_000)
        return model

    async def follow_items(self) -> None:
        """Bring the catalogue up to date with what the shop says of its items. Raises StateError."""
        model, trial = self.model, self.trial
        later = await asyncio.to_thread(self._up_to_date, model)
        if self.model is model:  # else another was activated meanwhile, which knows them all
            self.model = later
        if trial is not None:
            later = await asyncio.to_thread(self._up_to_date, trial.model)
            if self.trial is trial:
                self.trial = trial._replace(model=later)

    def _up_to_date(self, model: Model) -> Model:
        while model.takes_edits and (edits := self.state.item_edits(model.seq, EDITS_AT_ONCE)):
            fresh = [edit.item_id for edit in edits if edit.picture_seq > model.seq]
            found = {item_id: self.state.item_picture(item_id) for item_id in fresh}
            model = model.over(edits, {item_id: data for item_id, data in found.items() if data is not None})
            self._tell_trend(model)
        return model

    async def _follow_experiment(self) -> None:
        wanted = await asyncio.to_thread(running, self.state)
        if wanted == (self.trial.experiment if self.trial else None) or (wanted and wanted == self._refused_trial):
            return
        if wanted is None:
            self.trial, self._refused_trial = None, None
            return
        try:
            trial = Trial(wanted, await asyncio.to_thread(self._ready, wanted.version))
        except StateError:  # says nothing of the model: it is tried again
            raise
        except RayrecError as error:
            log.error("refused model %s of experiment '%s': %s", wanted.version, wanted.name, error)
            await asyncio.to_thread(reply, self.state, wanted, str(error))
            self.trial, self._refused_trial = None, wanted
        else:
            await asyncio.to_thread(reply, self.state, wanted)
            self.trial = trial

    async def _follow_model(self) -> None:
        wanted = await asyncio.to_thread(self.state.setting, ACTIVE_MODEL)
        if wanted is None or wanted in (self.model.version, self._refused) or self.load is None:
            return
        try:
            self.model = await asyncio.to_thread(self._ready, wanted)
        except RayrecError as error:
            self._refused = wanted  # and not every second anew
            log.error("refused model %s: %s; going on with %s", wanted, error, self.model.version)
        else:
            self._refused = None
            log.warning("serving model %s", wanted)

    def _ready(self, version: str) -> Model:
        if self.load is None:
            raise BundleError("this server was given one model alone, and cannot load others")
        with self._swapping:  # two of them would need the memory of both
            if version == self.model.version:
                return self.model
            try:
                model = Model(version, self.load(version), self.config)
            except RayrecError:
                raise
            except Exception as error:  # a file that says what it may not
                raise BundleError(f"{version}: cannot be loaded ({error})") from error
            model.try_out()
            return self._up_to_date(self._tell_trend(model))


class _Nobody:
    """The state of visitors of whom nothing is held, for a trial."""

    def histories(self, visitors: Sequence[str], limit: int) -> list[History]:
        return [History()] * len(visitors)

    def log_shown(self, lists: Sequence[Shown]) -> None:
        raise AssertionError("a trial is not stored")


class Cards:
    """What people are shown of each item."""

    def __init__(self, catalogue: Catalogue, *, with_images: bool) -> None:
        self._index, self._with_images = catalogue.index, with_images
        self._rows = _rows(catalogue.table)
        self._picture_seq: Mapping[str, int] = {}

    def over(self, catalogue: Catalogue, row_R: Ints, picture_seq: Mapping[str, int]) -> Cards:
        """The same after edits of these rows."""
        later = copy.copy(self)
        later._index, later._picture_seq = catalogue.index, picture_seq
        later._rows = self._rows + [()] * (len(catalogue) - len(self._rows))
        for row, facts in zip(row_R.tolist(), _rows(catalogue.table.take(pa.array(row_R - 1))), strict=True):
            later._rows[row - 1] = facts
        return later

    def of(self, item_id: str) -> dict[str, Any]:
        """`wire.ItemOut` of an item that is in the catalogue."""
        title, category, brand, price, has_image = self._rows[self._index[item_id] - 1]
        put = self._picture_seq.get(item_id)
        image = None
        if put or (has_image and self._with_images):
            version = f"?v={put}" if put else ""  # browsers keep pictures for a while
            image = f"/v1/items/{quote(item_id, safe='')}/image{version}"
        price = price if price is not None and price == price else None
        return {
            "item_id": item_id,
            "title": title,
            "category": category,
            "brand": brand,
            "price": price,
            "image": image,
        }


def _rows(items: pa.Table) -> list[tuple[Any, ...]]:
    columns = ("title", "category", "brand", "price", "has_image")
    return list(zip(*(items[name].to_pylist() for name in columns), strict=True))
