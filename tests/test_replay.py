"""Replays: kept events go into the queue again, once in effect, at their rate, and never at the cost of live traffic."""

from __future__ import annotations

import json
from datetime import timedelta
from io import StringIO
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone
from rest_framework.test import APIClient

from aemos.lib import keys, per_process, redis
from aemos.management.commands.runscheduler import PERIODIC_TASKS
from devices import catalogue
from devices.exceptions import Overloaded
from devices.models import DeviceState, Reading, StateChange, Variable
from rules import events, retention
from rules.admission import circuit_store, rejections, replay
from rules.admission.circuit import State
from rules.admission.replay import CannotReplay, ReplayRequest
from rules.effects import suspension
from rules.journal import slots, tickets
from rules.journal.ledger import Account, audit
from rules.journal.tickets import ALLOWED_FUNCTIONS
from rules.models import DeadLetter, RejectedEvent, Replay, Status
from tests import builders
from tests.problems import wrong
from tests.worker import drain_all, ledger

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]
OPEN = Overloaded("full", reason="circuit-open", retry_after=7, queue_depth=60, threshold=50, circuit_state="OPEN")


class Farm:
    """One sensor, one pump, one chain that switches the pump on below 5.5."""

    def __init__(self) -> None:
        self.organization = builders.organization()
        self.sensor = builders.sensor(self.organization)
        self.pump = builders.device(self.organization, "Pump")
        self.chain = builders.switching_chain(self.sensor, self.pump, name="pH up")
        self.token = builders.token(self.sensor, highest_priority=1)

    def refuse(self, *phs: float, ago: timedelta = timedelta(0), kind: str = "") -> list[RejectedEvent]:
        """Sends readings while the queue takes none."""
        body = [
            {"values": {"ph": ph}, "timestamp": (timezone.now() - ago + timedelta(milliseconds=n)).isoformat()}
            | ({"type": kind} if kind else {})
            for n, ph in enumerate(phs)
        ]
        originator = catalogue.shared().originators([("sensor", str(self.sensor.uuid))])[
            "sensor", str(self.sensor.uuid)
        ]
        batch = events.decode(
            json.dumps({"events": body}).encode(), originator, highest_priority=1, now=timezone.now(), protocol="http"
        )
        rejections.record_events(batch, OPEN)
        rejections.shared().flush()
        return list(RejectedEvent.objects.order_by("id"))

    def state(self) -> Any:
        return DeviceState.objects.get(device=self.pump).value


@pytest.fixture
def farm() -> Farm:
    return Farm()


def request_for(farm: Farm, kind: str = Replay.Kind.REJECTED, **fields: Any) -> ReplayRequest:
    told: dict[str, Any] = {"kind": kind, "criteria": {}, "organization": farm.organization, "actor": "ann"}
    return ReplayRequest(**{**told, **fields})


def step(row: Replay, at: float = 1_000.0) -> Replay:
    """One step of a worker at a second of an injected clock."""
    replay.step(str(row.uuid), clock=lambda: at)
    row.refresh_from_db()
    return row


def run(row: Replay) -> Replay:
    for second in range(1, 30):
        if step(row, 1_000.0 + second).state != Replay.State.RUNNING:
            return row
    raise AssertionError(row.note)


def test_a_replay_stores_the_readings_with_their_own_time_and_lets_rules_act(farm: Farm) -> None:
    rows = farm.refuse(5.0, 6.0, ago=timedelta(seconds=30))
    row = run(replay.start(request_for(farm, with_commands=True)))
    drain_all()

    assert (row.state, row.total, row.replayed, row.failed) == (Replay.State.DONE, 2, 2, 0)
    assert set(Reading.objects.values_list("timestamp", flat=True)) == {one.timestamp for one in rows}
    assert farm.state() == "on"
    assert ledger() == Account(accepted=2, processed=2)
    kept = RejectedEvent.objects.first()
    assert kept is not None
    assert (kept.status, kept.decided_by) == (Status.REPLAYED, "ann")
    assert kept.decided_at is not None


def test_a_replay_that_runs_twice_has_one_effect(farm: Farm) -> None:
    farm.refuse(5.0)
    run(replay.start(request_for(farm, with_commands=True)))
    drain_all()
    DeviceState.objects.update(value="off")
    RejectedEvent.objects.update(status=Status.OPEN)  # as a crash between journal and database leaves it
    run(replay.start(request_for(farm, with_commands=True)))
    drain_all()

    assert farm.state() == "off"
    assert (Reading.objects.count(), StateChange.objects.count()) == (1, 1)
    assert ledger() == Account(accepted=2, processed=1, duplicate=1)


