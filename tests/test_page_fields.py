"""No field of a page's forms and no value in an address makes a page fail, whatever people mistype and programs try."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from html.parser import HTMLParser
from urllib.parse import parse_qsl, urlsplit
from uuid import uuid4

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from devices.models import Area, Organization, Reading, Variable
from rules.models import Alarm, RejectedEvent
from tests import builders

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis"), pytest.mark.timeout(300)]
JUNK = (
    "", " ", "\0", "a\0b", "-1", "0", "1e999", "nan", "9" * 400, "x" * 5_000, "ü'\"<b>{x}%s\\", "[]", '{"a": [{}]}', "[" * 2_000,
    "\N{PILE OF POO}", "2026-13-45", "0001-01-01", "9999-12-31T23:59:59+14:00", "on", "None", "٣", "1,5", "--", "5m", "-5m",
    "99999999999h", str(uuid4()),
)  # fmt: skip
# Values for each field of a form.
VALUES = 6
# Parameters that pages know, asked of every one of them.
PARAMETERS = {
    "/": ("organization", "area", "hours", "search", "page", "form", "template"),
    "/admin/": (
        "ids", "q", "o", "p", "all", "_popup", "id", "uuid", "name__icontains", "organization", "organization__id__exact",
        "role__exact",
        "reason__exact", "received_at__gte", "timestamp__day", "_changelist_filters", "app_label", "model_name", "field_name",
        "term",
    ),
}  # fmt: skip
ENDS = ("delete", "remove", "withdraw")
# Other sites, and the end of who asks.
NO_PAGE = ("/api", "/static", "/admin/log", "/admin/password", "/account/second-factor")


@dataclass
class Form:
    """A form as a browser would send it; `action` may have parameters."""

    action: str
    method: str = "get"
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[str, ...]:
        return (self.method, urlsplit(self.action).path, *sorted(self.fields))


class Page(HTMLParser):
    """Its forms and links, also those that are templates of a script."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address, self._select = address, ""
        self.forms: list[Form] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag == "a":
            self.links.append(found.get("href", ""))
        elif tag == "form":
            self.forms.append(Form(found.get("action") or self._address, found.get("method", "get").lower()))
        elif self.forms and found.get("name") and "__" not in found["name"]:
            self._take_field(tag, found)
        elif tag == "option" and self._select and "selected" in found:
            self.forms[-1].fields[self._select] = found.get("value", "")

    def _take_field(self, tag: str, found: dict[str, str]) -> None:
        self._select = found["name"] if tag == "select" else ""
        fields = self.forms[-1].fields
        if found.get("type") not in ("checkbox", "radio") or "checked" in found:
            fields[found["name"]] = found.get("value", "")


def forms_below(client: Client, start: str) -> Iterator[Form]:
    """Every form of every page of this site that links lead to, and every address as a form of its parameters."""
    waiting, seen = [start], set()
    while waiting:
        address = waiting.pop()
        own = Form(urlsplit(address).path, fields=dict(parse_qsl(urlsplit(address).query)))
        if own.shape in seen or not address.startswith("/") or address.startswith(NO_PAGE) or _site(address) != start:
            continue
        seen.add(own.shape)
        own.fields = dict.fromkeys(PARAMETERS[start], "") | own.fields
        yield own
        answer = client.get(address)
        if answer.streaming or "html" not in answer.headers.get("Content-Type", ""):
            continue
        page = Page(address)
        page.feed(answer.text)
        waiting += page.links
        for form in page.forms:
            if form.shape not in seen and not form.action.startswith(NO_PAGE):
                seen.add(form.shape)
                yield form


def _site(address: str) -> str:
    return "/admin/" if address.startswith("/admin") else "/"


@pytest.fixture
def client() -> Client:
    """Of somebody with a farm that has something of everything."""
    farm: Organization = builders.organization("Basil Farm")
    person = builders.member(farm, "admin", is_staff=True, is_superuser=True)
    builders.member(farm)
    Area.objects.create(organization=farm, name="House")
    sensor = builders.sensor(farm, "Tank", variables={"ph": "number", "leak": "boolean", "mode": "string"})
    builders.switching_chain(sensor, builders.device(farm, "Pump"))
    now = timezone.now()
    Reading.objects.create(variable=Variable.objects.get(name="ph"), timestamp=now - timedelta(hours=1), number=6.1)
    Alarm.objects.create(
        organization=farm, source_type="sensor", originator_uuid=sensor.uuid, type="low", message="x",
        raised_at=now, last_raised_at=now,
    )  # fmt: skip
    RejectedEvent.objects.create(organization=farm, protocol="http", reason="bad-payload", payload="[" * 4_000)
    return builders.client_of(person)


@pytest.mark.parametrize(("start", "requests"), [("/", 60), ("/admin/", 8)])
def test_no_field_makes_a_page_fail(client: Client, start: str, requests: int) -> None:
    """An exception is raised by the client itself; which values a field gets differs from run to run."""
    forms = sorted(forms_below(client, start), key=lambda form: urlsplit(form.action).path.rstrip("/").endswith(ENDS))
    assert len(forms) > 40
    assert {"post"} < {form.method for form in forms}
    for form in forms:
        tried = [(name, junk) for name in form.fields for junk in random.sample(JUNK, VALUES)]
        for name, junk in random.sample(tried, min(len(tried), requests)):
            sent = {**form.fields, name: junk}
            answer = client.post(form.action, sent) if form.method == "post" else client.get(form.action, sent)
            assert answer.status_code < 500, (form.method, form.action, name, junk)


@pytest.mark.parametrize(
    ("page", "method", "sent", "status"),
    [
        ("devices_area_add", "get", {"organization": "--"}, 200),
        ("devices_area_add", "post", {"organization": "x", "name": "y"}, 200),
        ("devices_interlock_add", "post", {"excludes": ["x", "1,5"]}, 200),
        ("devices_devicestate_add", "post", {"allowed_values": "[" * 2_000}, 200),
        ("rules_deadletter_replay", "get", {"q": "a\0b"}, 302),
    ],
)
def test_what_once_made_the_admin_fail(
    client: Client, page: str, method: str, sent: dict[str, str], status: int
) -> None:
    assert getattr(client, method)(reverse(f"admin:{page}"), sent).status_code == status
