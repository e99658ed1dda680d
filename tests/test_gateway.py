"""The gateway between the notification stream and its transports, over a real Redis that is stopped and started again."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from django.db import OperationalError

from aemos.lib import keys, metrics, redis
from deploy.servers import Server, free_port
from gateway.deliveries import Deliveries, Outcome, State
from notifications import outbox
from notifications.messages import Message, Protocol
from notifications.models import Delivery
from notifications.publisher import Entry, append
from tests import builders
from tests.gateway_process import REPOSITORY, GatewayProcess, memory, new_message, operator, running
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("empty_redis")
MQTT = "mqtt"
ANOTHER_DEVICE = str(UUID(int=7))


def published(count: int = 1, *, protocols: Sequence[Protocol] = tuple(Protocol), **fields: Any) -> list[str]:
    """Messages on the stream alone; their ids."""
    messages: list[Message] = [new_message(protocols=tuple(protocols), **fields) for _ in range(count)]
    append(map(Entry, messages))
    return [str(message.id) for message in messages]


def pending() -> int:
    """Entries that were read for the broker and are not acknowledged."""
    summary = _any(redis.client().xpending(keys.NOTIFICATIONS, keys.NOTIFICATIONS_MQTT_GROUP))
    return int(summary["pending"])


def _any(reply: Any) -> Any:
    """The client's types say that a reply may also be awaitable."""
    return reply


def test_every_transport_receives_what_is_published_after_the_start_in_order(tmp_path: Path) -> None:
    before = published(3)
    with running(tmp_path / "log", memory("socketio"), memory("coap")) as gateway:
        sent = published(150)
        gateway.wait_for(lambda: len(gateway.delivered("socketio")) + len(gateway.delivered("coap")) >= 300)
        assert gateway.delivered("socketio") == gateway.delivered("coap") == sent
        assert not set(before) & set(gateway.delivered("coap"))
        for protocol in ("socketio", "coap"):
            field = f"{metrics.NOTIFICATIONS_SENT.name}|{protocol}|sent"
            # At least: what a gateway that another test killed had counted is told, too.
            gateway.wait_for(lambda field=field: float(_any(redis.client().hget(keys.METRICS, field)) or 0) >= 150)  # type: ignore[misc]


def test_a_message_goes_only_to_the_protocols_it_names(tmp_path: Path) -> None:
    with running(tmp_path / "log", memory("socketio"), memory("coap"), memory(MQTT)) as gateway:
        (only_coap,) = published(protocols=[Protocol.COAP])
        (for_all,) = published()
        gateway.wait_for(lambda: for_all in gateway.delivered("socketio") and for_all in gateway.delivered(MQTT))
        gateway.wait_for(lambda: for_all in gateway.delivered("coap"))
        assert gateway.delivered("socketio") == gateway.delivered(MQTT) == [for_all]
        assert gateway.delivered("coap") == [only_coap, for_all]
        gateway.wait_for(lambda: pending() == 0)


@pytest.mark.parametrize("trouble", [{"failure": "unforeseen"}, {"failure": "temporary"}, {"slow_seconds": 60}])
def test_one_failing_or_slow_transport_does_not_hold_up_the_others(tmp_path: Path, trouble: dict[str, object]) -> None:
    with running(tmp_path / "log", memory("coap", **trouble), memory("socketio"), memory(MQTT)) as gateway:
        sent = published(20)
        gateway.wait_for(lambda: gateway.delivered("socketio") == sent)
        gateway.wait_for(lambda: gateway.delivered(MQTT) == sent)
        assert gateway.delivered("coap") == []


def test_of_two_gateways_one_delivers_to_the_broker_and_each_serves_its_own_clients(tmp_path: Path) -> None:
    with (
        running(tmp_path / "one", memory(MQTT), memory("socketio")) as one,
        running(tmp_path / "two", memory(MQTT), memory("socketio")) as two,
    ):
        sent = published(300)
        one.wait_for(lambda: len(one.delivered(MQTT)) + len(two.delivered(MQTT)) >= 300)
        one.wait_for(lambda: one.delivered("socketio") == sent)
        two.wait_for(lambda: two.delivered("socketio") == sent)
        assert sorted([one.delivered(MQTT), two.delivered(MQTT)]) == [[], sent], "all by one, in order"


