"""Telemetry that is answered ahead of Django's handler: the same answers, the same counts, and no connection kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from typing import Any

import pytest
from django.core.handlers.wsgi import WSGIHandler
from django.test import RequestFactory
from django_prometheus.middleware import Metrics

from aemos import http_metrics, telemetry_wsgi
from rules import ingest
from tests import builders

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]
READING = b'{"values": {"ph": 6.4}}'
Environ = dict[str, Any]


@pytest.fixture(autouse=True)
def _forget_what_settings_decided() -> Iterator[None]:
    yield
    telemetry_wsgi._is_allowed_host.cache_clear()
    telemetry_wsgi._headers.cache_clear()


@pytest.fixture
def authorization() -> str:
    return f"Bearer {builders.token(builders.sensor(builders.organization()))}"


def environ_of(body: bytes, **changes: str) -> Environ:
    request = RequestFactory().generic("POST", telemetry_wsgi.PATH, body, content_type="application/json")
    return {**request.environ, "wsgi.input": BytesIO(body), **changes}


def answer(application: Callable[..., Iterable[bytes]], environ: Environ) -> tuple[str, dict[str, str], bytes]:
    started: list[tuple[str, list[tuple[str, str]]]] = []
    body = b"".join(application(environ, lambda status, headers, *_: started.append((status, headers))))
    status, headers = started[0]
    return status, dict(headers), body


def not_here(*_: object) -> list[bytes]:
    raise LookupError("this is for Django")


CASES: dict[str, tuple[bytes, dict[str, str]]] = {
    "no JSON": (b"{", {}),
    "no body": (b"", {}),
    "a body that is too large": (b"x" * 1_048_577, {}),
    "an unknown variable": (b'{"values": {"pressure": 1}}', {}),
    "no token": (READING, {"HTTP_AUTHORIZATION": ""}),
    "garbage as a token": (READING, {"HTTP_AUTHORIZATION": "Bearer \xff"}),
    "another scheme": (READING, {"HTTP_AUTHORIZATION": "Basic YTpi"}),
    "a host that is not allowed": (READING, {"HTTP_HOST": "evil.test"}),
    "a host that is none": (READING, {"HTTP_HOST": "a b"}),
    "TLS at the proxy": (b"{", {"HTTP_X_FORWARDED_PROTO": "https"}),
    "accepted": (READING, {}),
    "accepted over TLS": (READING, {"HTTP_X_FORWARDED_PROTO": "https"}),
}


@pytest.mark.parametrize("behind_proxy", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_the_one_that_django_gives(
    case: str, behind_proxy: bool, authorization: str, settings: Any
) -> None:
    settings.ALLOWED_HOSTS = ["testserver"]
    settings.SECURE_SSL_REDIRECT = behind_proxy
    settings.SECURE_HSTS_SECONDS = 3_600 if behind_proxy else 0
    settings.SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if behind_proxy else None
    body, changes = CASES[case]
    environ = {"HTTP_AUTHORIZATION": authorization, **changes}
    django = WSGIHandler()
    ours = answer(telemetry_wsgi.telemetry_first(django), environ_of(body, **environ))
    assert ours == answer(django, environ_of(body, **environ))


def test_only_posts_to_the_one_path_are_taken(authorization: str) -> None:
    application = telemetry_wsgi.telemetry_first(not_here)
    status, _, body = answer(application, environ_of(READING, HTTP_AUTHORIZATION=authorization))
    assert (status, json.loads(body)) == ("202 Accepted", {"accepted": 1, "rejected": 0})
    for change in ({"REQUEST_METHOD": "GET"}, {"PATH_INFO": "/api/v1/telemetry/"}, {"PATH_INFO": "/"}):
        with pytest.raises(LookupError):
            answer(application, environ_of(READING, **change))


def test_a_failure_that_nobody_foresaw_is_a_500_in_json(monkeypatch: pytest.MonkeyPatch, authorization: str) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(ingest, "submit", fails)
    status, _, body = answer(
        telemetry_wsgi.telemetry_first(not_here), environ_of(READING, HTTP_AUTHORIZATION=authorization)
    )
    assert (status, json.loads(body)["code"]) == ("500 Internal Server Error", "internal-error")


def test_requests_are_counted_under_the_names_of_all_others(authorization: str) -> None:
    metrics = Metrics.get_instance()

    def counts() -> list[float]:
        return [
            metrics.requests_by_method.labels(method="POST")._value.get(),
            metrics.responses_by_status_view_method.labels(status="202", view="telemetry", method="POST")._value.get(),
            metrics.requests_latency_by_view_method.labels(view="telemetry", method="POST")._sum.get() > 0,
        ]

    http_metrics.flush()  # what other tests have counted
    before = counts()
    answer(telemetry_wsgi.telemetry_first(not_here), environ_of(READING, HTTP_AUTHORIZATION=authorization))
    http_metrics.flush()
    assert counts() == [before[0] + 1, before[1] + 1, True]
