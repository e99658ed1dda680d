"""POST /api/v1/telemetry: answer 202 once the journal has the events, or say why not.

This is the one URL that thousands of requests a second come to. `answer` knows nothing of Django's requests: the WSGI application
calls it ahead of Django's handler (aemos.telemetry_wsgi), and `view` for whatever does not take that way.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import msgspec
from django.core.exceptions import RequestDataTooBig
from django.db import Error as DatabaseError
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.http.request import UnreadablePostError
from django.views.decorators.csrf import csrf_exempt

from aemos.lib import problems
from aemos.lib.text import bearer_token
from aemos.lib.turns import Turns
from devices import catalogue
from devices.catalogue import Credential
from devices.exceptions import (
    BadPayload,
    Forbidden,
    OverLimit,
    Overloaded,
    Refusal,
    TooLarge,
    TooManyFailures,
    Unauthorized,
    UnknownCoding,
)
from devices.people import failures
from rules import events, ingest
from rules.admission import rejections
from rules.ingest import Receipt

STATUS: dict[type[Refusal], int] = {
    Unauthorized: 401,
    Forbidden: 403,
    BadPayload: 400,
    TooLarge: 413,
    UnknownCoding: 415,
    TooManyFailures: 429,
    OverLimit: 429,
    Overloaded: 503,
}
DATABASE_RETRY_SECONDS = 5
BAD_REQUEST = 400
# Decoding takes most of the processor time of a large request, refused ones included.
_turns = Turns()


class Answer(NamedTuple):
    """`body` is JSON; `headers` are those that only some answers have."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def content_type(self) -> str:
        return "application/json" if self.status < BAD_REQUEST else problems.MEDIA_TYPE


@csrf_exempt  # devices authenticate with a token in a header, never with a cookie
def view(request: HttpRequest) -> HttpResponse:
    if request.method != "POST":
        return HttpResponseNotAllowed(["POST"])
    found = answer(request.META, partial(_body, request))
    response = HttpResponse(
        found.body, status=found.status, content_type=found.content_type, headers=dict(found.headers)
    )
    # Refusals are counted and recorded; Django would write a line of log for each 503, thousands a second under overload.
    response._has_been_logged = True  # type: ignore[attr-defined]
    return response


def answer(environ: Mapping[str, Any], read_body: Callable[[], bytes]) -> Answer:
    """`environ` is that of WSGI. `read_body` raises TooLarge or BadPayload for a body that cannot be read."""
    try:
        credential = catalogue.shared().credential(bearer_token(environ.get("HTTP_AUTHORIZATION", "")))
        if credential is None:
            _count_failure(environ)
        payload = _payload(read_body, credential)
        trace = environ.get("HTTP_TRACEPARENT", "")
        receipt = ingest.submit(payload, credential=credential, protocol="http", turns=_turns, trace=trace).wait()
    except Refusal as refusal:
        return _refused(refusal)
    except DatabaseError:
        # The token is not known yet and cannot be looked up.
        text = "Tokens cannot be checked: the database cannot be reached."
        return _refused(Overloaded(text, reason="database-unavailable", retry_after=DATABASE_RETRY_SECONDS))
    return _accepted(receipt)


def too_large() -> TooLarge:
    return TooLarge(f"The request is larger than {events.MAXIMUM_BYTES} bytes.")


def incomplete() -> BadPayload:
    return BadPayload("The request ended before its body was complete.")


def uncompressed(body: bytes, coding: str) -> bytes:
    """`coding` is the header Content-Encoding. Raises UnknownCoding, BadPayload, and TooLarge before it takes the memory."""
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return body
    if coding not in ("gzip", "x-gzip"):
        raise UnknownCoding(f"Content-Encoding: {coding[:50]} is not known here; send gzip, or the body as it is.")
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        found = unpacker.decompress(body, events.MAXIMUM_BYTES + 1)
    except zlib.error as error:
        raise BadPayload(f"The body is not gzip, as Content-Encoding says: {error}.") from None
    if len(found) > events.MAXIMUM_BYTES:
        raise too_large()
    if not unpacker.eof:
        raise incomplete()
    return found


def _payload(read_body: Callable[[], bytes], credential: Credential | None) -> bytes:
    try:
        return read_body()
    except Refusal as refusal:
        rejections.record(refusal, b"", credential=credential, protocol="http", uuid=None)
        raise


def _body(request: HttpRequest) -> bytes:
    try:
        return uncompressed(request.body, request.headers.get("Content-Encoding", ""))
    except RequestDataTooBig:
        raise too_large() from None
    except UnreadablePostError:
        raise incomplete() from None


def _count_failure(environ: Mapping[str, Any]) -> None:
    """Strangers may not fill the list of rejected events: from too many failures of one address on, they are counted alone.

    Raises TooManyFailures. A live token behind the same address works all the time.
    """
    wait = failures.count({failures.TOKEN_ADDRESS: failures.address_of(environ)})
    if wait:
        text = f"Too many requests without a live token from your address; try again in {wait} seconds."
        refusal = TooManyFailures(text, retry_after=wait)
        rejections.count_unrecorded(refusal, protocol="http")
        raise refusal


def _accepted(receipt: Receipt) -> Answer:
    body = receipt.summary()
    if receipt.results:
        body["results"] = [
            {"index": index, "accepted": result.accepted, "reason": result.reason}
            for index, result in zip(receipt.positions(), receipt.results, strict=True)
        ]
    return Answer(202, msgspec.json.encode(body))


def body_of(refusal: Refusal) -> dict[str, Any]:
    """The answer to a refused sender."""
    errors = [_error_of(refusal)] if isinstance(refusal, BadPayload) else ()
    status = STATUS[type(refusal)]
    return problems.body(refusal.reason, refusal.detail, status=status, errors=errors, **members_of(refusal))


def members_of(refusal: Refusal) -> dict[str, Any]:
    """What the answer says beside the members of every problem."""
    members: dict[str, Any] = {"accepted": 0}
    if isinstance(refusal, Overloaded):
        members |= {
            "reason": refusal.reason,
            "queueDepth": refusal.queue_depth,
            "threshold": refusal.threshold,
            "thresholdSource": refusal.threshold_source or None,
            "drainRate": None if refusal.drain_rate is None else round(refusal.drain_rate, 3),
            "circuitState": refusal.circuit_state or None,
            "retryAfter": refusal.retry_after,
        }
    return members


def _error_of(refusal: BadPayload) -> dict[str, Any]:
    place = {"index": refusal.index, "field": refusal.field or None}
    return {name: value for name, value in place.items() if value is not None} | {"detail": refusal.detail}


def _refused(refusal: Refusal) -> Answer:
    headers: tuple[tuple[str, str], ...] = ()
    if isinstance(refusal, Overloaded | TooManyFailures):
        headers = (("Retry-After", str(refusal.retry_after)),)
    if isinstance(refusal, Unauthorized):
        headers = (("WWW-Authenticate", 'Bearer realm="aemos"'),)
    return Answer(STATUS[type(refusal)], msgspec.json.encode(body_of(refusal)), headers)
