"""Keep messages in memory, with the same contract as the real transports: for tests and examples."""

from __future__ import annotations

from collections import deque

from gateway.transport import DeliveryReport, OnReport, Transport
from notifications.messages import Message, Protocol


class MemoryTransport(Transport):
    """Stands in for any protocol. While `failure` is set it raises that instead of taking a message.

    `acknowledging` False takes messages without ever reporting on them, as a broker that does not answer.
    """

    def __init__(self, protocol: Protocol, *, acknowledging: bool = True, keep: int = 1_000) -> None:
        self.protocol = protocol
        self.acknowledging = acknowledging
        self.failure: Exception | None = None
        self.started = False
        self.messages: deque[Message] = deque(maxlen=keep)

    def start(self) -> None:
        self.started = True

    def stop(self, *, timeout_seconds: float) -> None:
        self.started = False

    def deliver(self, message: Message, on_report: OnReport) -> None:
        if self.failure is not None:
            raise self.failure
        self.messages.append(message)
        if self.acknowledging:
            on_report(DeliveryReport(message))
