"""Listens over MQTT as the demo's pump and fan would: each logs in with its own token and prints what it is told."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from examples import connection


def main() -> None:
    parser = connection.parser(
        "Subscribe to the state of every demo device and to its farm's broadcast; print what arrives."
    )
    host, port = connection.mqtt_address()
    parser.add_argument("--host", default=host, help="broker (default: %(default)s)")
    parser.add_argument("--port", type=int, default=port, help="port of the broker (default: %(default)s)")
    options = parser.parse_args()
    farm = connection.farm(options)
    devices = [{**device, "broadcast": f"organizations/{farm['organization']}/broadcast"} for device in farm["devices"]]
    clients = [_connect(device, options.host, options.port) for device in devices]
    for client in clients[1:]:
        client.loop_start()
    clients[0].loop_forever(retry_first_connection=True)


def _connect(device: dict[str, str], host: str, port: int) -> mqtt.Client:
    """The user name is the middle part of a token and the client id, too; the password is the whole token."""
    username = device["listenerToken"].split("_")[1]
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=username, userdata=device)
    client.username_pw_set(username, device["listenerToken"])
    client.on_connect = _subscribe
    client.on_message = _show
    client.connect_async(host, port)
    return client


def _subscribe(client: mqtt.Client, device: dict[str, str], _flags: Any, reason: Any, _properties: Any) -> None:
    if reason.is_failure:
        # The broker knows a new device within five seconds, so this is no fault yet.
        connection.say(f"waiting for the broker to know {device['name']} ({reason}); trying again")
        return
    client.subscribe([(f"devices/{device['uuid']}/state", 1), (device["broadcast"], 1)])
    connection.say(f"listening on devices/{device['uuid']}/state as {device['name']}")


def _show(_client: mqtt.Client, device: dict[str, str], message: mqtt.MQTTMessage) -> None:
    what = connection.in_words(json.loads(message.payload))
    connection.say(f"received on mqtt: {message.topic} as {device['name']}: {what}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
