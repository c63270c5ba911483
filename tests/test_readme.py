"""README.md tells the truth: each command line parses, each setting and route exists, CI runs the same commands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from fastapi.routing import APIRoute
from shopfake import FakeScorer

from rayrec.cli import app
from rayrec.config import Config, PrepareConfig, ServeConfig
from rayrec.errors import UsageError
from rayrec.serving import wire
from rayrec.serving.web import create_app
from rayrec.settings import with_settings
from rayrec.state import open_state

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)


def shell_lines() -> list[str]:
    """The commands of all bash blocks, one a line, continuation lines joined and `a && b` taken apart."""
    text = "\n".join(block for language, block in BLOCKS if language == "bash").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [command.strip() for line in lines for command in line.split(" && ")]


def lines_of(program: str) -> list[list[str]]:
    """The words of each line that calls `program`, in bash blocks and in the text."""
    return [shlex.split(line) for line in [*shell_lines(), *INLINE] if line.startswith(f"{program} ")]


def parse(words: list[str]) -> None:
    """Parse the arguments of `rayrec` as the command line does, and run nothing. Raises for what it does not know."""
    command = typer.main.get_command(app)
    name = "rayrec"
    while hasattr(command, "commands"):
        assert words, f"{name} needs a command"
        name, *words = words
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    command.make_context(name, list(words))


@pytest.mark.parametrize("line", [" ".join(words[1:]) for words in lines_of("rayrec")])
def test_each_rayrec_line_parses(line: str) -> None:
    parse(line.split())


@pytest.mark.parametrize("line", ["trian A B", "train A B --epoch 3", "train A", "train A B --epochs many"])
def test_parse_refuses_what_does_not_exist(line: str) -> None:
    with pytest.raises(Exception, match=r"trian|--epoch|bundles|integer"):
        parse(line.split())


def test_each_command_is_in_the_readme() -> None:
    command = typer.main.get_command(app)
    assert {words[1] for words in lines_of("rayrec") if len(words) > 1} == set(command.commands)


@pytest.mark.parametrize("words", lines_of("ray job submit"), ids=lambda words: str(words[6]))
def test_each_job_takes_the_arguments_of_its_command(words: list[str]) -> None:
    from ray.dashboard.modules.job.cli import submit

    options, entry = words[3 : words.index("--")], words[words.index("--") + 1 :]
    submit.make_context("submit", [*options, "--", *entry])
    python, script, *arguments = entry
    assert python == "python"
    assert (REPOSITORY / script).is_file()
    parse([Path(script).stem, *arguments])
    paths = [word for word in arguments if "/" in word]
    assert len(paths) >= 1
    assert all(path.startswith("/") or "://" in path for path in paths), "a job's paths are absolute"


def test_every_job_is_in_the_readme() -> None:
    named = {re.search(r"jobs/(\w+)\.py", " ".join(words)) for words in lines_of("ray job submit")}
    assert {match[1] for match in named if match} == {path.stem for path in (REPOSITORY / "jobs").glob("*.py")}


def settings() -> Iterator[list[str]]:
    """Of each command, or part of one."""
    for line in [*shell_lines(), *INLINE]:
        if found := [setting for setting in re.findall(r"--set (\S+=\S+)", line) if setting != "path=value"]:
            yield found


def test_each_setting_exists() -> None:
    shown = list(settings())
    assert len(shown) >= 3
    for together in shown:
        refusals = []
        for config in (PrepareConfig(), Config(), ServeConfig()):
            try:
                with_settings(config, together)
            except UsageError as error:
                refusals.append(str(error))
        assert len(refusals) < 3, refusals


# ---------------------------------------------------------------- the API

ROUTES = {
    "POST /v1/events", "POST /v1/recommend", "GET /v1/items/{}", "GET /v1/items/{}/image", "PUT /v1/items/{}",
    "DELETE /v1/items/{}", "POST /v1/models/{}:activate", "POST /v1/visitors", "GET /v1/users/{}",
    "DELETE /v1/users/{}", "POST /v1/users/{}:join", "GET /v1/status", "GET /healthz", "GET /readyz", "GET /metrics",
    "GET /",
}  # fmt: skip


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    state = open_state(f"sqlite:///{tmp_path_factory.mktemp('state')}/state.db")
    web = create_app(FakeScorer(), state)
    found = {
        f"{method} {re.sub(r'{[^}]*}', '{}', route.path)}"
        for route in web.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    state.close()
    return found


def test_every_route_of_the_contract_is_served(routes: set[str]) -> None:
    assert routes >= ROUTES


def test_each_curl_line_calls_a_route_with_a_valid_body(routes: set[str]) -> None:
    calls = lines_of("curl")
    assert len(calls) >= 2
    models = {
        "/v1/events": wire.EventsRequest, "/v1/recommend": wire.RecommendRequest, "/v1/items/{}": wire.ItemRequest
    }  # fmt: skip
    for words in calls:
        (path,) = [match[1] for word in words if (match := re.fullmatch(r"(?:http://)?localhost:8000(/\S*)", word))]
        route = re.sub(r"(?<=/v1/items/)[\w-]+", "{}", path)
        body = json.loads(words[words.index("-d") + 1]) if "-d" in words else None
        method = words[words.index("-X") + 1] if "-X" in words else "POST" if body else "GET"
        assert f"{method} {route}" in routes
        if body:
            models[route].model_validate(body)


# ---------------------------------------------------------------- installing and testing


def test_ci_runs_the_commands_that_the_readme_gives() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text()
    (install, demo), (install_tests, tests) = [
        line.split(" && ") for line in "\n".join(block for _, block in BLOCKS).splitlines() if line.startswith("pip ")
    ]
    assert (install, demo) == ("pip install .", "rayrec demo")
    assert install_tests.replace("pip install ", "pip install -q ") in script
    for command in (demo, tests):
        assert re.search(rf"^\W*(cd \S+ && )?\(?.*\b{command}\b", script, re.MULTILINE)


def test_each_file_of_the_tree_exists() -> None:
    (tree,) = [block for _, block in BLOCKS if block.startswith("rayrec/\n")]
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        for name in re.findall(r"^\s*((?:[\w]+(?:/|\.py)\s?)+)", line):
            for part in name.split():
                assert (REPOSITORY / ("rayrec" if indent else "") / part).exists(), part
