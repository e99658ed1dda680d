"""A transport that keeps its messages in memory: for tests and examples, with the same contract as the real ones."""

from __future__ import annotations

from collections import deque

from gateway.transport import Delivered
from notifications.messages import Message, Protocol


class MemoryTransport:
    """Stands in for any protocol. While `failure` is set it raises that instead of taking a message.

    `acknowledging` False takes messages without ever calling `delivered`, as a broker that does not answer.
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

    def deliver(self, message: Message, delivered: Delivered) -> None:
        if self.failure is not None:
            raise self.failure
        self.messages.append(message)
        if self.acknowledging:
            delivered(message)
