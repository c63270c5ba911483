"""Judge what would be served: a bundle's own scorer before the judge, its figures kept in the bundle.

In: a bundle and a dataset. Out: the body of `rayrec evaluate --json`, `metrics.json` and a report.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rayrec.bundle import Bundle, add_file, write_atomically
from rayrec.cluster import connect
from rayrec.data.dataset import Dataset
from rayrec.errors import DataError, UsageError, writing
from rayrec.evaluation import evaluate
from rayrec.evaluation.replay import Split, users_at_once
from rayrec.evaluation.report import write_report
from rayrec.progress import timed
from rayrec.serving.scorer import scorer_maker


def judge(
    bundle_path: str, dataset_path: str, split: Split, report: Path | None = None, users: int | None = None
) -> dict[str, Any]:
    """Evaluate a bundle on a split, over the Ray cluster; keep the figures in its metrics.json and report.html.

    users: see `evaluate`; figures of a sample are not kept, lest they stand for all.

    Raises DataError if the bundle was trained on other items than the dataset holds, UsageError at once if there is
    no folder for `report`, ResourceError if the figures cannot be written.
    """
    if report is not None:
        _require_place(report)
    bundle, dataset = Bundle.open(bundle_path), Dataset.open(dataset_path)
    n_items = len(bundle.catalogue)
    if not bundle.catalogue.table["item_id"].equals(dataset.catalogue().table["item_id"]):
        raise DataError(
            f"{bundle.path} was trained on other items than {dataset.path} holds ({n_items} items in the bundle); "
            "evaluate it on the dataset it was trained on, or train again"
        )
    connect(dashboard=False)
    batch = users_at_once(n_items)
    with timed(f"evaluate: {split} split, full ranking over {n_items} items"):
        result = evaluate(
            *(scorer_maker(bundle.location), dataset, split),
            max_len=bundle.config.model.max_len, batch=batch, users=users,
        )  # fmt: skip
    facts = {"dataset": dataset.manifest.get("counts", {}), "bundle": _facts(bundle)}
    _write(bundle, split, result, facts, report, keep=result["settings"]["sampled_users"] is None)
    return result


def _require_place(report: Path) -> None:
    """Know before the work, not after it, that its report can be written."""
    folder = report.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{report}: there is no folder {folder}; make it first")
    with writing(report), tempfile.TemporaryFile(dir=folder):
        pass


def _facts(bundle: Bundle) -> dict[str, Any]:
    return {"version": bundle.version, "preset": bundle.config.preset, **bundle.config.model.model_dump()}


def _write(
    bundle: Bundle, split: str, result: dict[str, Any], facts: dict[str, Any], report: Path | None, keep: bool
) -> None:
    metrics = {**bundle.json("metrics.json"), split: result}
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write_report(result, page, facts)
        if keep:
            with writing(bundle.path):
                bundle = add_file(bundle, "metrics.json", lambda path: _write_json(path, metrics))
                add_file(bundle, "report.html", lambda path: path.write_bytes(page.read_bytes()))
        if report is not None:
            with writing(report):
                write_atomically(report, page.read_bytes())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