def test_only_what_a_killed_gateway_left_unacknowledged_is_taken_over(tmp_path: Path) -> None:
    with running(tmp_path / "one", memory(MQTT)) as one:
        acknowledged = published(5)
        one.wait_for(lambda: one.delivered(MQTT) == acknowledged)
        one.wait_for(lambda: pending() == 0)
        one.stop()
    with running(tmp_path / "two", memory(MQTT, acknowledging=False)) as two:
        in_flight = published(5)
        two.wait_for(lambda: two.delivered(MQTT) == in_flight)
        two.kill()
    with running(tmp_path / "three", memory(MQTT)) as three:
        three.wait_for(lambda: three.delivered(MQTT) == in_flight)
        three.wait_for(lambda: pending() == 0)


def test_what_is_in_flight_is_not_sent_again_until_its_gateway_dies(tmp_path: Path) -> None:
    group = keys.NOTIFICATIONS_MQTT_GROUP
    redis.client().xgroup_create(keys.NOTIFICATIONS, group, id="0", mkstream=True)
    (orphan,) = published()
    redis.client().xreadgroup(group, "dead", {keys.NOTIFICATIONS: ">"})
    with running(tmp_path / "one", memory(MQTT, acknowledging=False)) as one:
        in_flight = [orphan, *published(3)]
        one.wait_for(lambda: one.delivered(MQTT) == in_flight)
        with running(tmp_path / "two", memory(MQTT)) as two:
            (later,) = published()
            one.wait_for(lambda: one.delivered(MQTT) == [*in_flight, later])
            assert two.delivered(MQTT) == []
            one.kill()
            two.wait_for(lambda: two.delivered(MQTT) == [*in_flight, later])
            two.wait_for(lambda: pending() == 0)


def test_messages_published_minutes_before_the_first_gateway_reach_the_broker(tmp_path: Path) -> None:
    early = published(2)
    with running(tmp_path / "log", memory(MQTT)) as gateway:
        gateway.wait_for(lambda: gateway.delivered(MQTT) == early)


def test_messages_from_long_before_the_first_gateway_are_not_sent_to_the_broker(tmp_path: Path) -> None:
    seconds, _ = _any(redis.client().time())
    redis.client().xadd(keys.NOTIFICATIONS, {"m": b"whatever it is"}, id=f"{(seconds - 3600) * 1000}-0")
    sent = published()
    with running(tmp_path / "log", memory(MQTT)) as gateway:
        gateway.wait_for(lambda: gateway.delivered(MQTT) == sent)
        gateway.stop()
        assert gateway.printed("counts") == [{MQTT: {"delivered": 1}}]


def test_an_entry_that_is_no_message_is_skipped_counted_and_acknowledged(tmp_path: Path) -> None:
    with running(tmp_path / "log", memory(MQTT), memory("coap")) as gateway:
        for field, value in (("m", b"\xc1"), ("other", b"1"), ("m", b"\x81\xa2id\x01")):
            redis.client().xadd(keys.NOTIFICATIONS, {field: value})
        sent = published()
        gateway.wait_for(lambda: gateway.delivered(MQTT) == sent and gateway.delivered("coap") == sent)
        gateway.wait_for(lambda: pending() == 0)
        gateway.stop()
        (counts,) = gateway.printed("counts")
        assert counts[MQTT]["undecodable"] == counts["coap"]["undecodable"] == 3


def test_redis_restarted_loses_no_message_and_is_mentioned_once(tmp_path: Path, redis_server: Server) -> None:
    with running(tmp_path / "log", memory("socketio"), memory(MQTT)) as gateway:
        first = published(3)
        gateway.wait_for(lambda: gateway.delivered("socketio") == first and gateway.delivered(MQTT) == first)
        redis_server.kill()
        gateway.wait_for(lambda: "Notifications wait in the stream" in gateway.text)
        redis_server.start()
        second = published(3)
        gateway.wait_for(lambda: gateway.delivered("socketio") == first + second, seconds=5)
        gateway.wait_for(lambda: gateway.delivered(MQTT)[-3:] == second, seconds=5)
        assert gateway.text.count("Notifications wait in the stream") == 1


