"""Every page for growers, wide and on a phone: nothing that axe-core finds, no layout wider than the screen, and light enough."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import axe_core_python
import pytest

from deploy.local import LocalSystem, local_system
from tests.browser import Page, browser, log_in

pytestmark = pytest.mark.timeout(300)
AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
SIZES = {"wide": (1400, 900), "phone": (390, 844)}
FIRST_VIEW_BYTES = 300_000
A_WEEK_AND_AN_ALARM = """
from aemos import demo_week
from devices.models import Sensor
from django.utils import timezone
from rules.models import Alarm
sensor, now = Sensor.objects.first(), timezone.now()
demo_week.fill(list(Sensor.objects.all()), end=now)
Alarm.objects.create(organization=sensor.organization, source_type="sensor", originator_uuid=sensor.uuid, type="pH high",
    severity="critical", message="pH of Reservoir A is above 7", raised_at=now, last_raised_at=now)
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    with local_system(tmp_path_factory.mktemp("system")) as running:
        running.manage("shell", "-v", "0", "-c", A_WEEK_AND_AN_ALARM)
        running.start("web", "scheduler")
        yield running


@pytest.fixture
def page(system: LocalSystem, tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path) as opened:
        log_in(opened, system)
        yield opened


def paths(system: LocalSystem) -> list[str]:
    chain = json.loads(
        system.manage(
            "shell", "-v", "0", "-c",
            "from rules.models import RuleChain; import json; print(json.dumps(str(RuleChain.objects.first().uuid)))",
        ).stdout
    )  # fmt: skip
    sensor, device = system.farm["sensors"][0]["uuid"], system.farm["devices"][0]["uuid"]
    return [
        "/", f"/sensors/{sensor}", f"/devices/{device}", "/rules", f"/rules/{chain}", f"/rules/{chain}/edit", "/rules/new",
        "/rules/new?template=dry-run", "/rules/new?template=light-on", "/operations", "/sensors/new", "/devices/new", "/areas",
        "/farms/new", f"/sensors/{sensor}/connect", "/rules/new?template=steps", f"/rules/{chain}/edit?form=steps",
        "/account/preferences", "/people",
    ]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing_and_nothing_is_wider_than_the_screen(system: LocalSystem, page: Page, size: str) -> None:
    page.resize(*SIZES[size])
    found: dict[str, Any] = {}
    for path in paths(system):
        page.open(system.web + path)
        time.sleep(0.3)
        page.evaluate(AXE + "; undefined")
        wrong = page.evaluate(
            "axe.run({ resultTypes: ['violations'] }).then(({ violations }) => "
            "violations.map(each => [each.id, each.nodes.map(node => node.html.slice(0, 120))]))"
        )
        too_wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
        if wrong or too_wide:
            found[path] = [*wrong, *(["wider than the screen"] if too_wide else [])]
    assert found == {}


def test_the_first_view_of_a_page_is_light(system: LocalSystem, page: Page) -> None:
    """Everything that the page itself asks for, as it goes over the wire, with nothing in the cache."""
    page.without_cache()
    heavy = {}
    for path in paths(system):
        page.open(system.web + path)
        page.until("document.readyState === 'complete'")
        time.sleep(0.5)
        size = page.evaluate(
            "performance.getEntriesByType('resource').concat(performance.getEntriesByType('navigation'))"
            ".reduce((sum, each) => sum + each.transferSize, 0)"
        )
        assert size > 1_000, path
        if size > FIRST_VIEW_BYTES:
            heavy[path] = size
    assert heavy == {}


def test_nothing_jumps_while_a_page_comes(system: LocalSystem, page: Page) -> None:
    """The cumulative layout shift, which browsers measure; above 0.1 people notice."""
    page.before_each(
        "window.shift = 0; new PerformanceObserver(list => { for (const each of list.getEntries()) shift += each.value })"
        ".observe({ type: 'layout-shift', buffered: true })"
    )
    jumping = {}
    for path in paths(system)[:5]:
        page.open(system.web + path)
        time.sleep(1.5)
        if (shift := page.evaluate("shift")) > 0.1:
            jumping[path] = shift
    assert jumping == {}


def test_a_phone_acknowledges_an_alarm_in_three_taps(system: LocalSystem, page: Page) -> None:
    """Logged in: the page is open, one tap on the button; no menu and no question in between."""
    page.resize(*SIZES["phone"])
    page.open(system.web + "/")
    button = "[...document.querySelectorAll('button')].find(each => each.innerText === 'Acknowledge')"
    top, height, width = page.evaluate(
        f"(() => {{ const box = {button}.getBoundingClientRect(); return [box.top, box.height, box.width]; }})()"
    )
    assert top < SIZES["phone"][1], "the button is not on the first screen"
    assert min(height, width) >= 44
    page.evaluate(f"{button}.click()")
    page.until("document.body.innerText.includes('acknowledged by admin')")
