"""What every answer of the web process forbids browsers, and that our own pages live with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from deploy.local import LocalSystem, local_system
from tests.browser import browser, log_in

pytestmark = pytest.mark.timeout(180)
WATCH = """
    window.refused = [];
    addEventListener("securitypolicyviolation", (event) => refused.push(`${event.effectiveDirective} ${event.blockedURI}`));
"""
PAGES = [
    "/",
    "/api/v1/docs",
    "/static/notifications/socketio.html",
    "/admin/login/",
    "/account/second-factor",
    "/no-such-page",
]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    with local_system(tmp_path_factory.mktemp("system")) as running:
        running.start("web")
        yield running


def test_no_page_needs_what_the_policy_forbids(system: LocalSystem, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.before_each(WATCH)
        log_in(page, system)
        lists = page.evaluate("[...document.querySelectorAll('#content-main a[href]')].map(a => a.pathname)")
        assert len(lists) > 15
        for path in [*PAGES, *dict.fromkeys(lists)]:
            page.open(system.web + path)
            assert page.evaluate("refused") == [], path
            row = page.evaluate("document.querySelector('#result_list tbody th a, #result_list tbody td a')?.pathname")
            if row:
                page.open(system.web + row)
                assert page.evaluate("refused") == [], row


@pytest.mark.parametrize("path", [*PAGES, "/static/notifications/socketio.js", "/api/v1/sensors", "/api/v1/gateway"])
def test_every_answer_forbids_frames_scripts_of_others_and_devices(system: LocalSystem, path: str) -> None:
    headers = requests.get(system.web + path, headers={"Origin": "https://elsewhere.example"}, timeout=10).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["frame-ancestors"] == "'none'"
    assert policy.get("script-src", policy["default-src"]) in ("'self'", "'none'")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "same-origin"
    assert "camera=()" in headers["Permissions-Policy"]
    assert "Access-Control-Allow-Origin" not in headers


def test_pages_of_other_servers_may_call_the_api_when_they_are_named(tmp_path: Path) -> None:
    with local_system(tmp_path, CORS_ALLOWED_ORIGINS="https://app.example.org") as system:
        system.start("web")
        token = system.farm["sensors"][0]["token"]
        for origin, allowed in (("https://app.example.org", True), ("https://elsewhere.example", False)):
            for path, method in (("/api/v1/telemetry", "POST"), ("/api/v1/sensors", "GET")):
                wish = {"Origin": origin, "Access-Control-Request-Method": method}
                wish["Access-Control-Request-Headers"] = "authorization"
                asked = requests.options(system.web + path, headers=wish, timeout=10)
                assert ("Access-Control-Allow-Origin" in asked.headers) == allowed
            sent = requests.post(
                f"{system.web}/api/v1/telemetry", json={"values": {"ph": 6.1}},
                headers={"Origin": origin, "Authorization": f"Bearer {token}"}, timeout=10,
            )  # fmt: skip
            assert (sent.status_code, sent.headers.get("Access-Control-Allow-Origin")) == (
                202,
                origin if allowed else None,
            )
