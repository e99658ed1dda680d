"""The overview in a real browser beside a whole system: news come by the gateway, and without it the page looks by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from deploy.local import LocalSystem, local_system
from tests.browser import Page, browser, log_in
from tests.system_clients import http_post, reading

pytestmark = pytest.mark.timeout(180)
RENEW_SECONDS = 10
# By then the workers know that somebody watches.
KNOWN_SECONDS = 4


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    with local_system(tmp_path_factory.mktemp("system")) as running:
        running.start()
        yield running


@pytest.fixture
def page(system: LocalSystem, tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path) as opened:
        log_in(opened, system, "/")
        yield opened


def report(system: LocalSystem, ph: float) -> None:
    assert http_post(system, system.farm["sensors"][0], reading(ph=ph)).status_code == 202


def test_news_come_without_a_look(system: LocalSystem, page: Page) -> None:
    report(system, 6.0)
    page.until(f"{tile('ph')} === '6'")
    page.until("heard.isLive()")
    time.sleep(KNOWN_SECONDS)
    page.evaluate(
        "window.looked = 0; const own = fetch; fetch = (...all) => { looked += 1; return own(...all); }; undefined"
    )
    report(system, 6.13)
    page.until(f"{tile('ph')} === '6.13'", seconds=8)
    assert page.evaluate("looked") == 0, "the reading itself was told"
    report(system, 7.2)
    page.until("[...document.querySelectorAll('.state strong')].some(each => each.textContent === 'on')", seconds=8)
    assert page.evaluate("looked") > 0, "what else happened is asked of the server"


def test_a_chart_is_drawn_anew_when_a_reading_comes(system: LocalSystem, page: Page) -> None:
    report(system, 6.2)
    page.open(f"{system.web}/sensors/{system.farm['sensors'][0]['uuid']}")
    numbers = "document.querySelector('[data-numbers=ph]').innerText"
    page.until(f"{numbers}.includes('now 6.2')")
    time.sleep(KNOWN_SECONDS)
    report(system, 6.27)
    page.until(f"{numbers}.includes('now 6.27')", seconds=30)


def test_without_the_gateway_the_page_looks_by_itself(system: LocalSystem, page: Page) -> None:
    page.until("heard.isLive()")
    system.stop("gateway")
    try:
        page.until("!heard.isLive()")
        report(system, 6.31)
        page.until(f"{tile('ph')} === '6.31'", seconds=3 * RENEW_SECONDS)
    finally:
        system.start("gateway")
    page.until("heard.isLive()", seconds=40)


def test_a_page_of_others_gets_no_token(system: LocalSystem) -> None:
    assert requests.post(f"{system.web}/live", timeout=10).status_code == 403
    assert requests.get(f"{system.web}/live", timeout=10, allow_redirects=False).status_code in (302, 405)


def tile(name: str) -> str:
    return (
        "[...document.querySelectorAll('[data-live]')].find(each => "
        f"each.querySelector('.name').textContent === '{name}')?.querySelector('[data-value]')?.textContent"
    )
