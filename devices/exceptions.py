"""Why a sender was not believed or not served; raised by ingest, translated once per edge.

Refusal
├── Unauthorized   no live token                          HTTP 401  CoAP 4.01  MQTT: recorded, acknowledged
├── TooManyFailures  no live token, too often from there    HTTP 429
├── Forbidden      someone else's uuid, or too urgent     HTTP 403  CoAP 4.03  MQTT: recorded, acknowledged
├── BadPayload     names the item and the field           HTTP 400  CoAP 4.00  MQTT: recorded, acknowledged
├── UnknownCoding  the body is compressed otherwise than gzip      HTTP 415
├── TooLarge       more than 1,000 events or 1 MB         HTTP 413  CoAP 4.13  MQTT: recorded, acknowledged
└── Overloaded     not now; says when to try again        HTTP 503  CoAP 5.03  MQTT: not acknowledged, tried again
    └── OverLimit  the organization's share is used up    HTTP 429  CoAP 4.29  MQTT: not acknowledged, tried again
"""

from __future__ import annotations


class Refusal(Exception):
    """Carries `reason` (a stable word for machines) and `detail` (a sentence for people)."""

    reason = "refused"

    def __init__(self, detail: str, *, reason: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.reason = reason or self.reason


class Unauthorized(Refusal):
    reason = "unauthorized"


class TooManyFailures(Refusal):
    """Nobody with a live token is ever refused so. `retry_after` is in seconds."""

    reason = "too-many-failures"

    def __init__(self, detail: str, *, retry_after: int) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class Forbidden(Refusal):
    reason = "forbidden"


class BadPayload(Refusal):
    """`index` is the item of the batch, None when the request as a whole is wrong; `field` the field in it."""

    reason = "bad-payload"

    def __init__(self, detail: str, *, index: int | None = None, field: str = "") -> None:
        super().__init__(detail)
        self.index = index
        self.field = field


class UnknownCoding(Refusal):
    reason = "unknown-coding"


class TooLarge(Refusal):
    reason = "too-large"


class Overloaded(Refusal):
    """The system cannot take it now. `retry_after` is in seconds; depth and threshold are in events, the drain rate in events/s.

    `recorded` once the refused events are kept for the admin, and so need not be kept by whoever sent them.
    """

    reason = "overloaded"

    def __init__(
        self,
        detail: str,
        *,
        reason: str,
        retry_after: int,
        queue_depth: int | None = None,
        threshold: int | None = None,
        circuit_state: str = "",
        drain_rate: float | None = None,
        threshold_source: str = "",
    ) -> None:
        super().__init__(detail, reason=reason)
        self.retry_after = retry_after
        self.queue_depth = queue_depth
        self.threshold = threshold
        self.circuit_state = circuit_state
        self.drain_rate = drain_rate
        self.threshold_source = threshold_source
        self.recorded = False


class OverLimit(Overloaded):
    """The system could take it, but the organization's share is used up: it has `queue_depth` of `threshold` events."""
