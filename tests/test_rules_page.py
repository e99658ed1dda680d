"""The examples of docs/rules.md, imported and run as they stand there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.test import Client
from django.utils import timezone
from rest_framework.test import APIClient

from devices.models import Device, DeviceState, Organization, Sensor, StateChange, Variable
from rules import ingest, jobs
from rules.journal import slots
from rules.processing import index, schedules
from tests import builders

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis", "_old_times_count")]
PAGE = (Path(__file__).parent.parent / "docs" / "rules.md").read_text()
DAY, ZONE = date(2026, 5, 1), ZoneInfo("Europe/Berlin")
BY_THE_CLOCK = "the clock"


class Example:
    """One section of the page: its sensors and devices, its chains with their sentences, and a table of what happens."""

    def __init__(self, title: str) -> None:
        self.text = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
        self.documents = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", self.text, re.DOTALL)]
        self.sentences = re.findall(r"^> (.*)$", self.text, re.MULTILINE)

    def rows(self, first: str) -> Iterator[list[str]]:
        """Of the table whose first column is called so."""
        table = self.text.split(f"\n| {first} |")[1].split("\n\n")[0]
        for line in table.splitlines()[2:]:
            yield [cell.strip() for cell in line.strip("|").split("|")]


class Farm:
    def __init__(self, example: Example, clock: Clock) -> None:
        self.example = example
        self.clock = clock
        self.organization: Organization = builders.organization()
        self.tokens: dict[str, str] = {}
        for what, uuid, has in example.rows("what"):
            kind, name = what.split(" ", 1)
            fields = re.findall(r"`(\w+)` (\w+)(, \[momentary\])?", has)
            self._add(kind, name, uuid=uuid.strip("`"), fields=fields)
        self.api: Any = APIClient()
        self.api.force_authenticate(builders.member(self.organization, "operator"))
        self.told: set[int] = set()

    def _add(self, kind: str, name: str, *, uuid: str, fields: list[tuple[str, str, str]]) -> None:
        if kind == "sensor":
            sensor = Sensor.objects.create(organization=self.organization, uuid=uuid, name=name)
            for field, datatype, _ in fields:
                Variable.objects.create(sensor=sensor, name=field, datatype=datatype)
            self.tokens[name] = builders.token(sensor)
        else:
            device = Device.objects.create(organization=self.organization, uuid=uuid, name=name)
            for field, datatype, momentary in fields:
                state_kind = DeviceState.Kind.MOMENTARY if momentary else DeviceState.Kind.LEVEL
                DeviceState.objects.create(device=device, name=field, datatype=datatype, kind=state_kind)

    def import_all(self) -> list[str]:
        """Gives what each chain says of itself."""
        sentences = []
        for document in self.example.documents:
            body = {"organization": str(self.organization.uuid), "document": document}
            answer = self.api.post("/api/v1/rule-chains/import", body)
            assert answer.status_code == 201, answer.json()
            sentences.append(answer.json()["sentence"])
            assert self.api.post(f"/api/v1/rule-chains/{answer.json()['uuid']}/enable").status_code == 200
        return sentences

    def report(self, values: str) -> None:
        (token,) = self.tokens.values()
        event = {"values": json.loads(values), "timestamp": self.clock.now.isoformat()}
        headers = {"authorization": f"Bearer {token}"}
        answer = Client().post("/api/v1/telemetry", event, content_type="application/json", headers=headers)
        assert answer.status_code == 202, answer.content

    def drain(self) -> None:
        index.shared().refresh(at_once=True)
        for slot in slots.slots():
            jobs.drain(slot.lane, slot.partition)

    def done(self) -> str:
        """What was switched since this was asked last."""
        rows = StateChange.objects.exclude(pk__in=self.told).select_related("state__device").order_by("pk")
        self.told |= {row.pk for row in rows}
        return ", ".join(f"{row.state.device.name} {row.state.name} {row.value}" for row in rows)


class Clock:
    """The clock of the server, which stands at the time of the row."""

    now = datetime.combine(DAY, time(5), ZONE).astimezone(UTC)

    def set(self, at: str) -> None:
        self.now = datetime.combine(DAY, time.fromisoformat(at), ZONE).astimezone(UTC)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timezone, "now", lambda: found.now)
    monkeypatch.setattr(ingest, "now", lambda: found.now)
    return found


@pytest.mark.parametrize("title", ["Dosing against a high pH", "Ebb and flow"])
def test_an_example_does_what_the_page_says(title: str, clock: Clock) -> None:
    example = Example(title)
    farm = Farm(example, clock)
    assert farm.import_all() == example.sentences
    rows = list(example.rows("at"))
    assert len(rows) > 5
    for at, reported, done, _ in rows:
        clock.set(at)
        if reported == BY_THE_CLOCK:
            assert schedules.shared().fire(clock.now) == 1
        else:
            farm.report(reported.strip("`"))
        farm.drain()
        assert farm.done() == done, f"at {at}"


def test_every_chain_of_the_page_is_part_of_an_example() -> None:
    tried = [
        document for title in ("Dosing against a high pH", "Ebb and flow") for document in Example(title).documents
    ]
    assert len(tried) == PAGE.count("```json") == 3
