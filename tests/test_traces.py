"""Traces: a reading's way through every process, told to a receiver of OpenTelemetry's protocol; and nothing without one."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
import requests
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from aemos.lib import tracing
from deploy.local import LocalSystem, local_system
from tests import listeners, otlp
from tests.otlp import Receiver
from tests.system_clients import coap_ask, reading
from tests.waiting import until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with otlp.receiving() as made:
        yield made


@pytest.fixture(scope="module")
def system(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    folder = tmp_path_factory.mktemp("traced")
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_TRACES_SAMPLER_ARG": "0"}
    with local_system(folder, **settings) as running:
        running.start()
        yield running


KNOWN: set[str] = set()  # of all tests here: spans of one may still come in another


def traceparent(*, sampled: bool = True) -> tuple[str, str]:
    """A new one, and its trace's id."""
    trace_id = secrets.token_hex(16)
    KNOWN.add(trace_id)
    return f"00-{trace_id}-{secrets.token_hex(8)}-{'01' if sampled else '00'}", trace_id


def publish(system: LocalSystem, sensor: dict[str, str], body: dict[str, object], parent: str) -> None:
    """With the traceparent as a user property of MQTT 5, by a client that others wrote."""
    username = sensor["token"].split("_")[1]
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=username, protocol=mqtt.MQTTv5)
    client.username_pw_set(username, sensor["token"])
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.UserProperty = [("board", "esp32"), ("traceparent", parent)]
    client.reconnect_delay_set(1, 1)
    client.connect("127.0.0.1", system.broker.port)
    client.loop_start()
    until(client.is_connected, seconds=40)  # the broker may not know a new farm yet
    topic = f"devices/{sensor['uuid']}/datastream"
    client.publish(topic, json.dumps(body), qos=1, properties=properties).wait_for_publish(10)
    client.disconnect()
    client.loop_stop()


def test_one_reading_is_followed_from_mqtt_to_coap(system: LocalSystem, receiver: Receiver) -> None:
    sensor, pump = system.farm["sensors"][0], system.farm["devices"][0]
    with ExitStack() as stack:
        observer = listeners.aiocoap_observer(system, pump, stack)
        until(observer.heard)
        before = len(observer.heard())
        for ph in (6.0, 6.9):  # the second switches the pump, whatever it was
            parent, trace_id = traceparent()
            publish(system, sensor, reading(ph=ph), parent)
            until(lambda trace_id=trace_id: any(span.name == "process" for span in receiver.of(trace_id)))  # type: ignore[misc]
        until(lambda: sum(span.name.startswith("deliver") for span in receiver.of(trace_id)) == 3)
        until(lambda: len(observer.heard()) > before)
    spans = receiver.of(trace_id)
    print(otlp.as_text(spans))
    names = {span.name: span for span in spans}
    chains = [span for span in spans if span.name == "rule chain"]
    assert len(chains) >= 2
    assert set(names) == {
        "receive", "queue", "process", "rule chain", "deliver socketio", "deliver mqtt", "deliver coap"
    }  # fmt: skip
    assert names["receive"].parent_id == parent.split("-")[2]
    assert {names["queue"].parent_id, names["process"].parent_id} == {names["receive"].span_id}
    assert {span.parent_id for span in spans if "deliver" in span.name} == {names["process"].span_id}
    assert {span.service for span in spans} == {"aemos-gateway", "aemos-worker"}
    assert all(0 <= span.milliseconds < 10_000 for span in spans)


def test_http_and_coap_take_a_traceparent_too(system: LocalSystem, receiver: Receiver) -> None:
    sensor = system.farm["sensors"][1]
    parent, over_http = traceparent()
    headers = {"Authorization": f"Bearer {sensor['token']}", "traceparent": parent}
    answer = requests.post(f"{system.web}/api/v1/telemetry", json=reading(ph=6.4), headers=headers, timeout=10)
    assert answer.status_code == 202
    until(lambda: {span.service for span in receiver.of(over_http)} == {"aemos-web", "aemos-worker"})
    parent, over_coap = traceparent()
    path = f"/devices/{sensor['uuid']}/datastream"
    told = {**sensor, "token": f"{sensor['token']}&traceparent={parent}"}
    assert coap_ask(system, "POST", path, told, reading(ph=6.5))[0] == "2.04"
    until(lambda: {span.service for span in receiver.of(over_coap)} == {"aemos-gateway", "aemos-worker"})


def test_what_is_not_sampled_or_no_traceparent_makes_no_spans(system: LocalSystem, receiver: Receiver) -> None:
    sensor = system.farm["sensors"][1]
    unsampled, never = traceparent(sampled=False)
    for parent in (
        unsampled,
        "",
        "00-zz",
        "\N{SNOWMAN}".encode().decode("latin-1"),
        "00-" + "0" * 32 + "-" + "0" * 16 + "-01",
    ):
        headers = {"Authorization": f"Bearer {sensor['token']}", "traceparent": parent}
        answer = requests.post(f"{system.web}/api/v1/telemetry", json=reading(ph=6.4), headers=headers, timeout=10)
        assert answer.status_code == 202
    parent, trace_id = traceparent()
    headers = {"Authorization": f"Bearer {sensor['token']}", "traceparent": parent}
    requests.post(f"{system.web}/api/v1/telemetry", json=reading(ph=6.4), headers=headers, timeout=10)
    until(lambda: any(span.name == "process" for span in receiver.of(trace_id)))
    assert {span.trace_id for span in receiver.spans} <= KNOWN - {never}


def test_a_refusal_ends_its_span_with_the_reason(system: LocalSystem, receiver: Receiver) -> None:
    sensor = system.farm["sensors"][1]
    system.manage("circuit", "open", "--note", "tried")
    try:
        until(lambda: "OPEN" in system.manage("circuit", "status").stdout)
        parent, trace_id = traceparent()
        headers = {"Authorization": f"Bearer {sensor['token']}", "traceparent": parent}

        def refused() -> bool:
            url = f"{system.web}/api/v1/telemetry"
            return requests.post(url, json=reading(ph=6.4), headers=headers, timeout=10).status_code == 503

        until(refused)
        until(lambda: [span for span in receiver.of(trace_id) if span.name == "receive"])
    finally:
        system.manage("circuit", "close")


def test_without_an_exporter_nothing_of_it_is_even_imported(tmp_path: Path) -> None:
    code = (
        "import django, sys; django.setup(); from rules import ingest, jobs; from gateway import dispatcher;"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk.trace', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=_plain(tmp_path)
    )
    assert done.stdout.strip() == "[]"
    assert not tracing.is_on()


def _plain(folder: Path) -> dict[str, str]:
    return {"DJANGO_SETTINGS_MODULE": "aemos.settings", "AEMOS_ENV": "test", "VAR_DIR": str(folder), "PATH": ""}
