"""One registration of a CoAP observer, and how far its notification is."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.coap.codec import Message
from gateway.coap.limits import Backoff


@dataclass(slots=True, eq=False)
class Observer:
    """One registration.

    `busy`: an answer or a notification is being made, or waits for its ACK. `stale`: there is news since it was made.
    """

    message: Message
    confirmed_at: float
    refresh_at: float
    unconfirmed: int = 0
    busy: bool = True
    stale: bool = False
    pending: int | None = None  # message id of the notification or ping that waits for its answer
    backoff: Backoff | None = None  # where a replaced notification stopped, so that news do not renew the patience