def test_events_keep_their_priority(farm: Farm) -> None:
    farm.refuse(6.0, kind="critical-alarm")
    run(replay.start(request_for(farm)))
    accounts = {slot.lane: audit(slot).accepted for slot in slots.slots() if audit(slot).accepted}
    assert accounts == {"critical": 1}


@pytest.mark.parametrize("seconds", [1, 44, 90_000])
@pytest.mark.parametrize(("with_commands", "state"), [(False, None), (True, "on")])
def test_a_replay_switches_nothing_unless_that_is_asked_for(
    farm: Farm, seconds: int, with_commands: bool, state: Any
) -> None:
    farm.refuse(5.0, ago=timedelta(seconds=seconds))
    run(replay.start(request_for(farm, with_commands=with_commands)))
    drain_all()

    assert farm.state() == state
    assert Reading.objects.count() == 1
    assert ledger() == Account(accepted=1, processed=1)


def test_a_replay_sends_at_most_its_rate(farm: Farm) -> None:
    farm.refuse(*[6.0] * 30)
    row = replay.start(request_for(farm, rate=10))
    sent = {second: step(row, second).replayed for second in (1_000.0, 1_000.3, 1_000.35, 1_000.9, 1_001.0, 1_050.0)}
    assert sent == {1_000.0: 10, 1_000.3: 13, 1_000.35: 13, 1_000.9: 19, 1_001.0: 20, 1_050.0: 30}


def test_a_replay_waits_while_the_circuit_is_not_closed(farm: Farm) -> None:
    farm.refuse(6.0)
    row = replay.start(request_for(farm))
    circuit_store.force(State.OPEN, actor="test", queue_depth=0)
    per_process.forget_all()
    step(row)
    assert (row.replayed, ledger()) == (0, Account())
    assert row.note.startswith("It waits: ")
    assert "circuit" in row.note
    circuit_store.reset("test", 0)
    per_process.forget_all()
    assert (run(row).replayed, row.note) == (1, "")


def test_a_replay_goes_no_further_than_the_warning_threshold(farm: Farm, settings: Any) -> None:
    settings.QUEUE_RECOVERY_THRESHOLD, settings.QUEUE_WARNING_THRESHOLD, settings.QUEUE_CRITICAL_THRESHOLD = 2, 5, 50
    per_process.forget_all()
    farm.refuse(*[6.0] * 20)
    row = step(replay.start(request_for(farm)))
    assert row.replayed == 5
    assert row.note.startswith("It waits: ")
    assert ledger().depth == 5


def test_what_cannot_be_sent_any_more_is_told_and_the_rest_goes_on(farm: Farm) -> None:
    other = builders.sensor(farm.organization)
    farm.refuse(6.0)
    RejectedEvent.objects.update(originator_uuid=str(other.uuid))
    other.delete()
    (*_, kept) = farm.refuse(6.2)
    row = run(replay.start(request_for(farm)))

    assert (row.replayed, row.failed, row.total) == (1, 1, 2)
    assert "was deleted" in row.note
    failed = RejectedEvent.objects.get(status=Status.OPEN)
    assert failed.detail.startswith("full (replay: ")
    assert str(other.uuid) in failed.detail
    Variable.objects.create(sensor=farm.sensor, name="ec")
    assert RejectedEvent.objects.get(pk=kept.pk).status == Status.REPLAYED


def test_a_variable_that_was_deleted_fails_its_events(farm: Farm) -> None:
    farm.refuse(6.0)
    Variable.objects.all().delete()
    catalogue.shared().refresh(at_once=True)
    row = run(replay.start(request_for(farm)))
    assert (row.replayed, row.failed) == (0, 1)
    assert "values.ph" in row.note


def test_only_what_matches_and_was_there_is_replayed(farm: Farm) -> None:
    _, second = farm.refuse(6.0, 6.1)
    RejectedEvent.objects.filter(pk=second.pk).update(reason="queue-critical")
    RejectedEvent.objects.create(organization=farm.organization, protocol="http", reason="circuit-open", payload="{")
    row = replay.start(request_for(farm, criteria={"reason__exact": "circuit-open"}))
    farm.refuse(6.2)
    assert (run(row).replayed, row.total) == (1, 1)
    assert RejectedEvent.objects.filter(status=Status.OPEN).count() == 3


