"""Trainings of a BUNDLES folder that are under way: names, settings, and where their checkpoints lie.

In: a BUNDLES folder or URI. Out: names of runs. It must not know what a run does.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrec.config import Config, saved_config
from rayrec.errors import ResourceError, UsageError
from rayrec.files import filesystem

LEAST_ROOM_BYTES = 32 * 1024 * 1024
"""Checkpoints and bundle of a small model. With less it is kinder to say so at once than after an epoch."""


TEACH_NOTHING = ("checkpoint_s", "checkpoint_steps", "tracker", "bad_shards", "min_workers")
"""Settings of `TrainConfig` that a training may change when it goes on: it learns the same."""


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """How the settings of a saved training differ from `config`, but for those that teach nothing."""
    was, now = (settings.model_dump(mode="json") for settings in (saved_config(saved), config))
    found = [] if was["preset"] == now["preset"] else [f"preset was {was['preset']} and is {now['preset']}"]
    return found + [
        f"{group}.{name} was {was[group][name]} and is {value}"
        for group in ("model", "train")
        for name, value in now[group].items()
        if was[group][name] != value and name not in TEACH_NOTHING
    ]


@dataclass(frozen=True)
class Runs:
    """Unfinished and finished trainings of a BUNDLES folder: checkpoints in `.runs/<run>/`, the open one in OPEN."""

    bundles: str

    @property
    def storage(self) -> str:
        """Where Ray Train keeps checkpoints."""
        if "://" in self.bundles:
            return f"{self.bundles.rstrip('/')}/.runs"
        return str(Path(self.bundles).absolute() / ".runs")

    def begin(self, config: Config, dataset: str = "", parent: Any = None) -> str:
        """Open a new run and remember its settings, its dataset's fingerprint, and the record of its parent bundle."""
        run = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{config.preset}"
        self._write({"run": run, "config": config.model_dump(mode="json"), "dataset": dataset, "parent": parent})
        return run

    def unfinished(self, config: Config, dataset: str = "") -> str | None:
        """The run that was not finished, if there is one.

        Raises UsageError if it had other settings, or another dataset.
        """
        try:
            saved = self._read()
        except (FileNotFoundError, ValueError):
            return None
        if others := differences(saved["config"], config):
            raise UsageError(
                f"{self.bundles}: the training to resume ({saved['run']}) had other settings: {'; '.join(others)}; "
                "give the same preset, --set and options, or start anew without --resume"
            )
        if dataset and saved.get("dataset", dataset) != dataset:
            raise UsageError(
                f"{self.bundles}: the training to resume ({saved['run']}) had another dataset, or this one has "
                "changed; give the same, or start anew without --resume"
            )
        return str(saved["run"])

    def parent(self) -> Any:
        """What the open run remembers of the bundle that it started from."""
        return self._read().get("parent")

    def _read(self) -> dict[str, Any]:
        fs, root = filesystem(self.storage)
        with fs.open_input_stream(f"{root}/OPEN") as stream:
            return dict(json.loads(stream.read()))

    def finish(self, run: str) -> None:
        """Close the run and drop its checkpoints: the bundle has all that is worth keeping."""
        fs, root = filesystem(self.storage)
        fs.delete_file(f"{root}/OPEN")
        fs.delete_dir(f"{root}/{run}")

    def _write(self, content: dict[str, Any]) -> None:
        fs, root = filesystem(self.storage)
        try:
            fs.create_dir(root, recursive=True)
            with fs.open_output_stream(f"{root}/OPEN") as stream:
                stream.write(json.dumps(content).encode())
        except OSError as error:
            raise ResourceError(f"{self.bundles}: cannot write here ({error})") from None
        if "://" not in self.bundles and (free := shutil.disk_usage(root).free) < LEAST_ROOM_BYTES:
            raise ResourceError(
                f"{self.bundles}: {free >> 20} MiB are free and a training needs {LEAST_ROOM_BYTES >> 20}; free space, "
                "or name another place"
            )
