"""Administer the broker's clients and roles through Mosquitto's dynamic-security plugin."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import paho.mqtt.client as mqtt
from django.conf import settings
from paho.mqtt.reasoncodes import ReasonCode

from gateway.mqtt.connection import BrokerAway, BrokerError, Connection
from gateway.mqtt.topics import Grant

log = logging.getLogger(__name__)
CONTROL = "$CONTROL/dynamic-security/v1"
RESPONSES = f"{CONTROL}/response"
# The plugin writes its whole file at every command: 27 ms each at 1,600 devices, 0.3 s at 10,000.
ANSWER_SECONDS, ANSWER_SECONDS_PER_COMMAND = 5.0, 1.0

Command = dict[str, Any]


class CommandFailed(BrokerError):
    """`command` is the plugin's name of it, `error` the plugin's reason."""

    def __init__(self, command: str, error: str) -> None:
        super().__init__(f"{command}: {error}")
        self.command = command
        self.error = error


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one command ended: `error` is the plugin's reason, empty when it was done; `data` is what it listed."""

    command: str
    error: str = ""
    data: dict[str, Any] = field(default_factory=dict)


def create_client(username: str, *, password: str, rolename: str) -> Command:
    return {"command": "createClient", **_client_fields(username, password, rolename)}


def modify_client(username: str, *, password: str, rolename: str) -> Command:
    return {"command": "modifyClient", **_client_fields(username, password, rolename)}


def delete_client(username: str) -> Command:
    """Also ends the client's live connection."""
    return {"command": "deleteClient", "username": username}


def create_role(rolename: str, grants: Iterable[Grant]) -> Command:
    return {"command": "createRole", "rolename": rolename, "acls": _acls(grants)}


def modify_role(rolename: str, grants: Iterable[Grant]) -> Command:
    """Replaces all that the role allowed."""
    return {"command": "modifyRole", "rolename": rolename, "acls": _acls(grants)}


def delete_role(rolename: str) -> Command:
    return {"command": "deleteRole", "rolename": rolename}


def _client_fields(username: str, password: str, rolename: str) -> Command:
    """The client id is the user name and no other: nobody can take the connection of another account."""
    return {
        "username": username,
        "clientid": username,
        "password": password,
        "roles": [{"rolename": rolename}],
    }


def _acls(grants: Iterable[Grant]) -> list[dict[str, Any]]:
    return [{"acltype": grant.right, "topic": grant.topic, "priority": 0, "allow": True} for grant in grants]


class DynamicSecurity:
    """The broker's own table of clients and roles. One request at a time; `connections` counts how often it came back."""

    def __init__(self) -> None:
        self.connections = 0
        self.ready = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._answers: queue.Queue[Any] = queue.Queue()
        self._connection = Connection(
            "device accounts",
            client_id=f"aemos-accounts-{uuid4().hex[:16]}",
            on_ready=self._subscribe,
            on_lost=self._lost,
        )
        client = self._connection.client
        client.on_subscribe = self._connection.guarded(self._subscribed)
        client.on_message = self._connection.guarded(lambda _client, _data, message: self._answers.put(message.payload))

    def __enter__(self) -> DynamicSecurity:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._connection.start()

    def stop(self) -> None:
        self._connection.stop()

    def revive(self) -> None:
        self._connection.revive()

    def execute(self, commands: Sequence[Command]) -> list[Outcome]:
        """Has the broker do all commands, in order; an outcome for each. BrokerAway when it does not answer.

        A command of a request that was not answered may have been done or not.
        """
        if not commands:
            return []
        with self._one_at_a_time:
            return self._request(commands)

    def clients(self) -> dict[str, frozenset[str]]:
        """Username -> its roles. Raises BrokerError."""
        listed = self._list("listClients", verbose=True)["clients"]
        return {each["username"]: frozenset(role["rolename"] for role in each.get("roles", ())) for each in listed}

    def roles(self) -> frozenset[str]:
        """The names of all roles. Raises BrokerError."""
        return frozenset(self._list("listRoles")["roles"])

    def _list(self, command: str, **options: bool) -> dict[str, Any]:
        outcome = self.execute([{"command": command, **options}])[0]
        if outcome.error:
            raise CommandFailed(command, outcome.error)
        return outcome.data

    def _request(self, commands: Sequence[Command]) -> list[Outcome]:
        if not self.ready.is_set():
            raise BrokerAway("the MQTT broker is not connected")
        while not self._answers.empty():  # late answers to a request that was given up
            self._answers.get_nowait()
        request = uuid4().hex
        numbered = [{**command, "correlationData": f"{request}-{index}"} for index, command in enumerate(commands)]
        # QoS 0 on purpose: a queued command that is carried out after a reconnect could undo a later one.
        self._connection.client.publish(CONTROL, json.dumps({"commands": numbered}), qos=0)
        deadline = time.monotonic() + ANSWER_SECONDS + ANSWER_SECONDS_PER_COMMAND * len(commands)
        answers: dict[str, Any] = {}
        while len(answers) < len(commands):
            answers |= self._more_answers(request, deadline=deadline)
        return [_outcome(command, answers[command["correlationData"]]) for command in numbered]

    def _more_answers(self, request: str, *, deadline: float) -> dict[str, Any]:
        try:
            payload = self._answers.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            raise BrokerAway("the MQTT broker did not answer in time") from None
        if payload is None:
            raise BrokerAway("the MQTT broker went away before it answered")
        answers = {str(each.get("correlationData")): each for each in json.loads(payload)["responses"]}
        return {key: each for key, each in answers.items() if key.startswith(request)}

    def _subscribe(self) -> None:
        self._connection.client.subscribe(RESPONSES, qos=1)

    def _subscribed(
        self, _client: mqtt.Client, _data: Any, _mid: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        if any(reason.is_failure for reason in reasons):
            log.error("%s may not manage the broker's clients: %s", settings.MQTT_USERNAME, reasons[0])
            return
        self.connections += 1
        self.ready.set()

    def _lost(self) -> None:
        self.ready.clear()
        self._answers.put(None)


def _outcome(command: Command, answer: dict[str, Any]) -> Outcome:
    return Outcome(command["command"], answer.get("error", ""), answer.get("data", {}))
