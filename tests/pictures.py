"""`make pictures`: starts a demo farm, opens its pages in Chromium, and writes the pictures of the guides to docs/pictures."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from deploy.local import LocalSystem, local_system
from deploy.programs import REPOSITORY
from tests.browser import Page, browser, log_in

PICTURES = REPOSITORY / "docs" / "pictures"
WIDE, PHONE = (1200, 800), (390, 844)
FARM = """
from datetime import timedelta
from aemos import demo_week
from devices.models import Area, Device, DeviceState, Organization, Sensor, StateChange
from django.utils import timezone
from rules.models import Alarm
now, farm = timezone.now(), Organization.objects.get()
sensors = list(Sensor.objects.order_by("name"))
demo_week.fill(sensors, end=now)
house = Area.objects.create(organization=farm, name="Greenhouse 1")
Sensor.objects.update(area=house)
Device.objects.update(area=house, connected=True, connection_changed_at=now - timedelta(days=2), last_seen_at=now)
for hours in (20, 13, 6):
    for minutes, value in ((0, "on"), (50, "off")):
        at = now - timedelta(hours=hours) + timedelta(minutes=minutes)
        state = DeviceState.objects.get(device__name="Dosing pump")
        StateChange.objects.create(effect_key=f"{hours}{value}", state=state, value=value, source="rule", timestamp=at,
            actor="Dose when pH is high / pump on" if value == "on" else "Stop dosing / pump off", command_state="applied")
Alarm.objects.create(organization=farm, source_type="sensor", originator_uuid=sensors[1].uuid, type="Water too low",
    severity="critical", message="The water level of Reservoir B is 14 %: the pump was stopped.",
    raised_at=now - timedelta(minutes=7), last_raised_at=now)
"""


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, local_system(Path(folder)) as system, browser(Path(folder)) as page:
        system.manage("shell", "-v", "0", "-c", FARM)
        system.start("web", "worker", "scheduler")
        log_in(page, system)
        sensor = system.farm["sensors"][0]["uuid"]
        for name, path, size in (
            ("overview", "/", WIDE),
            ("overview-phone", "/", PHONE),
            ("charts", f"/sensors/{sensor}?hours=168", WIDE),
            ("device", f"/devices/{system.farm['devices'][0]['uuid']}", WIDE),
            ("rule-templates", "/rules/new", WIDE),
            ("operations", "/operations", WIDE),
            ("people", "/people", WIDE),
            ("preferences", "/account/preferences", PHONE),
        ):
            _take(page, system.web + path, name, size)
        _make_rule(page, system)
        print(f"The pictures are in {PICTURES}.")


def _take(page: Page, url: str, name: str, size: tuple[int, int]) -> None:
    page.resize(*size)
    page.open(url)
    _shoot(page, name)


def _shoot(page: Page, name: str) -> None:
    time.sleep(2)  # charts are drawn after the page has come
    page.picture(PICTURES / f"{name}.png")
    print(name, flush=True)


def _make_rule(page: Page, system: LocalSystem) -> None:
    """A template, filled in, and what it would have done."""
    _take(page, f"{system.web}/rules/new?template=ph-down", "rule-form", (1200, 900))
    page.evaluate("document.querySelector('[name=when-0-value]').value = '6.4'")
    page.evaluate("document.querySelector('#rule').requestSubmit()")
    page.until("document.body?.innerText.includes('What it would have done')")
    page.resize(1200, 900)
    _shoot(page, "rule-trial")
    page.evaluate("location.href = location.pathname + '/edit?form=steps'")
    page.until("document.querySelector('[data-steps]') !== null")
    _shoot(page, "rule-steps")


if __name__ == "__main__":
    main()
