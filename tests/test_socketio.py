"""Socket.IO from outside: a gateway process, the real client, and messages published the way effects publish them."""

from __future__ import annotations

import itertools
import queue
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
import socketio
from socketio.exceptions import ConnectionError as NotConnected

from aemos.lib import keys, metrics, redis
from gateway.people import Login
from gateway.socketio.sessions import Session
from gateway.socketio.transport import RIGHTS_SECONDS, SWEEP_SECONDS, SocketIoTransport
from notifications.messages import decode
from tests.gateway_process import GatewayProcess, operator, running
from tests.servers import redis_that_was_empty
from tests.socketio_clients import Client, connected, events, messages, raw_websocket, text_frame, url
from tests.waiting import until

Farm = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with redis_that_was_empty(), running(tmp_path_factory.mktemp("gateway") / "log", {"kind": "socketio"}) as process:
        yield process


@pytest.fixture
def farm() -> Farm:
    found: Farm = operator().ask("seed")
    return found


def refusal(gateway: GatewayProcess, **options: Any) -> str:
    """What the server says to a client that it does not let in."""
    client = socketio.Client(reconnection=False)
    answers: queue.Queue[Any] = queue.Queue()
    client.on("connect_error", answers.put)
    try:
        with pytest.raises(NotConnected):
            client.connect(url(gateway), transports=["websocket"], wait_timeout=5, **options)
        return str(answers.get(timeout=5))
    finally:
        client.disconnect()
        client.shutdown()


def sent_to_all(farm: Farm, **fields: Any) -> str:
    """A message that was published a moment ago."""
    message: str = operator().ask("publish", organization=farm["organization"], protocols=["socketio"], **fields)
    time.sleep(0.2)
    return message


def published(farm: Farm, *clients: Client, **fields: Any) -> str:
    """Publishes a message and waits until the clients have it; with another after it, so that doubles would be seen."""
    first: str = operator().ask("publish", organization=farm["organization"], protocols=["socketio"], **fields)
    last: str = operator().ask("publish", organization=farm["organization"], protocols=["socketio"], **fields)
    for client in clients:
        until(lambda client=client: last in client.ids())  # type: ignore[misc]
    return first


def position_of(message: str) -> str | None:
    """Where the stream holds the message."""
    entries: Any = redis.client().xrevrange(keys.NOTIFICATIONS, count=100)
    found = (entry_id.decode() for entry_id, fields in entries if str(decode(fields[b"m"]).id) == message)
    return next(found, None)


@pytest.mark.parametrize("auth", [None, {}, {"token": ""}, {"token": {"a": 1}}, "text", ["list"]])
def test_without_a_token_nobody_is_let_in(gateway: GatewayProcess, auth: object) -> None:
    assert "access token" in refusal(gateway, auth=auth)


@pytest.mark.parametrize("token", ["garbage", "a.b.c", "aemos_12345678901234_x"])
def test_garbage_is_no_token(gateway: GatewayProcess, token: str) -> None:
    assert "not valid" in refusal(gateway, auth={"token": token})


def test_an_expired_token_is_refused(gateway: GatewayProcess, farm: Farm) -> None:
    token = operator().ask("access_token", user=farm["user"], seconds=-1)
    assert "expired" in refusal(gateway, auth={"token": token})


def test_a_person_who_is_not_active_is_refused(gateway: GatewayProcess, farm: Farm) -> None:
    operator().ask("deactivate", user=farm["user"])
    assert "not active" in refusal(gateway, auth={"token": farm["access_token"]})


def test_a_device_token_is_no_persons_token(gateway: GatewayProcess, farm: Farm) -> None:
    assert "not valid" in refusal(gateway, auth={"token": farm["device_token"]})


def test_the_token_may_come_in_the_authorization_header(gateway: GatewayProcess, farm: Farm) -> None:
    headers = {"Authorization": f"Bearer {farm['access_token']}"}
    with connected(gateway, "", auth=None, headers=headers) as client:
        assert client.io.connected


def test_another_namespace_is_refused(gateway: GatewayProcess, farm: Farm) -> None:
    with pytest.raises(NotConnected), connected(gateway, farm["access_token"], namespaces=["/admin"], wait_timeout=2):
        pass