def test_a_lost_stream_and_group_are_made_anew(tmp_path: Path) -> None:
    with running(tmp_path / "log", memory("socketio"), memory(MQTT)) as gateway:
        first = published(3)
        gateway.wait_for(lambda: gateway.delivered("socketio") == first and gateway.delivered(MQTT) == first)
        redis.client().flushdb()
        second = published(3)
        gateway.wait_for(lambda: gateway.delivered("socketio") == first + second)
        gateway.wait_for(lambda: gateway.delivered(MQTT) == first + second)


def test_a_gateway_that_starts_without_redis_serves_once_redis_is_there(tmp_path: Path, redis_server: Server) -> None:
    redis_server.kill()
    try:
        with running(tmp_path / "log", memory("socketio"), memory(MQTT)) as gateway:
            redis_server.start()
            sent = published(2)
            gateway.wait_for(lambda: gateway.delivered("socketio") == sent and gateway.delivered(MQTT) == sent)
    finally:
        if redis_server.child is None:
            redis_server.start()


def test_a_refused_message_is_tried_again_and_keeps_its_place(tmp_path: Path) -> None:
    with running(tmp_path / "log", memory(MQTT, failure="temporary", failures=3), memory("coap")) as gateway:
        sent = published(3)
        gateway.wait_for(lambda: gateway.delivered(MQTT) == sent)
        assert gateway.printed("refused") == [[MQTT, sent[0]]] * 3


def test_an_urgent_message_goes_out_at_once_behind_ten_thousand_normal_ones(tmp_path: Path) -> None:
    with running(tmp_path / "log", memory(MQTT, slow_seconds=0.002), memory("coap", slow_seconds=0.002)) as gateway:
        waiting = published(10_000)
        (urgent,) = published(priority=1, device=ANOTHER_DEVICE)
        for protocol in (MQTT, "coap"):
            gateway.wait_for(lambda protocol=protocol: urgent in gateway.delivered(protocol))  # type: ignore[misc]
            order = gateway.delivered(protocol)
            assert order.index(urgent) < 3_000
            del order[order.index(urgent) :]
            assert order == waiting[: len(order)]


def test_an_urgent_message_never_overtakes_what_its_device_was_told_before(tmp_path: Path) -> None:
    with running(tmp_path / "log", memory(MQTT, slow_seconds=0.001)) as gateway:
        published(2_000)
        mine = published(3, device=ANOTHER_DEVICE) + published(1, device=ANOTHER_DEVICE, priority=1)
        gateway.wait_for(lambda: set(mine) <= set(gateway.delivered(MQTT)))
        assert [each for each in gateway.delivered(MQTT) if each in mine] == mine


def test_people_are_told_in_the_order_of_the_stream_whatever_is_urgent(tmp_path: Path) -> None:
    with running(tmp_path / "log", memory("socketio", slow_seconds=0.001)) as gateway:
        sent = published(500) + published(1, priority=1, device=ANOTHER_DEVICE)
        gateway.wait_for(lambda: gateway.delivered("socketio") == sent)


def test_what_has_expired_is_put_aside_but_a_state_is_told_however_late(tmp_path: Path) -> None:
    farm = operator().ask("seed")
    organization, device = farm["organization"], farm["device"]
    with running(tmp_path / "log", memory(MQTT)) as gateway:
        late = {"protocols": [MQTT], "expires_at": 1.0}
        alert = operator().ask("publish", organization=organization, **late)
        state = operator().ask("publish", organization=organization, device=device, event="device-state-change", **late)
        gateway.wait_for(lambda: operator().ask("deliveries", message=alert)[MQTT][0] == "expired")
        gateway.wait_for(lambda: operator().ask("deliveries", message=state)[MQTT][0] == "acknowledged")
        assert gateway.delivered(MQTT) == [state]
        gateway.wait_for(lambda: pending() == 0)


@pytest.mark.parametrize(("status", "state"), [("expired", "expired"), ("delivered", "acknowledged")])
def test_what_expired_in_the_transport_is_dead_and_what_was_late_is_not(
    tmp_path: Path, status: str, state: str
) -> None:
    farm = operator().ask("seed")
    with running(tmp_path / "log", memory(MQTT, slow_seconds=3.5, status=status)) as gateway:
        soon = {"protocols": [MQTT], "expires_at": time.time() + 3}
        message = operator().ask("publish", organization=farm["organization"], **soon)
        gateway.wait_for(lambda: operator().ask("deliveries", message=message)[MQTT][0] != "pending")
        assert operator().ask("deliveries", message=message)[MQTT][0] == state


