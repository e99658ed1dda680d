"""The CoAP transport: receive telemetry, and send observers the states of devices.

    POST /devices/{uuid}/datastream?token=...   telemetry of the sensor or device whose token it is
    GET  /devices/{uuid}/state?token=...        what the device's states should be; may be observed
    POST /devices/{uuid}/commands/ack?token=... what became of a command, from the device itself

They speak JSON and CBOR. An observer is notified of every change and, changed or not, once before COAP_MAX_AGE_SECONDS is over.
The state is shown to the device itself (its own token) and to people of its organization (an access token). The right is
checked for every notification, and every few seconds in between, so that an observation ends with its right.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import gevent
import msgspec
from django.conf import settings
from django.db import Error as DatabaseError
from django.db import close_old_connections

from aemos.lib import cbor, metrics
from devices import catalogue, commands, tokens
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
from gateway import acknowledgements
from gateway.coap.endpoint import CoapRequest, CoapResponse, Code, Endpoint, Limits
from gateway.coap.states import States
from gateway.people import Login, Person, organizations_of, person
from gateway.transport import DeliveryReport, Ingest, OnReport, Transport
from notifications.messages import Message, Protocol
from rules import events
from rules.ingest import Receipt

log = logging.getLogger(__name__)
JSON, CBOR = 50, 60  # RFC 7252 12.3, RFC 8949 9.3
FORMATS = (None, JSON, CBOR)
LINKS = (
    '</devices/{uuid}/datastream>;title="POST telemetry";ct="50 60",'
    '</devices/{uuid}/state>;title="Device state";ct="50 60";obs,'
    '</devices/{uuid}/commands/ack>;title="POST acknowledgements";ct="50 60"'
)
RIGHTS_SECONDS = 2.0
RETRY_AFTER_SECONDS = 5
# Of COAP_MAX_AGE_SECONDS: the rest is for a notification that gets lost and is sent again.
REFRESH_SHARE = 0.75

# The one place that says which refusal is which code; a special case stands before the general one.
CODES: dict[type[Refusal], Code] = {
    Unauthorized: Code.UNAUTHORIZED,
    Forbidden: Code.FORBIDDEN,
    BadPayload: Code.BAD_REQUEST,
    TooLarge: Code.TOO_LARGE,
    UnknownCoding: Code.UNSUPPORTED_FORMAT,
    OverLimit: Code.TOO_MANY_REQUESTS,
    TooManyFailures: Code.TOO_MANY_REQUESTS,
    Overloaded: Code.UNAVAILABLE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Someone's right to see a device's state; `who` is None for the device itself."""

    uuid: str
    token: str
    organization: str
    who: Person | None


