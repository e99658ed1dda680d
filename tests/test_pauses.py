"""Lanes that a person pauses: their events wait in order, all others go on, and the end comes by itself."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import Client

from aemos.lib import per_process
from deploy.local import LocalSystem, local_system
from deploy.servers import free_port
from rules.journal import pauses, recovery
from rules.journal.ledger import Account
from tests import builders
from tests.system_clients import Person, http_post, reading
from tests.test_drain import Farm
from tests.waiting import until
from tests.worker import drain_all, ledger

HOUR = 3_600.0


@pytest.fixture
def farm() -> Farm:
    return Farm()


@pytest.mark.django_db
@pytest.mark.usefixtures("empty_redis")
class TestInOneProcess:
    def test_a_paused_lane_keeps_its_events_and_the_others_go_on(self, farm: Farm) -> None:
        pauses.pause("normal", by="ada", seconds=HOUR)
        farm.post(6.9)
        farm.post(6.8, type="batch-operation")
        drain_all()
        assert ledger() == Account(accepted=2, processed=1, depth=1, waiting=1)
        assert pauses.resume("normal")
        drain_all()
        assert ledger() == Account(accepted=2, processed=2)

    def test_its_tickets_are_not_queued_again_and_again(self, farm: Farm, caplog: Any) -> None:
        pauses.pause("normal", by="ada", seconds=HOUR)
        farm.post(6.9)
        drain_all()
        with caplog.at_level(logging.WARNING):
            assert [recovery.reissue_lost_tickets() for _ in range(3)] == [0, 0, 0]
        assert caplog.messages == []
        pauses.resume("normal")
        assert recovery.reissue_lost_tickets() == 1

    def test_a_pause_ends_by_itself(self, farm: Farm) -> None:
        pauses.pause("normal", by="ada", seconds=2.0)
        farm.post(6.9)
        drain_all()
        assert ledger().processed == 0
        until(lambda: not pauses.is_paused("normal"))
        drain_all()
        assert (ledger().processed, pauses.current()) == (1, {})

    def test_health_and_metrics_say_so(self, farm: Farm) -> None:
        pauses.pause("low", by="ada", seconds=HOUR, note="imports wait for the new disk")
        client = Client()
        client.force_login(builders.user(is_staff=True))
        problems = client.get("/api/v1/health").json()["problems"]
        (said,) = [each for each in problems if "lane" in each]
        assert re.fullmatch(
            r"The low lane is paused by ada until .* UTC: imports wait for the new disk\. Its events wait\.", said
        )
        lines = client.get("/api/v1/metrics/prometheus").text.splitlines()
        assert {'rule_engine_lane_paused{lane="normal"} 0.0', 'rule_engine_lane_paused{lane="low"} 1.0'} <= set(lines)

    @pytest.mark.parametrize(
        ("lane", "seconds"),
        [("critical", 60), ("", 60), ("normal", 0), ("normal", -1), ("low", 25 * HOUR), ("low", float("nan"))],
    )
    def test_what_cannot_be_paused_is_not(self, lane: str, seconds: float) -> None:
        with pytest.raises(ValueError, match=r"cannot be paused|at most 24 hours"):
            pauses.pause(lane, by="ada", seconds=seconds)
        assert pauses.current() == {}

    def test_the_command_pauses_shows_and_resumes(self, capsys: Any) -> None:
        call_command("lane", "pause", "normal", "--for", "30m", "--note", "filters", "--actor", "ada")
        shown = capsys.readouterr().out
        assert re.search(r"^critical +0 events +running$", shown, re.MULTILINE)
        assert re.search(r"^normal +0 events +paused by ada until .*: filters$", shown, re.MULTILINE)
        assert 1_790 < pauses.current()["normal"].until - time.time() <= 1_800
        call_command("lane", "resume", "normal")
        assert "paused" not in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["pause"], "Name the lane"),
            (["status", "low"], "Name the lane"),
            (["pause", "critical"], "invalid choice"),
            (["pause", "low", "--for", "soon"], "--for"),
            (["pause", "low", "--for", "2d"], "at most 24 hours"),
            (["resume", "low"], "not paused"),
            (["resume", "low", "--note", "x"], "belong to pause"),
        ],
    )
    def test_the_command_says_what_is_wrong(self, words: list[str], said: str) -> None:
        with pytest.raises(CommandError, match=said):
            call_command("lane", *words)

    def test_the_command_says_that_redis_is_away(self, settings: Any, redis_is_away: None) -> None:
        with pytest.raises(CommandError, match="Redis cannot be reached"):
            call_command("lane", "status")


@pytest.fixture
def redis_is_away(settings: Any) -> Iterator[None]:
    settings.REDIS_PORT = free_port()
    per_process.forget_all()
    yield
    per_process.forget_all()


@pytest.mark.timeout(180)
def test_workers_leave_a_paused_lane_alone_and_take_it_up_again_in_order(tmp_path: Path) -> None:
    with local_system(tmp_path) as system:
        system.start("web", "worker", "scheduler")
        sensor = system.farm["sensors"][0]
        report(system, sensor, 6.0)
        until(lambda: counts(system)["processed"] == 1)
        assert "paused by ada" in system.manage("lane", "pause", "normal", "--actor", "ada").stdout
        time.sleep(1)
        for number in range(5):
            report(system, sensor, round(6.1 + number / 10, 1))
        imported = http_post(system, sensor, {**reading(ph=6.9), "type": "batch-operation"})
        assert imported.status_code == 202
        until(lambda: counts(system)["processed"] == 2)
        system.kill("worker")
        system.start("worker")
        time.sleep(3)
        assert counts(system) == {"accepted": 7, "processed": 2, "waiting": 5}
        system.manage("lane", "resume", "normal")
        until(lambda: counts(system)["processed"] == 7)
        readings = Person(system).get("readings", sensor=sensor["uuid"], pageSize="20")["results"]
        assert [each["value"] for each in readings] == [6.9, 6.5, 6.4, 6.3, 6.2, 6.1, 6.0]
        assert system.manage("ledger").returncode == 0
        assert "holds events and no ticket" not in system.log("scheduler")


def report(system: LocalSystem, sensor: dict[str, str], ph: float) -> None:
    assert http_post(system, sensor, reading(ph=ph)).status_code == 202


def counts(system: LocalSystem) -> dict[str, int]:
    found = json.loads(system.manage("ledger", "--json", check=False).stdout)["lanes"]
    return {name: found["total"][name] for name in ("accepted", "processed", "waiting")}
