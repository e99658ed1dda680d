"""Listens over MQTT as the demo's pump and fan would: each logs in with its own token and prints its state topic."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from examples import connection


def main() -> None:
    parser = connection.parser("Subscribe to devices/<uuid>/state of every demo device and print what arrives.")
    host, port = connection.mqtt_address()
    parser.add_argument("--host", default=host, help="broker (default: %(default)s)")
    parser.add_argument("--port", type=int, default=port, help="port of the broker (default: %(default)s)")
    options = parser.parse_args()
    clients = [_connect(device, options.host, options.port) for device in connection.farm(options)["devices"]]
    for client in clients[1:]:
        client.loop_start()
    clients[0].loop_forever(retry_first_connection=True)


def _connect(device: dict[str, str], host: str, port: int) -> mqtt.Client:
    """The user name is the middle part of a token, the password the whole of it."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"example-{device['uuid']}", userdata=device)
    client.username_pw_set(device["token"].split("_")[1], device["token"])
    client.on_connect = _subscribe
    client.on_message = _show
    client.connect_async(host, port)
    return client


def _subscribe(client: mqtt.Client, device: dict[str, str], _flags: Any, reason: Any, _properties: Any) -> None:
    if reason.is_failure:
        connection.say(f"not connected as {device['name']}: {reason}; trying again")
        return
    connection.say(f"listening on devices/{device['uuid']}/state as {device['name']}")
    client.subscribe(f"devices/{device['uuid']}/state", qos=1)


def _show(_client: mqtt.Client, device: dict[str, str], message: mqtt.MQTTMessage) -> None:
    data = json.loads(message.payload)["data"]
    connection.say(f"received on mqtt: {message.topic}: {device['name']}: {data['stateName']} = {data['value']}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
