"""Sends one reading over MQTT, as a sensor would; ends when the broker has passed it on and the gateway has kept it."""

from __future__ import annotations

import json
import sys
import threading
from datetime import UTC, datetime
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from examples import connection

WAIT_SECONDS = 10


def main() -> None:
    parser = connection.parser("Publish one reading of the first demo sensor to devices/<uuid>/datastream with QoS 1.")
    host, port = connection.mqtt_address()
    parser.add_argument("--host", default=host, help="broker (default: %(default)s)")
    parser.add_argument("--port", type=int, default=port, help="port of the broker (default: %(default)s)")
    parser.add_argument("--variable", default="ph", help="what was measured (default: %(default)s)")
    parser.add_argument("--value", type=float, default=6.8, help="the reading (default: %(default)s)")
    options = parser.parse_args()
    sensor = connection.farm(options)["sensors"][0]
    body = {"values": {options.variable: options.value}, "timestamp": datetime.now(UTC).isoformat()}
    topic = f"devices/{sensor['uuid']}/datastream"
    _publish(options.host, options.port, token=sensor["token"], topic=topic, body=body)
    connection.say(f"published on {topic}: {options.variable} = {options.value}")


def _publish(host: str, port: int, *, token: str, topic: str, body: dict[str, Any]) -> None:
    connected, refused = threading.Event(), []

    def on_connect(_client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        refused.extend([reason] if reason.is_failure else [])
        connected.set()

    username = token.split("_")[1]
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=username)
    client.username_pw_set(username, token)
    client.on_connect = on_connect
    try:
        client.connect(host, port)
    except OSError as error:
        sys.exit(f"The broker at {host}:{port} cannot be reached: {error}.")
    client.loop_start()
    if not connected.wait(WAIT_SECONDS) or refused:
        sys.exit(f"The broker does not let us in: {refused or 'no answer'}.")
    client.publish(topic, json.dumps(body), qos=1).wait_for_publish(WAIT_SECONDS)
    client.disconnect()
    client.loop_stop()


if __name__ == "__main__":
    main()
