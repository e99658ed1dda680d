"""HTTP as it goes over the wire: what gunicorn, its gevent worker and Django answer to clients that are not browsers."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from deploy.local import LocalSystem, local_system
from tests.problems import problem

TELEMETRY = "/api/v1/telemetry"
READING = b'{"values": {"ph": 6.4}}'


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    with local_system(tmp_path_factory.mktemp("system")) as running:
        running.start("web")
        yield running


def chunked(system: LocalSystem, path: str, *chunks: bytes, **headers: str) -> tuple[int, Any]:
    with closing(http.client.HTTPConnection(urlsplit(system.web).netloc, timeout=5)) as connection:
        headers = {"Content-Type": "application/json", **headers}
        connection.request("POST", path, body=iter(chunks), headers=headers, encode_chunked=True)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def bearer(system: LocalSystem) -> dict[str, str]:
    return {"Authorization": f"Bearer {system.farm['sensors'][0]['token']}"}


@pytest.mark.parametrize(
    "path", ["/admin/login/", "/api/v1/schema", "/api/v1/sensors", "/api/v1/health/liveness", "/", "/no"]
)
def test_an_answer_to_head_has_no_body_and_the_next_one_is_read_in_step(system: LocalSystem, path: str) -> None:
    address = urlsplit(system.web)
    request = f"HEAD {path} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n"
    request += f"GET /api/v1/health/liveness HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=5) as raw:
        raw.sendall(request.encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    first, _, rest = answer.partition(b"\r\n\r\n")

    assert first.startswith(b"HTTP/1.1 ")
    assert rest.startswith(b"HTTP/1.1 200 "), rest[:200]


def test_a_body_sent_in_chunks_is_read_whole(system: LocalSystem) -> None:
    status, answer = chunked(system, TELEMETRY, READING[:7], READING[7:], **bearer(system))
    assert (status, answer["accepted"]) == (202, 1)

    login = json.dumps({"username": "nobody", "password": "wrong-horse"}).encode()
    status, answer = chunked(system, "/api/v1/auth/login", login[:9], login[9:])
    assert status == 401, answer


def test_a_body_sent_in_chunks_is_bounded_like_any_other(system: LocalSystem) -> None:
    status, answer = chunked(system, TELEMETRY, b" " * 700_000, b" " * 700_000, **bearer(system))
    assert (status, answer["code"]) == (413, "too-large")

    assert chunked(system, "/api/v1/auth/login", b" " * 700_000, b" " * 700_000)[0] == 413


def test_chunks_that_end_too_soon_are_a_bad_request(system: LocalSystem) -> None:
    address = urlsplit(system.web)
    head = f"POST {TELEMETRY} HTTP/1.1\r\nHost: {address.netloc}\r\nTransfer-Encoding: chunked\r\n"
    head += f"Authorization: {bearer(system)['Authorization']}\r\nConnection: close\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=5) as raw:
        raw.sendall(head.encode() + b"zz\r\nno length\r\n")
        raw.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: raw.recv(65536), b""))

    assert answer.startswith(b"HTTP/1.1 400 "), answer[:200]


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/html"])
@pytest.mark.parametrize("verb", ["GET", "POST", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("path", ["/api/v1/docs", "/api/v1/schema"])
def test_an_invalid_token_is_no_error_of_the_server(system: LocalSystem, path: str, verb: str, accept: str) -> None:
    headers = {"Authorization": "Bearer no.such.token", "Accept": accept}
    answer = requests.request(verb, system.web + path, headers=headers, timeout=5)

    assert answer.status_code in (200, 401, 405, 406)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/api/v1/sensors/0", 404, "not-found"),
        ("POST", "/api/v1/rule-chains/0/disable", 404, "not-found"),
        ("PUT", "/api/v1/telemetry", 405, "method-not-allowed"),
        ("POST", "/api/v1/health/liveness", 403, "permission-denied"),  # no CSRF token
    ],
)
def test_what_django_refuses_before_a_view_is_a_problem_of_its_own_length(
    system: LocalSystem, method: str, path: str, status: int, code: str
) -> None:
    with requests.Session() as session:
        answers = [session.request(method, system.web + path, timeout=5) for _ in range(2)]
    for answer in answers:
        assert problem(answer, status)["code"] == code
        assert int(answer.headers["Content-Length"]) == len(answer.content)


def test_the_root_leads_to_the_admin(system: LocalSystem) -> None:
    answer = requests.get(system.web + "/", timeout=5)

    assert answer.history[0].status_code == 302
    assert answer.url.startswith(system.web + "/admin/")


def test_a_scan_does_not_grow_the_metrics(system: LocalSystem) -> None:
    def lines() -> int:
        return len(requests.get(f"{system.web}/api/v1/metrics/prometheus", timeout=5).text.splitlines())

    paths = ("/", TELEMETRY, "/api/v1/sensors", "/api/v1/health", "/admin/", "/admin/login/", "/api/v1/schema")
    for path in paths:
        requests.get(system.web + path, timeout=5)
        requests.post(system.web + path, timeout=5)
    before = lines()
    odd = [f"ODD{number}" for number in range(20)]
    for path in (*paths, *(f"/{number}" for number in range(20))):
        for verb in (*odd, "DELETE", "PATCH", "PUT", "TRACE", "OPTIONS", "CONNECT"):
            requests.request(verb, system.web + path, timeout=5, allow_redirects=False)
    text = requests.get(f"{system.web}/api/v1/metrics/prometheus", timeout=5).text

    assert not re.search("ODD", text)
    # One more method, "<other>", of each view, and what these views answer to it.
    assert len(text.splitlines()) - before < 40 * (len(paths) + 1)


def test_the_server_says_where_socketio_is_served(system: LocalSystem) -> None:
    answer = requests.get(f"{system.web}/api/v1/gateway", timeout=5).json()

    assert answer == {"socketio": f"http://127.0.0.1:{system.environment['SOCKETIO_PORT']}"}