@pytest.mark.parametrize("transport", ["websocket", "polling"])
def test_a_state_change_reaches_the_organizations_people_once(
    gateway: GatewayProcess, farm: Farm, transport: str
) -> None:
    with connected(gateway, farm["access_token"], transport=transport) as client:
        assert client.ask("subscribe", {"room": f"device-uuid-{farm['device']}"}) == {"ok": True}
        message = published(farm, client, device=farm["device"], event="device-state-change")
        assert client.ids().count(message) == 1
        event, data = next(each for each in client.received if each[1]["id"] == message)
        assert event == "device-state-change"
        assert data == {
            "position": position_of(message),
            "id": message,
            "event": "device-state-change",
            "organization": farm["organization"],
            "device": farm["device"],
            "priority": 5,
            "timestamp": "2026-01-02T03:04:05+00:00",
            "data": {"text": "ph is 9"},
        }


def test_messages_come_in_the_order_in_which_they_were_published(gateway: GatewayProcess, farm: Farm) -> None:
    with raw_websocket(gateway, token=farm["access_token"]) as connection:
        sent = operator().ask("publish_many", organization=farm["organization"], count=200, size=10)
        received = messages(connection)
        assert [next(received)["id"] for _ in sent] == sent


def test_nobody_hears_of_another_organization(gateway: GatewayProcess, farm: Farm) -> None:
    other = operator().ask("seed")
    with connected(gateway, farm["access_token"]) as mine, connected(gateway, other["access_token"]) as theirs:
        message = published(farm, mine)
        published(other, theirs)
        assert message in mine.ids()
        assert message not in theirs.ids()


@pytest.mark.parametrize("event", ["subscribe", "join"])
def test_no_room_of_another_organization_is_granted(gateway: GatewayProcess, farm: Farm, event: str) -> None:
    other = operator().ask("seed")
    rooms = [
        f"organization-{other['organization']}",
        f"device-uuid-{other['device']}",
        f"telemetry-{other['variable']}",
        "device-uuid-00000000-0000-4000-8000-000000000000",
    ]
    with connected(gateway, farm["access_token"]) as client:
        answers = [client.ask(event, {"room": room}) for room in rooms]
        # The same words for what is not there and for what is somebody else's: who asks learns nothing.
        assert answers == [{"ok": False, "error": "There is no such room, or you have no right to it."}] * 4
        message = published(other, device=other["device"])
        published(farm, client)
        assert message not in client.ids()


@pytest.mark.parametrize(
    "arguments", [(), (None,), ({"room": 1},), ({"room": "everything"},), ("device-uuid-x",), ([],)]
)
def test_what_is_no_room_is_answered_as_such(
    gateway: GatewayProcess, farm: Farm, arguments: tuple[object, ...]
) -> None:
    with connected(gateway, farm["access_token"]) as client:
        assert client.ask("subscribe", *arguments)["ok"] is False


def test_a_client_may_be_told_of_one_device_alone(gateway: GatewayProcess, farm: Farm) -> None:
    with (
        connected(gateway, farm["access_token"]) as everything,
        connected(gateway, farm["access_token"]) as one_device,
    ):
        assert one_device.ask("subscribe", {"room": f"device-uuid-{farm['device'].upper()}"})["ok"]
        assert one_device.ask("unsubscribe", {"room": f"organization-{farm['organization']}"})["ok"]
        other = published(farm, everything, device=farm["other_device"])
        general = published(farm, everything)
        own = published(farm, everything, one_device, device=farm["device"])
        assert {own, other, general} <= set(everything.ids())
        assert own in one_device.ids()
        assert not {other, general} & set(one_device.ids())
        assert one_device.ask("unsubscribe", {"room": f"device-uuid-{farm['device']}"})["ok"]
        assert not one_device.ask("unsubscribe", {"room": f"device-uuid-{farm['device']}"})["ok"]
        assert published(farm, everything, device=farm["device"]) not in one_device.ids()


def test_the_telemetry_room_of_an_own_variable_is_granted(gateway: GatewayProcess, farm: Farm) -> None:
    with connected(gateway, farm["access_token"]) as client:
        assert client.ask("subscribe", {"room": f"telemetry-{farm['variable']}"}) == {"ok": True}


def test_the_connection_ends_with_the_token_and_says_why(gateway: GatewayProcess, farm: Farm) -> None:
    token = operator().ask("access_token", user=farm["user"], seconds=3)
    with connected(gateway, token) as client:
        until(lambda: not client.io.connected)
        ((event, data),) = client.received
        assert (event, data["reason"]) == ("session-ended", "token-expired")


