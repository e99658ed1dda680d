"""The whole system as real processes and real servers: readings in over each protocol, what the rules make of them out."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from deploy.local import LocalSystem, local_system
from tests.conftest import OLD_TIMES_COUNT
from tests.socketio_clients import connected
from tests.system_clients import Person, coap_post, http_post, mqtt_publish, reading
from tests.waiting import until

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    with local_system(tmp_path_factory.mktemp("system")) as running:
        running.start()
        yield running


def over_http(system: LocalSystem, sensor: dict[str, str], body: dict[str, Any]) -> None:
    answer = http_post(system, sensor, body)
    assert (answer.status_code, answer.json()["accepted"]) == (202, 1)


def over_coap(system: LocalSystem, sensor: dict[str, str], body: dict[str, Any]) -> None:
    assert coap_post(system, sensor, body) == ("2.04", "")


def power(system: LocalSystem) -> Any:
    """What the pump should be."""
    pump = system.farm["devices"][0]["uuid"]
    return Person(system).get("device-states", device=pump, name="power")["results"][0]["value"]


def test_a_reading_over_each_protocol_switches_the_pump_and_people_are_told(system: LocalSystem) -> None:
    sensor, pump = system.farm["sensors"][0], system.farm["devices"][0]
    over_http(system, sensor, reading(ph=6.0))  # whatever an earlier test has left
    until(lambda: power(system) == "off")
    with connected(system.socketio, Person(system).token) as client:
        for number, (send, value) in enumerate([(over_http, "on"), (mqtt_publish, "off"), (over_coap, "on")], start=1):
            send(system, sensor, reading(ph=6.9 if value == "on" else 6.0))
            until(lambda number=number: len(client.received) >= number)  # type: ignore[misc]
            event, told = client.received[-1]
            assert (event, told["device"]) == ("device-state-change", pump["uuid"])
            assert (told["data"]["stateName"], told["data"]["value"]) == ("power", value)
    assert system.manage("ledger").returncode == 0


BAD: dict[str, Any] = {"events": [{"values": {"ph": 6.1}}, {"values": {"ph": "high"}}], "strict": True}
SAID = "events[1].values.ph must be a number, not a string"


def test_bad_input_is_refused_alike_on_three_protocols_and_kept_for_the_admin(system: LocalSystem) -> None:
    sensor, person = system.farm["sensors"][1], Person(system)
    answer = http_post(system, sensor, BAD)
    assert (answer.status_code, answer.json()["detail"]) == (400, SAID)
    mqtt_publish(system, sensor, BAD)
    assert coap_post(system, sensor, BAD) == ("4.00", SAID)

    def all_kept() -> list[dict[str, Any]]:
        rows = [row for row in person.get("rejected-events")["results"] if row["detail"] == SAID]
        return rows if len(rows) == 3 else []

    kept = until(all_kept)
    assert {row["protocol"] for row in kept} == {"http", "mqtt", "coap"}
    assert {row["reason"] for row in kept} == {"bad-payload"}
    assert {json.dumps(json.loads(row["payload"])) for row in kept} == {json.dumps(BAD)}


def test_a_bad_value_costs_its_siblings_nothing_on_three_protocols(system: LocalSystem) -> None:
    sensor, person = system.farm["sensors"][1], Person(system)
    said = "events[1].values.lux is not a variable of this sensor"

    def body() -> dict[str, Any]:
        return {"events": [reading(ph=6.1), reading(ph=6.2, lux=4)]}

    answer = http_post(system, sensor, body())
    assert (answer.status_code, answer.json()["accepted"]) == (202, 2)
    assert answer.json()["problems"][0]["detail"].startswith(said)
    mqtt_publish(system, sensor, body())
    code, text = coap_post(system, sensor, body())
    assert (code, json.loads(text)["problems"][0]["field"]) == ("2.04", "values.lux")

    def noted() -> list[int]:
        return [row["count"] for row in person.get("data-problems")["results"] if row["detail"].startswith(said)]

    until(lambda: noted() == [3])
    until(lambda: system.manage("ledger", check=False).returncode == 0)


def test_a_suspect_reading_is_kept_counted_and_not_believed_on_three_protocols(system: LocalSystem) -> None:
    sensor, person = system.farm["sensors"][0], Person(system)
    (ph,) = person.get("variables", sensor=sensor["uuid"], name="ph")["results"]
    assert http_post(system, sensor, reading(ph=6.0)).status_code == 202
    until(lambda: power(system) == "off")
    person.patch(f"variables/{ph['uuid']}", maximum=14, maximumStep=3)
    time.sleep(2.5)  # until every process has noticed
    for send in (over_http, mqtt_publish, over_coap):
        send(system, sensor, reading(ph=85.0))

    def problems() -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = person.get("data-problems", originator=sensor["uuid"], kind="above-maximum")[
            "results"
        ]
        return [row for row in rows if row["count"] == 3]

    (problem,) = until(problems)
    assert json.loads(problem["payload"]) == {"ph": 85.0}
    newest = person.get("readings", variable=ph["uuid"])["results"][:4]
    assert [(row["quality"], row["reason"]) for row in newest] == [("suspect", "above-maximum")] * 3 + [("good", None)]
    assert power(system) == "off"
    assert http_post(system, sensor, reading(ph=6.9)).status_code == 202
    until(lambda: power(system) == "on")
    person.patch(f"variables/{ph['uuid']}", maximum=None, maximumStep=None)


def test_kill_9_of_the_worker_in_mid_batch_loses_nothing_and_acts_once(tmp_path: Path) -> None:
    """Five kills at different moments while 20,000 events are processed; each event that was accepted counts once."""
    with local_system(tmp_path, LOG_LEVEL="WARNING", **OLD_TIMES_COUNT) as system:
        system.start("web", "scheduler", "worker")
        with ThreadPoolExecutor(1) as pool:
            accepted = pool.submit(post_batches, system, 40)
            for number in range(5):
                time.sleep(0.7 + 0.13 * number)
                system.kill("worker")
                system.start("worker")
            assert accepted.result() == 20_000
        until(lambda: ledger(system)["waiting"] + ledger(system)["in_flight"] == 0, seconds=120)

        total = ledger(system)
        assert total["accepted"] == 20_000
        assert total["processed"] + total["duplicate"] == 20_000
        assert total["dead"] == 0
        assert total["missing"] == 0
        assert count(system, "devices_reading") == 20_000
        keys = count(system, "devices_statechange"), count(system, "notifications_notification")
        assert keys[0] == keys[1] > 0


def post_batches(system: LocalSystem, batches: int) -> int:
    sensors = system.farm["sensors"]
    return sum(post_batch(system, sensors[batch % 2], start=batch * 500, count=500) for batch in range(batches))


def post_batch(system: LocalSystem, sensor: dict[str, str], *, start: int, count: int) -> int:
    """Readings a second apart, every tenth of which is above the limit at which the demo's rule doses."""
    events: list[dict[str, Any]] = [
        {
            "values": {"ph": 6.9 if number % 10 == 0 else 6.0},
            "timestamp": datetime.fromtimestamp(1_770_000_000 + number, UTC).isoformat(),
        }
        for number in range(start, start + count)
    ]
    answer = http_post(system, sensor, {"events": events})
    assert answer.status_code == 202, answer.text
    accepted: int = answer.json()["accepted"]
    return accepted


def ledger(system: LocalSystem) -> dict[str, int]:
    total: dict[str, int] = json.loads(system.manage("ledger", "--json").stdout)["lanes"]["total"]
    return total


def count(system: LocalSystem, table: str) -> int:
    with closing(sqlite3.connect(system.environment["DB_NAME"])) as database:
        number: int = database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        return number
