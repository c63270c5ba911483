"""The versions of a BUNDLES folder: where each comes from and how it was judged.

In: a BUNDLES folder or URI. Out: rows, and lines for people. It opens no bundle: a damaged one is a row as well.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow.fs as pafs

from rayrec.bundle import current_version, versions
from rayrec.errors import UsageError
from rayrec.files import filesystem, read_text
from rayrec.training.lineage import LINEAGE, VERDICT

FACTS = ("created", "items", "ndcg@10", "preset", "config", "dataset", "parent", "code", VERDICT)
"""What a row tells beside version and live; None where a bundle does not say."""


def listing(bundles: str) -> list[dict[str, Any]]:
    """A row a version, by name: version, live, FACTS, and of a damaged one "trouble".

    config: the beginning of the hash of its settings. Raises UsageError if there is no such folder.
    """
    fs, root = filesystem(bundles)
    if fs.get_file_info(root).type != pafs.FileType.Directory:
        raise UsageError(f"{bundles}: no such folder")
    current = current_version(bundles)
    return [{"version": name, "live": name == current, **facts(bundles, name)} for name in versions(bundles)]


def facts(bundles: str, version: str) -> dict[str, Any]:
    """What the files of one version say."""
    fs, root = filesystem(f"{bundles.rstrip('/')}/{version}")

    def said(name: str) -> Any:
        text = read_text(fs, f"{root}/{name}")
        if text is None:
            raise OSError(f"there is no {name}")
        return json.loads(text)

    try:
        manifest, metrics = said("manifest.json"), said("metrics.json")
        files = manifest.get("files", {})
        origin = said(LINEAGE) if LINEAGE in files else {}
        config = said("config.json") if "config.json" in files else {}
        found = {
            "created": manifest["created"],
            "items": manifest["items"],
            "ndcg@10": metrics.get("test", {}).get("metrics", {}).get("ndcg@10"),
            "preset": config.get("preset"),
            "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8] if config else None,
        }
        return {**found, **{name: origin.get(name) for name in ("dataset", "parent", "code", VERDICT)}}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return {**dict.fromkeys(FACTS), "trouble": str(error)}


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    mark = "*" if row["live"] else " "
    if "trouble" in row:
        return f"{mark} {row['version']}  damaged: {row['trouble']}"
    code, judged = row["code"], row[VERDICT]
    words = [
        f"{row['created']}  {row['items']} items",
        "" if row["ndcg@10"] is None else f"NDCG@10 {row['ndcg@10']:.4f}",
        "" if row["preset"] is None else f"{row['preset']} {row['config']}",
        "" if code is None else _code(code),
        "" if row["dataset"] is None else f"dataset {row['dataset']['id']}",
        "" if row["parent"] is None else f"from {row['parent']['version']}",
        "" if judged is None else _judged(judged),
    ]
    return f"{mark} {row['version']}  {'  '.join(word for word in words if word)}"


def _code(code: dict[str, Any]) -> str:
    commit = f" {code['commit'][:8]}{'+' if code['changed'] else ''}" if code.get("commit") else ""
    return f"rayrec {code['rayrec']}{commit}"


def _judged(judged: dict[str, Any]) -> str:
    outcome = "published" if judged["passed"] else "refused"
    if not judged["users"]:
        return f"{outcome}: {judged['reason']}"
    return f"{outcome}: next item {judged['candidate']:.4f}, {judged['current']:.4f} before, {judged['users']} visitors"
