"""Options that commands share. In: words of the command line. Out: values. They must not know commands."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Set = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]


def print_json(value: Any) -> None:
    """The one JSON object that `--json` promises."""
    print(json.dumps(value, ensure_ascii=False), flush=True)
