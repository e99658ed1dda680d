"""Drive a headless Chromium over its DevTools protocol: open a page, ask its scripts, take a picture."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket

from deploy.local import LocalSystem

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0",
    "--remote-allow-origins=*", "--window-size=1000,800",
)  # fmt: skip
START_SECONDS = 30.0


class Page:
    """One open page."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=20)
        self._ids = count(1)

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def before_each(self, script: str) -> None:
        """Runs in every page that is opened from now on, ahead of its own scripts."""
        self._call("Page.enable")
        self._call("Page.addScriptToEvaluateOnNewDocument", source=script)

    def evaluate(self, script: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str, *, seconds: float = 20.0) -> Any:
        """The value of the expression as soon as it is true; what a page that still loads lacks may come."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if seen := self.evaluate(script):
                    return seen
            except AssertionError as error:
                seen = error
            assert time.monotonic() < deadline, f"{script} stays {seen!r}: {self.evaluate('document.body?.innerText')}"
            time.sleep(0.1)

    def resize(self, width: int, height: int) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def without_cache(self) -> None:
        self._call("Network.enable")
        self._call("Network.setCacheDisabled", cacheDisabled=True)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._socket.close()

    def _call(self, method: str, **parameters: Any) -> Any:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]


def log_in(page: Page, system: LocalSystem, to: str = "/admin/") -> None:
    """As the admin of the demo farm; opens the page that follows."""
    page.open(f"{system.web}/admin/login/?next={to}")
    for field in ("username", "password"):
        page.evaluate(f"document.getElementById('id_{field}').value = {system.farm['admin'][field]!r}")
    page.evaluate("document.forms[0].submit()")
    page.until("document.getElementById('login-form') === null && document.querySelector('#user-tools, nav') !== null")


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a browser whose profile lives in the folder; the test is skipped on machines without one."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("Chromium is not on this machine, and the page is looked at with it")
    log = folder / "chromium.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        with closing(Page(_address(log))) as page:
            yield page
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _address(log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while not (found := re.search(r"DevTools listening on ws://([^/]+)/", log.read_text(errors="replace"))):
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.1)
    pages = requests.get(f"http://{found[1]}/json/list", timeout=10).json()
    address: str = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
    return address
