"""POST /api/v1/telemetry: answer 202 once the journal has the events, or say why not.

A plain view without DRF: this is the one URL that thousands of requests a second come to.
"""

from __future__ import annotations

from typing import Any

import msgspec
from django.core.exceptions import RequestDataTooBig
from django.db import Error as DatabaseError
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.http.request import UnreadablePostError
from django.views.decorators.csrf import csrf_exempt

from devices import catalogue
from devices.catalogue import Credential
from devices.exceptions import BadPayload, Forbidden, OverLimit, Overloaded, Refusal, TooLarge, Unauthorized
from rules import events, ingest
from rules.admission import rejections
from rules.ingest import Receipt

STATUS: dict[type[Refusal], int] = {
    Unauthorized: 401,
    Forbidden: 403,
    BadPayload: 400,
    TooLarge: 413,
    OverLimit: 429,
    Overloaded: 503,
}
DATABASE_RETRY_SECONDS = 5


@csrf_exempt  # devices authenticate with a token in a header, never with a cookie
def view(request: HttpRequest) -> HttpResponse:
    if request.method != "POST":
        return HttpResponseNotAllowed(["POST"])
    try:
        credential = catalogue.shared().credential(_bearer(request))
        payload = _body(request, credential)
        receipt = ingest.submit(payload, credential=credential, protocol="http").wait()
    except Refusal as refusal:
        return _refused(refusal)
    except DatabaseError:
        # The token is not known yet and cannot be looked up.
        text = "Tokens cannot be checked: the database cannot be reached."
        return _refused(Overloaded(text, reason="database-unavailable", retry_after=DATABASE_RETRY_SECONDS))
    return _accepted(receipt)


def _body(request: HttpRequest, credential: Credential | None) -> bytes:
    refusal: Refusal
    try:
        return request.body
    except RequestDataTooBig:
        refusal = TooLarge(f"The request is larger than {events.MAXIMUM_BYTES} bytes.")
    except UnreadablePostError:
        refusal = BadPayload("The request ended before its body was complete.")
    rejections.record(refusal, b"", credential=credential, protocol="http", uuid=None)
    raise refusal


def _bearer(request: HttpRequest) -> str:
    scheme, _, token = request.META.get("HTTP_AUTHORIZATION", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _accepted(receipt: Receipt) -> HttpResponse:
    body: dict[str, Any] = {"accepted": receipt.accepted, "rejected": receipt.rejected}
    if receipt.results:
        body["results"] = [
            {"index": index, "accepted": result.accepted, "reason": result.reason}
            for index, result in enumerate(receipt.results)
        ]
    return _json(body, status=202)


def body_of(refusal: Refusal) -> dict[str, Any]:
    """What a refused sender is told."""
    body: dict[str, Any] = {"error": refusal.reason, "detail": refusal.detail, "accepted": 0}
    if isinstance(refusal, BadPayload):
        body |= {"index": refusal.index, "field": refusal.field or None}
    if isinstance(refusal, Overloaded):
        body |= {
            "reason": refusal.reason,
            "queueDepth": refusal.queue_depth,
            "threshold": refusal.threshold,
            "circuitState": refusal.circuit_state or None,
            "retryAfter": refusal.retry_after,
        }
    return body


def _refused(refusal: Refusal) -> HttpResponse:
    response = _json(body_of(refusal), status=STATUS[type(refusal)])
    # Refusals are counted and recorded; Django would write a line of log for each 503, thousands a second under overload.
    response._has_been_logged = True  # type: ignore[attr-defined]
    if isinstance(refusal, Overloaded):
        response["Retry-After"] = str(refusal.retry_after)
    if isinstance(refusal, Unauthorized):
        response["WWW-Authenticate"] = 'Bearer realm="aemos"'
    return response


def _json(body: dict[str, Any], *, status: int) -> HttpResponse:
    return HttpResponse(msgspec.json.encode(body), status=status, content_type="application/json")
