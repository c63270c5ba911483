from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from evaluation_shop import ScoreTable, maker, random_shop, sequence_table, write_dataset

from rayrec.errors import UsageError
from rayrec.evaluation.judge import evaluate
from rayrec.evaluation.report import fact_text, render, verdict, write_report

NOON = datetime(2026, 1, 2, 12, tzinfo=timezone.utc)


class Links(HTMLParser):
    """Collects what a browser would load, and the headings."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "srcset", "data"}]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    sequences, items = random_shop(0, users=60, n_items=30)
    dataset = write_dataset(tmp_path_factory.mktemp("data") / "shop", sequences, items)
    return evaluate(maker(ScoreTable(next=range(30))), dataset, "test", max_len=10, parallel=False)


def test_the_report_opens_without_the_network(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(result, path, {"dataset": {"users": 60}})
    text = path.read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert links.tags.count("svg") == 4
    assert all(target.startswith("#") for target in links.loaded)
    assert not {"script", "link", "iframe", "img"} & set(links.tags)
    assert not re.search(r"url\((?!#)|@import", text)
    assert [child.name for child in path.parent.iterdir()] == ["report.html"]


def test_the_report_says_where_a_catalogue_is_made_of_its_log(result: dict[str, Any]) -> None:
    for met_later, told in ((5, True), (4, False)):
        made = {**result, "items": 30, "catalogue": {"cold": 5, "cold_met_later": met_later}}
        assert ("Note: all 5 items without a training event" in render(made, {}, NOON)) is told


def test_the_report_shows_the_figures_and_the_facts(result: dict[str, Any]) -> None:
    text = render(result, {"model": "<v1>", "dataset": {"events": 12345}}, NOON)
    shown = [result[name] for name in ("metrics", "next", "cart", "purchase")]
    for body in (*shown, result["floors"]["markov"]["cart"]):
        assert f"{body['ndcg@10']:.4f}" in text
    assert "2026-01-02 12:00 UTC" in text
    assert "&lt;v1&gt;" in text
    assert "<v1>" not in text
    assert "12,345" in text
    assert f"{result['pointwise']['gauc']:.4f}" in text


def test_the_report_reads_what_json_has_kept(result: dict[str, Any]) -> None:
    assert render(json.loads(json.dumps(result)), {}, NOON) == render(result, {}, NOON)


def test_ids_of_plots_do_not_clash(result: dict[str, Any]) -> None:
    text = render(result, {}, NOON)
    clips = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(clips) == len(set(clips)) > 0


def test_a_report_of_little(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "shop", sequence_table([1, 2], [2]), random_shop(0, 5, 3)[1])
    nobody = evaluate(maker(ScoreTable(next=[1, 2, 3])), dataset, "test", max_len=5, parallel=False)
    assert "nothing to compare" in render(nobody, {}, NOON)
    few = evaluate(
        maker(ScoreTable(next=[1, 2, 3])), dataset, max_len=5, parallel=False, floors=False, protocols=("next",)
    )
    assert "Evaluation, test split" in render(few, {}, NOON)


@pytest.mark.parametrize(
    ("model", "floor", "word"), [(0.30, 0.10, "beats"), (0.30, 0.29, "cannot be told from"), (0.30, 0.40, "loses to")]
)
def test_the_verdict_asks_whether_the_difference_is_sure(model: float, floor: float, word: str) -> None:
    body = {"ndcg@10": model, "hr@10": 0.5, "ndcg@10_95": [model - 0.02, model + 0.02]}
    said = verdict({"metrics": body, "floors": {"popular": {"ndcg@10": floor}, "markov": {"ndcg@10": floor / 2}}})
    assert f"{word} the popularity floor" in said


def test_facts_for_people() -> None:
    assert fact_text(1234567) == "1,234,567"
    assert fact_text({"view": 1, "cart": None}) == "view 1, cart –"
    assert fact_text([True, 0.123456]) == "yes, 0.1235"


def test_a_place_that_cannot_be_written_is_named(result: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"report\.html.*cannot be written"):
        write_report(result, tmp_path / "file" / "report.html", {})
