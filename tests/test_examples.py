"""The examples in docstrings say what is so."""

import doctest
import importlib
from pathlib import Path

import pytest

import rayrec

HOME = Path(rayrec.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(["rayrec", *path.relative_to(HOME).with_suffix("").parts])
    for path in HOME.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_are_so(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0, f"`python -m doctest -v` on the file of {name} shows which"
