"""The steps of a retraining in their order; what they do and why is told by the package.

In: where bundles, dataset, state and exports are, and settings. Out: a verdict, and perhaps another live bundle.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrec.bundle import Bundle, add_file, current_version, publish, versions
from rayrec.cluster import connect
from rayrec.config import Config
from rayrec.data.dataset import Dataset
from rayrec.data.intake import CATALOGUE, Intake
from rayrec.data.pipelines import add, forget
from rayrec.errors import ResourceError, UsageError, writing
from rayrec.files import absolute, filesystem, read_text
from rayrec.progress import step
from rayrec.retrain.alone import alone
from rayrec.retrain.comparison import Rule, compare
from rayrec.retrain.exports import Exports
from rayrec.serving.live import ACTIVE_MODEL
from rayrec.settings import with_settings
from rayrec.state import State, using
from rayrec.training.lineage import LINEAGE, VERDICT, manifest_sha256
from rayrec.training.runs import Runs, differences
from rayrec.training.trainer import train

PUBLISHED, REFUSED, NO_NEWS = "published", "refused", "no news"


@dataclass(frozen=True)
class Places:
    """BUNDLES and DATASET, the URL of the state, and the raw folder of exports; paths or URIs."""

    bundles: str
    dataset: str
    state: str
    raw: str


def retrain(places: Places, settings: Sequence[str], rule: Rule, *, wait_s: float = 0.0) -> dict[str, Any]:
    """Export, add, train, judge, publish; answers what came of it.

    settings: over those of the current bundle. wait_s: how long a cluster that scales up may take to give the workers.
    Raises UsageError where there is no bundle, dataset or state, StateError if the state is away, ResourceError where
    another run is under way or was quicker; and as `pipelines.add` and `trainer.train`.
    """
    version = current_version(places.bundles)
    if version is None:
        raise UsageError(f"{places.bundles}: nothing is published there to start from; train first: rayrec train")
    with alone(places.bundles):
        current = Bundle.open(f"{absolute(places.bundles)}/{version}")
        config: Config = with_settings(current.config, settings)
        exported = _take_in(places)
        dataset = Dataset.open(places.dataset)
        try:
            candidate = _made(places, dataset, current, config) or _trained(places, current, config, wait_s)
        except NoNewsError as none:
            _tell(places.state, current)
            step(f"no news: {none}")
            return {"verdict": NO_NEWS, "live": current.version, "reason": str(none), "exported": exported}
        judged = candidate.json(LINEAGE).get(VERDICT)
        if judged is None:
            judged = compare(candidate, current, dataset, rule)
            candidate = _noted(candidate, judged)
        if now := _other(places.bundles, version):
            raise ResourceError(
                f"{places.bundles}: {now} was published meanwhile and stays; {candidate.version} was judged against "
                f"{version}. Run this again"
            )
        if judged["passed"]:
            publish(candidate)
            _tell(places.state, candidate)
        live = candidate if judged["passed"] else current
        step(line(candidate.version, judged))
        outcome = PUBLISHED if judged["passed"] else REFUSED
        return {
            "verdict": outcome, "version": candidate.version, "live": live.version, **judged, "exported": exported
        }  # fmt: skip


class NoNewsError(Exception):
    """There is nothing to learn from that was not learned from before."""


def line(version: str, judged: dict[str, Any]) -> str:
    """A verdict for people."""
    what = f"{PUBLISHED if judged['passed'] else REFUSED} {version}: {judged['reason']}"
    if not judged["users"]:
        return f"{what}; {judged['against']} stays"
    low, high = judged["difference_95"]
    return (
        f"{what}; NDCG@10 of the next item {judged['candidate']:.4f}, and {judged['current']:.4f} by "
        f"{judged['against']} ({judged['difference']:+.4f}, 95% {low:+.4f} to {high:+.4f}; {judged['users']} visitors "
        f"since {judged['since']})"
    )


# ---------------------------------------------------------------- the steps


def _take_in(places: Places) -> dict[str, int]:
    """Export what is new, and add it to the dataset; how much that was."""
    intake = Intake.of(places.dataset)
    exports = Exports(places.raw, intake.facts["mapping"]["columns"])
    with using(places.state) as state:
        _forget_erased(places, state, intake, exports)
        new = exports.export(state, intake.table(CATALOGUE))
    step(
        f"export: {new.events} events and {new.impressions} impressions that are new, "
        f"{new.items} items and {new.pictures} pictures, to {places.raw}"
    )
    connect()  # one Ray for all steps, with all that training asks of it
    if exports:
        add(places.raw, places.dataset)
    return {**vars(new)}


def _forget_erased(places: Places, state: State, intake: Intake, exports: Exports) -> None:
    """Take the events of those who were erased since out of exports and dataset."""
    if not state.counts()["erased"]:
        return
    held = intake.visitors() | exports.visitors()
    erased = {visitor: ms for visitor in held if (ms := state.erased_ms(visitor)) is not None}
    if not erased:
        return
    connect()
    if report := forget(places.dataset, exports.forget(erased), places.raw):
        n = report["events"]["rejected"]["erased"]
        step(f"erased visitors: {n} events of theirs were in the dataset and are gone by now")
    exports.forget_joins(erased)


def _made(places: Places, dataset: Dataset, current: Bundle, config: Config) -> Bundle | None:
    """The candidate of an earlier run that was ended after its training, if there is one.

    Raises NoNewsError if the dataset was learned from to the end: by the current bundle, or by one that was refused.
    """
    digest = manifest_sha256(dataset)
    if _origin(current).get("dataset", {}).get("manifest_sha256") == digest:
        raise NoNewsError(f"{current.version} has learned from all that {places.dataset} holds")
    for version, origin, saved in _offspring(places.bundles, current.version):
        if origin["dataset"]["manifest_sha256"] != digest or differences(saved, config):
            continue
        if not origin.get(VERDICT, {"passed": True})["passed"]:
            raise NoNewsError(f"{version} was refused, and there is nothing that it has not learned from")
        step(f"train: {version} is there from a run that was ended")
        return Bundle.open(f"{absolute(places.bundles)}/{version}")
    return None


def _offspring(bundles: str, parent: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Versions that started from `parent`, newest first: name, lineage and settings."""
    fs, root = filesystem(bundles)
    for version in reversed(versions(bundles)):
        texts = [read_text(fs, f"{root}/{version}/{name}") for name in (LINEAGE, "config.json")]
        if None in texts:
            continue
        origin, saved = (json.loads(text or "{}") for text in texts)
        if (origin.get("parent") or {}).get("version") == parent:
            yield version, origin, saved


