"""The interface of a transport: one protocol of the gateway, which delivers messages and may take telemetry in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

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
    Overloaded is not recorded (its `recorded` is false): the caller keeps the payload and tries again. `after` is what the call
    for the sender's request before this one gave, if nobody has waited for it: where that one fails, this one fails, too. `trace`
    is the sender's W3C traceparent, if it sent one.
    """

    def __call__(
        self,
        payload: bytes,
        *,
        credential: Credential | None,
        protocol: str,
        uuid: str | None = None,
        hold: bool = False,
        after: Any = None,
        trace: str = "",
    ) -> Pending: ...


class TransportError(Exception):
    """A delivery that did not succeed. `permanent`: trying again cannot help."""

    def __init__(self, detail: str, *, permanent: bool = False) -> None:
        super().__init__(detail)
        self.permanent = permanent


class Status(StrEnum):
    DELIVERED = "delivered"  # for MQTT at PUBACK, for the others when the message has been handed to every peer
    EXPIRED = "expired"  # not sent: its time ran out while it waited in the transport
    REFUSED = "refused"  # by the broker, too often; `reason` says why


@dataclass(frozen=True, slots=True)
class DeliveryReport:
    """What became of a message. There is one for each message that `Transport.deliver` took, from any thread."""

    message: Message
    status: Status = Status.DELIVERED
    reason: str = ""


OnReport = Callable[[DeliveryReport], None]
# A loop that ends when the event it is given is set; gevent's and threading's events are the same to it.
BackgroundTask = Callable[[Any], None]


class Transport(ABC):
    """One protocol of the gateway. `deliver` is called in stream order from one greenlet of its own."""

    protocol: messages.Protocol

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port where it listens; None when it connects to somebody else."""
        return None

    def background_tasks(self) -> Mapping[str, BackgroundTask]:
        """Loops that run beside it as long as the gateway does, by their names in the log."""
        return {}

    @abstractmethod
    def start(self) -> None:
        """Raises OSError when it cannot take its address."""

    @abstractmethod
    def stop(self, *, timeout_seconds: float) -> None: ...

    @abstractmethod
    def deliver(self, message: Message, on_report: OnReport) -> None:
        """Hands the message to the peers; TransportError when that fails. Never waits for a slow peer."""

    def on_lead(self, leads: bool) -> None:  # noqa: B027  most have nothing to do
        """Of several gateways one delivers over a shared protocol: this one begins to, before its first message, or ceases to."""

    def on_gap(self) -> None:  # noqa: B027  the same
        """The stream may have lost messages between the last one delivered and the next."""