class CoapTransport(Transport):
    """The server. `ingest` takes the telemetry; `handle` runs in a greenlet of its own for each request."""

    protocol = Protocol.COAP

    def __init__(self, ingest: Ingest, *, host: str = "", port: int | None = None) -> None:
        address = (host or settings.COAP_HOST, settings.COAP_PORT if port is None else port)
        self._ingest = ingest
        self._states = States()
        self._watches: dict[tuple[str, str], Watch] = {}
        self._checker: gevent.Greenlet[..., None] | None = None
        self._counted: dict[str, int] = {}
        self._failed = 0
        self.endpoint = Endpoint(address, handler=self.handle, links=LINKS, limits=_limits())

    @property
    def address(self) -> tuple[str, int]:
        """Host and port bound; the wanted ones before the start."""
        return self.endpoint.address

    def start(self) -> None:
        """Listens; OSError when the address cannot be had."""
        self.endpoint.start()
        self._checker = gevent.spawn(self._check_for_ever)

    def stop(self, *, timeout_seconds: float) -> None:
        if self._checker is not None:
            self._checker.kill()
        self.endpoint.stop(timeout_seconds=timeout_seconds)
        self._count()

    def deliver(self, message: Message, on_report: OnReport) -> None:
        """Observers get the newest state, not the message: the endpoint calls `handle` again for each of them."""
        if device := message.changed_device:
            self.endpoint.notify(_state_path(device))
        on_report(DeliveryReport(message))

    def on_gap(self) -> None:
        """The stream has lost messages: whatever they were about, every observer is sent the newest state."""
        for uuid in {watch.uuid for watch in self._watches.values()}:
            self.endpoint.notify(_state_path(uuid))

    def handle(self, request: CoapRequest) -> CoapResponse:
        try:
            return self._route(request)
        except Refusal as refusal:
            return _refused(refusal)
        except DatabaseError as error:
            log.warning("A CoAP request was refused because the database is away: %s", error)
            return _text(Code.UNAVAILABLE, "The database is away.", max_age=RETRY_AFTER_SECONDS)
        finally:
            close_old_connections()

    def _route(self, request: CoapRequest) -> CoapResponse:
        match request.method, request.path:
            case method, ("devices", uuid, "datastream") if _is_uuid(uuid):
                return self._post(request, uuid) if method == "POST" else _text(Code.METHOD_NOT_ALLOWED, "Use POST.")
            case method, ("devices", uuid, "state") if _is_uuid(uuid):
                return self._get(request, uuid) if method == "GET" else _text(Code.METHOD_NOT_ALLOWED, "Use GET.")
            case method, ("devices", uuid, "commands", "ack") if _is_uuid(uuid):
                return _acknowledge(request, uuid) if method == "POST" else _text(Code.METHOD_NOT_ALLOWED, "Use POST.")
        return _text(Code.NOT_FOUND, "There is no such resource, see /.well-known/core.")

    def _post(self, request: CoapRequest, uuid: str) -> CoapResponse:
        if request.content_format not in FORMATS:
            return _text(Code.UNSUPPORTED_FORMAT, "Send JSON (50) or CBOR (60).")
        credential = catalogue.shared().credential(request.query.get("token", ""))
        if request.more and credential is not None and credential.originator.uuid == uuid:
            return CoapResponse(code=Code.CONTINUE)
        trace = request.query.get("traceparent", "")
        pending = self._ingest(
            request.payload, credential=credential, protocol=str(self.protocol), uuid=uuid, trace=trace
        )
        return _changed(pending.wait(), request.accept)

    def _get(self, request: CoapRequest, uuid: str) -> CoapResponse:
        watch = _watch(uuid, request.query.get("token", ""))
        if request.accept not in FORMATS:
            return _text(Code.NOT_ACCEPTABLE, "There is JSON (50) and CBOR (60).")
        if request.observe:
            self._watches[uuid, watch.token] = watch
        response = _encoded(Code.CONTENT, self._states.of(uuid), request.accept)
        return replace(response, max_age=settings.COAP_MAX_AGE_SECONDS, observable=True)

    def _check_for_ever(self) -> None:
        while True:
            gevent.sleep(RIGHTS_SECONDS)
            self._count()
            try:
                self._check_rights()
            except DatabaseError as error:
                log.warning("Rights of CoAP observers cannot be checked now: %s", error)
            except Exception:  # the process loop: without it no observation would end with its right
                log.exception("Looking after CoAP observers failed")
                metrics.GATEWAY_FAILURES.labels("coap").inc()
            finally:
                close_old_connections()

    def _count(self) -> None:
        """What the endpoint refused since the last time, before any event was seen in it, and what failed in it."""
        stats = self.endpoint.stats
        if stats.errors > self._failed:
            metrics.GATEWAY_FAILURES.labels("coap").inc(stats.errors - self._failed)
            self._failed = stats.errors
        refused = {"rate": stats.rate_limited, "busy": stats.refused_busy, "malformed": stats.malformed}
        for reason, total in refused.items():
            if total > (counted := self._counted.get(reason, 0)):
                metrics.COAP_REFUSED.labels(reason).inc(total - counted)
        self._counted = refused

    def _check_rights(self) -> None:
        """Asks for a notification where a right is gone: the handler then refuses, and that ends the observation."""
        observed = {_key(request) for request in self.endpoint.observations()}
        self._watches = {key: watch for key, watch in self._watches.items() if key in observed}
        for watch in _ended(list(self._watches.values())):
            self._watches.pop((watch.uuid, watch.token), None)
            self.endpoint.notify(_state_path(watch.uuid))


