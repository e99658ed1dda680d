"""The JavaScript client under node against a gateway: over WebSocket, polling, and the upgrade from one to the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import javascript
from deploy.debian import FetchError
from tests.gateway_process import GatewayProcess, operator, running
from tests.servers import redis_that_was_empty
from tests.socketio_clients import JAVASCRIPT, JavaScriptClient, javascript_client, url
from tests.waiting import until

Farm = dict[str, Any]
TRANSPORTS = [["websocket"], ["polling"], ["polling", "websocket"]]


@pytest.fixture(scope="module", autouse=True)
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with redis_that_was_empty(), running(tmp_path_factory.mktemp("gateway") / "log", {"kind": "socketio"}) as process:
        yield process


@pytest.fixture
def farm() -> Farm:
    found: Farm = operator().ask("seed")
    return found


@pytest.mark.parametrize("transports", TRANSPORTS, ids="+".join)
def test_messages_arrive_whole_and_in_order(gateway: GatewayProcess, farm: Farm, transports: list[str]) -> None:
    with javascript_client([url(gateway)], farm["access_token"], transports=transports) as client:
        assert client.printed("connected")[0] in transports
        alert = operator().ask("publish", organization=farm["organization"], device=farm["device"])
        sent = operator().ask("publish_many", organization=farm["organization"], count=300, size=2_000)
        until(lambda: len(client.ids()) > 300)
        assert client.ids() == [alert, *sent]
        event, data = next(each for each in client.received if each[1].get("id") == alert)
        assert (event, data["device"], data["data"]) == ("alert", farm["device"], {"text": "ph is 9"})


@pytest.mark.parametrize("transports", TRANSPORTS, ids="+".join)
def test_rooms_are_asked_for_and_answered(gateway: GatewayProcess, farm: Farm, transports: list[str]) -> None:
    other = operator().ask("seed")
    with javascript_client([url(gateway)], farm["access_token"], transports=transports) as client:
        assert client.ask("subscribe", {"room": f"device-uuid-{farm['device']}"}) == {"ok": True}
        assert client.ask("subscribe", {"room": f"organization-{other['organization']}"})["ok"] is False
        assert client.ask("unsubscribe", {"room": f"organization-{farm['organization']}"}) == {"ok": True}
        operator().ask("publish", organization=farm["organization"])
        own = operator().ask("publish", organization=farm["organization"], device=farm["device"])
        until(client.ids)
        assert client.ids() == [own]


@pytest.mark.parametrize("transports", TRANSPORTS, ids="+".join)
def test_a_client_may_ask_for_many_rooms_at_once(gateway: GatewayProcess, farm: Farm, transports: list[str]) -> None:
    """A polling client sends what it has to say in one request."""
    with javascript_client([url(gateway)], farm["access_token"], transports=transports) as client:
        room = {"room": f"device-uuid-{farm['device']}"}
        answers = client.ask_at_once([["subscribe", room]] * 100)
        assert answers == [{"ok": True}] * 100


@pytest.mark.parametrize("transports", TRANSPORTS, ids="+".join)
def test_a_client_that_was_cut_off_comes_back_with_its_position_and_misses_nothing(
    gateway: GatewayProcess, farm: Farm, transports: list[str]
) -> None:
    javascript.modules(JAVASCRIPT)  # fetched now, if this test is the first: the token does not last
    token = operator().ask("access_token", user=farm["user"], seconds=3)
    with javascript_client([url(gateway)], token, transports=transports) as client:
        (first,) = operator().ask("publish_many", organization=farm["organization"], count=1, size=10)
        until(lambda: client.ids() == [first])
        until(lambda: client.printed("disconnected"), seconds=10)  # with its token
        position = client.received[-2][1]["position"]
    missed = operator().ask("publish_many", organization=farm["organization"], count=20, size=10)
    with javascript_client([url(gateway)], farm["access_token"], transports=transports) as client:
        assert client.ask("resume", {"position": position}) == {"ok": True}
        until(lambda: client.ids() == missed)


def test_a_wrong_token_is_refused_with_the_reason(gateway: GatewayProcess) -> None:
    client = JavaScriptClient([url(gateway)], "nonsense", transports=["websocket"])
    try:
        until(lambda: client.printed("refused"))
        assert "not valid" in client.printed("refused")[0]
    finally:
        client.close()


def test_packages_that_cannot_be_fetched_are_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(javascript, "UNPACKED", tmp_path)
    with monkeypatch.context() as offline:
        offline.setenv("AEMOS_SERVERS_OFFLINE", "1")
        offline.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
        with pytest.raises(FetchError, match="AEMOS_SERVERS_OFFLINE"):
            javascript.modules(JAVASCRIPT)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FetchError, match="npm is not on this machine"):
        javascript.modules(JAVASCRIPT)
    assert not (tmp_path / "javascript").exists()


def test_the_lock_names_no_host_and_pins_the_client_that_is_served_to_browsers() -> None:
    lock = json.loads((JAVASCRIPT / "package-lock.json").read_text())
    assert all(
        "resolved" not in package and package.get("integrity", "sha512-").startswith("sha512-")
        for package in lock["packages"].values()
    )
    served = JAVASCRIPT.parents[1] / "notifications/static/notifications/socket.io.min.js"
    version = lock["packages"]["node_modules/socket.io-client"]["version"]
    assert f"Socket.IO v{version}" in served.read_text()[:100]
