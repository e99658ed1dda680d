"""The WSGI application that gunicorn serves: telemetry, and Django behind what its WSGI handler leaves to the server.

Django reads a body only where CONTENT_LENGTH says how long it is, and sends a body in answer to HEAD; gevent's server corrects
neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from typing import Any

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "aemos.settings")
Environ = dict[str, Any]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]


def with_bodies_of_unknown_length(inner: Application) -> Application:
    """Read a body sent in chunks, at most one byte more than is allowed, and give it its length, so that Django can judge it."""
    from django.conf import settings

    limit = settings.DATA_UPLOAD_MAX_MEMORY_SIZE
    assert limit is not None  # noqa: S101  settings.py sets it

    def application(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        if "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "").lower():
            try:
                body = environ["wsgi.input"].read(limit + 1)
            except OSError as error:
                environ |= {"wsgi.input": _Broken(error), "CONTENT_LENGTH": "1"}
            else:
                environ |= {"wsgi.input": BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        return inner(environ, start_response)

    return application


def without_bodies_for_head(inner: Application) -> Application:
    """Send the headers alone in answer to HEAD: a client that keeps the connection would read a body as its next answer."""

    def application(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        response = inner(environ, start_response)
        return _HeadersOnly(response) if environ["REQUEST_METHOD"] == "HEAD" else response

    return application


class _Broken:
    """A body that ended before it was complete: whoever reads it learns why."""

    def __init__(self, error: OSError) -> None:
        self._error = error

    def read(self, *_: int) -> bytes:
        raise self._error

    readline = read


class _HeadersOnly:
    """No bytes of a response, which is closed as if they had been sent."""

    def __init__(self, response: Iterable[bytes]) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        return iter(())

    def close(self) -> None:
        close = getattr(self._response, "close", None)
        if close is not None:
            close()


django_application = get_wsgi_application()

from aemos.telemetry_wsgi import telemetry_first  # noqa: E402  Django is set up above

application = without_bodies_for_head(with_bodies_of_unknown_length(telemetry_first(django_application)))
