"""CoAP for devices: who may post and observe, and what every refusal looks like to a real client."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiocoap
import gevent
import pytest
from django.db import OperationalError

from aemos.lib import cbor, metrics, redis
from deploy import programs
from devices import exceptions
from devices.exceptions import BadPayload, Forbidden, OverLimit, Overloaded, Refusal, TooLarge, Unauthorized
from gateway.coap import states
from gateway.coap.endpoint import CoapRequest, CoapResponse, Code
from gateway.coap.states import States
from gateway.coap.transport import CODES, CoapTransport
from gateway.transport import Pending
from rules.ingest import Receipt
from tests import builders, coap_peers
from tests.gateway_process import GatewayProcess, operator, running
from tests.servers import redis_that_was_empty

Farm = dict[str, Any]
UUID = str(uuid4())


class ScriptedIngest:
    """Remembers what it was given, and refuses at once or when it is waited for, as told."""

    def __init__(
        self, *, at_once: Refusal | None = None, later: Refusal | None = None, receipt: Receipt | None = None
    ) -> None:
        self.at_once, self.later, self.receipt = at_once, later, receipt or Receipt(accepted=1)
        self.calls: list[tuple[bytes, Any, str, str | None]] = []

    def __call__(self, payload: bytes, *, credential: Any, protocol: str, uuid: str | None = None, **_: Any) -> Pending:
        self.calls.append((payload, credential, protocol, uuid))
        if self.at_once:
            raise self.at_once
        return self

    def wait(self) -> Receipt:
        if self.later:
            raise self.later
        return self.receipt


def ask(
    ingest: ScriptedIngest,
    method: str,
    *path: str,
    payload: bytes = b"",
    query: Mapping[str, str] | None = None,
    **fields: Any,
) -> CoapResponse:
    """What the handler answers, without a network."""
    plain: dict[str, Any] = {"content_format": None, "accept": None, "observe": False}
    request = CoapRequest(
        method=method,
        path=path,
        query=query or {},
        payload=payload,
        source=("127.0.0.1", 40_000),
        **plain | fields,
    )
    return CoapTransport(ingest, port=0).handle(request)


def posted(ingest: ScriptedIngest, **fields: Any) -> CoapResponse:
    return ask(ingest, "POST", "devices", UUID, "datastream", **fields)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("when", ["at_once", "later"])
@pytest.mark.parametrize(
    ("refusal", "code", "max_age"),
    [
        (Unauthorized("No live token."), Code.UNAUTHORIZED, None),
        (Forbidden("Another one's."), Code.FORBIDDEN, None),
        (BadPayload("ph: must be a number", index=3, field="ph"), Code.BAD_REQUEST, None),
        (TooLarge("More than 1,000 events."), Code.TOO_LARGE, None),
        (Overloaded("The queue is full.", reason="queue-critical", retry_after=7), Code.UNAVAILABLE, 7),
        (OverLimit("Your share is used.", reason="organization-limit", retry_after=9), Code.TOO_MANY_REQUESTS, 9),
    ],
)
def test_every_refusal_has_its_code_its_sentence_and_its_time(
    when: str, refusal: Refusal, code: Code, max_age: int | None
) -> None:
    response = posted(ScriptedIngest(at_once=refusal) if when == "at_once" else ScriptedIngest(later=refusal))
    assert (response.code, response.max_age) == (code, max_age)
    assert response.payload.decode() == refusal.detail


def test_no_kind_of_refusal_is_forgotten() -> None:
    kinds = {kind for kind in vars(exceptions).values() if isinstance(kind, type) and issubclass(kind, Refusal)}
    assert kinds - {Refusal} == CODES.keys()


@pytest.mark.django_db(transaction=True)
def test_accepted_telemetry_is_answered_with_changed() -> None:
    ingest = ScriptedIngest()
    sensor = builders.sensor(builders.organization())
    response = ask(
        ingest,
        "POST",
        "devices",
        str(sensor.uuid),
        "datastream",
        payload=b'{"values": {"ph": 6}}',
        query={"token": builders.token(sensor)},
    )
    assert (response.code, response.payload) == (Code.CHANGED, b"")
    ((payload, credential, protocol, uuid),) = ingest.calls
    assert (payload, protocol, uuid) == (b'{"values": {"ph": 6}}', "coap", str(sensor.uuid))
    assert credential.originator.uuid == str(sensor.uuid)


@pytest.mark.django_db(transaction=True)
def test_partly_accepted_telemetry_says_how_much() -> None:
    response = posted(ScriptedIngest(receipt=Receipt(accepted=2, rejected=1)))
    assert response.code is Code.CHANGED
    assert json.loads(response.payload) == {"accepted": 2, "rejected": 1}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", (), Code.NOT_FOUND),
        ("GET", ("devices",), Code.NOT_FOUND),
        ("POST", ("devices", "not-a-uuid", "datastream"), Code.NOT_FOUND),
        ("POST", ("devices", UUID.upper(), "datastream"), Code.NOT_FOUND),
        ("GET", ("devices", UUID, "secrets"), Code.NOT_FOUND),
        ("GET", ("devices", UUID, "datastream"), Code.METHOD_NOT_ALLOWED),
        ("PUT", ("devices", UUID, "datastream"), Code.METHOD_NOT_ALLOWED),
        ("POST", ("devices", UUID, "state"), Code.METHOD_NOT_ALLOWED),
        ("DELETE", ("devices", UUID, "state"), Code.METHOD_NOT_ALLOWED),
        ("GET", ("devices", UUID, "state"), Code.UNAUTHORIZED),
    ],
)
def test_unknown_paths_and_methods_are_told_apart(method: str, path: tuple[str, ...], code: Code) -> None:
    ingest = ScriptedIngest()
    assert ask(ingest, method, *path).code is code
    assert not ingest.calls


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("content_format", [0, 40, 42, 110])
def test_telemetry_in_another_format_is_refused_before_anything_is_read(content_format: int) -> None:
    ingest = ScriptedIngest()
    response = posted(ingest, payload=b'{"values":{"ph":6}}', content_format=content_format)
    assert (response.code, response.payload) == (Code.UNSUPPORTED_FORMAT, b"Send JSON (50) or CBOR (60).")
    assert not ingest.calls


@pytest.mark.django_db(transaction=True)
def test_what_was_accepted_in_part_is_said_in_the_format_that_is_wanted() -> None:
    ingest = ScriptedIngest(receipt=Receipt(accepted=2, rejected=1))
    response = posted(ingest, payload=b"{}", content_format=60, accept=60)
    assert (response.code, response.content_format) == (Code.CHANGED, 60)
    assert cbor.loads(response.payload) == {"accepted": 2, "rejected": 1}


@pytest.mark.django_db(transaction=True)
def test_a_body_in_blocks_is_gathered_for_the_token_of_its_sender_only() -> None:
    ingest = ScriptedIngest(at_once=Unauthorized("No live token."))
    owner = builders.sensor(builders.organization())
    other = builders.sensor(owner.organization)
    path = ("devices", str(owner.uuid), "datastream")
    block: dict[str, Any] = {"payload": b'{"ev', "more": True}
    assert ask(ingest, "POST", *path, query={"token": builders.token(owner)}, **block).code is Code.CONTINUE
    assert not ingest.calls
    assert ask(ingest, "POST", *path, query={"token": builders.token(other)}, **block).code is Code.UNAUTHORIZED
    assert ask(ingest, "POST", *path, **block).code is Code.UNAUTHORIZED
    assert [call[0] for call in ingest.calls] == [b'{"ev', b'{"ev']


@pytest.mark.django_db(transaction=True)
def test_many_who_ask_for_states_at_once_share_a_query(monkeypatch: pytest.MonkeyPatch) -> None:
    organization = builders.organization()
    devices = [builders.device(organization) for _ in range(20)]
    read, queries = states._read, list[int]()

    def counted(uuids: list[str]) -> dict[str, Any]:
        queries.append(len(uuids))
        return read(uuids)

    monkeypatch.setattr(states, "_read", counted)
    shared = States()
    asking = [gevent.spawn(shared.of, str(device.uuid)) for device in devices for _ in range(3)]
    documents = [each.get(timeout=5) for each in asking]
    assert [document["device"] for document in documents[::3]] == [str(device.uuid) for device in devices]
    assert all(document["states"]["power"]["value"] is None for document in documents)
    assert queries == [20]


def test_a_database_that_is_away_is_said_to_all_who_wait_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    away = [True]

    def read(uuids: list[str]) -> dict[str, Any]:
        if away:
            raise OperationalError("gone")
        return {uuid: {"states": {}} for uuid in uuids}

    monkeypatch.setattr(states, "_read", read)
    shared = States()
    asking = [gevent.spawn(shared.of, name) for name in ("a", "b", "a")]
    gevent.joinall(asking, timeout=5)
    assert [type(each.exception) for each in asking] == [OperationalError] * 3
    away.clear()
    assert shared.of("a") == {"device": "a", "states": {}}


def test_what_the_endpoint_refuses_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: Counter[str] = Counter()
    monkeypatch.setattr(metrics.COUNTERS, "add", lambda name, amount: counted.update({name: amount}))
    transport = CoapTransport(ScriptedIngest(), port=0)
    transport.start()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            for _ in range(3):
                peer.sendto(b"GET / HTTP/1.1", transport.address)
        coap_peers.until(lambda: transport.endpoint.stats.malformed == 3)
    finally:
        transport.stop(timeout_seconds=1)
    assert counted == {"coap_refused_total|malformed": 3}
    transport.endpoint._counts.errors += 2
    transport.stop(timeout_seconds=1)
    assert counted.pop("gateway_failures_total|coap") == 2
    assert counted == {"coap_refused_total|malformed": 3}


@pytest.fixture(scope="module", autouse=True)
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with (
        redis_that_was_empty(),
        running(tmp_path_factory.mktemp("gateway") / "log", {"kind": "coap"}, COAP_MAX_AGE_SECONDS="10") as process,
    ):
        yield process


@pytest.fixture
def farm() -> Farm:
    found: Farm = operator().ask("seed")
    return found


def address(gateway: GatewayProcess, uuid: str, resource: str, token: str = "") -> str:
    host, port = gateway.addresses()["coap"]
    return f"coap://{host}:{port}/devices/{uuid}/{resource}" + (f"?token={token}" if token else "")


def libcoap(*arguments: str) -> str:
    """What coap-client prints."""
    program = programs.get("coap-client-notls")
    done = subprocess.run(
        [str(program.path), "-B", "5", *arguments],
        env={**os.environ, **program.environment},
        capture_output=True,
        encoding="utf-8",
        errors="backslashreplace",
        timeout=10,
        check=False,
    )
    return done.stdout + done.stderr


@asynccontextmanager
async def client() -> AsyncIterator[Any]:
    context = await aiocoap.Context.create_client_context()
    try:
        yield context
    finally:
        await context.shutdown()


async def get(context: Any, uri: str, **options: Any) -> Any:
    return await asyncio.wait_for(context.request(aiocoap.Message(code=aiocoap.GET, uri=uri, **options)).response, 10)


@asynccontextmanager
async def observed(uri: str) -> AsyncIterator[tuple[Any, asyncio.Queue[Any]]]:
    """An observation: the first answer, and a queue of what comes after it, with the exception that ends it."""
    news: asyncio.Queue[Any] = asyncio.Queue()

    async def listen(observation: Any) -> None:
        try:
            async for notification in observation:
                news.put_nowait(notification)
        except aiocoap.error.Error as error:
            news.put_nowait(error)

    async with client() as context:
        request = context.request(aiocoap.Message(code=aiocoap.GET, uri=uri, observe=0))
        listener = asyncio.create_task(listen(request.observation))
        try:
            yield await asyncio.wait_for(request.response, 10), news
        finally:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)


async def news_of(queue: asyncio.Queue[Any], *, seconds: float = 10.0) -> Any:
    return await asyncio.wait_for(queue.get(), seconds)


async def ask_operator(name: str, **arguments: Any) -> Any:
    """Off the event loop, on which the client has to go on answering."""
    return await asyncio.to_thread(operator().ask, name, **arguments)


def run(test: Awaitable[None]) -> None:
    async def awaited() -> None:
        await test

    asyncio.run(awaited())


def test_libcoap_posts_telemetry(gateway: GatewayProcess, farm: Farm) -> None:
    uri = address(gateway, farm["sensor"], "datastream", farm["sensor_token"])
    assert "4." not in libcoap("-m", "post", "-t", "50", "-e", '{"values":{"ph":6.1}}', uri)
    gateway.wait_for(
        lambda: ['{"values":{"ph":6.1}}', farm["sensor"], "coap", farm["sensor"]] in gateway.printed("ingested")
    )


def code_seen(printed: str) -> str:
    """The code of the last response in what coap-client says with -v 7."""
    codes: list[str] = re.findall(r" t:(?:ACK|CON|NON) c:([2-5]\.\d\d)", printed)
    return codes[-1] if codes else printed


@pytest.mark.parametrize(
    ("method", "path", "options", "code"),
    [
        ("post", "{sensor}/datastream?token={sensor_token}", ["-t", "50", "-e", '{"values":{"ph":6}}'], "2.04"),
        ("post", "{sensor}/datastream?token={sensor_token}", ["-e", '{"values":{"ph":6}}'], "2.04"),
        ("post", "{sensor}/datastream?token={sensor_token}", ["-N", "-e", '{"values":{"ph":6}}'], "2.04"),
        ("get", "{device}/state?token={device_token}", [], "2.05"),
        ("get", "{device}/state?token={device_token}", ["-N"], "2.05"),
        ("get", "{device}/state?token={device_token}", ["-A", "60"], "2.05"),
        ("post", "{sensor}/datastream?token={device_token}", ["-t", "50", "-e", "{}"], "4.03"),
        ("post", "{sensor}/datastream?token=aemos_12345678901234_x", ["-e", "{}"], "4.01"),
        ("get", "{device}/state?token=aemos_12345678901234_x", [], "4.01"),
        ("get", "{device}/state?token={sensor_token}", [], "4.03"),
        ("get", "{device}/secrets?token={device_token}", [], "4.04"),
        ("put", "{device}/state?token={device_token}", ["-e", "on"], "4.05"),
        ("get", "{sensor}/datastream?token={sensor_token}", [], "4.05"),
        ("get", "{device}/state?token={device_token}", ["-A", "41"], "4.06"),
        ("post", "{sensor}/datastream?token={sensor_token}", ["-t", "41", "-e", "<ph>6</ph>"], "4.15"),
        ("get", "{device}/state?token={device_token}", ["-O", "9,x"], "4.02"),
        ("get", "{device}/state?token={device_token}", ["-P", "coap://127.0.0.1:PORT"], "5.05"),
    ],
)
def test_libcoap_sees_the_code_of_each_case(
    gateway: GatewayProcess, farm: Farm, method: str, path: str, options: list[str], code: str
) -> None:
    host, port = gateway.addresses()["coap"]
    uri = f"coap://{host}:{port}/devices/" + path.format(**farm)
    given = [option.replace("PORT", str(port)) for option in options]
    assert code_seen(libcoap("-v", "7", "-m", method, *given, uri)) == code


def test_libcoap_sends_and_reads_bodies_in_blocks(gateway: GatewayProcess, farm: Farm, tmp_path: Path) -> None:
    body = json.dumps({"events": [{"values": {"ph": 6 + number / 1000}} for number in range(100)]})
    (tmp_path / "body").write_text(body)
    uri = address(gateway, farm["sensor"], "datastream", farm["sensor_token"])
    said = libcoap("-v", "7", "-m", "post", "-t", "50", "-b", "256", "-f", str(tmp_path / "body"), uri)
    assert (code_seen(said), "c:2.31" in said) == ("2.04", True)
    gateway.wait_for(lambda: [body, farm["sensor"], "coap", farm["sensor"]] in gateway.printed("ingested"))
    shown = libcoap("-m", "get", "-b", "32", address(gateway, farm["device"], "state", farm["device_token"]))
    assert json.loads(shown)["device"] == farm["device"]


def test_aiocoap_posts_and_reads_cbor(gateway: GatewayProcess, farm: Farm) -> None:
    async def test() -> None:
        async with client() as context:
            post = aiocoap.Message(
                code=aiocoap.POST,
                uri=address(gateway, farm["sensor"], "datastream", farm["sensor_token"]),
                payload=cbor.dumps({"values": {"ph": 6.5}}),
                content_format=60,
            )
            assert (await context.request(post).response).code.dotted == "2.04"
            uri = address(gateway, farm["device"], "state", farm["device_token"])
            shown = await get(context, uri, accept=60)
            assert int(shown.opt.content_format) == 60
            assert cbor.loads(shown.payload)["states"]["power"]["value"] == "off"
            assert (await get(context, uri, accept=0)).code.dotted == "4.06"

    run(test())


def test_states_are_shown_and_told_though_redis_has_lost_everything(gateway: GatewayProcess, farm: Farm) -> None:
    uri = address(gateway, farm["device"], "state", farm["device_token"])

    async def test() -> None:
        async with observed(uri) as (first, news), client() as context:
            assert first.opt.max_age == 10
            redis.client().flushdb()
            await ask_operator("set_state", device=farm["device"], value="on")
            shown = await get(context, uri)
            assert json.loads(shown.payload)["states"]["power"]["value"] == "on"
            # Nobody published the change: the message is what was lost.
            told = await news_of(news, seconds=12.0)
            assert json.loads(told.payload)["states"]["power"]["value"] == "on"
            # The gateway finds the gap with the next message; the observers of other tests are not to hear of it.
            change = {"organization": farm["organization"], "device": farm["device"], "event": "device-state-change"}
            await ask_operator("publish", **change)
            await news_of(news)

    run(test())


def test_libcoap_without_a_token_is_told_so(gateway: GatewayProcess, farm: Farm) -> None:
    assert "4.01" in libcoap("-m", "post", "-e", "{}", address(gateway, farm["sensor"], "datastream"))
    assert "4.01" in libcoap("-m", "get", address(gateway, farm["device"], "state"))


def test_discovery_lists_both_resources(gateway: GatewayProcess) -> None:
    host, port = gateway.addresses()["coap"]
    listed = libcoap("-m", "get", f"coap://{host}:{port}/.well-known/core")
    assert "</devices/{uuid}/datastream>" in listed
    assert "</devices/{uuid}/state>" in listed
    assert ";obs" in listed


def test_a_device_reads_its_states(gateway: GatewayProcess, farm: Farm) -> None:
    operator().ask("set_state", device=farm["device"], value="on")
    shown = json.loads(libcoap("-m", "get", address(gateway, farm["device"], "state", farm["device_token"])))
    assert shown["device"] == farm["device"]
    assert shown["states"]["power"]["value"] == "on"
    assert shown["states"]["power"]["changedAt"].endswith("Z")


def test_only_the_device_and_its_organizations_people_see_its_state(gateway: GatewayProcess, farm: Farm) -> None:
    other = operator().ask("seed")
    expected = {
        farm["device_token"]: "2.05",
        farm["access_token"]: "2.05",
        farm["other_device_token"]: "4.03",
        farm["sensor_token"]: "4.03",
        other["device_token"]: "4.03",
        other["access_token"]: "4.03",
        "garbage": "4.01",
        "aemos_12345678901234_x": "4.01",
        "": "4.01",
    }

    async def test() -> None:
        async with client() as context:
            seen = {
                token: (await get(context, address(gateway, farm["device"], "state", token))).code.dotted
                for token in expected
            }
        assert seen == expected

    run(test())


def test_a_state_change_reaches_the_observers_of_that_device(gateway: GatewayProcess, farm: Farm) -> None:
    own = address(gateway, farm["device"], "state", farm["device_token"])
    person = address(gateway, farm["device"], "state", farm["access_token"])
    other = address(gateway, farm["other_device"], "state", farm["other_device_token"])

    async def test() -> None:
        async with observed(own) as (first, mine), observed(person) as (_, theirs), observed(other) as (known, others):
            assert json.loads(first.payload)["states"]["power"] == {"value": "off", "changedAt": None}
            await ask_operator("set_state", device=farm["device"], value="on")
            change = {"organization": farm["organization"], "device": farm["device"], "event": "device-state-change"}
            await ask_operator("publish", **change)
            for queue in (mine, theirs):
                assert json.loads((await news_of(queue)).payload)["states"]["power"]["value"] == "on"
            while not others.empty():  # what it knows may be repeated
                assert json.loads(others.get_nowait().payload)["states"] == json.loads(known.payload)["states"]

    run(test())


def test_what_is_no_state_change_is_not_told_to_observers(gateway: GatewayProcess, farm: Farm) -> None:
    async def test() -> None:
        async with observed(address(gateway, farm["device"], "state", farm["device_token"])) as (_, news):
            place = {"organization": farm["organization"], "device": farm["device"]}
            await ask_operator("publish", **place, event="alert")
            await ask_operator("set_state", device=farm["device"], value="on")
            await ask_operator("publish", **place, event="device-state-change")
            assert json.loads((await news_of(news)).payload)["states"]["power"]["value"] == "on"
            assert news.empty()

    run(test())


@pytest.mark.parametrize("trouble", ["token revoked", "person left", "person deactivated", "access token expired"])
def test_an_observation_ends_with_its_right_even_when_nothing_happens(
    gateway: GatewayProcess, farm: Farm, trouble: str
) -> None:
    token = farm["device_token"] if trouble == "token revoked" else farm["access_token"]
    if trouble == "access token expired":
        token = operator().ask("access_token", user=farm["user"], seconds=2)

    async def test() -> None:
        async with observed(address(gateway, farm["device"], "state", token)) as (first, news):
            assert first.opt.observe is not None
            if trouble == "token revoked":
                await ask_operator("revoke", token=token)
            elif trouble == "person left":
                await ask_operator("leave", user=farm["user"], organization=farm["organization"])
            elif trouble == "person deactivated":
                await ask_operator("deactivate", user=farm["user"])
            last = await news_of(news)
            if not isinstance(last, Exception):
                assert last.code.dotted in ("4.01", "4.03")
                assert last.opt.observe is None

    run(test())


def test_the_other_observers_of_the_device_stay(gateway: GatewayProcess, farm: Farm) -> None:
    async def test() -> None:
        async with (
            observed(address(gateway, farm["device"], "state", farm["device_token"])) as (_, revoked),
            observed(address(gateway, farm["device"], "state", farm["access_token"])) as (_, staying),
        ):
            await ask_operator("revoke", token=farm["device_token"])
            await news_of(revoked)
            await ask_operator("set_state", device=farm["device"], value="on")
            change = {"organization": farm["organization"], "device": farm["device"], "event": "device-state-change"}
            await ask_operator("publish", **change)
            while json.loads((await news_of(staying)).payload)["states"]["power"]["value"] != "on":
                pass

    run(test())