def test_a_wish_that_cannot_be_granted_says_why(farm: Farm) -> None:
    with pytest.raises(CannotReplay, match="No kept event"):
        replay.start(request_for(farm))
    farm.refuse(6.0)
    with pytest.raises(CannotReplay, match="rate"):
        replay.start(request_for(farm, rate=0))


def test_a_stopped_replay_sends_no_more(farm: Farm) -> None:
    farm.refuse(*[6.0] * 10)
    row = step(replay.start(request_for(farm, rate=4)))
    assert replay.stop(row, actor="ann")
    assert not replay.stop(row, actor="ann")
    assert (step(row, 2_000.0).replayed, row.state, row.note) == (4, Replay.State.STOPPED, "Stopped by ann.")
    assert RejectedEvent.objects.filter(status=Status.OPEN).count() == 6


def test_the_scheduler_queues_one_step_at_a_time(farm: Farm) -> None:
    farm.refuse(6.0)
    row = replay.start(request_for(farm))
    queue = tickets.queue_of("low")
    assert (replay.queue_steps(), queue.count) == (0, 1)
    (job,) = queue.jobs
    assert (job.func_name, job.args) == ("rules.admission.replay.step", [str(row.uuid)])
    assert job.func_name in ALLOWED_FUNCTIONS
    step(row, 1_000.0)
    assert replay.queue_steps() == 0, "it has ended"
    assert {replay.queue_steps, retention.delete_expired} <= set(PERIODIC_TASKS)


def test_two_workers_do_not_step_at_the_same_time(farm: Farm) -> None:
    farm.refuse(6.0)
    row = replay.start(request_for(farm))
    redis.client().set(keys.replay_lease(str(row.uuid)), "1")
    assert step(row).replayed == 0


# Dead letters


def post(farm: Farm, ph: float) -> None:
    answer = Client().post(
        "/api/v1/telemetry",
        json.dumps({"values": {"ph": ph}}),
        content_type="application/json",
        headers={"authorization": f"Bearer {farm.token}"},
    )
    assert answer.status_code == 202


def break_chain(farm: Farm) -> Any:
    nodes = [
        builders.node("low", builders.leaf(farm.sensor), next="convert"),
        builders.node("convert", {"operation": "add", "key": "ec", "value": 1}, next="act"),
        builders.node("act", builders.command(builders.device(farm.organization))),
    ]
    return builders.chain(farm.organization, nodes, "Broken", max_retries=0)


def test_a_dead_letter_runs_again_in_the_chain_that_failed_and_in_no_other(farm: Farm) -> None:
    chain = break_chain(farm)
    post(farm, 5.0)
    drain_all()
    letter = DeadLetter.objects.get()
    assert (letter.chain, ledger()) == (chain, Account(accepted=1, dead=1))
    DeviceState.objects.filter(device=farm.pump).update(value="off")
    chain.nodes.filter(name="convert").update(config={"operation": "add", "key": "ph", "value": 1})
    chain.version += 1
    chain.save()
    catalogue.mark_changed(farm.organization.pk)
    row = run(replay.start(request_for(farm, Replay.Kind.DEAD, with_commands=True)))
    assert (row.replayed, ledger()) == (1, Account(accepted=2, dead=1, depth=1, waiting=1))
    drain_all()

    assert ledger() == Account(accepted=2, dead=1, processed=1)
    assert farm.state() == "off", "the other chain has done its part before"
    assert StateChange.objects.filter(actor="Broken / act").count() == 1
    letter.refresh_from_db()
    assert letter.status == Status.REPLAYED


def test_a_dead_letter_that_fails_again_is_there_for_a_decision_again(farm: Farm) -> None:
    break_chain(farm)
    post(farm, 5.0)
    drain_all()
    run(replay.start(request_for(farm, Replay.Kind.DEAD)))
    assert DeadLetter.objects.get().status == Status.REPLAYED
    drain_all()

    letter = DeadLetter.objects.get()
    assert (letter.status, letter.decided_at, letter.decided_by) == (Status.OPEN, None, "")
    assert ledger() == Account(accepted=2, dead=2)


