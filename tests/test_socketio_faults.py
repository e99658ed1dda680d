"""Socket.IO connections that are cut at random moments: the client goes on at another gateway, loses nothing, and order holds."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from socketio.exceptions import ConnectionError as NotConnected

from aemos.lib import redis
from tests.gateway_process import operator, running
from tests.socketio_clients import Client, connected, javascript_client, messages, open_websocket
from tests.storms import dice
from tests.tcp_relay import Relay
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("empty_redis")
CUTS = 20
Follow = Callable[[list[str], str], Any]


@pytest.fixture
def relays(tmp_path: Path) -> Iterator[list[Relay]]:
    """Two gateways, each behind a relay."""
    assert redis.client().ping()
    with (
        running(tmp_path / "one", {"kind": "socketio"}) as one,
        running(tmp_path / "two", {"kind": "socketio"}) as two,
    ):
        found = [Relay(each.addresses()["socketio"]) for each in (one, two)]
        yield found
        for relay in found:
            relay.close()


class Follower(threading.Thread):
    """Reads messages from the gateways in turn, from the last position on; `received` holds ids in order of arrival."""

    def __init__(self, urls: list[str], token: str) -> None:
        super().__init__(daemon=True)
        self.received: list[str] = []
        self.connections = 0
        self._urls = urls
        self._auth: dict[str, Any] = {"token": token}
        self._stopping = threading.Event()

    def ids(self) -> list[str]:
        return list(self.received)

    @property
    def position(self) -> str:
        """The last one seen; empty before the first."""
        return str(self._auth.get("position", ""))

    def run(self) -> None:
        while not self._stopping.is_set():
            address = urlsplit(self._urls[self.connections % len(self._urls)])
            self.connections += 1
            try:
                self._follow((str(address.hostname), address.port or 0))
            except (OSError, EOFError):
                time.sleep(0.02)

    def _follow(self, address: tuple[str, int]) -> None:
        with open_websocket(address, **self._auth) as connection:
            for event in messages(connection, all_with="position"):
                self._auth["position"] = event["position"]
                if "id" in event:
                    self.received.append(event["id"])
                if self._stopping.is_set():
                    return

    def stop(self) -> None:
        self._stopping.set()


@contextmanager
def bare(urls: list[str], token: str) -> Iterator[Follower]:
    follower = Follower(urls, token)
    follower.start()
    yield follower
    follower.stop()


@contextmanager
def node(urls: list[str], token: str, transport: str) -> Iterator[Any]:
    with javascript_client(urls, token, transports=[transport]) as client:
        yield client


CLIENTS: dict[str, Follow] = {
    "bare WebSocket": bare,
    "JavaScript, WebSocket": lambda urls, token: node(urls, token, "websocket"),
    "JavaScript, polling": lambda urls, token: node(urls, token, "polling"),
}


@pytest.mark.parametrize("follow", CLIENTS.values(), ids=CLIENTS)
def test_a_client_cut_at_random_moments_loses_nothing_and_keeps_the_order(relays: list[Relay], follow: Follow) -> None:
    farm, moments = operator().ask("seed"), dice(2026)
    with follow([relay.url for relay in relays], farm["access_token"]) as client:
        sent = _published_until_received(farm, client)
        cuts = 0
        while cuts < CUTS:
            for _ in range(moments.randrange(1, 8)):
                sent += operator().ask("publish_many", organization=farm["organization"], count=25, size=2_000)
            time.sleep(moments.uniform(0.0, 0.2))
            cuts += sum(relay.cut() for relay in relays) > 0  # not while the client is on its way back
        until(lambda: sent[-1] in client.ids(), seconds=30)
    received = client.ids()
    assert list(dict.fromkeys(received)) == sent


def _published_until_received(farm: dict[str, Any], client: Any) -> list[str]:
    """The first message that a client receives is the start of its story."""
    while not client.ids():
        operator().ask("publish_many", organization=farm["organization"], count=1, size=10)
        time.sleep(0.1)
    time.sleep(0.5)
    found: list[str] = client.ids()
    return found


# The library leaves a socket to the garbage collector when it is cut during the handshake.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("transport", ["websocket", "polling"])
def test_the_python_client_loses_nothing(relays: list[Relay], transport: str) -> None:
    """It runs a thread for each message, so the order in which handlers run is not the order of arrival."""
    farm, moments = operator().ask("seed"), dice(5)
    clients: list[Client] = []
    ended = threading.Event()

    def place(position: str) -> list[int]:
        return [int(part) for part in position.split("-")]

    def seen() -> dict[str, str]:
        """The position of each message by its id."""
        return {data["id"]: data["position"] for each in clients for _, data in list(each.received) if "id" in data}

    def auth() -> dict[str, str]:
        reached = [*seen().values(), *(position for each in clients for position in each.positions)]
        return {"token": farm["access_token"], **({"position": max(reached, key=place)} if reached else {})}

    def connect() -> None:
        """One client for each connection: after a cut in the handshake it may report that it is connected, and stay away."""
        url = moments.choice(relays).url
        with suppress(NotConnected), connected(url, "", transport=transport, auth=auth, wait_timeout=2) as client:
            clients.append(client)
            while client.io.eio.state == "connected" and not ended.is_set():
                time.sleep(0.02)

    def follow() -> None:
        while not ended.is_set():
            connect()
            time.sleep(0.05)

    follower = threading.Thread(target=follow)
    follower.start()
    try:
        until(lambda: clients and clients[0].positions)
        sent: list[str] = []
        for _ in range(10):
            sent += operator().ask("publish_many", organization=farm["organization"], count=25, size=2_000)
            time.sleep(moments.uniform(0.0, 0.3))
            for relay in relays:
                relay.cut()
        until(lambda: set(sent) <= set(seen()), seconds=30)
        positions = seen()
        assert sorted(sent, key=lambda each: place(positions[each])) == sent
    finally:
        ended.set()
        follower.join(30)
        assert not follower.is_alive()
        gc.collect()
