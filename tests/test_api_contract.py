"""Schemathesis sends what the OpenAPI document describes, and what it forbids, to every operation: the answers are as declared.

The same requests in every run. The rows of a farm stand in for the uuids of paths and bodies, so that they find something.
"""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from django.conf import LazySettings
from drf_spectacular.generators import SchemaGenerator
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode

from aemos.wsgi import application
from devices.people.jwt import RefreshToken
from tests.test_api_rights import make_farm

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]
EXAMPLES = 15
# One of two parameters is needed; a parameter names rows: which no schema says.
ASK_FOR_ROWS = ("/api/v1/readings", "/api/v1/sensors/{uuid}/history", "/api/v1/areas/{uuid}/history")
# Path parameters whose row is known by the collection that they belong to.
ROWS = {
    "organizations": "organization", "memberships": "organization", "sensors": "sensor", "variables": "variable",
    "devices": "device", "device-states": "state", "interlocks": "interlock", "interlock-requirements": "requirement",
    "vetoes": "veto", "device-tokens": "token", "data-problems": "problem", "state-changes": "change",
    "rule-chains": "chain", "alarms": "alarm", "rejected-events": "rejected", "dead-letters": "dead", "replays": "replay",
    "notifications": "notification", "invitations": "invitation",
    "audit-log": "entry", "areas": "area",
}  # fmt: skip
# Fields of bodies that name a row, which no schema can say.
FIELDS = ("organization", "area", "parent", "sensor", "variable", "device", "state", "interlock")


def contract() -> Any:
    generator: Any = SchemaGenerator
    found: Any = schemathesis.openapi.from_dict(generator().get_schema(request=None, public=True))
    found.app = application
    found.config.generation.update(allow_x00=False)  # refused by name everywhere, which no schema says
    return found


API = contract()
OPERATIONS = [(path, method) for path, methods in API.raw_schema["paths"].items() for method in methods]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_answer_is_as_declared(path: str, method: str, mode: GenerationMode, settings: LazySettings) -> None:
    settings.AEMOS_ENV = "staging"  # in tests, health and metrics are open to everybody
    farm = make_farm()
    token = RefreshToken.for_user(farm.people["superuser"]).access_token
    # What a body means beside its form is for the other tests: names that are taken, rows that do not fit together.
    excluded = [] if method == "get" and path not in ASK_FOR_ROWS else CHECKS.get_by_names(["positive_data_acceptance"])

    @given(case=API[path][method].as_strategy(generation_mode=mode))
    @bounded
    def ask(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            fill_in(case, farm.names)
        case.call_and_validate(headers={"Authorization": f"Bearer {token}"}, excluded_checks=excluded)

    try:
        ask()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # an operation without parameters and body forbids nothing


bounded = settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def fill_in(case: Any, names: dict[str, Any]) -> None:
    parameters = case.path_parameters or {}
    collection = case.path.removeprefix("/api/v1/").split("/")[0]
    of_chain = "node" if "chain_uuid" in parameters else ROWS.get(collection)
    for name in parameters:
        row = {"username": "person", "chain_uuid": "chain"}.get(name, of_chain)
        if row:
            parameters[name] = names[row]
    if isinstance(case.body, dict):
        case.body |= {field: names[field] for field in FIELDS if field in case.body}