def test_a_dead_letter_that_fails_again_before_it_is_marked_is_not_marked(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_chain(farm)
    post(farm, 5.0)
    drain_all()
    real = replay._note

    def later(*args: Any) -> bool:
        drain_all()
        return real(*args)

    monkeypatch.setattr(replay, "_note", later)
    run(replay.start(request_for(farm, Replay.Kind.DEAD)))
    assert DeadLetter.objects.get().status == Status.OPEN


def test_a_dead_letter_that_still_waits_is_not_accepted_twice(farm: Farm) -> None:
    break_chain(farm)
    post(farm, 5.0)
    drain_all()
    for _ in range(2):
        run(replay.start(request_for(farm, Replay.Kind.DEAD)))
        DeadLetter.objects.update(status=Status.OPEN)
    assert ledger() == Account(accepted=2, dead=1, depth=1, waiting=1)


@pytest.mark.parametrize("what", ["chain deleted", "chain off", "chain suspended", "unreadable"])
def test_a_dead_letter_that_has_nothing_to_run_in_stays(farm: Farm, what: str) -> None:
    chain = break_chain(farm)
    post(farm, 5.0)
    drain_all()
    if what == "chain deleted":
        chain.delete()
    elif what == "chain off":
        type(chain).objects.filter(pk=chain.pk).update(enabled=False)
    elif what == "chain suspended":
        assert suspension.suspend(chain.pk, "it failed")
    else:
        DeadLetter.objects.update(event={"base64": "", "events": 1}, chain=None)
    row = run(replay.start(request_for(farm, Replay.Kind.DEAD)))
    assert (row.replayed, row.failed) == (0, 1)
    assert DeadLetter.objects.get().status == Status.OPEN
    assert "(replay: " in DeadLetter.objects.get().error


def test_an_event_that_failed_as_a_whole_is_replayed_as_a_whole(farm: Farm) -> None:
    post(farm, 5.0)
    sensor, variable = farm.sensor, Variable.objects.get()
    Variable.objects.all().delete()
    catalogue.shared().refresh(at_once=True)
    drain_all()
    assert ledger() == Account(accepted=1, dead=1)
    Variable.objects.create(sensor=sensor, name=variable.name, datatype=variable.datatype)
    catalogue.shared().refresh(at_once=True)
    run(replay.start(request_for(farm, Replay.Kind.DEAD)))
    drain_all()
    assert Reading.objects.count() == 1
    assert ledger() == Account(accepted=2, dead=1, processed=1)


# REST


def client_of(farm: Farm, role: str) -> APIClient:
    client = APIClient()
    client.force_authenticate(builders.member(farm.organization, role))
    return client


def test_an_operator_replays_a_filter_and_follows_it(farm: Farm) -> None:
    farm.refuse(6.0, 6.1)
    client = client_of(farm, "operator")
    body = {"reason": "circuit-open", "from": "2026-01-01T00:00:00Z", "rate": 50, "withCommands": True}
    answer = client.post("/api/v1/rejected-events/replay", body, format="json")

    assert answer.status_code == 202
    told = answer.json()
    assert (told["total"], told["rate"], told["withCommands"], told["state"]) == (2, 50, True, "running")
    assert told["organization"] == str(farm.organization.uuid)
    run(Replay.objects.get(uuid=told["uuid"]))
    seen = client.get(f"/api/v1/replays/{told['uuid']}").json()
    assert (seen["state"], seen["replayed"]) == ("done", 2)
    assert client.post(f"/api/v1/replays/{told['uuid']}/stop").status_code == 409


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"raeson": "x"}, "raeson"),
        ({"rate": 0}, "rate"),
        ({"from": "yesterday"}, "from"),
        ({"reason": "nothing-like-it"}, ""),
    ],
)
def test_a_wish_over_rest_that_cannot_be_granted_names_what_is_wrong(farm: Farm, body: Any, complaint: str) -> None:
    farm.refuse(6.0)
    answer = client_of(farm, "operator").post("/api/v1/rejected-events/replay", body, format="json")
    assert complaint in wrong(answer)
    assert not Replay.objects.exists()


def test_viewers_only_look_and_others_see_nothing(farm: Farm) -> None:
    (row,) = farm.refuse(6.0)
    viewer, stranger = client_of(farm, "viewer"), APIClient()
    stranger.force_authenticate(builders.member(builders.organization(), "admin"))
    for client, statuses in ((viewer, [200, 403, 403]), (stranger, [404, 404, 400])):
        found = [
            client.get(f"/api/v1/rejected-events/{row.uuid}").status_code,
            client.post(f"/api/v1/rejected-events/{row.uuid}/discard").status_code,
            client.post("/api/v1/rejected-events/replay", {}, format="json").status_code,
        ]
        assert found == statuses