def test_the_connection_ends_when_the_person_is_deactivated(gateway: GatewayProcess, farm: Farm) -> None:
    with connected(gateway, farm["access_token"]) as client:
        operator().ask("deactivate", user=farm["user"])
        until(lambda: not client.io.connected)
        assert client.received[-1][1]["reason"] == "user-inactive"


def test_who_leaves_an_organization_hears_no_more_of_it_and_a_new_one_is_joined(
    gateway: GatewayProcess, farm: Farm
) -> None:
    other = operator().ask("seed")
    with connected(gateway, farm["access_token"]) as client:
        published(farm, client)
        operator().ask("leave", user=farm["user"], organization=farm["organization"])
        operator().ask("add_membership", user=farm["user"], organization=other["organization"])
        until(lambda: sent_to_all(other) in client.ids())
        assert published(farm) not in client.ids()
        published(other, client)
        assert not client.ask("subscribe", {"room": f"device-uuid-{farm['device']}"})["ok"]


@pytest.mark.parametrize("event", ["connect", "disconnect"])
def test_who_names_an_event_of_the_library_keeps_no_room_beyond_its_right(
    gateway: GatewayProcess, farm: Farm, event: str
) -> None:
    other = operator().ask("seed")
    operator().ask("add_membership", user=farm["user"], organization=other["organization"])
    with connected(gateway, farm["access_token"]) as client:
        client.ask("subscribe", {"room": f"device-uuid-{farm['device']}"})
        client.io.emit(event, ({}, {"token": farm["access_token"]}))
        published(farm, client)
        operator().ask("leave", user=farm["user"], organization=farm["organization"])
        time.sleep(RIGHTS_SECONDS + 2 * SWEEP_SECONDS)
        foreign = sent_to_all(farm, device=farm["device"])
        published(other, client)
        assert foreign not in client.ids()


@pytest.mark.parametrize(
    "named",
    [
        None,
        {},
        {"position": None},
        {"position": 5},
        {"position": "yesterday"},
        {"position": "1-2-3"},
        "1-2",
        {"position": f"1-{2**64}"},
    ],
)
def test_what_is_no_position_is_refused(gateway: GatewayProcess, farm: Farm, named: object) -> None:
    with connected(gateway, farm["access_token"]) as client:
        answer = client.ask("resume", named)
        assert answer["ok"] is False
        assert "position" in answer["error"]
        assert published(farm, client) in client.ids()


def test_a_handshake_with_what_is_no_position_is_refused(gateway: GatewayProcess, farm: Farm) -> None:
    assert "position" in refusal(gateway, auth={"token": farm["access_token"], "position": "yesterday"})


def test_a_message_for_roles_reaches_only_members_with_one_of_them(gateway: GatewayProcess, farm: Farm) -> None:
    grower = operator().ask("add_person", organization=farm["organization"], role="operator")
    with (
        connected(gateway, farm["access_token"]) as viewer,
        connected(gateway, grower["access_token"]) as told,
    ):
        for client in (viewer, told):
            client.ask("subscribe", {"room": f"device-uuid-{farm['device']}"})
        fields = {"device": farm["device"], "payload": {"text": "ph is 9", "roles": ["operator", "admin"]}}
        first = published(farm, told, **fields)
        general = published(farm, viewer, told)
        assert told.ids().count(first) == 1
        assert general in viewer.ids()
        assert first not in viewer.ids()


def test_a_change_of_role_changes_what_is_told_within_seconds(gateway: GatewayProcess, farm: Farm) -> None:
    fields = {"payload": {"roles": ["operator"]}}
    with connected(gateway, farm["access_token"]) as client:
        operator().ask("set_role", user=farm["user"], organization=farm["organization"], role="operator")
        until(lambda: sent_to_all(farm, **fields) in client.ids())
        operator().ask("set_role", user=farm["user"], organization=farm["organization"], role="viewer")
        until(lambda: sent_to_all(farm, **fields) not in client.ids())


@pytest.mark.parametrize("roles", ["operator", [1], {"operator": True}])
def test_roles_that_are_no_list_of_names_reach_nobody_and_the_delivery_says_so(
    gateway: GatewayProcess, farm: Farm, roles: object
) -> None:
    with connected(gateway, farm["access_token"]) as client:
        message = sent_to_all(farm, payload={"roles": roles})
        published(farm, client)
        assert message not in client.ids()
        until(lambda: operator().ask("deliveries", message=message)["socketio"][0] == "failed")
        assert "payload.roles" in operator().ask("deliveries", message=message)["socketio"][2]


