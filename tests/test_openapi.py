"""What OpenAPI promises is what is answered: requests made up from the document, good and bad, on every route."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.generation import GenerationMode
from schemathesis.python.asgi import shutdown_lifespans
from schemathesis.specs.openapi import checks
from shopfake import FakeScorer

from rayrec.serving.web import create_app
from rayrec.state import open_state

BASE = "http://127.0.0.1:8000"
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
JUDGED_ONE_BY_ONE = "/v1/events"
"""Its answer tells of each bad event, and is a 200."""


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.BaseSchema]:
    """The API of an application with a picture, which takes edits, and the application to ask."""
    state = open_state(f"sqlite:///{tmp_path_factory.mktemp('openapi')}/state.db")
    app = create_app(
        *(FakeScorer(), state),
        image_of=lambda index: (b"\xff\xd8picture", "image/jpeg") if index == 1 else None,
        edit=lambda scorer, edits, pictures: (scorer, np.empty(0, np.int64)),
    )
    document = schemathesis.openapi.from_dict(app.openapi(), config=SchemathesisConfig())
    document.app = app
    yield document
    shutdown_lifespans()


def hold(operation: schemathesis.APIOperation, mode: GenerationMode, examples: int, *, same: bool) -> None:
    """Ask one route for `examples` answers, and hold them against the document. same: as last time."""
    if mode.is_negative and not (operation.body or list(operation.iter_parameters())):
        return  # it takes nothing that could be wrong
    judged = mode.is_negative and operation.path != JUDGED_ONE_BY_ONE
    to_hold = [*CHECKS, checks.negative_data_rejection] if judged else CHECKS

    @settings(max_examples=examples, derandomize=same, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(mode))
    def holds(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=BASE, checks=to_hold)

    holds()


@pytest.mark.parametrize("mode", GenerationMode)
def test_answers_are_as_documented(document: schemathesis.BaseSchema, mode: GenerationMode) -> None:
    for found in document.get_all_operations():
        hold(found.ok(), mode, 12, same=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
def test_thousands_of_answers_are_as_documented(document: schemathesis.BaseSchema, mode: GenerationMode) -> None:
    for found in document.get_all_operations():
        hold(found.ok(), mode, 300, same=False)
