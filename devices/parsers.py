"""Request bodies of the REST API: bytes in, JSON values out, or a refusal before they can do harm."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import IO, Any

from django.conf import settings
from rest_framework import status
from rest_framework.exceptions import APIException, ParseError
from rest_framework.parsers import BaseParser, JSONParser

# The escapes of NUL and of surrogates: what JSON can say and no database can store.
_SUSPICIOUS = re.compile(rb"\\u(0000|[dD][89a-fA-F])")


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
            raise ParseError("JSON parse error - nested too deeply") from error
        if _SUSPICIOUS.search(body):
            _refuse_unstorable(data)
        return data


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
