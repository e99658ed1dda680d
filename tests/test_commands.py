"""Management commands: every one is tried here or in the file named beside it, helps, and fails with one clear line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command, get_commands, load_command_class
from django.db.models import Max, Min
from django.utils import timezone

from aemos.lib import keys, metrics, per_process, redis
from aemos.management.commands import runscheduler
from deploy.programs import REPOSITORY
from deploy.servers import free_port
from devices.models import Device, DeviceState, Organization, Reading, Sensor, Variable
from notifications.models import Notification, Unpublished
from rules.journal import tickets
from rules.journal.slots import Slot
from rules.models import CircuitTransition, RuleChain
from rules.processing.index import RuleIndex
from tests import builders

OURS = ("aemos", "devices", "rules", "notifications", "monitoring")
TESTED_IN = {
    "ledger": "test_commands.py",
    "circuit": "test_commands.py",
    "seed_demo": "test_commands.py",
    "runscheduler": "test_commands.py",
    "rqworker": "test_commands.py",
    "rungateway": "test_gateway.py",
    "replay_rejected": "test_replay.py",
    "sync_broker": "test_broker.py",
    "rebuild_rule_index": "test_commands.py",
    "audit_rule_chains": "test_commands.py",
    "audit": "test_audit.py",
    "second_factor": "test_second_factor.py",
    "import_readings": "test_importing.py",
    "lane": "test_pauses.py",
}
commands = sorted(name for name, app in get_commands().items() if app in OURS)


def test_every_command_has_a_test() -> None:
    assert set(commands) <= set(TESTED_IN)
    for name, file in TESTED_IN.items():
        assert name in (Path(__file__).parent / file).read_text(), f"{file} does not mention {name}"


@pytest.mark.parametrize("name", commands)
def test_every_command_says_what_it_is_for(name: str) -> None:
    command = load_command_class(get_commands()[name], name)
    text = command.create_parser("manage.py", name).format_help()

    assert len(command.help) > 40
    assert command.help.split()[0] in text


def run(name: str, *arguments: Any) -> str:
    out = StringIO()
    call_command(name, *arguments, stdout=out)
    return out.getvalue()


@pytest.mark.usefixtures("empty_redis")
def test_the_ledger_closes_on_an_empty_journal() -> None:
    assert run("ledger").endswith("The ledger closes.\n")
    assert json.loads(run("ledger", "--json"))["closes"] is True


@pytest.mark.usefixtures("empty_redis")
def test_the_ledger_names_the_slot_that_does_not_close() -> None:
    redis.client().hincrby(keys.ledger("normal", 3), "accepted", 2)

    with pytest.raises(CommandError, match=r"does not close: normal/3\."):
        run("ledger")


def test_the_ledger_says_that_redis_is_away(settings: Any) -> None:
    settings.REDIS_PORT = free_port()
    per_process.forget_all()
    try:
        with pytest.raises(CommandError, match="cannot be reached"):
            run("ledger")
    finally:
        per_process.forget_all()


def test_a_worker_names_a_wrong_redis_password_and_does_not_show_it() -> None:
    environment = {**os.environ, "REDIS_PASSWORD": "not-the-password-of-this-server"}
    ended = subprocess.run(
        [sys.executable, "manage.py", "rqworker", "--burst"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert ended.returncode == 1
    assert "refuses the password: check REDIS_PASSWORD" in ended.stderr
    assert "not-the-password" not in ended.stderr + ended.stdout


@pytest.mark.django_db
@pytest.mark.usefixtures("empty_redis")
def test_the_circuit_is_shown_opened_and_reset_with_the_name_of_who_did_it() -> None:
    assert "state       CLOSED" in run("circuit", "status")
    assert "state       OPEN" in run("circuit", "open", "--actor", "Ada")
    assert "OPEN -> CLOSED: manual-reset at 0 by Ada" in run("circuit", "reset", "--actor", "Ada")

    assert list(CircuitTransition.objects.values_list("to_state", "actor").order_by("id")) == [
        ("OPEN", "Ada"),
        ("CLOSED", "Ada"),
    ]


@pytest.mark.django_db
def test_the_demo_farm_is_made_once_and_keeps_its_logins(tmp_path: Path) -> None:
    output = tmp_path / "demo.json"
    run("seed_demo", "--output", output)
    first = json.loads(output.read_text())
    run("seed_demo", "--output", output)

    assert json.loads(output.read_text()) == first
    assert output.stat().st_mode & 0o077 == 0
    assert [Organization.objects.count(), Sensor.objects.count(), Device.objects.count()] == [1, 2, 2]
    assert RuleChain.objects.count() == 3
    assert not Reading.objects.exists()


@pytest.mark.django_db
def test_the_demo_farm_has_a_believable_week(tmp_path: Path) -> None:
    for _ in range(2):
        run("seed_demo", "--history", "--output", tmp_path / "demo.json")
    for variable in Variable.objects.all():
        readings = Reading.objects.filter(variable=variable)
        span = readings.aggregate(first=Min("timestamp"), last=Max("timestamp"), low=Min("number"), high=Max("number"))
        assert readings.count() == 7 * 24 * 12
        assert timedelta(days=6) < span["last"] - span["first"] < timedelta(days=7)
        assert timezone.now() - timedelta(minutes=15) < span["last"] < timezone.now()
        low, high = {"ph": (5.9, 6.7), "ec": (1.4, 2.0), "temperature": (19, 26), "waterLevel": (58, 97)}[variable.name]
        assert low < span["low"] < span["high"] < high


@pytest.mark.django_db
@pytest.mark.usefixtures("empty_redis")
def test_one_turn_of_the_scheduler_queues_lost_tickets_and_empties_the_outbox() -> None:
    slot = Slot("normal", 0)
    redis.client().xadd(keys.events(slot.lane, slot.partition), {"n": 1, "b": b"x"})
    device = builders.device(builders.organization())
    left = Notification.objects.create(
        effect_key="left behind",
        organization=device.organization,
        device=device,
        event="device-state-change",
        timestamp=datetime(2026, 5, 1, tzinfo=UTC),
    )
    Unpublished.objects.create(notification=left, uuid=left.uuid, written_at=datetime(2026, 5, 1, tzinfo=UTC))
    assert DeviceState.objects.count() == 1
    run("runscheduler", "--once")

    assert tickets.queue_of("normal").count == 1
    assert redis.client().xlen(keys.NOTIFICATIONS) == 1


@pytest.mark.django_db
def test_rebuilding_the_rule_index_counts_what_runs_and_reaches_every_process() -> None:
    farm = builders.organization()
    builders.organization()
    sensor, pump = builders.sensor(farm), builders.device(farm)
    builders.switching_chain(sensor, pump)
    builders.switching_chain(sensor, pump, enabled=False)
    elsewhere = RuleIndex()
    elsewhere.refresh()
    RuleChain.objects.filter(enabled=True).update(name="changed past AEMOS")
    lines = run("rebuild_rule_index").splitlines()
    elsewhere.refresh(at_once=True)

    assert lines[0].startswith("1 chains, 2 nodes, 1 references compiled in ")
    assert lines[1:] == ["All processes build the index of 2 organizations again."]
    assert [bound.name for bound in elsewhere] == ["changed past AEMOS"]


@pytest.mark.django_db
def test_rebuilding_the_rule_index_names_every_chain_that_is_not_valid() -> None:
    farm = builders.organization("Greenhouse")
    row = builders.switching_chain(builders.sensor(farm), builders.device(farm), name="Broken")
    row.nodes.filter(name="low").update(config={"UUID": "nonsense"})

    with pytest.raises(CommandError) as raised:
        run("rebuild_rule_index")
    text = str(raised.value)
    assert text.startswith(f"Broken ({row.uuid}) of Greenhouse: nodes[0].config.sourceType: is required")
    assert "nodes[0].config.UUID: must be a version 4 UUID (found 'nonsense')" in text
    assert text.endswith("1 chains are not valid and do not run.")


@pytest.mark.django_db
def test_rebuilding_the_rule_index_draws_its_progress_on_a_terminal() -> None:
    farm = builders.organization()
    sensor, pump = builders.sensor(farm), builders.device(farm)
    for _ in range(3):
        builders.switching_chain(sensor, pump)
    terminal = StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    call_command("rebuild_rule_index", stdout=terminal)

    assert f"\r[{'#' * 30}] 3 of 3 chains\n3 chains, 6 nodes" in terminal.getvalue()


@pytest.mark.django_db
def test_an_audit_of_sound_chains_ends_well_and_tells_their_warnings() -> None:
    farm = builders.organization()
    chain = builders.switching_chain(builders.sensor(farm), builders.device(farm), name="Acid")
    told = run("audit_rule_chains")
    assert f"Acid ({chain.uuid}) of {farm}\n  warning  nodes[0].config.key: is a variable that has no value yet" in told
    assert told.endswith("1 chains: 0 with problems, 1 with warnings.\n")


@pytest.mark.django_db
def test_an_audit_names_every_problem_of_every_chain_and_fails() -> None:
    farm, other = builders.organization(), builders.organization()
    sensor, device = builders.sensor(farm), builders.device(farm)
    acid = builders.switching_chain(sensor, device, name="Acid")
    builders.switching_chain(sensor, device, name="Base", enabled=False)
    builders.switching_chain(builders.sensor(other), builders.device(other), name="Theirs")
    sensor.delete()
    acid.nodes.filter(name="switch").update(next="nowhere")
    RuleChain.objects.filter(pk=acid.pk).update(cron="x")
    out = StringIO()
    with pytest.raises(CommandError, match="2 of 2 chains have problems"):
        call_command("audit_rule_chains", "--json", "--organization", str(farm.uuid), stdout=out)
    found = json.loads(out.getvalue())
    assert (found["chains"], [row["name"] for row in found["findings"]]) == (2, ["Acid", "Base"])
    assert [row["enabled"] for row in found["findings"]] == [True, False]
    problems = [[problem["path"] for problem in row["validationErrors"]] for row in found["findings"]]
    assert problems == [["cron", "nodes[1].next", "nodes[0].config.UUID"], ["nodes[0].config.UUID"]]
    out = StringIO()
    with pytest.raises(CommandError, match="2 of 3 chains have problems"):
        call_command("audit_rule_chains", stdout=out)
    assert "  problem  nodes[1].next: names no node of this chain (found 'nowhere')" in out.getvalue()
    assert f"of {farm}, switched off" in out.getvalue()
    assert "Theirs" in out.getvalue()


@pytest.mark.django_db
@pytest.mark.parametrize("uuid", ["nonsense", "0b7e9d52-6a3c-4f0e-9d1b-2c5a8f4e7d10"])
def test_an_audit_of_an_organization_that_does_not_exist_says_so(uuid: str) -> None:
    with pytest.raises(CommandError, match=f"no organization with the uuid {uuid}"):
        run("audit_rule_chains", "--organization", uuid)


def stumbles() -> None:
    raise KeyError("stateName")


@pytest.mark.django_db
@pytest.mark.usefixtures("empty_redis")
def test_a_periodic_task_that_fails_does_not_keep_the_others_from_running(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[str] = []

    monkeypatch.setattr(runscheduler, "PERIODIC_TASKS", (stumbles, lambda: done.append("next")))
    runscheduler._run_tasks()

    assert done == ["next"]
    assert "stumbles failed and is tried again" in caplog.text
    counted = {
        sample.labels.get("task", ""): sample.value
        for each in metrics.collect()
        for sample in each.samples
        if sample.name == "scheduler_failures_total"
    }
    assert [number for task, number in counted.items() if "stumbles" in task] == [1.0]
