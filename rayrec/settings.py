"""What every group of settings is, and how a user gives them: `--set path=value`, a YAML file, what was saved.

In: dictionaries, files, `path=value` strings. Out: frozen, typed, validated models. It must not know a setting by name,
but for what a scene holds.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from rayrec.errors import UsageError

C = TypeVar("C", bound="Settings")


class Settings(BaseModel):
    """A frozen group of settings; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError("must be a number")
        return value


def with_settings(config: C, settings: Iterable[str]) -> C:
    """`config` with each `path=value` of `settings` put in, validated as a whole.

    Values are YAML scalars or lists: `train.epochs=3`, `model.use_image=false`, `sequences.actions=[view,cart]`.
    Raises UsageError that names the setting and, for a misspelt one, the nearest name.

    >>> from rayrec.config import Config
    >>> with_settings(Config(), ["train.epochs=3"]).train.epochs
    3
    """
    tree = config.model_dump()
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write it as path=value")
        _put(tree, path.strip().split("."), _parse(text, setting), setting)
    return _validated(type(config), tree)


def with_file(config: C, path: Path) -> C:
    """`config` with what the YAML file at `path` says put in; groups are merged, lists replaced.

    Raises UsageError for a file that cannot be read, naming the place, or whose settings are wrong.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict):
        raise UsageError(f"--config {path}: write settings as name: value")
    try:
        return _validated(type(config), _merged(config.model_dump(), given))
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from None


def _merged(tree: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`tree` with the leaves of `given`. What a scene says of its heads or pins is all there is of them."""
    both = {
        name: _merged(tree[name], value)
        for name, value in given.items()
        if name not in ("heads", "pinned") and isinstance(value, dict) and isinstance(tree.get(name), dict)
    }
    return {**tree, **given, **both}


def from_dict(kind: type[C], tree: dict[str, Any]) -> C:
    """Settings of type `kind` from a dictionary (a saved config, a YAML file). Raises UsageError."""
    return _validated(kind, tree)


def _parse(text: str, setting: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {setting}: cannot read the value ({error.__class__.__name__})") from None


def _put(tree: dict[str, Any], path: Sequence[str], value: Any, setting: str) -> None:
    node = tree
    for depth, name in enumerate(path):
        if not isinstance(node, dict) or (name not in node and "scenes" not in path[:depth]):
            known = sorted(node) if isinstance(node, dict) else []
            raise UsageError(
                f"--set {setting}: there is no setting '{'.'.join(path[: depth + 1])}'{_nearest(name, known)}"
            )
        if depth == len(path) - 1:
            node[name] = value
        else:
            node = node.setdefault(name, {}) if isinstance(node, dict) else node[name]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(known)}" if known else ""


def _validated(kind: type[C], tree: dict[str, Any]) -> C:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # A misspelt name often makes another one missing: tell of the name.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = sorted(_names(kind, first["loc"][:-1]))
            raise UsageError(f"there is no setting '{where}'{_nearest(str(first['loc'][-1]), known)}") from None
        message = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        raise UsageError(f"setting {where}: {message}{got}") from None


def _names(kind: Any, path: Sequence[int | str]) -> Iterable[str]:
    """The settings of the group at `path` below `kind`; a name in a dictionary of groups is any name."""
    for name in path:
        is_group = isinstance(kind, type) and issubclass(kind, Settings)
        parts = [part for part in get_args(kind) if part is not Ellipsis]
        kind = kind.model_fields[str(name)].annotation if is_group else parts[-1]
    return kind.model_fields
