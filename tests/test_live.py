"""Live readings: from a worker's batch to those who watch, gathered per variable and second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import socketio

from aemos.lib import keys, redis
from devices.models import Variable
from gateway import live_readings
from gateway.live_readings import Gathered, LiveReadings, Watched
from notifications import live_channel
from tests import builders
from tests.gateway_process import operator, running
from tests.waiting import until

BEGAN_US = 1_767_323_045_000_000
PH = Watched("u", "s", "ph", "pH", "number")


def gathered(*values: Any, watched: Watched = PH) -> list[tuple[str, dict[str, Any]]]:
    found = Gathered()
    for number, value in enumerate(values):
        text = value if isinstance(value, str) else None
        found.add((1, BEGAN_US + number * 1_000_000, None if text else float(value), text, None))
    return found.events(watched)


def test_one_or_two_readings_are_told_as_they_are() -> None:
    assert gathered(6.5, 7.5) == [
        ("new-datastream", {"variable": "u", "sensor": "s", "name": "ph", "unit": "pH", "timestamp": when, "value": value})
        for when, value in (("2026-01-02T03:04:05+00:00", 6.5), ("2026-01-02T03:04:06+00:00", 7.5))
    ]  # fmt: skip


def test_more_readings_are_told_as_one_summary() -> None:
    ((event, body),) = gathered(6.0, 9.0, 7.5, 5.5)
    assert event == "datastream-batch"
    assert {name: body[name] for name in ("count", "min", "max", "average", "from", "to", "latest")} == {
        "count": 4,
        "min": 5.5,
        "max": 9.0,
        "average": 7.0,
        "from": "2026-01-02T03:04:05+00:00",
        "to": "2026-01-02T03:04:08+00:00",
        "latest": {"timestamp": "2026-01-02T03:04:08+00:00", "value": 5.5},
    }


def test_the_latest_is_that_of_time_not_of_arrival() -> None:
    found = Gathered()
    for second, value in ((3, 1.0), (9, 2.0), (5, 3.0)):
        found.add((1, BEGAN_US + second * 1_000_000, value, None, None))
    ((_, body),) = found.events(PH)
    assert (body["latest"]["value"], body["from"], body["to"]) == (
        2.0,
        "2026-01-02T03:04:08+00:00",
        "2026-01-02T03:04:14+00:00",
    )


def test_what_rules_do_not_believe_says_why() -> None:
    found = Gathered()
    found.add((1, BEGAN_US, 60.0, None, "above-maximum"))
    ((_, body),) = found.events(PH)
    assert (body["value"], body["suspect"]) == (60.0, "above-maximum")


@pytest.mark.parametrize(
    ("datatype", "values", "latest"), [("boolean", [1, 0, 1], True), ("string", ["a", "b", "c"], "c")]
)
def test_what_is_no_number_has_a_count_and_a_latest_value(datatype: str, values: list[Any], latest: Any) -> None:
    ((_, body),) = gathered(*values, watched=PH._replace(datatype=datatype))
    assert (body["count"], body["min"], body["max"], body["average"]) == (3, None, None, None)
    assert body["latest"]["value"] is latest or body["latest"]["value"] == latest


def test_a_worker_chooses_what_is_watched_and_new() -> None:
    rows = [(1, 10, 2.0, None, None), None, (2, 10, 4.0, None, None)]
    assert live_channel.select(rows, wanted=frozenset()) == []
    assert live_channel.select(rows, wanted=frozenset({1})) == [(1, 10, 2.0, None, None)]


@pytest.mark.usefixtures("empty_redis")
def test_what_is_watched_is_read_once_a_second_and_forgotten_with_its_gateway() -> None:
    now = 100.0
    wanted = live_channel.WatchedVariables(clock=lambda: now)
    live_channel.subscribe([1, 2], now=1_000.0)
    assert wanted.ids() == {1, 2}
    live_channel.subscribe([3], now=1_020.0)
    assert wanted.ids() == {1, 2}
    now += 1.0
    assert wanted.ids() == {1, 2, 3}
    live_channel.subscribe([3], now=1_031.0)
    now += 1.0
    assert wanted.ids() == {3}
    assert 0 < redis.client().ttl(keys.LIVE_READINGS_WATCHED) <= 30


class Audience:
    """Watches what it is told to; keeps what it hears."""

    def __init__(self, *watched: str) -> None:
        self.watched = set(watched)
        self.heard: list[tuple[str, str, Any]] = []

    def watched_variables(self) -> set[str]:
        return self.watched

    def send_to_watchers(self, variable_uuid: str, event: str, body: dict[str, Any]) -> None:
        self.heard.append((variable_uuid, event, body.get("value", body.get("count"))))


def variables(count: int) -> list[Variable]:
    names = {f"v{number}": "number" for number in range(count)}
    return list(builders.sensor(builders.organization(), variables=names).variables.order_by("id"))


def encoded(*rows: tuple[Variable, float]) -> bytes:
    sent: list[bytes] = []
    wire = [(variable.pk, BEGAN_US + number, value, None, None) for number, (variable, value) in enumerate(rows)]
    sent.append(live_channel._encode(wire))
    return sent[0]


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("empty_redis")
def test_a_gateway_gathers_what_its_clients_watch_and_tells_it_once() -> None:
    one, two, other = variables(3)
    audience = Audience(str(one.uuid), str(two.uuid))
    readings = LiveReadings(audience)
    readings.look()
    assert live_channel.WatchedVariables().ids() == {one.pk, two.pk}
    readings.gather(encoded((one, 1.0), (other, 2.0)))
    readings.gather(encoded((two, 3.0), (two, 4.0), (two, 5.0)))
    readings.gather(b"\xc1")
    readings.send()
    readings.send()
    assert audience.heard == [(str(one.uuid), "new-datastream", 1.0), (str(two.uuid), "datastream-batch", 3)]


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("empty_redis")
def test_who_stops_watching_is_told_nothing_more(django_assert_num_queries: Callable[[int], Any]) -> None:
    (one,) = variables(1)
    audience = Audience(str(one.uuid))
    readings = LiveReadings(audience)
    readings.look()
    audience.watched.clear()
    readings.gather(encoded((one, 1.0)))
    with django_assert_num_queries(0):
        readings.look()
    readings.send()
    assert audience.heard == []


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("empty_redis")
def test_more_than_so_many_variables_are_not_told_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live_readings, "MAXIMUM_VARIABLES", 2)
    readings = LiveReadings(Audience(*(str(each.uuid) for each in variables(3))))
    readings.look()
    assert len(live_channel.WatchedVariables().ids()) == 2
    assert "1 variables are not sent live" in caplog.text


@pytest.mark.usefixtures("empty_redis")
def test_a_client_in_the_room_of_a_variable_sees_its_readings(tmp_path: Path) -> None:
    farm = operator().ask("seed")
    variable = farm["variable"]
    with running(tmp_path / "log", {"kind": "socketio"}) as gateway:
        host, port = gateway.addresses()["socketio"]
        assert operator().ask("measure", variable=variable, values=[6.0]) == 0
        client, heard = socketio.Client(reconnection=False), []
        client.on("*", lambda event, data: heard.append((event, data.get("value", data.get("count")))))
        client.connect(f"http://{host}:{port}", auth={"token": farm["access_token"]}, transports=["websocket"])
        try:
            assert client.call("subscribe", {"room": f"telemetry-{variable}"}, timeout=10) == {"ok": True}
            until(lambda: operator().ask("measure", variable=variable, values=[6.0]) == 1)
            until(lambda: ("new-datastream", 6.0) in heard)
            operator().ask("measure", variable=variable, values=[5.0, 6.0, 7.0])
            until(lambda: ("datastream-batch", 3) in heard)
        finally:
            client.disconnect()
            client.shutdown()
