"""A whole device over MQTT: says that it is online, obeys each command once and answers, reports; its last will is offline."""

from __future__ import annotations

import json
from collections import deque
from datetime import UTC, datetime
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from examples import connection

SESSION_SECONDS = 24 * 3600
REMEMBERED_COMMANDS = 100


class Device:
    """Obeys commands; keeps the ids of the last ones, because each may come more than once."""

    def __init__(self, uuid: str, name: str, token: str) -> None:
        self._topic = f"devices/{uuid}"
        self._name = name
        self._known: deque[str] = deque(maxlen=REMEMBERED_COMMANDS)
        # The client id is the user name; with a session that lasts the broker keeps commands for it while it is away.
        username = token.split("_")[1]
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=username, protocol=mqtt.MQTTv5)
        self.client.username_pw_set(username, token)
        self.client.will_set(f"{self._topic}/status", "offline", qos=1, retain=True)
        self.client.on_connect = self._on_connect
        self.client.on_message = self._on_message

    def _on_connect(self, client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            connection.say(f"not connected as {self._name}: {reason}; trying again")
            return
        client.subscribe(f"{self._topic}/commands", qos=2)
        client.publish(f"{self._topic}/status", "online", qos=1, retain=True)
        connection.say(f"online as {self._name}")

    def _on_message(self, client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        command = json.loads(message.payload)
        data = command["data"]
        if command["id"] not in self._known:
            if datetime.now(UTC) > datetime.fromisoformat(data["deadline"]):
                connection.say(f"too late: {data['stateName']} = {data['value']}")
                return
            self._answer(command["id"], "acknowledged")
            self._known.append(command["id"])
            connection.say(f"obeyed: {self._name}: {data['stateName']} = {data['value']}")
        self._answer(command["id"], "applied")
        client.publish(f"{self._topic}/datastream", json.dumps({"values": {data["stateName"]: data["value"]}}), qos=1)

    def _answer(self, command_id: str, status: str) -> None:
        self.client.publish(f"{self._topic}/commands/ack", json.dumps({"id": command_id, "status": status}), qos=1)

    def goodbye(self) -> None:
        """Who leaves in order says so itself: the broker then forgets the last will."""
        self.client.loop_start()
        self.client.publish(f"{self._topic}/status", "offline", qos=1, retain=True).wait_for_publish(2)
        self.client.disconnect()
        self.client.loop_stop()


def main() -> None:
    parser = connection.parser("Be the demo's first device: obey commands, answer them, report the state.")
    host, port = connection.mqtt_address()
    parser.add_argument("--host", default=host, help="broker (default: %(default)s)")
    parser.add_argument("--port", type=int, default=port, help="port of the broker (default: %(default)s)")
    options = parser.parse_args()
    own = connection.farm(options)["devices"][0]
    device = Device(own["uuid"], own["name"], own["token"])
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = SESSION_SECONDS
    device.client.connect_async(options.host, options.port, clean_start=False, properties=properties)
    try:
        device.client.loop_forever(retry_first_connection=True)
    except KeyboardInterrupt:
        device.goodbye()


if __name__ == "__main__":
    main()
