"""Clients that two generators make of the OpenAPI document, used against a running server: the document says what is so."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from drf_spectacular.generators import SchemaGenerator
from pytest_django.live_server_helper import LiveServer

from tests import builders

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("empty_redis"),
    # What generators write is not ours to mend.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]
PASSWORD = "tomatoes-are-red"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator: Any = SchemaGenerator
    file = tmp_path_factory.mktemp("document") / "openapi.json"
    file.write_text(json.dumps(generator().get_schema(request=None, public=True), default=str))
    return file


@pytest.fixture
def root(live_server: LiveServer) -> User:
    return builders.user("root", password=PASSWORD, is_superuser=True)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def beside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("NO_PROXY", "*")


def test_a_client_of_openapi_python_client(
    document: Path,
    live_server: LiveServer,
    root: User,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    program = Path(sys.executable).parent / "openapi-python-client"
    said = run(
        str(program), "generate", "--path", str(document), "--meta", "none", "--output-path", str(tmp_path / "made")
    )
    assert "unexpected" not in said.lower()
    beside(tmp_path, monkeypatch)
    made = importlib.import_module("made")
    models: Any = importlib.import_module("made.models")

    def call(tag: str, operation: str) -> Callable[..., Any]:
        found: Callable[..., Any] = importlib.import_module(f"made.api.{tag}.{operation}").sync
        return found

    kept = ExitStack()  # clients are closed at its end
    request.addfinalizer(kept.close)
    stranger = kept.enter_context(made.Client(base_url=live_server.url))
    login = call("auth", "auth_login_create")
    refused = login(client=stranger, body=models.LoginRequest(username="root", password="wrong"))
    assert (refused.status, refused.code) == (401, "no-active-account")
    access = login(client=stranger, body=models.LoginRequest(username="root", password=PASSWORD)).access
    person = kept.enter_context(made.AuthenticatedClient(base_url=live_server.url, token=access))
    farm = call("organizations", "organizations_create")(client=person, body=models.OrganizationRequest(name="Basil"))
    sensor = call("sensors", "sensors_create")(
        client=person, body=models.SensorRequest(organization=farm.uuid, name="Tank 1")
    )
    again = call("sensors", "sensors_create")(
        client=person, body=models.SensorRequest(organization=farm.uuid, name="Tank 1")
    )
    assert (again.status, again.errors[0].field) == (400, "name")
    call("variables", "variables_create")(client=person, body=models.VariableRequest(sensor=sensor.uuid, name="ph"))
    token = call("device_tokens", "device_tokens_create")(
        client=person, body=models.DeviceTokenRequest(sensor=sensor.uuid)
    ).token
    board = kept.enter_context(made.AuthenticatedClient(base_url=live_server.url, token=token))
    values = models.TelemetryEventValues.from_dict({"ph": 6.1})
    receipt = call("telemetry", "telemetry_create")(client=board, body=models.TelemetryEvent(values=values))
    assert (receipt.accepted, receipt.rejected) == (1, 0)
    listed = call("sensors", "sensors_list")(client=person)
    assert [each.name for each in listed.results] == ["Tank 1"]


@pytest.mark.skipif(shutil.which("java") is None, reason="openapi-generator runs on Java")
def test_a_client_of_openapi_generator(
    document: Path, live_server: LiveServer, root: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openapi_generator_cli

    jar = next(Path(openapi_generator_cli.__file__).parent.glob("*.jar"))
    run("java", "-jar", str(jar), "validate", "--input-spec", str(document))
    options = ("--generator-name", "python", "--additional-properties", "packageName=made_by_java")
    run("java", "-jar", str(jar), "generate", "--input-spec", str(document), "--output", str(tmp_path), *options)
    beside(tmp_path, monkeypatch)
    api: Any = importlib.import_module("made_by_java")
    configuration = api.Configuration(host=live_server.url)
    with api.ApiClient(configuration) as client:
        login = api.LoginRequest(username="root", password=PASSWORD)
        configuration.access_token = api.AuthApi(client).auth_login_create(login).access
        farm = api.OrganizationsApi(client).organizations_create(api.OrganizationRequest(name="Basil"))
        wanted = api.SensorRequest(organization=farm.uuid, name="Tank 1")
        sensor = api.SensorsApi(client).sensors_create(wanted)
        assert api.SensorsApi(client).sensors_retrieve(sensor.uuid).name == "Tank 1"
        with pytest.raises(api.exceptions.BadRequestException) as refusal:
            api.SensorsApi(client).sensors_create(wanted)
        assert refusal.value.data.errors[0].var_field == "name"
