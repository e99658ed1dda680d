"""The OpenAPI document: valid, complete, served without a login, and true about telemetry."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from django.core.management import call_command
from django.test import Client
from rest_framework.test import APIClient

from aemos.openapi.telemetry import PATH
from tests import builders
from tests.test_api_rights import MATRIX, shape


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    answer = Client().get("/api/v1/schema", headers={"Accept": "application/json"})
    assert answer.status_code == 200
    parsed: dict[str, Any] = json.loads(answer.content)
    return parsed


def test_the_document_is_valid_and_made_without_a_warning() -> None:
    call_command("spectacular", "--fail-on-warn", "--validate", stdout=StringIO())


def test_every_endpoint_is_described(document: dict[str, Any]) -> None:
    described = {
        (
            method.upper(),
            "/".join("*" if part.startswith("{") else part for part in path.removeprefix("/api/v1/").split("/")),
        )
        for path, methods in document["paths"].items()
        for method in methods
    }
    wanted = {(method, shape(path)) for method, path, *_ in MATRIX}
    assert wanted <= described
    assert {("POST", "auth/login"), ("POST", "auth/refresh"), ("POST", "telemetry")} <= described


def test_names_are_camel_case_and_addresses_are_uuids(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        assert not [key for key in schema.get("properties", {}) if "_" in key], name
        assert "id" not in schema.get("properties", {}), name
    parameters = [
        parameter
        for methods in document["paths"].values()
        for operation in methods.values()
        for parameter in operation.get("parameters", [])
        if parameter["in"] == "path" and parameter["name"] != "username"
    ]
    assert parameters
    assert {parameter["schema"].get("format") for parameter in parameters} == {"uuid"}


def test_descriptions_speak_of_the_api_and_not_of_its_code(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    assert [word for word in ("Meta.", "clean()", "REST framework", "chains.compile") if word in text] == []


def test_everything_is_described(document: dict[str, Any]) -> None:
    """A new field, parameter, operation or tag without a word fails here: aemos/openapi/words.py is the place."""
    missing = [
        f"{name}.{field}"
        for name, schema in document["components"]["schemas"].items()
        for field, described in schema.get("properties", {}).items()
        if not described.get("description")
    ]
    operations = [
        (f"{method} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    for name, operation in operations:
        parameters = operation.get("parameters", [])
        missing += [f"{name}?{each['name']}" for each in parameters if not each.get("description")]
        missing += [] if operation.get("summary") else [name]
        missing += [
            f"{name} {status}" for status, each in operation["responses"].items() if each.get("description") is None
        ]
    assert missing == []
    tags = {tag for _, operation in operations for tag in operation["tags"]}
    assert tags == {tag["name"] for tag in document["tags"]}


def test_errors_are_declared_on_every_operation(document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            declared = {status for status in operation["responses"] if status >= "400"}
            assert declared >= ({"503"} if {} in operation.get("security", [{}]) else {"401", "503"}), (method, path)
            for status in declared - {"503"}:
                assert list(operation["responses"][status]["content"]) == ["application/problem+json"], (method, path)


def test_a_login_is_described_with_its_tokens(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    answers = {
        path: document["paths"][f"/api/v1/auth/{path}"]["post"]["responses"]["200"]["content"]["application/json"][
            "schema"
        ]
        for path in ("login", "refresh")
    }
    described = {path: set(schemas[answer["$ref"].rsplit("/", 1)[1]]["properties"]) for path, answer in answers.items()}
    assert described == {"login": {"access", "refresh"}, "refresh": {"access", "refresh"}}


def test_filters_are_described(document: dict[str, Any]) -> None:
    names = {parameter["name"] for parameter in document["paths"]["/api/v1/readings"]["get"]["parameters"]}
    assert names == {"from", "to", "sensor", "variable", "ordering", "format", "page", "pageSize"}


def test_telemetry_is_described_with_every_answer(document: dict[str, Any]) -> None:
    operation = document["paths"][PATH]["post"]
    assert operation["security"] == [{"deviceToken": []}]
    assert document["components"]["securitySchemes"]["deviceToken"]["scheme"] == "bearer"
    assert operation["responses"].keys() == {"202", "400", "401", "403", "413", "415", "429", "503"}
    assert "Retry-After" in operation["responses"]["503"]["headers"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("empty_redis")
@pytest.mark.parametrize(
    ("authorized", "body", "status"),
    [
        (True, {"values": {"ph": 6.1}}, "202"),
        (True, {"events": [{"values": {"ph": 6.1}}]}, "202"),
        (True, {"values": {"ph": "acid"}}, "400"),
        (False, {"values": {"ph": 6.1}}, "401"),
        (True, {"values": {"ph": 6.1}, "type": "critical-alarm"}, "403"),
        (True, {"events": [{"values": {"ph": 6.1}}] * 1_001}, "413"),
    ],
)
def test_telemetry_answers_as_it_is_described(
    document: dict[str, Any], authorized: bool, body: Any, status: str
) -> None:
    token = builders.token(builders.sensor(builders.organization()))
    headers = {"authorization": f"Bearer {token if authorized else 'nonsense'}"}
    answer = Client().post(PATH, json.dumps(body), content_type="application/json", headers=headers)
    assert str(answer.status_code) == status
    described = document["paths"][PATH]["post"]["responses"][status]["content"][answer.headers["Content-Type"]][
        "schema"
    ]
    jsonschema.validate(answer.json(), strict(described, document))


def strict(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """The described schema, in which no other key may appear; OpenAPI 3.0 says "nullable" where JSON Schema says null."""
    found: dict[str, Any] = json.loads(json.dumps(document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]))
    for described in found["properties"].values():
        if described.pop("nullable", False):
            described["type"] = [described["type"], "null"]
    return found | {"additionalProperties": False}


def test_the_documentation_is_served_from_this_installation() -> None:
    page = Client().get("/api/v1/docs")
    assert page.status_code == 200
    sources = [part.split('"')[0] for part in page.text.replace("'", '"').split('src="')[1:]]
    assert sources
    assert all(source.startswith(("/static/", "/api/v1/docs?")) for source in sources)
    assert "<script>" not in page.text  # the Content-Security-Policy would not let it run
    served: Any = Client().get(sources[0])
    assert served.status_code == 200
    assert b"".join(served.streaming_content)


@pytest.mark.django_db
def test_answers_of_the_api_are_as_described(document: dict[str, Any]) -> None:
    farm = builders.organization()
    client: Any = APIClient()
    client.force_authenticate(builders.member(farm))
    builders.device(farm)
    builders.switching_chain(builders.sensor(farm), builders.device(farm))
    for path, name in (("sensors", "Sensor"), ("device-states", "DeviceState"), ("rule-chains", "RuleChain")):
        row = client.get(f"/api/v1/{path}").json()["results"][0]
        assert row.keys() == document["components"]["schemas"][name]["properties"].keys()


def test_every_body_and_answer_has_an_example_that_is_one(document: dict[str, Any]) -> None:
    """As its schema says; bodies of no fields at all have the empty one."""
    contents = [
        (f"{method} {path} {status}", content)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        for status, each in [("body", operation.get("requestBody", {})), *operation["responses"].items()]
        for kind, content in each.get("content", {}).items()
        if "json" in kind and "ndjson" not in kind
    ]
    assert len(contents) > 400
    assert [name for name, content in contents if not {"example", "examples"} & content.keys()] == []
    problems = []
    for name, content in contents:
        examples = (
            [content["example"]] if "example" in content else [each["value"] for each in content["examples"].values()]
        )
        for example in examples:
            schema = {**_as_json_schema(content["schema"]), "components": _as_json_schema(document["components"])}
            error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(example))
            problems += [f"{name}: {error.json_path}: {error.message[:200]}"] if error else []
    assert problems == []


def _as_json_schema(schema: Any) -> Any:
    """OpenAPI 3.0 writes null in its own way, and formats are no matter of the form."""
    if isinstance(schema, list):
        return [_as_json_schema(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {
        name: _as_json_schema(value)
        for name, value in schema.items()
        if name not in ("nullable", "example", "discriminator")
    }
    return {"anyOf": [plain, {"type": "null"}]} if schema.get("nullable") is True else plain
