"""Answer every refused request in one format: problem details (RFC 9457), as `application/problem+json`.

    {"type": "urn:aemos:problem:invalid", "title": "Invalid", "status": 400, "code": "invalid",
     "detail": "name: This field is required.",
     "errors": [{"field": "name", "code": "required", "detail": "This field is required."}]}

`code` is a stable word for programs, `detail` a sentence for people. `errors` names what is wrong in the request, where that can
be named; a kind of problem may have members of its own beside these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

from django.core.exceptions import PermissionDenied as DjangoPermissionDenied
from django.db import DataError, IntegrityError, InterfaceError, OperationalError
from django.http import Http404
from rest_framework import exceptions, status, views
from rest_framework.response import Response

log = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:aemos:problem:"
# Keys of REST framework and Django that stand for the request as a whole.
_NO_FIELD = frozenset({"detail", "nonFieldErrors", "non_field_errors", "__all__"})
_FIELDS_NAMED = 5
_CODES = {HTTPStatus.FORBIDDEN: "permission-denied", HTTPStatus.INTERNAL_SERVER_ERROR: "internal-error"}


class ProblemException(exceptions.APIException):
    """An answer with `errors` of its own, or with members beside those of every problem."""

    def __init__(
        self,
        detail: str | None = None,
        *,
        code: str | None = None,
        errors: Iterable[Mapping[str, Any]] = (),
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail, code)
        self.errors = [dict(error) for error in errors]
        self.members = dict(members or {})


class Conflict(exceptions.APIException):
    status_code = status.HTTP_409_CONFLICT
    default_detail = "Someone else changed the same thing at the same time; look again and repeat."
    default_code = "conflict"


class Unavailable(exceptions.APIException):
    """Something that the request needs does not answer; by default the database."""

    status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    default_detail = "The database is busy or cannot be reached; try again."
    default_code = "database-unavailable"
    wait = 5  # seconds; REST framework sends it as Retry-After


def body(
    code: str, detail: str, *, status: int, errors: Iterable[Mapping[str, Any]] = (), **members: Any
) -> dict[str, Any]:
    found = {
        "type": f"{TYPE_PREFIX}{code}",
        "title": code.replace("-", " ").capitalize(),
        "status": status,
        "code": code,
        "detail": detail,
    }
    listed = list(errors)
    return found | ({"errors": listed} if listed else {}) | members


def of_status(status: int) -> dict[str, Any]:
    """The problem that only a status says, where Django answered before a view did."""
    known = HTTPStatus(status)
    code = _CODES.get(known, known.phrase.lower().replace(" ", "-"))
    return body(code, f"{known.description or known.phrase}.", status=status)


def exception_handler(error: Exception, context: dict[str, Any]) -> Response | None:
    """REST framework's, with the body of a problem; None for what is a fault of the server."""
    translated = _translated(error)
    response = views.exception_handler(translated, context)
    if response is not None and isinstance(translated, exceptions.APIException):
        response.data = _of_exception(translated)
        response.content_type = MEDIA_TYPE
    return response


def flatten(detail: Any, field: str = "") -> Iterator[dict[str, str]]:
    """REST framework's nested details of a ValidationError as `errors`, with paths such as nodes[0].name."""
    if isinstance(detail, Mapping):
        for key, inner in detail.items():
            yield from flatten(inner, _path(field, key))
    elif isinstance(detail, list | tuple):
        for index, inner in enumerate(detail):
            yield from flatten(inner, field if isinstance(inner, str) else f"{field}[{index}]")
    else:
        code = str(getattr(detail, "code", "invalid")).replace("_", "-")
        yield {**({"field": field} if field else {}), "code": code, "detail": str(detail)}


def _path(field: str, key: Any) -> str:
    if isinstance(key, int):
        return f"{field}[{key}]"
    if key in _NO_FIELD:
        return field
    return f"{field}.{key}" if field else str(key)


def _translated(error: Exception) -> Exception:
    if isinstance(error, Http404):
        return exceptions.NotFound()
    if isinstance(error, DjangoPermissionDenied):
        return exceptions.PermissionDenied()
    if isinstance(error, IntegrityError):
        return Conflict()
    if isinstance(error, DataError):
        return exceptions.ValidationError({"detail": ["A value lies outside of what can be stored."]})
    if isinstance(error, OperationalError | InterfaceError):
        log.error("A request fails because of the database: %s", error)
        return Unavailable()
    return error


def _of_exception(error: exceptions.APIException) -> dict[str, Any]:
    if isinstance(error, exceptions.ValidationError):
        errors = list(flatten(error.detail))
        return body("invalid", sentence(errors), status=error.status_code, errors=errors)
    if isinstance(error, ProblemException):
        return body(
            _word(error.get_codes()), str(error.detail), status=error.status_code, errors=error.errors, **error.members
        )
    detail: Any = error.detail
    if isinstance(detail, Mapping):  # of a token that is not accepted
        return body(_word(detail.get("code")), str(detail.get("detail", "")), status=error.status_code)
    return body(_word(error.get_codes()), str(detail), status=error.status_code)


def _word(code: Any) -> str:
    return str(code or "error").replace("_", "-")


def sentence(errors: list[dict[str, Any]]) -> str:
    """What `errors` say, in short."""
    if len(errors) == 1:
        only = errors[0]
        return f"{only['field']}: {only['detail']}" if only.get("field") else str(only["detail"])
    fields = list(dict.fromkeys(error.get("field", "") for error in errors))
    named = ", ".join(field or "the request" for field in fields[:_FIELDS_NAMED])
    return f"{len(errors)} problems, in {named}{' and others' if len(fields) > _FIELDS_NAMED else ''}."
