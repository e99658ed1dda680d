"""Socket.IO clients that come back: to any gateway, with their last position, and get what they missed or are told of a gap."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from aemos.lib import keys, metrics, redis
from deploy.servers import Server
from gateway.socketio import replay
from tests.gateway_process import GatewayProcess, operator, running
from tests.socketio_clients import connected, events, messages, raw_websocket
from tests.waiting import until

Farm = dict[str, Any]
pytestmark = pytest.mark.usefixtures("empty_redis")


@pytest.fixture
def farm() -> Farm:
    found: Farm = operator().ask("seed")
    return found


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayProcess]:
    with running(tmp_path / "log", {"kind": "socketio"}) as process:
        yield process


def published(farm: Farm, count: int = 1, **fields: Any) -> list[str]:
    """Messages in the table and on the stream, as effects make them."""
    return [operator().ask("publish", organization=farm["organization"], **fields) for _ in range(count)]


def streamed(farm: Farm, count: int) -> list[str]:
    """Messages on the stream alone."""
    sent: list[str] = operator().ask("publish_many", organization=farm["organization"], count=count, size=10)
    return sent


def newest_position() -> str:
    ((entry_id, _),) = redis.client().xrevrange(keys.NOTIFICATIONS, count=1)
    return str(entry_id.decode())


def resumed(gateway: GatewayProcess, farm: Farm, position: str) -> list[tuple[str, Any]]:
    """What a client that comes back is sent up to the moment when it is live; the next news must be the next message."""
    with raw_websocket(gateway, token=farm["access_token"], position=position) as connection:
        received = events(connection)
        replayed = list(takewhile(lambda each: each[0] != "position", received))
        live = streamed(farm, 1)
        known = {None, *(data.get("id") for _, data in replayed)}
        assert [next(data["id"] for _, data in received if data.get("id") not in known)] == live
        return replayed


def ids(received: list[tuple[str, Any]]) -> list[str]:
    return [data["id"] for _, data in received]


def test_what_was_missed_is_replayed_in_order_by_a_gateway_that_was_not_there_then(tmp_path: Path, farm: Farm) -> None:
    with running(tmp_path / "one", {"kind": "socketio"}) as one:
        with raw_websocket(one, token=farm["access_token"]) as connection:
            sent = streamed(farm, 5)
            seen = [next(received) for received in [messages(connection)] for _ in sent]
            assert [message["id"] for message in seen] == sent
        one.kill()
    missed = streamed(farm, 250)
    with running(tmp_path / "two", {"kind": "socketio"}) as two:
        assert ids(resumed(two, farm, seen[2]["position"])) == sent[3:] + missed


def test_a_client_that_was_told_nothing_yet_knows_where_to_go_on(gateway: GatewayProcess, farm: Farm) -> None:
    with connected(gateway, farm["access_token"]) as client:
        until(lambda: client.positions)
    missed = streamed(farm, 3)
    assert ids(resumed(gateway, farm, client.positions[-1])) == missed


def test_connected_clients_get_what_the_stream_lost_before_it_was_read(gateway: GatewayProcess, farm: Farm) -> None:
    with raw_websocket(gateway, token=farm["access_token"]) as connection:
        received = messages(connection)
        first = published(farm)
        assert [next(received)["id"]] == first
        gateway.child.send_signal(signal.SIGSTOP)
        lost = published(farm, 2)
        redis.client().flushdb()
        kept = published(farm)
        gateway.child.send_signal(signal.SIGCONT)
        heard = [next(received)["id"] for _ in first + lost + kept]
    assert heard == first + lost + kept, "the first comes again: the table knows publications to some seconds only"


def test_live_messages_do_not_overtake_replayed_ones(gateway: GatewayProcess, farm: Farm) -> None:
    (first,) = streamed(farm, 1)
    position = newest_position()
    missed = streamed(farm, 3_000)
    with raw_websocket(gateway, token=farm["access_token"], position=position) as connection:
        live = [message for _ in range(30) for message in streamed(farm, 20)]
        received = messages(connection)
        assert [next(received)["id"] for _ in missed + live] == missed + live
    assert first not in missed


def test_many_clients_that_come_back_at_once_are_all_given_everything(gateway: GatewayProcess, farm: Farm) -> None:
    streamed(farm, 1)
    position, missed = newest_position(), streamed(farm, 1_000)
    replays = [raw_websocket(gateway, token=farm["access_token"], position=position) for _ in range(20)]
    connections = [each.__enter__() for each in replays]
    for connection in connections:
        received = messages(connection)
        assert [next(received)["id"] for _ in missed] == missed
    for each in replays:
        each.__exit__(None, None, None)


def test_resume_may_be_asked_for_after_rooms_were_chosen(gateway: GatewayProcess, farm: Farm) -> None:
    streamed(farm, 1)
    position = newest_position()
    with connected(gateway, farm["access_token"]) as client:
        client.ask("subscribe", {"room": f"device-uuid-{farm['device']}"})
        client.ask("unsubscribe", {"room": f"organization-{farm['organization']}"})
        own, _ = published(farm, device=farm["device"]), published(farm, device=farm["other_device"])
        until(lambda: own[0] in client.ids())
        assert client.ask("resume", {"position": position}) == {"ok": True}
        until(lambda: client.ids() == own * 2)
        again = published(farm, device=farm["device"])
        until(lambda: client.ids() == own * 2 + again)


def test_only_what_the_client_may_see_is_replayed(gateway: GatewayProcess, farm: Farm) -> None:
    other = operator().ask("seed")
    streamed(farm, 1)
    position = newest_position()
    published(other)
    published(farm, payload={"roles": ["admin"]})
    published(farm, protocols=["mqtt"])
    mine = published(farm, payload={"roles": ["viewer", "admin"]})
    assert ids(resumed(gateway, farm, position)) == mine


def test_what_was_cut_off_the_stream_is_replayed_from_the_table(gateway: GatewayProcess, farm: Farm) -> None:
    published(farm)
    position, missed = newest_position(), published(farm, 120)
    redis.client().xtrim(keys.NOTIFICATIONS, maxlen=50, approximate=False)
    received = ids(resumed(gateway, farm, position))
    assert received[-120:] == missed
    assert len(set(received)) == len(received)


def test_a_stream_that_was_lost_is_made_up_for_from_the_table(gateway: GatewayProcess, farm: Farm) -> None:
    published(farm)
    position, missed = newest_position(), published(farm, 10)
    redis.client().flushdb()
    assert ids(resumed(gateway, farm, position))[-10:] == missed
    missed += published(farm, 10)
    received = ids(resumed(gateway, farm, position))
    assert [each for each in received if each in missed] == missed


def test_a_replay_from_the_table_that_was_interrupted_goes_on_without_loss(gateway: GatewayProcess, farm: Farm) -> None:
    published(farm)
    position, missed = newest_position(), published(farm, 150)
    redis.client().xtrim(keys.NOTIFICATIONS, maxlen=10, approximate=False)
    with raw_websocket(gateway, token=farm["access_token"], position=position) as connection:
        received = messages(connection)
        seen = [next(received) for _ in range(100)]
    rest = ids(resumed(gateway, farm, seen[-1]["position"]))
    assert list(dict.fromkeys([each for each in [*(one["id"] for one in seen), *rest] if each in missed])) == missed


def test_a_gap_is_said_and_the_states_are_sent(gateway: GatewayProcess, farm: Farm) -> None:
    published(farm, 3)
    operator().ask("set_state", device=farm["device"], value="on")
    for position in ("0-0", "1500000000000-7", "999999999999999-0"):  # long ago twice, and a time to come
        gap, snapshot = resumed(gateway, farm, position)
        assert (gap[0], gap[1]["from"]) == ("gap", position)
        assert (snapshot[0], snapshot[1]["complete"]) == ("snapshot", True)
        (state,) = snapshot[1]["states"]
        assert (state["device"], state["stateName"], state["value"]) == (farm["device"], "power", "on")
    until(lambda: counted("gap") >= 2 and counted("complete") >= 1)  # to begin at 0-0 is no gap


def counted(result: str) -> float:
    return float(redis.client().hget(keys.METRICS, f"{metrics.SOCKETIO_RESUMES.name}|{result}") or 0)


def test_a_client_at_the_beginning_gets_the_states_before_anything_is_published(
    gateway: GatewayProcess, farm: Farm
) -> None:
    assert [event for event, _ in resumed(gateway, farm, "0-0")] == ["gap", "snapshot"]


def test_states_of_many_devices_come_in_parts_of_which_the_last_says_so(gateway: GatewayProcess, farm: Farm) -> None:
    operator().ask("add_devices", organization=farm["organization"], count=600)
    published(farm)
    _, *snapshots = resumed(gateway, farm, "0-0")
    assert [(len(body["states"]), body["complete"]) for _, body in snapshots] == [(500, False), (101, True)]


def test_a_client_that_missed_too_much_is_told_of_a_gap(tmp_path: Path, farm: Farm) -> None:
    published(farm)
    position = newest_position()
    streamed(farm, 500)
    limit = {"kind": "socketio", "replayed": 200}
    with running(tmp_path / "log", limit) as gateway:
        received = resumed(gateway, farm, position)
    names = [event for event, _ in received]
    assert 200 <= names.count("alert") < 200 + replay.SLICE
    assert names[-2:] == ["gap", "snapshot"]


def test_a_slow_client_is_replayed_to_at_its_own_pace(gateway: GatewayProcess, farm: Farm) -> None:
    """Far more than a connection may leave unread."""
    streamed(farm, 1)
    position = newest_position()
    missed = operator().ask("publish_many", organization=farm["organization"], count=300, size=100_000)
    with raw_websocket(gateway, token=farm["access_token"], receive_buffer=4096, position=position) as connection:
        time.sleep(3)  # the sweep looks for connections that leave too much unread
        received = messages(connection)
        assert [next(received)["id"] for _ in missed] == missed
    assert "Cut off" not in gateway.text


def test_a_replay_waits_for_redis_and_goes_on(tmp_path: Path, farm: Farm, redis_server: Server) -> None:
    streamed(farm, 1)
    position, missed = newest_position(), streamed(farm, 5)
    with running(tmp_path / "log", {"kind": "socketio"}) as gateway:
        redis_server.kill()
        try:
            with raw_websocket(gateway, token=farm["access_token"], position=position) as connection:
                gateway.wait_for(lambda: "wait for what they missed" in gateway.text)
                redis_server.start()
                received = messages(connection)
                assert [next(received)["id"] for _ in missed] == missed
        finally:
            if redis_server.child is None:
                redis_server.start()


def test_rights_that_end_during_a_replay_end_it(gateway: GatewayProcess, farm: Farm) -> None:
    streamed(farm, 1)
    position = newest_position()
    operator().ask("publish_many", organization=farm["organization"], count=300, size=100_000)
    with raw_websocket(gateway, token=farm["access_token"], receive_buffer=4096, position=position) as connection:
        operator().ask("leave", user=farm["user"], organization=farm["organization"])
        time.sleep(7)  # rights are looked at every five seconds
        received = list(takewhile(lambda each: each[0] != "position", events(connection)))
        assert 0 < len(received) < 300