def test_a_client_that_asks_too_often_is_told_and_cut_off_while_others_go_on(
    gateway: GatewayProcess, farm: Farm
) -> None:
    with (
        connected(gateway, farm["access_token"]) as client,
        raw_websocket(gateway, token=farm["access_token"]) as busy,
    ):
        received = events(busy)
        busy.sendall(text_frame(b'42["subscribe",{"room":"x"}]') * 400)
        reasons = [data["reason"] for event, data in received if event == "session-ended"]
        assert reasons == ["too-many-events"]
        assert published(farm, client) in client.ids()


def test_a_stranger_that_asks_too_often_is_cut_off(gateway: GatewayProcess) -> None:
    with raw_websocket(gateway) as stranger:
        stranger.sendall(text_frame(b'42["subscribe",{"room":"x"}]') * 400)
        stranger.settimeout(5)  # sooner than who only shows no token
        while stranger.recv(4096):
            pass


def test_a_connection_that_ended_while_its_token_was_checked_leaves_no_session() -> None:
    transport = SocketIoTransport(port=0)
    manager = transport._server.manager
    sid = manager.pre_connect("connection", "/")
    transport.sessions[sid] = Session(login=Login(1, ""), expires_at=time.time() + 60, organizations={})
    transport._sweep(time.time(), 0.0)
    assert not transport.sessions
    assert list(manager.get_participants("/", None)) == []


def test_a_handler_that_fails_is_told_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted: list[str] = []
    monkeypatch.setattr(metrics.COUNTERS, "add", lambda name, _amount: counted.append(name))
    transport = SocketIoTransport(port=0)

    def fails(_sid: str) -> None:
        raise RuntimeError("nobody foresaw this")

    transport._server.on("subscribe", fails)
    with pytest.raises(RuntimeError):
        transport._server._trigger_event("subscribe", "/", "a")
    assert counted == ["gateway_failures_total|socketio"]
    assert "nobody foresaw this" in caplog.text


def test_one_person_may_not_take_all_connections(gateway: GatewayProcess, farm: Farm) -> None:
    other = operator().ask("seed")
    with ExitStack() as held:
        for _ in range(50):
            held.enter_context(raw_websocket(gateway, token=farm["access_token"]))
        assert "50 connections" in refusal(gateway, auth={"token": farm["access_token"]})
        held.enter_context(raw_websocket(gateway, token=other["access_token"]))
    until(lambda: _is_let_in(gateway, farm))


def _is_let_in(gateway: GatewayProcess, farm: Farm) -> bool:
    try:
        with connected(gateway, farm["access_token"]):
            return True
    except NotConnected:
        return False


def test_a_client_that_leaves_many_megabytes_unread_is_cut_off(gateway: GatewayProcess, farm: Farm) -> None:
    with raw_websocket(gateway, token=farm["access_token"], receive_buffer=4096):
        before = gateway.text.count("Cut off a Socket.IO client")
        operator().ask("publish_many", organization=farm["organization"], count=100, size=300_000)
        gateway.wait_for(lambda: gateway.text.count("Cut off a Socket.IO client") > before)


