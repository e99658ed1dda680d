"""What a transport is: messages in, deliveries out, and telemetry handed to an injected ingest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from devices.catalogue import Credential
from notifications import messages
from notifications.messages import Message
from rules.ingest import Receipt


class Pending(Protocol):
    """A request whose events are on their way into the journal."""

    def wait(self) -> Receipt:
        """Blocks this greenlet until the journal has the events; raises devices.exceptions.Refusal when it does not."""


class Ingest(Protocol):
    """The one way in for telemetry, the same for every protocol (rules.ingest.submit).

    Raises devices.exceptions.Refusal at once for what can be judged at once; every refusal is already counted and recorded.
    `credential` None means that nobody was recognised; `uuid` is the originator that the path or topic names. With `hold` an
    Overloaded is not recorded (its `recorded` is false): the caller keeps the payload and tries again.
    """

    def __call__(
        self,
        payload: bytes,
        *,
        credential: Credential | None,
        protocol: str,
        uuid: str | None = None,
        hold: bool = False,
    ) -> Pending: ...


class TransportError(Exception):
    """A delivery that did not succeed. `permanent`: trying again cannot help."""

    def __init__(self, detail: str, *, permanent: bool = False) -> None:
        super().__init__(detail)
        self.permanent = permanent


# Called with the message once it is delivered: for MQTT at PUBACK, for the others when it has been handed to every peer.
# With expired=True for one that was not sent, because it had expired while it waited in the transport.
# With given_up="a sentence" for one that the broker refused too often.
Delivered = Callable[..., None]


class Transport(Protocol):
    """One protocol of the gateway. `deliver` is called in stream order from one greenlet of its own."""

    protocol: messages.Protocol

    def start(self) -> None: ...

    def stop(self, *, timeout_seconds: float) -> None: ...

    def deliver(self, message: Message, delivered: Delivered) -> None:
        """Hands the message to the peers; TransportError when that fails. Never waits on a slow peer."""
