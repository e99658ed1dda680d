"""Request bodies of the REST API: bytes in, JSON values out, or a refusal before they can do harm."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from typing import IO, Any

from django.conf import settings
from rest_framework import status
from rest_framework.exceptions import APIException, ParseError
from rest_framework.parsers import BaseParser, JSONParser

# Levels of lists and objects in each other. No chain needs so many, and all that reads the value can go so deep.
MAXIMUM_DEPTH = 100
# The escapes of NUL and of surrogates: what JSON can say and no database can store.
_SUSPICIOUS = re.compile(rb"\\u(0000|[dD][89a-fA-F])")


_TOO_DEEP = f"JSON parse error - nested too deeply, at most {MAXIMUM_DEPTH} levels"


class RequestTooLarge(APIException):
    status_code = status.HTTP_413_REQUEST_ENTITY_TOO_LARGE
    default_code = "too-large"


class BoundedJSONParser(BaseParser):
    """JSON of at most DATA_UPLOAD_MAX_MEMORY_SIZE bytes.

    No subclass of JSONParser: for those REST framework reads the body itself, and answers one too large with an HTML page.
    """

    media_type = "application/json"

    def parse(
        self, stream: IO[Any], media_type: str | None = None, parser_context: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        limit = settings.DATA_UPLOAD_MAX_MEMORY_SIZE
        assert limit is not None  # noqa: S101  settings.py sets it
        body = stream.read(limit + 1)
        if len(body) > limit:
            raise RequestTooLarge(f"The request is larger than {limit} bytes.")
        try:
            data: dict[str, Any] = JSONParser().parse(BytesIO(body), media_type, parser_context)
        except RecursionError as error:
            raise ParseError(_TOO_DEEP) from error
        if body.count(b"[") + body.count(b"{") > MAXIMUM_DEPTH:
            _refuse_deep(data)
        if _SUSPICIOUS.search(body):
            _refuse_unstorable(data)
        return data


def _refuse_deep(data: object) -> None:
    level: list[object] = [data]
    for _ in range(MAXIMUM_DEPTH + 1):
        level = [each for value in level for each in _inner(value)]
        if not level:
            return
    raise ParseError(_TOO_DEEP)


def _inner(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse_unstorable(data: object) -> None:
    for text in _texts(data):
        if "\x00" in text:
            raise ParseError("JSON parse error - a text holds a NUL character")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ParseError("JSON parse error - a text holds half of a surrogate pair") from error


def _texts(data: object) -> Iterator[str]:
    """Every text of a JSON value, keys included; with a stack of its own, because the value may be nested deeply."""
    stack = [data]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, dict):
            stack.extend(value)
            stack.extend(value.values())
