"""Listens to an organization over Socket.IO: logs in as a person, prints every message, also those of the time it was away."""

from __future__ import annotations

import sys
from typing import Any

import requests
import socketio

from examples import connection

EVENTS = ("device-state-change", "device-status", "alert", "notification")


class Listener:
    """What was seen last. Access tokens run out, so every connection logs in again, and goes on from there."""

    def __init__(self, web: str, login: dict[str, str]) -> None:
        self._web = web
        self._login = login
        self._position = ""

    def client(self) -> socketio.Client:
        """A client for one connection.

        The library's own reconnection would send the first token again, which has run out by then. And a client whose
        connection drops during the handshake may report that it is connected, and never reconnect.
        """
        client = socketio.Client(reconnection=False)
        for event in EVENTS:
            client.on(event, self.printer(event))
        client.on("position", self.reached)
        client.on("gap", self.gap)
        client.on("snapshot", self.snapshot)
        return client

    def auth(self) -> dict[str, str]:
        answer = requests.post(f"{self._web}/api/v1/auth/login", json=self._login, timeout=5)
        answer.raise_for_status()
        token: str = answer.json()["access"]
        return {"token": token, **({"position": self._position} if self._position else {})}

    def reached(self, told: dict[str, Any]) -> None:
        """The library runs a thread for each message, so a later one may be handled first."""
        self._position = max(self._position, told["position"], key=_parts)

    def gap(self, gap: dict[str, Any]) -> None:
        connection.say(
            f"messages between {gap['from']} and {gap['to']} are not kept any more; these are the states now:"
        )

    def snapshot(self, snapshot: dict[str, Any]) -> None:
        for state in snapshot["states"]:
            connection.say(f"state: {state['deviceName']}: {state['stateName']} = {state['value']}")

    def printer(self, event: str) -> Any:
        def show(message: dict[str, Any]) -> None:
            self.reached(message)
            connection.say(f"received on socket: {event}: {connection.in_words(message)}")

        return show


def main() -> None:
    parser = connection.parser("Log in over REST, connect to the gateway over Socket.IO and print what arrives.")
    parser.add_argument("--web", default=connection.web_url(), help="AEMOS web address (default: %(default)s)")
    parser.add_argument("--gateway", default=connection.socketio_url(), help="Socket.IO address (default: %(default)s)")
    options = parser.parse_args()
    listener = Listener(options.web, connection.farm(options)["admin"])
    while True:
        client = listener.client()
        try:
            client.connect(options.gateway, auth=listener.auth())
        except (socketio.exceptions.ConnectionError, requests.RequestException) as error:
            connection.say(f"not connected: {error}; trying again in 2 s")
            client.sleep(2)
            continue
        connection.say(f"listening on {options.gateway}")
        client.wait()


def _parts(position: str) -> list[int]:
    return [int(part) for part in position.split("-")] if position else []


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(0)
