"""The admin's pages of rejected events, dead letters and replays, as people of different roles use them."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from devices.models import Organization
from rules.models import DeadLetter, RejectedEvent, Replay, Status
from tests import builders

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
WHEN = datetime(2026, 5, 1, 6, tzinfo=UTC)
LIST = "admin:rules_rejectedevent_changelist"
REPLAY = "admin:rules_rejectedevent_replay"


def rejected(of: Organization | None, **fields: Any) -> RejectedEvent:
    told: dict[str, Any] = {
        "organization": of, "event_id": uuid4(), "protocol": "http", "source_type": "sensor", "originator_uuid": str(uuid4()),
        "type": "telemetry-data", "priority": 5, "lane": "normal", "timestamp": WHEN, "reason": "circuit-open",
        "detail": "The queue is full.", "payload": '{"values":{"ph":6.1}}', "queue_depth": 60_123, "threshold": 50_000,
        "circuit_state": "OPEN", "received_at": WHEN,
    }  # fmt: skip
    return RejectedEvent.objects.create(**{**told, **fields})


def dead(of: Organization, **fields: Any) -> DeadLetter:
    told: dict[str, Any] = {
        "organization": of, "failure_key": f"{uuid4()}:", "event_id": uuid4(), "lane": "normal", "originator_uuid": uuid4(),
        "event": {"values": {"ph": 6.1}}, "error": "division by zero", "node": "convert", "attempts": 4,
        "traceback": "Traceback: line 7", "created_at": WHEN,
    }  # fmt: skip
    return DeadLetter.objects.create(**{**told, **fields})


@pytest.fixture
def organization() -> Organization:
    return builders.organization()


def staff(of: Organization, role: str = "operator") -> Client:
    person = builders.member(of, role)
    client = Client()
    client.force_login(person)
    return client


def superuser() -> Client:
    client = Client()
    client.force_login(builders.user(is_superuser=True, is_staff=True))
    return client


def shown(client: Client, page: str = LIST, **query: Any) -> set[int]:
    return {row.pk for row in client.get(reverse(page), query).context["cl"].queryset}


def act(client: Client, action: str, *rows: Any, page: str = LIST) -> Any:
    return client.post(reverse(page), {"action": action, "_selected_action": [row.pk for row in rows]})


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ({"reason": "enqueue-error"}, {"reason": "enqueue-error"}),
        ({"priority": "10"}, {"priority": 10}),
        ({"lane": "low"}, {"lane": "low"}),
        ({"protocol": "mqtt"}, {"protocol": "mqtt"}),
        ({"status": "discarded"}, {"status": "discarded"}),
        ({"from": "2026-05-01T07:00"}, {"received_at": WHEN + timedelta(hours=2)}),
        ({"to": "2026-05-01T05:00"}, {"received_at": WHEN - timedelta(hours=2)}),
        ({"q": "Limit"}, {"detail": "the limit is reached"}),
    ],
)
def test_every_filter_finds_its_rows_and_a_replay_of_it_takes_the_same(
    organization: Organization, query: dict[str, str], fields: dict[str, Any]
) -> None:
    rejected(organization)
    wanted = rejected(organization, **fields)
    client = staff(organization)
    assert shown(client, **query) == {wanted.pk}
    assert f"replay/?{next(iter(query))}=" in client.get(reverse(LIST), query).text
    if "status" in query:
        return
    client.post(f"{reverse(REPLAY)}?{'&'.join(f'{name}={value}' for name, value in query.items())}", {"rate": "5"})
    started = Replay.objects.get()
    assert started.total == 1
    assert RejectedEvent.objects.filter(**started.criteria).get() == wanted


def test_a_search_finds_an_event_id_an_originator_and_a_row(organization: Organization) -> None:
    row = rejected(organization)
    rejected(organization)
    for value in (row.event_id, row.originator_uuid, row.uuid):
        assert shown(superuser(), q=str(value)) == {row.pk}
    assert shown(superuser(), q=str(uuid4())) == set()


def test_a_filter_that_makes_no_sense_is_no_error(organization: Organization) -> None:
    assert superuser().get(reverse(LIST), {"from": "yesterday"}).status_code == 302
    answer = superuser().get(reverse(REPLAY), {"from": "yesterday"}, follow=True)
    assert "Enter a valid date" in answer.text


def test_the_page_of_an_event_shows_payload_circuit_and_depth(organization: Organization) -> None:
    row = rejected(organization, payload='{"values":{"note":"<script>"}}')
    text = staff(organization, "viewer").get(reverse("admin:rules_rejectedevent_change", args=[row.pk])).text
    for part in ("60123", "50000", "OPEN", "&lt;script&gt;", "&quot;values&quot;: {"):
        assert part in text.replace("60,123", "60123").replace("50,000", "50000")
    assert "<script>&quot;" not in text


def test_the_page_of_a_dead_letter_shows_error_node_attempts_and_traceback(organization: Organization) -> None:
    row = dead(organization)
    text = staff(organization, "viewer").get(reverse("admin:rules_deadletter_change", args=[row.pk])).text
    for part in ("division by zero", "convert", "4", "Traceback: line 7"):
        assert part in text


def test_selected_events_are_replayed_after_a_look_at_their_number(organization: Organization) -> None:
    rows = [rejected(organization) for _ in range(3)]
    client = staff(organization)
    answer = act(client, "replay_selected", *rows[:2])
    assert answer.status_code == 302
    page = client.get(answer["Location"])
    assert "<strong>2</strong> of these" in page.text
    assert not Replay.objects.exists(), "looking starts nothing"
    answer = client.post(answer["Location"], {"rate": "25", "with_commands": "on"})
    started = Replay.objects.get()
    assert answer["Location"] == reverse("admin:rules_replay_change", args=[started.pk])
    assert (started.rate, started.with_commands, started.total) == (25, True, 2)
    assert (started.organization, started.kind) == (organization, Replay.Kind.REJECTED)
    assert started.created_by


def test_a_rate_that_cannot_be_is_told_on_the_form(organization: Organization) -> None:
    rejected(organization)
    answer = staff(organization).post(reverse(REPLAY), {"rate": "0"})
    assert answer.context["form"].errors.keys() == {"rate"}
    assert not Replay.objects.exists()


def test_a_replay_of_a_filter_touches_no_other_organization(organization: Organization) -> None:
    other = builders.organization()
    mine, foreign = rejected(organization), rejected(other)
    client = staff(organization)
    client.post(reverse(REPLAY), {"rate": "5"})
    started = Replay.objects.get()
    assert list(RejectedEvent.objects.filter(**started.criteria)) == [mine]
    refused = client.post(f"{reverse(REPLAY)}?ids={foreign.pk}", {"rate": "5"}, follow=True)
    assert "one organization in which you may replay" in refused.text
    assert client.get(f"{reverse(REPLAY)}?organization={other.uuid}").status_code == 302
    assert Replay.objects.count() == 1


def test_a_superuser_replays_over_all_organizations(organization: Organization) -> None:
    rows = [rejected(organization), rejected(builders.organization())]
    superuser().post(reverse(REPLAY), {"rate": "5"})
    superuser().post(f"{reverse(REPLAY)}?ids={rows[0].pk},{rows[1].pk}", {"rate": "5"})
    assert [(row.organization, row.total) for row in Replay.objects.all()] == [(None, 2), (None, 2)]


def test_viewers_look_and_decide_nothing(organization: Organization) -> None:
    row, client = rejected(organization), staff(organization, "viewer")
    page = client.get(reverse(LIST))
    assert "Replay everything" not in page.text
    assert "replay_selected" not in page.text
    assert "discard_selected" not in page.text
    act(client, "discard_selected", row)
    act(client, "replay_selected", row)
    assert client.get(reverse(REPLAY)).status_code == 403
    assert client.post(reverse(REPLAY), {"rate": "5"}).status_code == 403
    row.refresh_from_db()
    assert (row.status, Replay.objects.exists()) == (Status.OPEN, False)


def test_discarding_marks_only_what_is_kept_and_one_s_own(organization: Organization) -> None:
    mine = [rejected(organization), rejected(organization, status=Status.REPLAYED)]
    foreign = rejected(builders.organization())
    client = staff(organization)
    answer = client.post(
        reverse(LIST),
        {"action": "discard_selected", "_selected_action": [row.pk for row in (*mine, foreign)]},
        follow=True,
    )
    assert "1 discarded." in answer.text
    assert [row.status for row in RejectedEvent.objects.order_by("id")] == ["discarded", "replayed", "kept"]
    assert RejectedEvent.objects.get(status=Status.DISCARDED).decided_by


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "  ="])
def test_an_export_holds_no_formulas(organization: Organization, start: str) -> None:
    row = rejected(organization, detail=f"{start}cmd|'/C calc'!A0")
    answer: Any = act(staff(organization, "viewer"), "export_csv", row)
    assert answer.streaming
    lines = list(csv.DictReader(StringIO(b"".join(answer.streaming_content).decode())))
    assert lines[0]["detail"] == f"'{start}cmd|'/C calc'!A0"
    assert (lines[0]["reason"], lines[0]["queue_depth"]) == ("circuit-open", "60123")
    assert json.loads(lines[0]["payload"]) == {"values": {"ph": 6.1}}


def test_dead_letters_have_the_same_actions(organization: Organization) -> None:
    rows, client = [dead(organization) for _ in range(3)], staff(organization)
    page = "admin:rules_deadletter_changelist"
    assert shown(client, page, q="zero", status="kept", lane="normal") == {row.pk for row in rows}
    answer = act(client, "replay_selected", rows[0], page=page)
    assert parse_qs(urlsplit(answer["Location"]).query) == {"ids": [str(rows[0].pk)]}
    client.post(answer["Location"], {"rate": "5"})
    assert Replay.objects.get().kind == Replay.Kind.DEAD
    act(client, "discard_selected", rows[1], page=page)
    assert DeadLetter.objects.get(status=Status.DISCARDED) == rows[1]
    exported: Any = act(client, "export_csv", rows[2], page=page)
    assert b"division by zero" in b"".join(exported.streaming_content)


def test_the_page_of_a_running_replay_shows_its_progress_and_shows_itself_again(organization: Organization) -> None:
    row = Replay.objects.create(
        kind=Replay.Kind.REJECTED, organization=organization, total=40, replayed=9, failed=1, created_by="ann"
    )
    url = reverse("admin:rules_replay_change", args=[row.pk])
    text = staff(organization, "viewer").get(url).text
    assert '<progress max="40" value="10">' in text
    assert 'http-equiv="refresh"' in text
    assert "/stop/" not in text, "a viewer only looks"
    stop = reverse("admin:rules_replay_stop", args=[row.pk])
    assert stop in staff(organization).get(url).text
    assert staff(organization, "viewer").post(stop).status_code == 403
    assert staff(builders.organization()).post(stop).status_code == 404
    assert staff(organization).get(stop).status_code == 405
    assert staff(organization).post(stop).status_code == 302
    row.refresh_from_db()
    assert row.state == Replay.State.STOPPED
    assert 'http-equiv="refresh"' not in staff(organization).get(url).text


def test_no_page_counts_or_groups_the_whole_table(organization: Organization) -> None:
    rejected(organization)
    client = superuser()
    with CaptureQueriesContext(connection) as queries:
        client.get(reverse(LIST), {"reason": "circuit-open"})
        client.get(reverse(REPLAY), {"reason": "circuit-open"})
    asked = [query["sql"].upper() for query in queries if "RULES_REJECTEDEVENT" in query["sql"].upper()]
    assert not [sql for sql in asked if "DISTINCT" in sql or "GROUP BY" in sql]
    assert all("LIMIT" in sql for sql in asked if "COUNT(" in sql)


def test_the_page_of_a_replay_names_what_could_be_switched(organization: Organization) -> None:
    tank, other = builders.sensor(organization), builders.sensor(organization)
    doser, fan, heater = (builders.device(organization) for _ in range(3))
    acid = builders.switching_chain(tank, doser)
    builders.switching_chain(other, fan)
    builders.switching_chain(tank, heater, enabled=False)
    failed = builders.switching_chain(other, heater)
    live = rejected(organization, originator_uuid=str(tank.uuid))
    rejected(organization)
    letter = dead(organization, originator_uuid=tank.uuid, chain=failed)
    client = staff(organization)

    page = client.get(f"{reverse(REPLAY)}?ids={live.pk}")
    assert page.context["movements"] == [(acid.name, doser.name, "power")]
    assert doser.name in page.text

    page = client.get(f"{reverse('admin:rules_deadletter_replay')}?ids={letter.pk}")
    assert page.context["movements"] == [(failed.name, heater.name, "power")]
