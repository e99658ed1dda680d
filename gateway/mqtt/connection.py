"""Connections to the MQTT broker, which reconnect by themselves.

BrokerError
├── BrokerAway      no connection, or no answer in time
└── CommandFailed   the broker refused a command; names the command and the reason
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import paho.mqtt.client as mqtt
from django.conf import settings
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from aemos.lib import metrics
from gateway.mqtt.receiving import ReceivingClient

log = logging.getLogger(__name__)
KEEPALIVE_SECONDS = 30
CONNECT_TIMEOUT_SECONDS = 5.0
SHORTEST_RECONNECT_SECONDS, LONGEST_RECONNECT_SECONDS = 1, 5
_BAD_CREDENTIALS = ("Bad user name or password", "Not authorized")


class BrokerError(Exception):
    """Something the broker did not do."""


class BrokerAway(BrokerError):
    """Trying again later may help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What the broker keeps of a client that is away: nothing, or subscriptions and messages for `expiry_seconds`.

    `receive_maximum`: so many messages may be unacknowledged before the broker holds the rest back; then the receiver
    acknowledges each message itself. The broker passes on no packet of more than `maximum_bytes`.
    """

    expiry_seconds: int = 0
    receive_maximum: int | None = None
    maximum_bytes: int | None = None

    @property
    def properties(self) -> Properties:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self.expiry_seconds
        if self.receive_maximum:
            properties.ReceiveMaximum = self.receive_maximum
        if self.maximum_bytes:
            properties.MaximumPacketSize = self.maximum_bytes
        return properties


class Connection:
    """One connection as the gateway's user. It comes back by itself and logs each change of state once.

    `on_ready` and `on_lost` are called from the network thread and must not wait; a callback that raises is logged and
    counted in `counts["callback-failed"]`, because an exception would end paho's thread without a word.
    """

    def __init__(
        self,
        purpose: str,
        *,
        client_id: str,
        session: Session | None = None,
        on_ready: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.connected = False
        self.receive_maximum = 1  # how many publications the broker lets be unacknowledged
        self.counts: Counter[str] = Counter()
        self._purpose = purpose
        self._session = session or Session()
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._state = ""
        self._has_tls = False
        self._thread_name = f"paho-mqtt-client-{client_id}"
        self.client = self._client(client_id)

    def _client(self, client_id: str) -> mqtt.Client:
        receives = self._session.receive_maximum is not None
        kind = ReceivingClient if receives else mqtt.Client
        client = kind(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5, manual_ack=receives)
        client.username_pw_set(settings.MQTT_USERNAME, settings.MQTT_PASSWORD or None)
        client.connect_timeout = CONNECT_TIMEOUT_SECONDS
        client.reconnect_delay_set(SHORTEST_RECONNECT_SECONDS, LONGEST_RECONNECT_SECONDS)
        client.on_connect = self.guarded(self._connected)
        client.on_connect_fail = self.guarded(self._unreachable)
        client.on_disconnect = self.guarded(self._disconnected)
        # The one place that every way of losing a connection leads through.
        client.on_pre_connect = self.guarded(lambda *_: self._lose())
        return client

    def guarded(self, callback: Callable[..., None]) -> Callable[..., None]:
        @wraps(callback)
        def call(*arguments: Any) -> None:
            try:
                callback(*arguments)
            except Exception:  # process loop: the network thread must outlive any single callback
                self.counts["callback-failed"] += 1
                metrics.GATEWAY_FAILURES.labels("mqtt").inc()
                log.exception("A callback of the MQTT connection for %s failed", self._purpose)

        return call

    def acknowledge(self, mids: Sequence[int]) -> None:
        """Messages that were received with QoS 1; for a session that receives."""
        assert isinstance(self.client, ReceivingClient)  # noqa: S101  there is no other that holds acknowledgements back
        self.client.acknowledge(mids)

    def start(self) -> None:
        """Begins to connect; returns at once. OSError when the certificates cannot be read."""
        self._state = ""
        if settings.MQTT_TLS and not self._has_tls:
            self._set_tls()
        self.client.connect_async(
            settings.MQTT_HOST,
            settings.MQTT_PORT,
            keepalive=KEEPALIVE_SECONDS,
            clean_start=self._session.expiry_seconds == 0,
            properties=self._session.properties,
        )
        self.client.loop_start()

    def _set_tls(self) -> None:
        own = (settings.MQTT_CERT_FILE or None, settings.MQTT_KEY_FILE or None)
        try:
            self.client.tls_set(settings.MQTT_CA_FILE or None, *own)
        except (OSError, ValueError) as error:
            files = ", ".join(name for name in (settings.MQTT_CA_FILE, *own) if name)
            text = f"MQTT_CA_FILE, MQTT_CERT_FILE, MQTT_KEY_FILE ({files}): {error}"
            raise OSError(getattr(error, "errno", None) or 0, text) from None
        self._has_tls = True

    def revive(self) -> None:
        """Starts the network thread again if something nobody foresaw has ended it. To be called now and then."""
        if not any(thread.name == self._thread_name for thread in threading.enumerate()):
            self.counts["revived"] += 1
            log.error("The network thread of the MQTT connection for %s had ended and is started again", self._purpose)
            self.start()

    def stop(self) -> None:
        """Disconnects. What was not acknowledged by then stays with whoever sent it."""
        self._state = "stopped"
        self.client.drop_out_messages()  # paho's thread would wait for their acknowledgement
        self.client.disconnect()
        self.client.loop_stop()
        self._lose()

    def _connected(self, _client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, properties: Any) -> None:
        if reason.is_failure:
            hint = ": check MQTT_USERNAME and MQTT_PASSWORD" if str(reason) in _BAD_CREDENTIALS else ""
            self._log_once("refused", logging.ERROR, f"refuses the connection ({reason}){hint}")
            return
        self._log_once("connected", logging.INFO, "is connected")
        self.receive_maximum = getattr(properties, "ReceiveMaximum", 65_535)
        self.connected = True
        self._on_ready()

    def _unreachable(self, _client: mqtt.Client, _data: Any) -> None:
        # paho calls this while it handles the exception that says why.
        self._log_once("away", logging.WARNING, f"cannot be reached, trying again ({sys.exception()})")

    def _disconnected(
        self, _client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any
    ) -> None:
        if self.connected:
            self._log_once("away", logging.WARNING, f"closed the connection, trying again ({reason})")
        self._lose()

    def _lose(self) -> None:
        if self.connected:
            self.connected = False
            self._on_lost()

    def _log_once(self, state: str, level: int, text: str) -> None:
        if self._state not in (state, "stopped"):
            self._state = state
            where = f"{settings.MQTT_HOST}:{settings.MQTT_PORT}"
            log.log(level, "The MQTT broker at %s %s, for %s", where, text, self._purpose)
