"""What replicas count and time, in the text format of Prometheus.

In: what happened. Out: the text of `/metrics`. It must not know visitors: no label holds an id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from rayrec.ranking.requests import Answer
from rayrec.serving.wire import EventsAnswer

MEDIA_TYPE = CONTENT_TYPE_LATEST
BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Metrics:
    """Counters of one replica, which all its series name: those of several add up, and one that ends resets no sum."""

    def __init__(self, replica_id: str) -> None:
        self._replica_id, self.registry = replica_id, CollectorRegistry()
        self._version: str | None = None
        self._requests = Counter("rayrec_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self._request_s = Histogram(
            "rayrec_request_seconds",
            "Time from a request to the end of its answer, in the replica",
            ["route"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._answers = Counter("rayrec_answers", "Lists answered", ["served_by"], registry=self.registry)
        self._without = Counter(
            "rayrec_answers_without", "Lists answered without what failed", ["what"], registry=self.registry
        )
        self._removed = Counter("rayrec_removed", "Candidates removed", ["reason"], registry=self.registry)
        self._events = Counter("rayrec_events", "Events received", ["outcome"], registry=self.registry)
        self._lists = Counter("rayrec_lists", "Lists answered", ["scene"], registry=self.registry)
        self._remembered = Counter(
            "rayrec_lists_remembered", "Lists whose scores were known from before", registry=self.registry
        )
        self._candidates = Counter("rayrec_candidates", "Candidates proposed", ["source"], registry=self.registry)
        self._model = Gauge("rayrec_model_info", "1 for the model that is live", ["version"], registry=self.registry)
        self._together = Histogram(
            "rayrec_batch_size", "Requests ranked together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self._basket = Histogram(
            "rayrec_basket_value",
            "What the items of a cart cost, where a list was asked for it",
            buckets=(5, 10, 25, 50, 100, 250, 500, 1000),
            registry=self.registry,
        )
        self._age_s = Histogram(
            "rayrec_event_age_seconds",
            "How long ago stored events happened",
            buckets=(0.1, 1, 10, 60, 600, 3600, 86_400),
            registry=self.registry,
        )
        self._stage_s = Histogram(
            "rayrec_stage_seconds", "Time of a stage", ["stage"], buckets=BUCKETS_S, registry=self.registry
        )

    def serves(self, version: str) -> None:
        """Say which model is live."""
        if version != self._version:
            self._version = version
            self._model.clear()
            self._model.labels(version).set(1)

    def requested(self, route: str | None, status: int, took_s: float) -> None:
        """Count one request. route: its template, without ids; None if there is none. status: 0 if the client left."""
        self._requests.labels(route or "none", str(status) if status else "gone").inc()
        self._request_s.labels(route or "none").observe(took_s)

    def answered(self, answer: Answer, scene: str) -> None:
        """Count one list."""
        self._lists.labels(scene).inc()
        self._remembered.inc(answer.remembered)
        self._together.observe(answer.together)
        for source, n in answer.candidates.items():
            self._candidates.labels(source).inc(n)
        if answer.basket is not None:
            self._basket.observe(answer.basket)
        self._answers.labels(answer.served_by).inc()
        for what in answer.without:
            self._without.labels(what).inc()
        for reason, n in answer.removed.items():
            self._removed.labels(reason).inc(n)
        for stage, ms in answer.timing_ms.items():
            self._stage_s.labels(stage).observe(ms / 1000)

    def stored(self, answer: EventsAnswer, age_s: Iterable[float] = ()) -> None:
        """Count one body of events. age_s: of each that is new."""
        for age in age_s:
            self._age_s.observe(age)
        for outcome, n in (
            ("accepted", answer.accepted),
            ("duplicate", answer.duplicate),
            ("rejected", len(answer.rejected)),
            ("unknown_item", answer.unknown_item),
        ):
            self._events.labels(outcome).inc(n)

    def collect(self) -> Iterator[Metric]:
        """All of it, each series with the replica that counted it."""
        for family in self.registry.collect():
            own = {"serve_replica": self._replica_id}
            family.samples = [sample._replace(labels={**sample.labels, **own}) for sample in family.samples]
            yield family

    def text(self) -> str:
        """All of it, as Prometheus reads it."""
        return generate_latest(self).decode()


def together(texts: Sequence[str]) -> str:
    """What several replicas say as one text: the series of a metric stand behind one heading, as Prometheus asks."""
    families: dict[str, list[str]] = {}
    for text in texts:
        for family in re.split(r"^# HELP ", text, flags=re.MULTILINE)[1:]:
            explained, kind, *series = family.removesuffix("\n").split("\n")
            name = explained.partition(" ")[0]  # what explains it may differ, of replicas of another version
            families.setdefault(name, [f"# HELP {explained}", kind]).extend(series)
    return "".join(f"{line}\n" for lines in families.values() for line in lines)
