"""Turns of greenlets: in order, what is short first, and never longer than a turn away from what others wait for."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import gevent
from gevent.event import Event
from gevent.socket import socketpair

from aemos.lib.turns import TURN_SECONDS, Turns


def busy(seconds: float) -> None:
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        pass


def test_whoever_waits_longest_is_next_and_what_is_short_comes_first() -> None:
    turns, order, begin = Turns(), list[str](), Event()

    def holder() -> None:
        with turns.turn(short=False):
            begin.wait()

    def waiter(name: str, *, short: bool) -> None:
        with turns.turn(short=short):
            order.append(name)

    greenlets: list[Any] = [gevent.spawn(holder)]
    for name in ("first", "second", "short", "short too"):
        greenlets.append(gevent.spawn(partial(waiter, name, short="short" in name)))
    gevent.sleep(0.01)
    begin.set()
    gevent.joinall(greenlets, timeout=5, raise_error=True)
    assert order == ["short", "short too", "first", "second"]


def test_somebody_whose_socket_is_ready_waits_for_one_turn_not_for_all() -> None:
    turns, done = Turns(), list[str]()
    ours, theirs = socketpair()

    def work(number: int) -> None:
        for _ in range(10):
            with turns.turn(short=False):
                busy(2 * TURN_SECONDS)
                done.append(f"turn {number}")

    def listen() -> None:
        ours.recv(1)
        done.append("heard")

    greenlets: list[Any] = [gevent.spawn(listen), *(gevent.spawn(work, number) for number in range(5))]
    theirs.send(b"x")
    gevent.joinall(greenlets, timeout=10, raise_error=True)
    assert "heard" in done[:3]
    assert {done.index(f"turn {number}") for number in range(5)} <= set(range(6)), (
        "nobody goes twice before all went once"
    )
    ours.close()
    theirs.close()


def test_a_greenlet_that_ends_while_it_waits_or_has_the_turn_passes_it_on() -> None:
    turns, order, begin = Turns(), list[str](), Event()

    def holder() -> None:
        with turns.turn(short=False):
            begin.wait()
            raise ValueError

    def waiter(name: str) -> None:
        with turns.turn(short=False):
            order.append(name)

    first, killed, last = gevent.spawn(holder), gevent.spawn(waiter, "killed"), gevent.spawn(waiter, "last")
    gevent.sleep(0.01)
    killed.kill()
    begin.set()
    greenlets: list[Any] = [first, killed, last]
    gevent.joinall(greenlets, timeout=5)
    assert order == ["last"]
    with turns.turn(short=False):
        order.append("free again")
    assert order == ["last", "free again"]
