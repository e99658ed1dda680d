"""The CoAP endpoint before real clients (aiocoap, libcoap), raw datagrams, silent peers and random bytes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import aiocoap as untyped_aiocoap
import gevent
import gevent.event
import gevent.socket
import pytest

from deploy import programs
from gateway.coap.blockwise import ExpiringMap
from gateway.coap.endpoint import CoapRequest, CoapResponse, Code, Endpoint, Handler
from gateway.coap.limits import DEFAULT_LIMITS
from gateway.coap.observe import Sequence
from gateway.coap.peers import MessageIds, network
from tests.coap_peers import (
    ACCEPT,
    ACK,
    BLOCK1,
    BLOCK2,
    CON,
    CONTENT_FORMAT,
    GET,
    HASTY,
    MAX_AGE,
    NON,
    OBSERVE,
    POST,
    PUT,
    RST,
    SIZE1,
    STATE,
    URI_PATH,
    URI_QUERY,
    Farm,
    ManualClock,
    Options,
    Packet,
    Peer,
    encode,
    serving,
    until,
)

T = TypeVar("T")
aiocoap: Any = untyped_aiocoap

Serve = Callable[..., Endpoint]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with contextlib.ExitStack() as started:
        yield lambda handler, **options: started.enter_context(serving(handler, **options))


@pytest.fixture
def farm() -> Farm:
    return Farm()


def in_thread(work: Callable[[], T]) -> T:
    """Runs in a real thread, while the endpoint goes on in this one."""
    return gevent.get_hub().threadpool.apply(work)


def with_aiocoap(work: Callable[[Any], Awaitable[T]]) -> T:
    async def client() -> T:
        context = await aiocoap.Context.create_client_context(transports=["udp6"])
        try:
            return await work(context)
        finally:
            await context.shutdown()

    return in_thread(lambda: asyncio.run(client()))


def uri(endpoint: Endpoint, path: str) -> str:
    return f"coap://127.0.0.1:{endpoint.address[1]}/{path}"


@pytest.fixture
def libcoap() -> Callable[..., bytes]:
    client = programs.get("coap-client-notls")
    environment = {**os.environ, **client.environment}

    def run(*arguments: str) -> bytes:
        command = [str(client.path), "-B", "5", *arguments]
        return in_thread(
            lambda: subprocess.run(command, env=environment, capture_output=True, check=True, timeout=20)
        ).stdout

    return run


# The clients people use


def test_aiocoap_reaches_the_handler_with_every_method_and_the_same_bytes(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    body = bytes(range(256))

    async def work(context: Any) -> list[Any]:
        methods = (aiocoap.GET, aiocoap.POST, aiocoap.PUT, aiocoap.DELETE)
        where = uri(endpoint, "devices/a%2Fb/datastream?token=s%26cret&fresh")
        return [
            await context.request(
                aiocoap.Message(code=m, uri=where, payload=body, content_format=42, accept=50)
            ).response
            for m in methods
        ]

    responses = with_aiocoap(work)
    assert [request.method for request in farm.requests] == ["GET", "POST", "PUT", "DELETE"]
    for request, response in zip(farm.requests, responses, strict=True):
        assert request.path == ("devices", "a/b", "datastream")
        assert request.query == {"token": "s&cret", "fresh": ""}
        assert (request.content_format, request.accept, request.observe) == (42, 50, False)
        assert request.payload == response.payload == body
        assert (int(response.code), int(response.opt.content_format)) == (Code.CHANGED, 42)


def test_aiocoap_uploads_and_downloads_bodies_of_many_blocks(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    body = random.Random(7).randbytes(20_001)

    async def work(context: Any) -> Any:
        return await context.request(
            aiocoap.Message(code=aiocoap.POST, uri=uri(endpoint, "echo"), payload=body)
        ).response

    assert with_aiocoap(work).payload == body
    assert [request.payload for request in farm.requests] == [body]


def test_aiocoap_observer_sees_every_state_and_the_error_that_ends_it(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    seen: list[tuple[int, bytes]] = []
    large = random.Random(8).randbytes(3000)

    async def work(context: Any) -> None:
        request = context.request(aiocoap.Message(code=aiocoap.GET, uri=uri(endpoint, "/".join(STATE)), observe=0))
        first = await request.response
        seen.append((int(first.code), first.payload))
        async for notification in request.observation:
            seen.append((int(notification.code), notification.payload))

    watching = gevent.spawn(with_aiocoap, work)
    for number, state in enumerate((b"on", large, b"off again"), start=1):
        until(lambda number=number: len(seen) == number)  # type: ignore[misc]
        farm.state = state
        assert endpoint.notify(STATE) == 1
    until(lambda: len(seen) == 4)
    farm.code, farm.state = Code.FORBIDDEN, b"no longer yours"
    endpoint.notify(STATE)
    watching.get(timeout=10)
    assert seen == [(69, b"off"), (69, b"on"), (69, large), (69, b"off again"), (131, b"no longer yours")]
    assert endpoint.stats.observers == 0


def test_libcoap_posts_a_file_and_fetches_it_in_small_blocks(
    serve: Serve, farm: Farm, libcoap: Callable[..., bytes], tmp_path: Path
) -> None:
    endpoint = serve(farm)
    body = random.Random(9).randbytes(5000)
    (tmp_path / "in").write_bytes(body)
    files = ["-f", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    libcoap("-m", "post", "-t", "60", "-b", "64", *files, uri(endpoint, "echo"))
    assert (tmp_path / "out").read_bytes() == body
    assert [(request.payload, request.content_format) for request in farm.requests] == [(body, 60)]


def test_libcoap_observes_and_deregisters(serve: Serve, farm: Farm, libcoap: Callable[..., bytes]) -> None:
    endpoint = serve(farm)
    watching = gevent.spawn(libcoap, "-s", "2", uri(endpoint, "/".join(STATE)))
    until(lambda: endpoint.stats.observers == 1)
    farm.state = b"on"
    endpoint.notify(STATE)
    assert b"offon" in watching.get(timeout=10)
    assert endpoint.stats.observers == 0


def test_libcoap_gets_an_answer_from_a_handler_slower_than_its_patience(
    serve: Serve, farm: Farm, libcoap: Callable[..., bytes]
) -> None:
    endpoint = serve(farm, ack_delay_seconds=0.05)
    farm.gate.clear()
    asking = gevent.spawn(libcoap, "-m", "put", "-e", "late", uri(endpoint, "slow"))
    until(lambda: len(farm.requests) == 1)
    gevent.sleep(0.2)
    farm.gate.set()
    assert asking.get(timeout=10).strip() == b"late"
    assert len(farm.requests) == 1


def test_discovery_answers_with_the_links_and_leaves_the_handler_alone(serve: Serve, farm: Farm) -> None:
    links = '</devices>;rt="aemos.device";obs,' * 60
    endpoint = serve(farm, links=links)

    async def work(context: Any) -> Any:
        return await context.request(aiocoap.Message(code=aiocoap.GET, uri=uri(endpoint, ".well-known/core"))).response

    response = with_aiocoap(work)
    assert response.payload.decode() == links
    assert int(response.opt.content_format) == 40
    peer, core = Peer(endpoint), (".well-known", "core")
    assert peer.ask(POST, core).code == Code.METHOD_NOT_ALLOWED
    assert peer.ask(GET, core, options=[(ACCEPT, b"\x32")]).code == Code.NOT_ACCEPTABLE
    assert OBSERVE not in peer.observe(core).options
    assert farm.requests == []


# Hostile and broken datagrams


@pytest.mark.parametrize(
    ("datagram", "answer"),
    [
        (b"", None),
        (b"\x40", None),
        (b"\x40\x01\x00", None),
        (b"\x00\x01\x00\x07", None),  # versions 0, 2 and 3
        (b"\x80\x01\x00\x07", None),
        (b"\xc0\x01\x00\x07", None),
        (b"\x40\x01\x00\x03\xd0", b"\x70\x00\x00\x03"),
        (b"\x40\x01\x00\x03\xe0\x00", b"\x70\x00\x00\x03"),
        (b"\x40\x01\x00\x03\x0d", b"\x70\x00\x00\x03"),
        (b"\x40\x01\x00\x03\xf0", b"\x70\x00\x00\x03"),  # delta 15 without being the payload marker
        (b"\x40\x01\x00\x03\x0f", b"\x70\x00\x00\x03"),
        (b"\x40\x01\x00\x03\xb5abc", b"\x70\x00\x00\x03"),  # the option is longer than the datagram
        (b"\x40\x01\x00\x03\xff", b"\x70\x00\x00\x03"),  # a payload marker, and no payload
        (b"\x40\x01\x00\x03" + b"\xb0" + b"\x00" * 70, b"\x70\x00\x00\x03"),  # 71 options
        (b"\x50\x01\x00\x03\xd0", None),  # the same, not confirmable
        (b"\x49\x01\x00\x04123456789", b"\x70\x00\x00\x04"),  # a token of nine bytes
        (b"\x44\x01\x00\x04123", b"\x70\x00\x00\x04"),
        (b"\x59\x01\x00\x04123456789", None),
        (b"GET / HTTP/1.1", b"\x70\x00\x54\x20"),  # reads as a confirmable response, which nobody asked for
        (b"GET / HTTP/1.1\r\nHost: farm\r\n\r\n", b"\x70\x00\x54\x20"),
        (b"\x40\x00\x00\x05", b"\x70\x00\x00\x05"),  # a ping
        (b"\x50\x00\x00\x05", None),
        (b"\x41\x00\x00\x05x", b"\x70\x00\x00\x05"),  # an empty message that is not empty
        (b"\x40\x45\x00\x06", b"\x70\x00\x00\x06"),
        (b"\x50\x45\x00\x06", None),
        (b"\x60\x45\x00\x06", None),
        (b"\x60\x01\x00\x06", None),
        (b"\x70\x01\x00\x06", None),
        (b"\x40\x20\x00\x06", b"\x70\x00\x00\x06"),  # reserved classes 1, 6 and 7
        (b"\x40\xc0\x00\x06", b"\x70\x00\x00\x06"),
        (b"\x40\xff\x00\x06", b"\x70\x00\x00\x06"),
        (b"\x60\x00\x00\x06", None),  # ACK and RST to nothing
        (b"\x70\x00\x00\x06", None),
    ],
)
def test_what_is_no_request_is_reset_or_ignored_as_the_rfc_says(
    serve: Serve, farm: Farm, datagram: bytes, answer: bytes | None
) -> None:
    peer = Peer(serve(farm))
    peer.send(datagram)
    if answer is not None:
        assert peer.receive().data == answer
    peer.expect_nothing_but_pong()
    assert peer.ask(GET).code == Code.CONTENT
    assert len(farm.requests) == 1


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([(9, b"x")], Code.BAD_OPTION),  # unknown and critical
        ([(65001, b"x")], Code.BAD_OPTION),
        ([(65535 + 268, b"")], Code.BAD_OPTION),
        ([(1, b"tag")], Code.BAD_OPTION),  # If-Match: known to the codec, not honoured here
        ([(5, b"")], Code.BAD_OPTION),
        ([(3, b"")], Code.BAD_OPTION),  # wrong length
        ([(URI_PATH, b"x" * 256)], Code.BAD_OPTION),
        ([(URI_PATH, b"\xff\xfe")], Code.BAD_OPTION),  # not UTF-8
        ([(URI_QUERY, b"\xc3")], Code.BAD_OPTION),
        ([(ACCEPT, b"\x00"), (ACCEPT, b"\x01")], Code.BAD_OPTION),  # critical, and not repeatable
        ([(BLOCK1, b"\x07")], Code.BAD_REQUEST),  # block size 7 is reserved
        ([(BLOCK2, b"\x0f")], Code.BAD_REQUEST),
        ([(BLOCK2, b"\x00\x00\x00\x00")], Code.BAD_OPTION),
        ([(35, b"coap://elsewhere/")], Code.PROXYING_NOT_SUPPORTED),
        ([(39, b"http")], Code.PROXYING_NOT_SUPPORTED),
    ],
)
def test_options_that_cannot_be_honoured_refuse_the_request(
    serve: Serve, farm: Farm, options: Options, code: Code
) -> None:
    peer = Peer(serve(farm))
    response = peer.ask(GET, options=options, token=b"tokn")
    assert (response.kind, response.code, response.token) == (ACK, code, b"tokn")
    assert len(response.payload) < 64
    assert farm.requests == []


def test_options_that_may_be_skipped_are_skipped(serve: Serve, farm: Farm) -> None:
    options = [(8, b"elsewhere"), (258, b"\x02"), (292, b"tag"), (65000, b"x" * 300), (OBSERVE, b"1234"), (4, b"etag")]
    response = Peer(serve(farm)).ask(GET, options=options)
    assert (response.code, response.payload) == (Code.CONTENT, b"off")
    assert not farm.requests[0].observe


def test_nonconfirmable_request_with_an_unknown_critical_option_is_ignored(serve: Serve, farm: Farm) -> None:
    peer = Peer(serve(farm))
    peer.send(encode(GET, kind=NON, options=[(9, b"x")]))
    peer.expect_nothing_but_pong()
    assert farm.requests == []


@pytest.mark.parametrize("method", [5, 6, 7, 31])
def test_unknown_methods_are_not_allowed(serve: Serve, farm: Farm, method: int) -> None:
    assert Peer(serve(farm)).ask(method).code == Code.METHOD_NOT_ALLOWED


def test_empty_segments_and_zero_options_keep_their_meaning(serve: Serve, farm: Farm) -> None:
    zeros = [(CONTENT_FORMAT, b""), (ACCEPT, b""), (BLOCK2, b""), (URI_QUERY, b"")]
    response = Peer(serve(farm)).ask(POST, ("a", "", "b''", ""), options=zeros, payload=b"\xff\x00\xfe")
    request = farm.requests[0]
    assert (request.path, request.query) == (("a", "", "b''", ""), {"": ""})
    assert (request.content_format, request.accept, request.payload) == (0, 0, b"\xff\x00\xfe")
    assert (response.number(BLOCK2), response.payload) == (0, b"\xff\x00\xfe")


# The message layer


def test_duplicate_is_answered_from_memory_and_not_handled_again(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    peer, other = Peer(endpoint), Peer(endpoint)
    request = encode(POST, mid=7, options=[(URI_PATH, b"echo")], payload=b"once")
    peer.send(request)
    first = peer.receive()
    peer.send(request)
    assert peer.receive().data == first.data
    assert len(farm.requests) == 1
    other.send(request)  # the same message id from elsewhere is another message
    assert other.receive().payload == b"once"
    assert (len(farm.requests), endpoint.stats.duplicates, endpoint.stats.requests) == (2, 1, 2)


def test_duplicate_of_a_nonconfirmable_request_is_ignored(serve: Serve, farm: Farm) -> None:
    peer = Peer(serve(farm))
    request = encode(POST, kind=NON, mid=7, options=[(URI_PATH, b"echo")])
    peer.send(request)
    assert (first := peer.receive()).kind == NON
    assert first.mid != 7
    peer.send(request)
    peer.expect_nothing_but_pong()
    assert len(farm.requests) == 1


def test_message_id_may_be_used_again_after_its_lifetime(serve: Serve, farm: Farm) -> None:
    clock = ManualClock()
    peer = Peer(serve(farm, clock=clock))
    peer.ask(POST, mid=7)
    clock.now += 248
    peer.ask(POST, mid=7)
    assert len(farm.requests) == 2


def test_slow_handler_acknowledges_first_and_answers_until_acknowledged(serve: Serve, farm: Farm) -> None:
    clock = ManualClock()
    endpoint = serve(farm, clock=clock, ack_random_factor=1.0, ack_delay_seconds=0.1, ack_timeout_seconds=2.0)
    peer = Peer(endpoint)
    farm.gate.clear()
    request = encode(PUT, mid=9, token=b"slow", options=[(URI_PATH, b"slow")], payload=b"x")
    peer.send(request)
    peer.send(request)  # too early: the answer is to come in the ACK, which must not be used up
    peer.expect_nothing_but_pong()
    clock.now += 1
    assert peer.receive().data == b"\x60\x00\x00\x09"
    peer.send(request)
    assert peer.receive().data == b"\x60\x00\x00\x09"
    farm.gate.set()
    response = peer.receive()
    assert (response.kind, response.code, response.token, response.payload) == (CON, Code.CHANGED, b"slow", b"x")
    for timeout_seconds in (2, 4, 8):
        clock.now += timeout_seconds - 0.1
        gevent.sleep(0.03)
        peer.expect_nothing_but_pong()
        clock.now += 0.1
        assert peer.receive().data == response.data
    peer.acknowledge(response)
    peer.expect_nothing_but_pong()
    clock.now += 1000
    gevent.sleep(0.03)
    peer.expect_nothing_but_pong()
    assert (len(farm.requests), endpoint.stats.timeouts, len(endpoint._outgoing.waiting)) == (1, 0, 0)


def test_separate_response_is_given_up_after_the_last_retransmission(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm, **HASTY | {"ack_delay_seconds": 0.01})
    peer = Peer(endpoint)
    farm.gate.clear()
    assert peer.ask(GET, ("slow",)).data[:2] == b"\x60\x00"
    farm.gate.set()
    assert len({peer.receive().data for _ in range(3)}) == 1
    until(lambda: endpoint.stats.timeouts == 1)
    assert len(endpoint._outgoing.waiting) == 0


def test_peers_that_never_acknowledge_are_bounded(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm, ack_delay_seconds=0.01, max_unacknowledged=2)
    farm.gate.clear()
    peers = [Peer(endpoint) for _ in range(4)]
    for peer in peers:
        assert peer.ask(GET, ("slow",)).kind == ACK
    farm.gate.set()
    assert [peer.receive().kind for peer in peers] == [CON] * 4
    assert len(endpoint._outgoing.waiting) == 2


def test_busy_endpoint_refuses_with_a_time_to_try_again_and_still_listens(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm, max_handlers=2, busy_retry_seconds=9)
    farm.gate.clear()
    busy, peer = Peer(endpoint), Peer(endpoint)
    for mid in (1, 2):
        busy.send(encode(GET, mid=mid, options=[(URI_PATH, b"slow")]))
    refusal = peer.ask(GET)
    assert (refusal.code, refusal.number(MAX_AGE), refusal.payload) == (Code.UNAVAILABLE, 9, b"busy")
    peer.expect_nothing_but_pong()
    farm.gate.set()
    assert {busy.receive().mid for _ in range(2)} == {1, 2}
    assert peer.ask(GET).code == Code.CONTENT
    assert endpoint.stats.refused_busy == 1


def test_blocked_handler_delays_nobody_else(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    farm.gate.clear()
    blocked = Peer(endpoint)
    blocked.send(encode(GET, options=[(URI_PATH, b"slow")]))
    assert Peer(endpoint).ask(GET).payload == b"off"
    farm.gate.set()
    assert blocked.receive().code == Code.CHANGED


@pytest.mark.parametrize(
    "failure",
    [
        lambda _: 1 / 0,
        lambda _: None,
        lambda _: CoapResponse(code=Code.CONTENT, payload="text"),  # type: ignore[arg-type]
        lambda _: CoapResponse(code=Code.CONTENT, max_age=-1),
        lambda _: CoapResponse(code=Code.CONTENT, content_format=2**16),
        lambda _: CoapResponse(code=7),  # type: ignore[arg-type]
        lambda _: CoapResponse(code=Code.CONTENT, payload=b"x" * (64 * 1024 + 1)),
        lambda _: (_ for _ in ()).throw(gevent.Timeout(1)),
    ],
)
def test_handler_that_fails_is_answered_for_and_counted(
    serve: Serve, failure: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = serve(failure)
    peer = Peer(endpoint)
    response = peer.ask(GET)
    assert (response.code, len(response.payload) < 32) == (Code.INTERNAL_ERROR, True)
    assert endpoint.stats.errors == 1
    assert "devices" in caplog.text
    peer.expect_nothing_but_pong()


def test_an_error_is_one_sentence_or_a_whole_document(serve: Serve) -> None:
    answers = [
        CoapResponse(code=Code.BAD_REQUEST, payload="ü".encode() * 5000),
        CoapResponse(code=Code.BAD_REQUEST, payload=b"{" + b" " * 600 + b"}", content_format=50),
        CoapResponse(code=Code.BAD_REQUEST, payload=b'{"reason":"queue-critical"}', content_format=50),
    ]
    peer = Peer(serve(lambda _: answers.pop(0)))
    assert peer.ask(GET).payload.decode() == "ü" * 256
    assert (cut := peer.ask(GET)).payload == b""
    assert CONTENT_FORMAT not in cut.options
    assert (whole := peer.ask(GET)).payload == b'{"reason":"queue-critical"}'
    assert whole.number(CONTENT_FORMAT) == 50


def test_one_host_above_its_rate_is_told_when_to_try_again_and_others_are_served(serve: Serve, farm: Farm) -> None:
    clock = ManualClock()
    endpoint = serve(farm, clock=clock, requests_per_second=0.5, request_burst=2)
    peer, same_host, other = Peer(endpoint), Peer(endpoint), Peer(endpoint, host="127.0.0.2")
    assert [peer.ask(GET, mid=7).code, same_host.ask(GET).code] == [Code.CONTENT, Code.CONTENT]
    refusal = peer.ask(GET)
    assert (refusal.code, refusal.number(MAX_AGE), refusal.payload) == (Code.TOO_MANY_REQUESTS, 2, b"too many requests")
    peer.send(encode(GET, mid=7, options=[(URI_PATH, segment.encode()) for segment in STATE]))
    peer.send(b"\x40\x00\xfe\xfe")
    peer.send(b"\x49\x01\x00\x04123456789")
    assert other.ask(GET).code == Code.CONTENT
    # A duplicate above the rate is neither replayed nor refused, for it was accepted once; pings and rubbish are ignored.
    with pytest.raises(TimeoutError):
        peer.receive(seconds=0.05)
    clock.now += 2
    assert [peer.ask(GET).code, peer.ask(GET).code] == [Code.CONTENT, Code.TOO_MANY_REQUESTS]
    assert (endpoint.stats.rate_limited, len(farm.requests)) == (2, 4)


def test_hosts_remembered_for_their_rate_are_bounded_and_forgotten(serve: Serve, farm: Farm) -> None:
    clock = ManualClock()
    endpoint = serve(farm, clock=clock, max_sources=3)
    for last in range(1, 7):
        Peer(endpoint, host=f"127.0.0.{last}").ask(GET)
    assert len(endpoint._rates.kept) == 3
    clock.now += 1000
    until(lambda: len(endpoint._rates.kept) == len(endpoint._exchanges) == 0)


# Block-wise transfers


def block(number: int, more: bool, exponent: int) -> bytes:
    return (number << 4 | more << 3 | exponent).to_bytes(3, "big")


def test_upload_with_a_missing_block_is_incomplete_and_a_repeated_one_does_no_harm(serve: Serve, farm: Farm) -> None:
    peer = Peer(serve(farm))

    def put(number: int, more: bool, payload: bytes, *, path: str = "echo") -> Packet:
        return peer.ask(PUT, (path,), options=[(BLOCK1, block(number, more, 0))], payload=payload)

    assert put(1, True, b"b" * 16).code == Code.INCOMPLETE
    first = put(0, True, b"a" * 16)
    assert (first.code, first.number(BLOCK1)) == (Code.CONTINUE, 0x08)
    assert put(2, True, b"c" * 16).code == Code.INCOMPLETE
    assert put(1, True, b"b" * 16, path="other").code == Code.INCOMPLETE  # every resource has its own body
    assert put(1, True, b"x" * 16).code == Code.CONTINUE
    assert put(1, True, b"b" * 16).code == Code.CONTINUE
    assert put(2, True, b"short").code == Code.BAD_REQUEST
    assert put(2, False, b"longer than its block").code == Code.BAD_REQUEST
    last = put(2, False, b"end")
    assert (last.code, last.number(BLOCK1)) == (Code.CHANGED, 0x20)
    assert [request.payload for request in farm.requests] == [b"a" * 16 + b"b" * 16 + b"end"]
    assert put(3, False, b"more").code == Code.INCOMPLETE  # done with and forgotten


def test_body_above_the_limit_is_too_large_declared_or_sent_in_one_or_in_blocks(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm, max_body_bytes=40)
    peer, first = Peer(endpoint), (BLOCK1, block(0, True, 0))
    declared = peer.ask(PUT, options=[first, (SIZE1, b"\x29")], payload=b"a" * 16)
    assert (declared.code, declared.number(SIZE1)) == (Code.TOO_LARGE, 40)
    assert peer.ask(PUT, payload=b"a" * 41).code == Code.TOO_LARGE
    assert peer.ask(PUT, options=[first], payload=b"a" * 16).code == Code.CONTINUE
    assert peer.ask(PUT, options=[(BLOCK1, block(1, True, 0))], payload=b"a" * 16).code == Code.CONTINUE
    assert peer.ask(PUT, options=[(BLOCK1, block(2, False, 0))], payload=b"a" * 16).code == Code.TOO_LARGE
    assert peer.ask(PUT, options=[(BLOCK1, b"\xff\xff\xf6")], payload=b"a").code == Code.TOO_LARGE
    assert (farm.requests, len(endpoint._uploads.kept)) == ([], 0)


def test_unfinished_uploads_are_bounded_and_expire(serve: Serve, farm: Farm) -> None:
    clock = ManualClock()
    endpoint = serve(farm, clock=clock, max_uploads=2)
    peer = Peer(endpoint)
    for name in "abc":
        assert peer.ask(PUT, (name,), options=[(BLOCK1, block(0, True, 0))], payload=b"x" * 16).code == Code.CONTINUE
    second = {"options": [(BLOCK1, block(1, False, 0))], "payload": b"end"}
    assert peer.ask(PUT, ("a",), **second).code == Code.INCOMPLETE  # the oldest made room
    assert peer.ask(PUT, ("b",), **second).code == Code.CHANGED
    clock.now += 61
    until(lambda: len(endpoint._uploads.kept) == 0)
    assert peer.ask(PUT, ("c",), **second).code == Code.INCOMPLETE


def test_blocks_of_a_download_come_from_one_representation_of_one_query(serve: Serve) -> None:
    versions = iter("abcdef")
    endpoint = serve(lambda request: CoapResponse(code=Code.CONTENT, payload=next(versions).encode() * 40))
    peer = Peer(endpoint)

    def fetch(number: int, query: bytes) -> Packet:
        return peer.ask(GET, ("log",), options=[(BLOCK2, block(number, False, 0)), (URI_QUERY, query)])

    first_a, first_b = fetch(0, b"day=1"), fetch(0, b"day=2")
    last_a = fetch(2, b"day=1")
    assert (first_a.payload, first_a.number(BLOCK2)) == (b"a" * 16, 0x08)
    assert (last_a.payload, last_a.number(BLOCK2)) == (b"a" * 8, 0x20)
    assert first_a.options[4] == last_a.options[4] != first_b.options[4]  # ETag
    assert fetch(1, b"day=2").payload == b"b" * 16
    assert fetch(3, b"day=1").code == Code.BAD_REQUEST
    assert fetch(1, b"day=3").payload == b"c" * 16  # nothing kept: the handler is asked


def test_large_answer_to_a_post_is_fetched_without_posting_twice(serve: Serve, farm: Farm) -> None:
    peer = Peer(serve(farm, max_downloads=1))
    body = bytes(range(250)) * 5
    first = peer.ask(POST, ("echo",), payload=body)
    assert (first.payload, first.number(BLOCK2)) == (body[:1024], 0x0E)
    rest = {"options": [(BLOCK2, block(1, False, 6))]}
    assert peer.ask(POST, ("echo",), **rest).payload == body[1024:]
    assert peer.ask(POST, ("echo2",), payload=body).code == Code.CHANGED
    assert peer.ask(POST, ("echo",), **rest).code == Code.INCOMPLETE
    assert len(farm.requests) == 2


# Observe


def test_registration_notification_and_deregistration(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    peer = Peer(endpoint)
    registered = peer.observe(token=b"tk")
    assert (registered.kind, registered.payload, endpoint.stats.observers) == (ACK, b"off", 1)
    farm.state = b"on"
    assert endpoint.notify(STATE) == 1
    news = peer.receive()
    assert (news.code, news.token, news.payload) == (Code.CONTENT, b"tk", b"on")
    assert registered.number(OBSERVE) < news.number(OBSERVE) < 2**24  # type: ignore[operator]
    assert endpoint.notify(("devices", "other", "state")) == 0
    peer.acknowledge(news)
    ended = peer.observe(value=b"\x01", token=b"tk")
    assert (ended.code, OBSERVE in ended.options) == (Code.CONTENT, False)
    assert (endpoint.stats.observers, endpoint.notify(STATE)) == (0, 0)
    assert [request.observe for request in farm.requests] == [True, True, False]


@pytest.mark.parametrize("kind", [CON, NON])
def test_reset_of_a_notification_ends_the_observation(serve: Serve, farm: Farm, kind: int) -> None:
    endpoint = serve(farm)
    peer = Peer(endpoint)
    peer.observe(kind=kind)
    endpoint.notify(STATE)
    news = peer.receive()
    assert news.kind == kind
    Peer(endpoint).acknowledge(news, kind=RST)  # somebody else's reset does nothing
    gevent.sleep(0.01)
    assert endpoint.stats.observers == 1
    peer.acknowledge(news, kind=RST)
    until(lambda: endpoint.stats.observers == 0)
    assert len(endpoint._outgoing.waiting) == 0


def test_registration_with_the_same_token_replaces_the_earlier_one(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    peer, elsewhere = Peer(endpoint), ("devices", "b", "state")
    peer.observe(token=b"t")
    endpoint.notify(STATE)
    old = peer.receive()
    peer.observe(elsewhere, token=b"t")
    assert (endpoint.stats.observers, endpoint.notify(STATE), endpoint.notify(elsewhere)) == (1, 0, 1)
    assert peer.receive().mid != old.mid
    assert len(endpoint._outgoing.waiting) == 1  # the old notification is no longer repeated
    peer.observe(STATE, token=b"another")
    assert endpoint.stats.observers == 2


def test_news_while_a_notification_is_under_way_are_sent_as_one(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    peer = Peer(endpoint)
    peer.observe()
    endpoint.notify(STATE)
    first = peer.receive()
    for number in range(50):
        farm.state = b"state %d" % number
        assert endpoint.notify(STATE) == 1
    peer.expect_nothing_but_pong()
    peer.acknowledge(first)
    second = peer.receive()
    assert second.payload == b"state 49"
    peer.acknowledge(second)
    gevent.sleep(0.01)
    peer.expect_nothing_but_pong()
    assert endpoint.stats.notifications == 2


def test_what_is_sent_again_is_the_newest_state_and_patience_is_not_renewed(serve: Serve, farm: Farm) -> None:
    clock = ManualClock()
    endpoint = serve(farm, clock=clock, **HASTY)
    peer = Peer(endpoint)
    peer.observe()
    seen = []
    for number in range(3):
        farm.state = b"state %d" % number
        endpoint.notify(STATE)
        clock.now += 1
        seen.append(peer.receive())
    assert [news.payload for news in seen] == [b"state 0", b"state 1", b"state 2"]
    assert len({news.mid for news in seen}) == 3
    farm.state = b"too late"
    endpoint.notify(STATE)
    clock.now += 1
    until(lambda: endpoint.stats.observers == 0)
    assert (endpoint.stats.timeouts, endpoint.stats.notifications) == (1, 3)


def test_news_that_replace_a_confirmable_notification_are_confirmable_too(serve: Serve, farm: Farm) -> None:
    clock = ManualClock()
    endpoint = serve(farm, clock=clock, confirm_every=2, **HASTY)
    peer = Peer(endpoint)
    peer.observe(kind=NON)
    kinds = []
    for _ in range(3):
        endpoint.notify(STATE)
        clock.now += 1
        kinds.append(peer.receive().kind)
    assert kinds == [NON, CON, CON]


def test_silent_observer_is_dropped_and_delays_nobody(serve: Serve, farm: Farm) -> None:
    clock = ManualClock()
    endpoint = serve(farm, clock=clock, **HASTY)
    silent, awake = Peer(endpoint), Peer(endpoint)
    silent.observe()
    awake.observe()
    for number in range(20):
        farm.state = b"%d" % number
        assert endpoint.notify(STATE) == 2
        news = awake.receive()
        assert news.payload == farm.state
        awake.acknowledge(news)
        awake.expect_nothing_but_pong()
    assert silent.receive().payload == b"0"
    for _ in range(2):
        clock.now += 1
        assert silent.receive().payload == b"19"
    clock.now += 1
    until(lambda: endpoint.stats.observers == 1)
    assert endpoint.notify(STATE) == 1
    assert awake.receive().kind == CON


def test_handler_blocked_for_one_observer_delays_neither_the_caller_nor_the_others(serve: Serve) -> None:
    gate = gevent.event.Event()
    gate.set()

    def handler(request: CoapRequest) -> CoapResponse:
        if request.query:
            gate.wait()
        return CoapResponse(code=Code.CONTENT, observable=True)

    endpoint = serve(handler)
    blocked, free = Peer(endpoint), Peer(endpoint)
    blocked.ask(GET, options=[(OBSERVE, b""), (URI_QUERY, b"block")])
    free.observe()
    gate.clear()
    assert endpoint.notify(STATE) == 2
    assert free.receive().code == Code.CONTENT
    gate.set()
    assert blocked.receive().code == Code.CONTENT


def test_state_that_changes_during_the_registration_is_not_missed(serve: Serve, farm: Farm) -> None:
    def handler(request: CoapRequest) -> CoapResponse:
        response = farm(request)
        farm.gate.wait()
        return response

    endpoint = serve(handler)
    peer = Peer(endpoint)
    farm.gate.clear()
    peer.send(encode(GET, options=[(OBSERVE, b""), *((URI_PATH, segment.encode()) for segment in STATE)]))
    until(lambda: len(farm.requests) == 1)
    farm.state = b"on"
    assert endpoint.notify(STATE) == 1
    farm.gate.set()
    registered, news = peer.receive(), peer.receive()
    assert (registered.kind, registered.payload, news.payload) == (ACK, b"off", b"on")
    assert registered.number(OBSERVE) < news.number(OBSERVE)  # type: ignore[operator]


def test_observation_ended_while_its_registration_is_answered_does_not_come_back(serve: Serve, farm: Farm) -> None:
    def handler(request: CoapRequest) -> CoapResponse:
        response = farm(request)
        if request.observe:
            farm.gate.wait()
        return response

    endpoint = serve(handler)
    peer = Peer(endpoint)
    farm.gate.clear()
    peer.send(encode(GET, options=[(OBSERVE, b""), *((URI_PATH, segment.encode()) for segment in STATE)]))
    until(lambda: len(farm.requests) == 1)
    assert peer.observe(value=b"\x01").code == Code.CONTENT
    farm.gate.set()
    assert OBSERVE not in peer.receive().options
    assert (endpoint.stats.observers, endpoint.notify(STATE)) == (0, 0)


def test_body_of_a_registration_is_not_kept_with_the_observer(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    Peer(endpoint).observe(payload=b"x" * 60_000)
    assert [observer.message.payload for observer in endpoint._notifications.observers.of(STATE)] == [b""]


def test_who_registered_nonconfirmably_gets_every_third_notification_confirmable(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm, confirm_every=3)
    peer = Peer(endpoint)
    assert peer.observe(kind=NON).kind == NON
    kinds = []
    for _ in range(7):
        endpoint.notify(STATE)
        news = peer.receive()
        kinds.append(news.kind)
        if news.kind == CON:
            peer.acknowledge(news)
            until(lambda: len(endpoint._outgoing.waiting) == 0)
    assert kinds == [NON, NON, CON, NON, NON, CON, NON]


def test_notification_after_a_day_is_confirmable(serve: Serve, farm: Farm) -> None:
    clock = ManualClock()
    endpoint = serve(farm, clock=clock, refresh_seconds=1e9)
    peer = Peer(endpoint)
    peer.observe(kind=NON)
    kinds = []
    for hours in (1, 23, 1):
        clock.now += hours * 3600
        endpoint.notify(STATE)
        news = peer.receive()
        kinds.append(news.kind)
        peer.acknowledge(news)
        until(lambda: len(endpoint._outgoing.waiting) == 0)
    assert kinds == [NON, CON, NON]


def test_observer_that_lost_its_right_is_told_once_and_forgotten(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    peer = Peer(endpoint)
    peer.observe(kind=NON)
    farm.code, farm.state = Code.UNAUTHORIZED, b""
    endpoint.notify(STATE)
    last = peer.receive()
    assert (last.kind, last.code, OBSERVE in last.options) == (CON, Code.UNAUTHORIZED, False)
    peer.acknowledge(last)
    until(lambda: len(endpoint._outgoing.waiting) == 0)
    assert (endpoint.stats.observers, endpoint.notify(STATE)) == (0, 0)


def test_handler_that_fails_for_a_notification_ends_the_observation_with_that(serve: Serve, farm: Farm) -> None:
    failing: list[bool] = []

    def handler(request: CoapRequest) -> CoapResponse:
        if failing:
            raise RuntimeError("the handler has a bug")
        return farm(request)

    endpoint = serve(handler)
    peer = Peer(endpoint)
    peer.observe()
    failing.append(True)
    endpoint.notify(STATE)
    assert peer.receive().code == Code.INTERNAL_ERROR
    assert endpoint.stats.observers == 0


def test_refused_and_unobservable_resources_register_nobody(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    peer = Peer(endpoint)
    assert OBSERVE not in peer.observe(("echo",)).options
    farm.code = Code.FORBIDDEN
    assert OBSERVE not in peer.observe().options
    assert OBSERVE not in peer.ask(POST, options=[(OBSERVE, b"")]).options
    assert endpoint.stats.observers == 0


def test_observers_beyond_the_limits_get_a_plain_answer(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm, max_observers=3, max_observers_per_source=2)
    here, there = Peer(endpoint), Peer(endpoint, host="127.0.0.2")
    kept = [OBSERVE in peer.observe(token=token).options for peer in (here, there) for token in (b"1", b"2", b"3")]
    assert kept == [True, True, False, True, False, False]
    assert not farm.requests[2].observe
    here.observe(value=b"\x01", token=b"1")
    assert OBSERVE in there.observe(token=b"2").options
    assert endpoint.stats.observers == 3


def test_large_notification_brings_its_first_block_and_the_rest_is_fetched(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    peer = Peer(endpoint)
    peer.observe()
    farm.state = b"first" * 300
    endpoint.notify(STATE)
    news = peer.receive()
    peer.acknowledge(news)
    assert (len(news.payload), news.number(BLOCK2), OBSERVE in news.options) == (1024, 0x0E, True)
    farm.state = b"second"
    rest = peer.ask(GET, options=[(BLOCK2, block(1, False, 6)), (OBSERVE, b"")])
    assert news.payload + rest.payload == b"first" * 300
    assert (OBSERVE in rest.options, endpoint.stats.observers) == (False, 1)


# Peers that nobody knows yet: any source address may be forged


def test_unknown_peer_is_sent_no_more_than_three_times_what_it_sent(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm, links="x" * 500, **HASTY)
    unknown = Peer(endpoint, proven=False)
    farm.state, farm.code = "ü".encode() * 200, Code.FORBIDDEN
    request = encode(GET, mid=1, options=[(URI_PATH, segment.encode()) for segment in STATE])
    unknown.send(request)
    refusal = unknown.receive()
    assert (refusal.code, set(refusal.payload.decode())) == (Code.FORBIDDEN, {"ü"})
    assert len(refusal.data) <= 3 * len(request)
    request = encode(GET, mid=2, options=[(URI_PATH, b".well-known"), (URI_PATH, b"core")])
    unknown.send(request)
    links = unknown.receive()
    assert (links.payload, links.number(BLOCK2)) == (b"x" * 16, 0x08)
    assert len(links.data) <= 3 * len(request)
    assert Peer(endpoint).ask(GET, (".well-known", "core")).payload == b"x" * 500


def test_separate_answer_to_an_unknown_peer_is_not_repeated_beyond_that(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm, **HASTY | {"ack_delay_seconds": 0.01, "max_retransmits": 9})
    unknown = Peer(endpoint, proven=False)
    farm.gate.clear()
    request = encode(PUT, mid=1, options=[(URI_PATH, b"slow")], payload=b"x" * 16)
    unknown.send(request)
    assert unknown.receive().code == 0
    farm.gate.set()
    received = unknown.receive_until(lambda: endpoint.stats.timeouts == 1)
    assert received
    assert sum(map(len, received)) <= 3 * len(request)


def test_large_answer_waits_for_the_proof_that_somebody_is_there(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    unknown = Peer(endpoint, proven=False)
    farm.state = b"s" * 900
    ping = unknown.ask(GET)
    assert (ping.kind, ping.code, len(ping.data)) == (CON, 0, 4)
    unknown.acknowledge(ping, kind=RST)
    assert unknown.receive().payload == farm.state
    assert unknown.ask(GET).payload == farm.state  # once is enough


def test_large_answer_without_a_proof_comes_in_small_blocks(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm, **HASTY)
    unknown = Peer(endpoint, proven=False)
    farm.state = b"s" * 900
    answer = unknown.ask(GET)
    while answer.code == 0:
        answer = unknown.receive()
    assert (len(answer.payload), answer.number(BLOCK2)) == (32, 0x09)


def test_observer_is_told_news_only_after_it_has_answered_a_ping(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    unknown = Peer(endpoint, proven=False)
    assert OBSERVE in unknown.observe(kind=NON).options
    farm.state = b"on"
    endpoint.notify(STATE)
    ping = unknown.receive()
    assert (ping.kind, ping.code, len(ping.data)) == (CON, 0, 4)
    unknown.acknowledge(ping, kind=RST)
    news = unknown.receive()
    assert (news.payload, endpoint.stats.observers) == (b"on", 1)


def test_registration_under_a_forged_address_costs_its_owner_a_few_empty_messages(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm, **HASTY)
    forged = Peer(endpoint, proven=False)
    forged.observe()
    endpoint.notify(STATE)
    received = forged.receive_until(lambda: not endpoint.stats.observers)
    assert {len(data) for data in received} == {4}
    assert len(received) <= 6
    assert endpoint.notify(STATE) == 0


def test_message_ids_grow_for_each_peer_and_tell_nothing_of_those_of_others() -> None:
    ids = MessageIds(DEFAULT_LIMITS, clock=time.monotonic)
    here, there = ("10.0.0.1", 5683), ("10.0.0.2", 5683)
    first = [ids.next(here) for _ in range(3)]
    assert [(b - a) & 0xFFFF for a, b in itertools.pairwise(first)] == [1, 1]

    def new() -> MessageIds:
        return MessageIds(DEFAULT_LIMITS, clock=time.monotonic)

    distances = {(new().next(here) - new().next(there)) & 0xFFFF for _ in range(20)}
    assert len(distances) > 15


def test_a_peer_is_not_sent_a_message_id_again_because_others_were_sent_many() -> None:
    """It would take what comes under a number of the last four minutes for a repetition (RFC 7252 4.4)."""
    now = 0.0
    ids = MessageIds(DEFAULT_LIMITS, clock=lambda: now)
    here, there = ("10.0.0.1", 5683), ("10.0.0.2", 5683)
    first = ids.next(here)
    for _ in range(0xFFFF):
        ids.next(there)
    assert ids.next(here) != first
    now = DEFAULT_LIMITS.exchange_lifetime_seconds
    ids.next(("10.0.0.3", 5683))
    assert len(ids.kept) == 1


def test_a_network_is_an_ipv4_host_or_the_upper_half_of_an_ipv6_address() -> None:
    assert network("10.0.0.1") != network("10.0.0.2")
    assert network("2001:db8::1") == network("2001:db8::ffff:2") != network("2001:db8:0:1::1")
    assert network("fe80::1%eth0") == network("fe80::2")
    assert network("::ffff:10.0.0.1") != network("::ffff:10.0.0.2")


def test_one_source_cannot_take_all_handlers(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm, max_handlers=4, max_handlers_per_source=2)
    farm.gate.clear()
    greedy, other = Peer(endpoint), Peer(endpoint, host="127.0.0.2")
    for mid in (1, 2, 3):
        greedy.send(encode(GET, mid=mid, options=[(URI_PATH, b"slow")]))
    assert greedy.receive().code == Code.UNAVAILABLE
    assert other.ask(GET).code == Code.CONTENT
    farm.gate.set()
    assert {greedy.receive().code for _ in range(2)} == {Code.CHANGED}
    assert greedy.ask(GET).code == Code.CONTENT


def test_blocks_are_gathered_only_where_the_handler_allows_it(serve: Serve) -> None:
    seen: list[tuple[bytes, bool]] = []

    def handler(request: CoapRequest) -> CoapResponse:
        seen.append((request.payload, request.more))
        return CoapResponse(code=Code.UNAUTHORIZED, payload=b"no token")

    endpoint = serve(handler)
    refusal = Peer(endpoint).ask(POST, options=[(BLOCK1, block(0, True, 0))], payload=b"a" * 16)
    assert (refusal.code, refusal.payload, len(endpoint._uploads.kept)) == (Code.UNAUTHORIZED, b"no token", 0)
    assert seen == [(b"a" * 16, True)]


# What observers hear when nothing happens


def test_observer_that_hears_nothing_new_is_told_again_before_it_must_doubt(serve: Serve, farm: Farm) -> None:
    clock = ManualClock()
    endpoint = serve(farm, clock=clock, refresh_seconds=40)
    peer = Peer(endpoint)
    peer.observe()
    clock.now += 31
    gevent.sleep(0.25)
    peer.expect_nothing_but_pong()
    clock.now += 10
    again = peer.receive()
    assert (again.payload, OBSERVE in again.options) == (b"off", True)
    peer.acknowledge(again)
    clock.now += 41
    assert peer.receive().payload == b"off"


def test_observer_that_went_away_is_forgotten_though_nothing_happens(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm, refresh_seconds=0.2, **HASTY)
    gone = Peer(endpoint)
    gone.observe()
    gone.socket.close()
    until(lambda: endpoint.stats.observers == 0)
    assert endpoint.stats.timeouts == 1


def test_a_service_that_is_away_for_a_moment_ends_no_observation(serve: Serve, farm: Farm) -> None:
    clock = ManualClock()
    endpoint = serve(farm, clock=clock, busy_retry_seconds=5)
    peer = Peer(endpoint)
    peer.observe()
    farm.code = Code.UNAVAILABLE
    endpoint.notify(STATE)
    gevent.sleep(0.05)
    peer.expect_nothing_but_pong()
    farm.code, farm.state = Code.CONTENT, b"on"
    clock.now += 6
    assert peer.receive().payload == b"on"


# Parts that need no socket


def test_observe_numbers_grow_over_a_restart_and_wrap_at_24_bits() -> None:
    clock = ManualClock()
    numbers = Sequence(clock)
    first, second = numbers.next(), numbers.next()
    assert second == first + 1
    clock.now += 1
    assert Sequence(clock).next() > second
    clock.now = (2**24 - 1) / 1000
    late = Sequence(clock)
    assert [late.next(), late.next()] == [2**24 - 1, 0]


def test_expiring_map_keeps_the_latest_and_forgets_in_time() -> None:
    clock = ManualClock()
    kept: ExpiringMap[str, int] = ExpiringMap(max_entries=2, lifetime_seconds=10, clock=clock)
    for number, name in enumerate("abac"):
        kept.put(name, number)
    assert [kept.get(name) for name in "abc"] == [2, None, 3]
    clock.now += 9
    kept.put("a", 5)
    clock.now += 1
    assert [kept.get(name) for name in "ac"] == [5, None]
    kept.expire()
    assert len(kept) == 1
    assert (kept.pop("a"), kept.pop("a"), len(kept)) == (5, None, 0)


# Start and stop


def test_port_in_use_is_an_error_and_a_stopped_endpoint_frees_it(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    second = Endpoint(endpoint.address, handler=farm)
    with pytest.raises(OSError, match="in use"):
        second.start()
    endpoint.stop()
    second.start()
    assert Peer(second).ask(GET).code == Code.CONTENT
    second.stop()
    second.stop()


def test_stop_lets_a_running_handler_answer(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm)
    peer = Peer(endpoint)
    farm.gate.clear()
    peer.send(encode(GET, options=[(URI_PATH, b"slow")]))
    until(lambda: len(farm.requests) == 1)
    gevent.spawn_later(0.05, farm.gate.set)
    endpoint.stop()
    assert peer.receive().code == Code.CHANGED


def test_ipv6_is_served_too(farm: Farm) -> None:
    endpoint = Endpoint(("::1", 0), handler=farm)
    endpoint.start()
    try:
        with gevent.socket.socket(gevent.socket.AF_INET6, gevent.socket.SOCK_DGRAM) as client:
            client.settimeout(3)
            client.sendto(encode(GET), endpoint.address)
            assert Packet.decode(client.recv(100)).code == Code.CHANGED
        assert farm.requests[0].source[0] == "::1"
    finally:
        endpoint.stop()


def test_peer_that_closed_its_port_harms_nothing(serve: Serve, farm: Farm) -> None:
    endpoint = serve(farm, **HASTY)
    gone, peer = Peer(endpoint), Peer(endpoint)
    gone.observe()
    gone.socket.close()
    for _ in range(3):
        endpoint.notify(STATE)
        assert peer.ask(GET).code == Code.CONTENT
    until(lambda: endpoint.stats.observers == 0)


PATCHED_SERVER = """
from gevent import get_hub, monkey; monkey.patch_all()
import sys, time
from gateway.coap.endpoint import CoapResponse, Code, Endpoint
def handler(request):
    time.sleep(0.2)
    return CoapResponse(code=Code.CONTENT, payload=request.payload)
endpoint = Endpoint(("127.0.0.1", 0), handler=handler)
endpoint.start()
print(endpoint.address[1], flush=True)
get_hub().threadpool.apply(sys.stdin.read)
endpoint.stop()
assert not [name for name in sys.modules if name.split(".")[0] in ("django", "redis")], "transport only"
"""


def test_it_serves_in_a_patched_process_and_imports_neither_django_nor_redis() -> None:
    command = [sys.executable, "-W", "error", "-c", PATCHED_SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        port = int(process.stdout.readline())
        with gevent.socket.socket(gevent.socket.AF_INET, gevent.socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            for mid in (1, 2):
                client.sendto(encode(POST, mid=mid, payload=b"hello"), ("127.0.0.1", port))
            assert {Packet.decode(client.recv(100)).mid for _ in range(2)} == {1, 2}
        _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
