"""Management commands: every one is tried here or in the file named beside it, helps, and fails with one clear line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command, get_commands, load_command_class

from aemos.lib import keys, redis
from deploy.programs import REPOSITORY
from deploy.servers import free_port
from devices.models import Device, DeviceState, Organization, Sensor
from notifications.models import Notification
from rules import backpressure, journal, tickets
from rules.journal import Slot
from rules.models import CircuitTransition, RuleChain
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
    redis.forget_connections()
    journal._script.cache_clear()
    try:
        with pytest.raises(CommandError, match="cannot be reached"):
            run("ledger")
    finally:
        redis.forget_connections()
        journal._script.cache_clear()


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
    backpressure.shared.cache_clear()
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


@pytest.mark.django_db
@pytest.mark.usefixtures("empty_redis")
def test_one_turn_of_the_scheduler_queues_lost_tickets_and_empties_the_outbox() -> None:
    backpressure.shared.cache_clear()
    slot = Slot("normal", 0)
    redis.client().xadd(keys.events(slot.lane, slot.partition), {"n": 1, "b": b"x"})
    device = builders.device(builders.organization())
    Notification.objects.create(
        effect_key="left behind",
        organization=device.organization,
        device=device,
        event="device-state-change",
        timestamp=datetime(2026, 5, 1, tzinfo=UTC),
        created_at=datetime(2026, 5, 1, tzinfo=UTC),
    )
    assert DeviceState.objects.count() == 1
    run("runscheduler", "--once")

    assert tickets.queue_of("normal").count == 1
    assert redis.client().xlen(keys.NOTIFICATIONS) == 1