def _trained(places: Places, current: Bundle, config: Config, wait_s: float) -> Bundle:
    """A candidate, which goes on with a training of the same that was ended."""
    start = current.location
    resume = _can_resume(places, current, config)
    if resume:
        step("train: goes on where the run before was ended")
    return train(
        places.dataset, places.bundles, config, resume=resume, start_from=start, publish=False, wait_s=wait_s
    )  # fmt: skip


def _can_resume(places: Places, current: Bundle, config: Config) -> bool:
    runs = Runs(places.bundles)
    try:
        unfinished = runs.unfinished(config, Dataset.open(places.dataset).fingerprint())
    except UsageError:
        return False
    return unfinished is not None and (runs.parent() or {}).get("version") == current.version


def _noted(candidate: Bundle, judged: dict[str, Any]) -> Bundle:
    """The candidate with its verdict in its lineage."""
    noted = {**judged, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    record = {**candidate.json(LINEAGE), VERDICT: noted}
    with writing(candidate.path):
        return add_file(candidate, LINEAGE, lambda path: _write(path, record))


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")


def _origin(bundle: Bundle) -> dict[str, Any]:
    """Its lineage; nothing where it was written before there were any."""
    return dict(bundle.json(LINEAGE)) if LINEAGE in bundle.manifest["files"] else {}


def _other(bundles: str, version: str) -> str | None:
    """The live version, if it is another one by now."""
    now = current_version(bundles)
    return None if now == version else now


def _tell(state_url: str, bundle: Bundle) -> None:
    """Have the live service serve `bundle`, unless somebody has had it serve another than the one before it."""
    origin = _origin(bundle)
    if not origin.get(VERDICT, {}).get("passed"):
        return  # it was not published here
    with using(state_url) as state:
        active = state.setting(ACTIVE_MODEL)
        if active in (None, origin["parent"]["version"]):
            state.put_setting(ACTIVE_MODEL, bundle.version)
        elif active != bundle.version:
            step(f"the service was told to serve {active}, and goes on; POST /v1/models/{bundle.version}:activate")
