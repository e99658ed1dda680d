"""A doser as it should be: each command is done at most once, whenever its power is cut. Its pump is a file of doses.

What it has begun is on its disk before the pump starts. After a power cut it answers what it knows: done, or begun and perhaps
done in part, which it never repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from examples import connection

# More than can be under way at a time: a command is repeated until it is answered or its deadline has passed.
REMEMBERED_COMMANDS = 50
SESSION_SECONDS = 3600


class Ledger:
    """The newest commands with what became of each: begun, applied or failed. Survives a power cut at any moment."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._commands: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}

    def state_of(self, command_id: str) -> str | None:
        return self._commands.get(command_id)

    def note(self, command_id: str, state: str) -> None:
        """On the disk when it returns: written beside, then put in place as a whole."""
        self._commands[command_id] = state
        self._commands = dict(list(self._commands.items())[-REMEMBERED_COMMANDS:])
        beside = self._file.with_suffix(".new")
        with beside.open("w") as file:
            json.dump(self._commands, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._file)

    def newest(self) -> list[tuple[str, str]]:
        """Ids and states, the oldest first."""
        return list(self._commands.items())


class Doser:
    """Doses `value` units for each command to the state `name`."""

    def __init__(self, uuid: str, name: str, token: str, directory: Path, seconds: float) -> None:
        self._topic, self._name, self._seconds = f"devices/{uuid}", name, seconds
        self._ledger, self._pump = Ledger(directory / "ledger.json"), directory / "doses.txt"
        username = token.split("_")[1]
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=username, protocol=mqtt.MQTTv5)
        self.client.username_pw_set(username, token)
        self.client.will_set(f"{self._topic}/status", "offline", qos=1, retain=True)
        self.client.on_connect = self._on_connect
        self.client.on_message = self._on_message

    def _on_connect(self, client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            connection.say(f"not connected: {reason}; trying again")
            return
        # Answers may have been lost with the power: what is known already is passed over.
        for command_id, state in self._ledger.newest():
            if state == "begun":
                self._ledger.note(command_id, "failed")
            self._answer(command_id, "applied" if state == "applied" else "failed")
        # Not QoS 2: what is handed over in two steps is lost when the power is cut between them, since a library keeps it in its
        # memory. At least once and an id that is on the disk is once.
        client.subscribe(f"{self._topic}/commands", qos=1)
        client.publish(f"{self._topic}/status", "online", qos=1, retain=True)
        connection.say("online")

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        command = json.loads(message.payload)
        data = command["data"]
        if data["stateName"] != self._name:
            return
        if known := self._ledger.state_of(command["id"]):
            self._answer(command["id"], known)  # it comes again because the answer was lost
            return
        if datetime.now(UTC) > datetime.fromisoformat(data["deadline"]):
            connection.say(f"too late for {data['value']}")
            return
        self._ledger.note(command["id"], "begun")
        self._answer(command["id"], "acknowledged")
        self._dose(command["id"], data["value"])
        self._ledger.note(command["id"], "applied")
        self._answer(command["id"], "applied")
        connection.say(f"dosed {data['value']}")

    def _dose(self, command_id: str, amount: float) -> None:
        with self._pump.open("a") as pump:
            pump.write(f"{command_id} {amount}\n")
        time.sleep(self._seconds)

    def _answer(self, command_id: str, status: str) -> None:
        error = {"error": "the power was cut while dosing"} if status == "failed" else {}
        body = {"id": command_id, "status": status, **error}
        self.client.publish(f"{self._topic}/commands/ack", json.dumps(body), qos=1)


def main() -> None:
    description = "Be a doser with a momentary state, whose power may be cut at any moment."
    parser = argparse.ArgumentParser(description=description)
    host, port = connection.mqtt_address()
    parser.add_argument("--uuid", required=True, help="of the device")
    parser.add_argument("--state", default="dose", help="name of its momentary state (default: %(default)s)")
    parser.add_argument("--directory", type=Path, default=Path(), help="for its ledger and its doses (default: here)")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long a dose takes (default: %(default)s)")
    parser.add_argument("--host", default=host, help="broker (default: %(default)s)")
    parser.add_argument("--port", type=int, default=port, help="port of the broker (default: %(default)s)")
    options = parser.parse_args()
    token = os.environ.get("DEVICE_TOKEN") or parser.error("put the device's token into the environment: DEVICE_TOKEN")
    doser = Doser(options.uuid, options.state, token, options.directory, options.seconds)
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = SESSION_SECONDS
    doser.client.connect_async(options.host, options.port, clean_start=False, properties=properties)
    doser.client.loop_forever(retry_first_connection=True)


if __name__ == "__main__":
    main()
