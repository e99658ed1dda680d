"""People and sensors as clients of a running system."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import aiocoap
import paho.mqtt.client as mqtt
import requests
from paho.mqtt.enums import CallbackAPIVersion

from deploy.local import LocalSystem

ANSWER_SECONDS = 15.0
# For how long a sensor that is refused with 503 or 5.03 comes again, as it is asked to. A machine whose disk is slow for a second
# makes Redis slow, too, and the right answer is then a refusal.
PATIENCE_SECONDS = 120.0


class Person:
    """Somebody logged in over REST: the demo's admin."""

    def __init__(self, system: LocalSystem) -> None:
        self._system = system

    @cached_property
    def token(self) -> str:
        """An access token."""
        login = self._system.farm["admin"]
        answer = requests.post(f"{self._system.web}/api/v1/auth/login", json=login, timeout=ANSWER_SECONDS)
        assert answer.status_code == 200, answer.text
        token: str = answer.json()["access"]
        return token

    def get(self, path: str, **query: str) -> dict[str, Any]:
        return self._ask("GET", path, params=query)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        return self._ask("POST", path, json=body)

    def patch(self, path: str, **body: Any) -> dict[str, Any]:
        return self._ask("PATCH", path, json=body)

    def switch(self, device: dict[str, str], state: str, value: str) -> dict[str, Any]:
        """The change that came of it."""
        return self.post("device-state-instances", deviceUuid=device["uuid"], stateName=state, value=value)

    def _ask(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}"}
        url = f"{self._system.web}/api/v1/{path}"
        answer = requests.request(method, url, headers=headers, timeout=ANSWER_SECONDS, **arguments)
        assert answer.ok, answer.text
        found: dict[str, Any] = answer.json()
        return found


def reading(**values: float) -> dict[str, Any]:
    """Of now; by its time it is known when it comes twice."""
    return {"values": values, "timestamp": datetime.now(UTC).isoformat()}


def http_post(
    system: LocalSystem, sensor: dict[str, str], body: dict[str, Any], *, patience: float = PATIENCE_SECONDS
) -> requests.Response:
    headers = {"Authorization": f"Bearer {sensor['token']}"}
    until = time.monotonic() + patience
    while True:
        answer = requests.post(f"{system.web}/api/v1/telemetry", json=body, headers=headers, timeout=30)
        if answer.status_code != 503 or time.monotonic() > until:
            return answer
        time.sleep(answer.json()["retryAfter"])


def mqtt_publish(system: LocalSystem, sensor: dict[str, str], body: dict[str, Any]) -> None:
    client = mqtt_client(system, sensor)
    topic = f"devices/{sensor['uuid']}/datastream"
    publication = client.publish(topic, json.dumps(body), qos=1)
    publication.wait_for_publish(ANSWER_SECONDS)
    assert publication.is_published(), "the broker did not acknowledge the message"
    client.disconnect()
    client.loop_stop()


def mqtt_grants(system: LocalSystem, speaker: dict[str, str], topic: str) -> bool:
    """Whether the broker lets the speaker subscribe the topic."""
    reasons: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client = mqtt_client(system, speaker)
    client.on_subscribe = lambda _client, _data, _mid, found, _properties: reasons.put(found)
    client.subscribe(topic, qos=1)
    granted = not reasons.get(timeout=ANSWER_SECONDS)[0].is_failure
    client.disconnect()
    client.loop_stop()
    return granted


def coap_post(system: LocalSystem, sensor: dict[str, str], body: dict[str, Any]) -> tuple[str, str]:
    """Code and diagnostic payload."""
    path, content = f"/devices/{sensor['uuid']}/datastream", json.dumps(body).encode()
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        code, text = asyncio.run(_coap(system, path, sensor["token"], code=aiocoap.POST, payload=content))
        if code != "5.03" or time.monotonic() > until:
            return code, text
        time.sleep(1)


def coap_get(system: LocalSystem, path: str, *, token: str) -> str:
    """The code of the answer to who wants to observe it."""
    return asyncio.run(_coap(system, path, token, code=aiocoap.GET, observe=0))[0]


async def _coap(system: LocalSystem, path: str, token: str, **fields: Any) -> tuple[str, str]:
    context = await aiocoap.Context.create_client_context()
    message = aiocoap.Message(uri=f"coap://{system.coap}{path}?token={token}", **fields)
    answer = await context.request(message, handle_blockwise="observe" not in fields).response
    await context.shutdown()
    return str(answer.code).split()[0], answer.payload.decode()


def coap_ask(
    system: LocalSystem, method: str, path: str, speaker: dict[str, str], body: Any = None
) -> tuple[str, dict[str, Any]]:
    """Code, and the document that came."""
    content = {"payload": json.dumps(body).encode()} if body is not None else {}
    code, text = asyncio.run(_coap(system, path, speaker["token"], code=getattr(aiocoap, method), **content))
    return code, json.loads(text) if text.startswith("{") else {}


def mqtt_client(
    system: LocalSystem,
    speaker: dict[str, str],
    *,
    will: tuple[str, str] | None = None,
    patience: float = ANSWER_SECONDS,
    comes_back: bool = True,
) -> mqtt.Client:
    """A connected client with the credentials that a device token gives. A `client_id` of the speaker is a wrong one."""
    connected = threading.Event()
    username = speaker["token"].split("_")[1]
    client = mqtt.Client(
        CallbackAPIVersion.VERSION2, client_id=speaker.get("client_id", username), reconnect_on_failure=comes_back
    )
    if will:
        client.will_set(*will, qos=1, retain=True)
    client.username_pw_set(username, speaker["token"])
    client.on_connect = lambda client, data, flags, reason, properties: None if reason.is_failure else connected.set()
    client.connect("127.0.0.1", system.broker.port)
    client.loop_start()
    assert connected.wait(patience), "the broker does not know the device"
    return client
