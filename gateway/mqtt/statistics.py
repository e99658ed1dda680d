"""Listens to what the broker says of itself: how many messages it holds, how many it has dropped.

Only what a session is full of does a device never hear of: the broker acknowledges a reading before it drops it.

Mosquitto says a number when it has changed, and keeps it for a minute: who comes later hears only of what changes. What is stored
and retained changes with every client that comes; what was dropped, as a rule, never does.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any
from uuid import uuid4

import paho.mqtt.client as mqtt
from paho.mqtt.reasoncodes import ReasonCode
from redis.exceptions import RedisError

from aemos.lib import redis
from aemos.lib.rate_limited_log import RateLimitedLog
from gateway.mqtt.accounts import Stop
from gateway.mqtt.connection import Connection
from notifications import broker_load

log = logging.getLogger(__name__)
# The topics of Mosquitto, which other brokers have taken over. What is retained is stored, and waits for nobody.
TOPICS = STORED, RETAINED, DROPPED = (
    "$SYS/broker/store/messages/count",
    "$SYS/broker/retained messages/count",
    "$SYS/broker/publish/messages/dropped",
)
EVERY_SECONDS = 2.0


class BrokerStatistics:
    """Every gateway listens; all are told the same."""

    def __init__(self) -> None:
        self._said: dict[str, int] = {}
        self._log = RateLimitedLog(log)
        self._connection = Connection(
            "its statistics", client_id=f"aemos-statistics-{uuid4().hex[:16]}", on_ready=self._subscribe
        )
        client = self._connection.client
        client.on_subscribe = self._connection.guarded(self._subscribed)
        client.on_message = self._connection.guarded(self._on_message)

    def run(self, stop: Stop) -> None:
        """Blocks until `stop` is set."""
        self._connection.start()
        try:
            while not stop.wait(EVERY_SECONDS):
                self._connection.revive()
                self._remember()  # the broker says what has changed, and nothing while all stays as it is
        finally:
            self._connection.stop()

    def _subscribe(self) -> None:
        self._said.clear()  # a broker that was started anew counts anew
        self._connection.client.subscribe([(topic, 0) for topic in TOPICS])

    def _subscribed(
        self, _client: mqtt.Client, _data: Any, _mid: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        refused = next((reason for reason in reasons if reason.is_failure), None)
        if refused:
            log.warning("What the MQTT broker holds is not known: it refuses $SYS/broker/# (%s)", refused)

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        with contextlib.suppress(ValueError):  # whatever else a broker may say there
            # Mosquitto counts retained messages below zero after some were taken away.
            self._said[message.topic] = max(int(message.payload), 0)

    def _remember(self) -> None:
        said = dict(self._said)
        if not self._connection.connected or not {STORED, RETAINED} <= said.keys():
            return
        try:
            broker_load.remember(held=max(said[STORED] - said[RETAINED], 0), dropped=said.get(DROPPED))
        except RedisError as error:
            self._log.log("redis", logging.WARNING, "What the broker holds is not noted: %s", redis.explain(error))