def test_fan_out_is_given_up_after_as_many_attempts_as_are_set(tmp_path: Path) -> None:
    farm = operator().ask("seed")
    failing = memory("coap", failure="temporary")
    with running(tmp_path / "log", failing, NOTIFICATION_MAX_ATTEMPTS="2") as gateway:
        message = operator().ask("publish", organization=farm["organization"], protocols=["coap"])
        given_up = ["failed", 2, "not now"]
        gateway.wait_for(lambda: operator().ask("deliveries", message=message)["coap"] == given_up)
        assert gateway.printed("refused") == [["coap", message]] * 2


def test_delivery_states_tell_how_far_each_protocol_has_come(tmp_path: Path) -> None:
    farm = operator().ask("seed")
    with running(tmp_path / "log", memory("socketio"), memory(MQTT), memory("coap", failure="permanent")) as gateway:
        message = operator().ask("publish", organization=farm["organization"])
        expected = {"socketio": ["sent", 1, ""], MQTT: ["acknowledged", 1, ""], "coap": ["failed", 1, "never"]}
        gateway.wait_for(lambda: operator().ask("deliveries", message=message) == expected)


def test_delivery_states_count_attempts_and_name_the_error_while_it_lasts(tmp_path: Path) -> None:
    farm = operator().ask("seed")
    with running(tmp_path / "log", memory(MQTT, failure="temporary", failures=4)) as gateway:
        message = operator().ask("publish", organization=farm["organization"], protocols=[MQTT])
        gateway.wait_for(lambda: operator().ask("deliveries", message=message)[MQTT][2] == "not now")
        gateway.wait_for(lambda: operator().ask("deliveries", message=message)[MQTT] == ["acknowledged", 5, ""])


def test_what_the_broker_refuses_for_good_is_a_dead_letter_with_its_reason(tmp_path: Path) -> None:
    farm = operator().ask("seed")
    with running(
        tmp_path / "log", memory(MQTT, status="refused", reason="Not authorized"), NOTIFICATION_MAX_ATTEMPTS="2"
    ) as gateway:
        message = operator().ask("publish", organization=farm["organization"], protocols=[MQTT])
        dead = ["failed", 2, "Not authorized"]
        gateway.wait_for(lambda: operator().ask("deliveries", message=message)[MQTT] == dead)
        gateway.wait_for(lambda: pending() == 0)


def state_of(message: str) -> tuple[str, int, str]:
    row = Delivery.objects.get(notification__uuid=message, protocol=Protocol.MQTT)
    return row.state, row.attempts, row.last_error


def written() -> UUID:
    """A notification in the database of this process; its id."""
    owner = builders.organization()
    message: Message = new_message(str(owner.uuid))
    outbox.write([(message, owner.pk, None)])
    return message.id


@pytest.mark.django_db(transaction=True)
def test_a_delivery_state_never_goes_backwards() -> None:
    deliveries, message = Deliveries(), written()
    steps = [
        (Outcome(State.PENDING, 2, "not now"), ("pending", 2, "not now")),
        (Outcome(State.FAILED, 5, "never"), ("failed", 5, "never")),
        (Outcome(State.PENDING, 6, "not now"), ("failed", 5, "never")),
        (Outcome(State.SENT, 1), ("sent", 5, "")),
        (Outcome(State.FAILED, 9, "never"), ("sent", 5, "")),
        (Outcome(State.ACKNOWLEDGED, 7), ("acknowledged", 7, "")),
        (Outcome(State.SENT, 8), ("acknowledged", 7, "")),
        (Outcome(State.PENDING, 8, "not now"), ("acknowledged", 7, "")),
    ]
    for outcome, expected in steps:
        deliveries.record(message, Protocol.MQTT, outcome)
        deliveries.flush()
        assert state_of(str(message)) == expected


@pytest.mark.django_db(transaction=True)
def test_outcomes_of_one_message_are_merged_before_they_are_written() -> None:
    deliveries, message = Deliveries(), written()
    for state in (State.PENDING, State.ACKNOWLEDGED, State.PENDING):
        deliveries.record(message, Protocol.MQTT, Outcome(state))
    assert len(deliveries) == 1
    deliveries.flush()
    assert state_of(str(message))[0] == "acknowledged"


