"""The examples of Socket.IO against a real system: they log in, are told of changes, and go on after a break."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from deploy.local import LocalSystem, local_system
from deploy.programs import REPOSITORY
from tests.browser import Page, browser
from tests.waiting import until

pytestmark = pytest.mark.timeout(180)
PAGE = "/static/notifications/socketio.html"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    with local_system(tmp_path_factory.mktemp("system")) as running:
        running.start("web", "gateway")
        yield running


def switch(system: LocalSystem, value: str) -> None:
    """A person switches the demo's pump."""
    login = requests.post(f"{system.web}/api/v1/auth/login", json=system.farm["admin"], timeout=10).json()
    pump = system.farm["devices"][0]["uuid"]
    answer = requests.post(
        f"{system.web}/api/v1/device-state-instances",
        json={"deviceUuid": pump, "stateName": "power", "value": value},
        headers={"Authorization": f"Bearer {login['access']}"},
        timeout=10,
    )
    assert answer.status_code == 201, answer.text


def log_in(page: Page, system: LocalSystem, password: str) -> None:
    page.open(system.web + PAGE)
    for field, value in {"username": "admin", "password": password}.items():
        page.evaluate(f"document.forms[0].{field}.value = {value!r}")
    page.evaluate("document.forms[0].requestSubmit()")


def test_the_page_shows_states_and_messages_and_goes_on_after_a_break(system: LocalSystem, tmp_path: Path) -> None:
    status, states, told = ("document.getElementById('status')", "states.innerText", "messages.innerText")
    with browser(tmp_path) as page:
        log_in(page, system, "wrong")
        page.until(f"{status}.dataset.kind === 'refused'")
        log_in(page, system, system.farm["admin"]["password"])
        page.until(f"{status}.dataset.kind === 'live'")
        assert "Dosing pump" in page.evaluate(states)
        assert "Fan" in page.evaluate(states)
        switch(system, "on")
        page.until(f"{told}.includes('Dosing pump: power = on')")
        system.kill("gateway")
        page.until(f"{status}.dataset.kind === 'away'")
        switch(system, "off")
        system.start("gateway")
        page.until(f"{status}.dataset.kind === 'live'")
        page.until(f"{told}.includes('Dosing pump: power = off')")
        assert page.evaluate("document.querySelectorAll('#messages tr').length") == 2
        assert "off" in page.evaluate("states.rows[0].cells[2].innerText")
        page.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5_000


def test_the_listener_prints_what_it_missed_while_the_gateway_was_away(system: LocalSystem, tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps(system.farm))
    log = tmp_path / "listener.log"
    options = ["--demo", str(tmp_path / "demo.json"), "--web", system.web, "--gateway", system.socketio]
    with log.open("wb") as output:
        command = [sys.executable, "-m", "examples.socketio_listener", *options]
        child = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=output)
    try:
        until(lambda: "listening on" in log.read_text())
        switch(system, "on")
        until(lambda: "Dosing pump: power = on" in log.read_text())
        system.kill("gateway")
        until(lambda: "not connected" in log.read_text())
        switch(system, "off")
        system.start("gateway")
        until(lambda: "Dosing pump: power = off" in log.read_text())
        assert log.read_text().count("Dosing pump: power = ") == 2
        assert "Traceback" not in log.read_text()
    finally:
        child.kill()
        child.wait()


def test_the_library_is_served_beside_the_page_with_its_licence(system: LocalSystem) -> None:
    for name in ("socket.io.min.js", "socket.io.LICENSE.txt"):
        answer = requests.get(f"{system.web}/static/notifications/{name}", timeout=10)
        assert answer.status_code == 200
        assert "MIT" in answer.text