def _acknowledge(request: CoapRequest, uuid: str) -> CoapResponse:
    """2.04 once the database has it."""
    if request.content_format not in FORMATS:
        return _text(Code.UNSUPPORTED_FORMAT, "Send JSON (50) or CBOR (60).")
    credential = catalogue.shared().credential(request.query.get("token", ""))
    if credential is None:
        raise Unauthorized("Send a live token: ?token=...")
    if (credential.originator.source_type, credential.originator.uuid) != ("device", uuid):
        raise Forbidden("The token belongs to another sensor or device.")
    payload = events.json_of(request.payload) if request.content_format == CBOR else request.payload
    if commands.acknowledge([acknowledgements.read(payload, UUID(uuid))]):
        raise acknowledgements.foreign()
    return CoapResponse(code=Code.CHANGED)


def _watch(uuid: str, token: str) -> Watch:
    """The right of whoever holds the token; Unauthorized or Forbidden, which do not reveal whether the device exists."""
    credential = catalogue.shared().credential(token)
    if credential is not None:
        owner = credential.originator
        if (owner.source_type, owner.uuid) != ("device", uuid):
            raise Forbidden("The token belongs to another sensor or device.")
        return Watch(uuid=uuid, token=token, organization=owner.organization_uuid, who=None)
    if not token or tokens.prefix_of(token):
        raise Unauthorized("Send a live token: ?token=...")
    who = person(token)
    device = catalogue.shared().originators([("device", uuid)]).get(("device", uuid))
    if device is None or device.organization_uuid not in who.organizations:
        raise Forbidden("There is no such device, or you have no right to it.")
    return Watch(uuid=uuid, token=token, organization=device.organization_uuid, who=who)


def _ended(watches: Iterable[Watch]) -> list[Watch]:
    """Those whose right is gone. Two queries for all people; devices are in the catalogue."""
    watches = list(watches)
    logins = {watch.who.login for watch in watches if watch.who is not None}
    organizations = organizations_of(logins) if logins else {}
    devices = catalogue.shared().originators(("device", watch.uuid) for watch in watches)
    return [watch for watch in watches if not _lasts(watch, devices=devices, organizations=organizations)]


def _lasts(watch: Watch, *, devices: dict[tuple[str, str], Any], organizations: dict[Login, dict[str, str]]) -> bool:
    if ("device", watch.uuid) not in devices:
        return False
    if watch.who is None:
        return catalogue.shared().credential(watch.token) is not None
    allowed = organizations.get(watch.who.login, {})
    return watch.organization in allowed and watch.who.expires_at > time.time()


def _encoded(code: Code, document: Mapping[str, Any], accept: int | None) -> CoapResponse:
    if accept == CBOR:
        return CoapResponse(code=code, payload=cbor.dumps(document), content_format=CBOR)
    return CoapResponse(code=code, payload=msgspec.json.encode(document), content_format=JSON)


def _changed(receipt: Receipt, accept: int | None) -> CoapResponse:
    """2.04; what was taken is said only when it is not all, because radio time is what a device has least of."""
    if not receipt.rejected and not receipt.problems:
        return CoapResponse(code=Code.CHANGED)
    return _encoded(Code.CHANGED, receipt.summary(), accept)


def _refused(refusal: Refusal) -> CoapResponse:
    code = next((code for kind, code in CODES.items() if isinstance(refusal, kind)), Code.BAD_REQUEST)
    if not isinstance(refusal, Overloaded):
        return _text(code, refusal.detail)
    return _text(code, refusal.detail, max_age=refusal.retry_after)


def _text(code: Code, sentence: str, *, max_age: int | None = None) -> CoapResponse:
    """A diagnostic payload (RFC 7252 5.5.2)."""
    return CoapResponse(code=code, payload=sentence.encode(), max_age=max_age)


def _limits() -> Limits:
    return Limits(
        refresh_seconds=REFRESH_SHARE * settings.COAP_MAX_AGE_SECONDS,
        requests_per_second=settings.COAP_REQUESTS_PER_SECOND,
        request_burst=2 * settings.COAP_REQUESTS_PER_SECOND,
    )


def _key(request: CoapRequest) -> tuple[str, str]:
    """Device and token of an observation."""
    return request.path[1], request.query.get("token", "")


def _state_path(uuid: str) -> tuple[str, ...]:
    return ("devices", uuid, "state")


def _is_uuid(text: str) -> bool:
    """Only as the server writes it: observers of one device must not be spread over several spellings of its path."""
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False