def test_a_client_that_does_not_read_holds_up_nobody_and_is_cut_off(gateway: GatewayProcess, farm: Farm) -> None:
    with (
        raw_websocket(gateway, token=farm["access_token"], receive_buffer=4096),
        raw_websocket(gateway, token=farm["access_token"]) as reading,
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        frames = messages(reading)
        count = 9_000
        received = pool.submit(lambda: [each["id"] for each in itertools.islice(frames, count)])
        sent = operator().ask("publish_many", organization=farm["organization"], count=count, size=1_000)
        assert received.result() == sent
        gateway.wait_for(lambda: "Cut off a Socket.IO client that does not read" in gateway.text)
        (last,) = operator().ask("publish_many", organization=farm["organization"], count=1, size=1)
        assert next(frames)["id"] == last


def test_a_connection_that_shows_no_token_is_closed(gateway: GatewayProcess) -> None:
    with raw_websocket(gateway) as stranger:
        stranger.settimeout(20)
        while stranger.recv(4096):
            pass


def test_a_connection_that_never_ends_its_request_is_closed(gateway: GatewayProcess, farm: Farm) -> None:
    post = b"POST /socket.io/?EIO=4&transport=polling HTTP/1.1\r\nContent-Length: 9\r\n\r\n4"
    with ExitStack() as stack:
        quiet = stack.enter_context(raw_websocket(gateway, token=farm["access_token"]))
        strangers = [
            stack.enter_context(socket.create_connection(gateway.addresses()["socketio"], timeout=30)) for _ in range(3)
        ]
        for stranger, begun in zip(strangers, (b"", b"GET /socket.io/", post), strict=True):
            stranger.sendall(begun)
        for stranger in strangers:
            while stranger.recv(4096):
                pass
        sent = operator().ask("publish", organization=farm["organization"])
        assert sent in [data.get("id") for _, data in itertools.islice(events(quiet), 2)]


def test_strangers_with_many_connections_take_no_files_from_the_rest(tmp_path: Path, farm: Farm) -> None:
    with running(tmp_path / "log", {"kind": "socketio", "files": 240}) as gateway, ExitStack() as stack:
        member = stack.enter_context(raw_websocket(gateway, token=farm["access_token"]))
        for _ in range(300):
            stranger = stack.enter_context(socket.socket())
            stranger.setblocking(False)  # most are not accepted for now
            stranger.connect_ex(gateway.addresses()["socketio"])
        sent = operator().ask("publish", organization=farm["organization"], protocols=["socketio"])
        assert sent in [data.get("id") for _, data in itertools.islice(events(member), 2)]
        gateway.wait_for(lambda: operator().ask("deliveries", message=sent)["socketio"][0] == "sent")
        until(lambda: _is_let_in(gateway, farm), seconds=60)
        assert "Too many open files" not in gateway.text
        assert "Only 40 connections" in gateway.text


@pytest.mark.parametrize(
    "garbage",
    [
        b"9",
        b"4",
        b"4x",
        b"42",
        b"42[",
        b'42["subscribe"]',
        b"42[[]]",
        b'451-["a",{"_placeholder":true,"num":0}]',
        b"40/admin,",
        b"\xf0\x9f",
    ],
)
def test_garbage_ends_at_most_its_own_connection(gateway: GatewayProcess, farm: Farm, garbage: bytes) -> None:
    with connected(gateway, farm["access_token"]) as client, raw_websocket(gateway) as stranger:
        stranger.sendall(text_frame(garbage) * 3)
        message = published(farm, client)
        assert message in client.ids()
    assert "Traceback" not in gateway.text


def test_more_than_64_kilobytes_are_not_read(gateway: GatewayProcess, farm: Farm) -> None:
    session = requests.get(url(gateway) + "/socket.io/?EIO=4&transport=polling", timeout=5).text
    sid = session.split('"sid":"')[1].split('"')[0]
    address = f"{url(gateway)}/socket.io/?EIO=4&transport=polling&sid={sid}"
    assert requests.post(address, data=b"4" * 70_000, timeout=5).status_code == 400
    with raw_websocket(gateway) as stranger:
        stranger.settimeout(10)
        stranger.sendall(text_frame(b"4" * 70_000))
        while stranger.recv(4096):
            pass


def test_large_messages_arrive_whole_over_a_slow_connection(gateway: GatewayProcess, farm: Farm) -> None:
    """Frames that do not fit the send buffer are written on, not cut off."""
    with raw_websocket(gateway, token=farm["access_token"], receive_buffer=4096) as slow:
        sent = operator().ask("publish_many", organization=farm["organization"], count=40, size=200_000)
        received = messages(slow, pause_seconds=0.005)
        assert [next(received)["id"] for _ in sent] == sent


def test_without_configured_origins_any_page_may_connect(gateway: GatewayProcess) -> None:
    assert opening(gateway, origin="https://dashboard.example") == 200


def test_configured_origins_keep_other_pages_out_but_not_the_python_client(tmp_path: Path, farm: Farm) -> None:
    with running(tmp_path / "log", {"kind": "socketio"}, SOCKETIO_ALLOWED_ORIGINS="https://dashboard.example") as other:
        assert opening(other, origin="https://evil.example") == 400
        assert opening(other, origin="https://dashboard.example") == 200
        assert opening(other, origin=None) == 200
        with connected(other, farm["access_token"]) as client:
            assert client.io.connected


def opening(gateway: GatewayProcess, *, origin: str | None) -> int:
    headers = {"Origin": origin} if origin else {}
    address = url(gateway) + "/socket.io/?EIO=4&transport=polling"
    return requests.get(address, headers=headers, timeout=5).status_code
