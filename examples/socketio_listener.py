"""Listens to an organization over Socket.IO: logs in as a person, prints every message."""

from __future__ import annotations

import sys
from typing import Any

import requests
import socketio

from examples import connection

EVENTS = ("device-state-change", "alert", "notification")


def main() -> None:
    parser = connection.parser("Log in over REST, connect to the gateway over Socket.IO and print what arrives.")
    parser.add_argument("--web", default=connection.web_url(), help="AEMOS web address (default: %(default)s)")
    parser.add_argument("--gateway", default=connection.socketio_url(), help="Socket.IO address (default: %(default)s)")
    options = parser.parse_args()
    login = connection.farm(options)["admin"]
    client = socketio.Client()
    for event in EVENTS:
        client.on(event, _printer(event))
    # Access tokens run out; the client logs in again for every connection that it makes.
    while True:
        try:
            client.connect(options.gateway, auth={"token": _access_token(options.web, login)})
        except (socketio.exceptions.ConnectionError, requests.RequestException) as error:
            connection.say(f"not connected: {error}; trying again in 2 s")
            client.sleep(2)
            continue
        connection.say(f"listening on {options.gateway}")
        client.wait()


def _access_token(web: str, login: dict[str, str]) -> str:
    answer = requests.post(f"{web}/api/v1/auth/login", json=login, timeout=5)
    answer.raise_for_status()
    token: str = answer.json()["access"]
    return token


def _printer(event: str) -> Any:
    def show(message: dict[str, Any]) -> None:
        data = message["data"]
        what = f"{data['deviceName']}: {data['stateName']} = {data['value']}" if "stateName" in data else data
        connection.say(f"received on socket: {event}: {what}")

    return show


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(0)