def test_whoever_may_replay_in_two_organizations_names_one(farm: Farm) -> None:
    farm.refuse(6.0)
    person = builders.member(farm.organization, "operator")
    builders.organization().memberships.create(user=person, role="operator")
    client = APIClient()
    client.force_authenticate(person)
    assert "organization" in wrong(client.post("/api/v1/rejected-events/replay", {}, format="json"))
    body = {"organization": str(farm.organization.uuid)}
    assert client.post("/api/v1/rejected-events/replay", body, format="json").status_code == 202


def test_discarding_is_final_and_named(farm: Farm) -> None:
    (row,) = farm.refuse(6.0)
    client = client_of(farm, "operator")
    told = client.post(f"/api/v1/rejected-events/{row.uuid}/discard").json()
    assert (told["status"], bool(told["decidedBy"])) == ("discarded", True)
    assert client.post(f"/api/v1/rejected-events/{row.uuid}/discard").status_code == 409


def test_rejected_events_are_found_by_every_filter(farm: Farm) -> None:
    row = farm.refuse(6.0)[0]
    client = client_of(farm, "viewer")
    hits: dict[str, Any] = {
        "reason": "circuit-open", "priority": 5, "lane": "normal", "organization": farm.organization.uuid, "protocol": "http",
        "from": "2026-01-01T00:00:00Z", "to": "2099-01-01T00:00:00Z", "status": "kept", "eventId": row.event_id,
        "originator": farm.sensor.uuid,
    }  # fmt: skip
    misses: dict[str, Any] = {
        "reason": "x", "priority": 1, "lane": "low", "organization": uuid4(), "protocol": "coap", "from": "2099-01-01T00:00:00Z",
        "to": "2026-01-01T00:00:00Z", "status": "replayed", "eventId": uuid4(), "originator": uuid4(),
    }  # fmt: skip
    for name in hits:
        assert client.get("/api/v1/rejected-events", {name: hits[name]}).json()["count"] == 1, name
        assert client.get("/api/v1/rejected-events", {name: misses[name]}).json()["count"] == 0, name


# The command


def command(*arguments: str) -> str:
    out = StringIO()
    call_command("replay_rejected", *arguments, stdout=out)
    return out.getvalue()


def test_the_command_with_dry_run_counts_by_reason_and_changes_nothing(farm: Farm) -> None:
    *_, last = farm.refuse(6.0, 6.1, 6.2)
    RejectedEvent.objects.filter(pk=last.pk).update(reason="enqueue-error")
    shown = command("--from", "2h", "--dry-run").split("\n")
    assert [line.split() for line in shown[:3]] == [["2", "circuit-open"], ["1", "enqueue-error"], ["3", "in", "all"]]
    assert command("--reason", "enqueue-error", "--to", "2026-01-01", "--dry-run").split()[0] == "0"
    assert not Replay.objects.exists()


def test_the_command_follows_its_replay_to_the_end(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    farm.refuse(6.0, 6.1)
    module = "rules.management.commands.replay_rejected.time.sleep"
    monkeypatch.setattr(module, lambda _: step(Replay.objects.get(), 1_000.0))
    shown = command("--rate", "20", "--organization", str(farm.organization.uuid), "--actor", "bob")
    assert "done: 2 replayed, 0 could not be." in shown
    assert Replay.objects.get().created_by == "bob"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--from", "soon"], "neither a duration such as 2h nor a time"),
        (["--from", "2026-99-99"], "from"),
        (["--organization", "7"], "no organization"),
        (["--rate", "0"], "rate"),
        (["--dead-letters", "--reason", "x"], "no --reason"),
        (["--stop", str(UUID(int=4))], "no replay"),
        (["--stop", "x"], "UUID"),
        ([], "No kept event"),
    ],
)
def test_the_command_says_what_it_cannot_do(farm: Farm, arguments: list[str], complaint: str) -> None:
    if arguments:
        farm.refuse(6.0)
    with pytest.raises(CommandError, match=complaint):
        command(*arguments)


def test_the_command_stops_a_replay(farm: Farm) -> None:
    farm.refuse(6.0)
    row = replay.start(request_for(farm))
    assert "Stopped after 0 events" in command("--stop", str(row.uuid))
    row.refresh_from_db()
    assert (row.state, row.ended_at is not None) == (Replay.State.STOPPED, True)