@pytest.mark.django_db(transaction=True)
def test_outcomes_that_are_alike_take_one_statement(django_assert_num_queries: Any) -> None:
    deliveries, messages = Deliveries(), [written() for _ in range(20)]
    for message in messages:
        for protocol in Protocol:
            deliveries.record(message, protocol, Outcome(State.SENT))
    with django_assert_num_queries(3):
        deliveries.flush()
    assert Delivery.objects.filter(state=State.SENT).count() == 60


@pytest.mark.django_db(transaction=True)
def test_what_the_database_cannot_take_now_waits_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise OperationalError("the server is gone")

    deliveries, messages = Deliveries(maximum=2), [written() for _ in range(3)]
    with monkeypatch.context() as broken:
        broken.setattr("gateway.deliveries._update", away)
        for message in messages:
            deliveries.record(message, Protocol.MQTT, Outcome(State.SENT))
            deliveries.flush()
    assert (len(deliveries), deliveries.dropped) == (2, 1)
    deliveries.flush()
    assert [state_of(str(message))[0] for message in messages] == ["sent", "sent", "pending"]


def test_sigterm_stops_the_gateway_in_order(tmp_path: Path) -> None:
    with running(tmp_path / "log", memory("socketio"), memory(MQTT)) as gateway:
        sent = published(2)
        gateway.wait_for(lambda: gateway.delivered(MQTT) == sent)
        assert gateway.stop() == 0
        groups = redis.client().xinfo_consumers(keys.NOTIFICATIONS, keys.NOTIFICATIONS_MQTT_GROUP)
        assert groups == []  # a consumer that has signed off is not looked after for ever


MANAGE = [sys.executable, str(REPOSITORY / "manage.py"), "rungateway"]


def test_rungateway_help_names_the_settings() -> None:
    done = subprocess.run([*MANAGE, "--help"], capture_output=True, text=True, check=True)
    for word in ("SOCKETIO_PORT", "MQTT_PORT", "COAP_PORT", "--no-mqtt", "--no-coap", "--no-socketio"):
        assert word in done.stdout


@pytest.mark.parametrize(("protocol", "setting"), [("socketio", "SOCKETIO_PORT"), ("coap", "COAP_PORT")])
def test_rungateway_names_the_port_in_use_and_its_setting(tmp_path: Path, protocol: str, setting: str) -> None:
    with running(tmp_path / "log", {"kind": protocol}) as gateway:
        port = gateway.addresses()[protocol][1]
        others = [f"--no-{each}" for each in ("socketio", "mqtt", "coap") if each != protocol]
        refused = GatewayProcess([*MANAGE, *others], tmp_path / "refused", **{setting: str(port)})
        until(lambda: refused.child.poll() is not None)
        assert refused.child.returncode == 1
        lines = [line for line in refused.text.splitlines() if "off (" not in line]
        assert len(lines) == 1
        assert str(port) in lines[0]
        assert setting in lines[0]


def test_rungateway_says_what_it_serves_and_stops_on_sigterm(tmp_path: Path) -> None:
    ports = {"SOCKETIO_PORT": str(free_port()), "COAP_PORT": "0", "MQTT_ENABLED": "false"}
    gateway = GatewayProcess(MANAGE, tmp_path / "log", **ports)
    try:
        socketio = f"Socket.IO: listening on http://127.0.0.1:{ports['SOCKETIO_PORT']}"
        gateway.wait_for(lambda: socketio in gateway.text)
        assert "CoAP: listening on coap://127.0.0.1:" in gateway.text.partition(socketio)[0]
        assert "MQTT: off (MQTT_ENABLED=false)" in gateway.text
        assert gateway.stop() == 0
    finally:
        gateway.kill()


def test_rungateway_refuses_to_run_nothing(tmp_path: Path) -> None:
    gateway = GatewayProcess([*MANAGE, "--no-socketio", "--no-mqtt", "--no-coap"], tmp_path / "log")
    until(lambda: gateway.child.poll() is not None)
    assert gateway.child.returncode == 1
    assert "nothing to run" in gateway.text
