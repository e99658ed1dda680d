"""What overtakes what: urgent messages go first, and never past an earlier message of their own addressee."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.backlog import Backlog, Item
from tests.gateway_process import new_message

DEVICES = [str(UUID(int=number)) for number in range(2, 6)]


def item(number: int, *, priority: int = 5, device: str | None = None) -> Item:
    return Item(b"%d-0" % number, new_message(device=device, priority=priority), 10)


def taken(backlog: Backlog) -> list[int]:
    return [int(backlog.take().entry_id.partition(b"-")[0]) for _ in range(len(backlog))]


def filled(*items: Item) -> Backlog:
    backlog = Backlog()
    for each in items:
        backlog.add(each)
    return backlog


def test_messages_that_are_alike_keep_their_order() -> None:
    assert taken(filled(*(item(number, device=DEVICES[number % 3]) for number in range(1, 10)))) == list(range(1, 10))


def test_an_urgent_message_overtakes_what_others_are_told() -> None:
    waiting = [item(number, device=DEVICES[0]) for number in range(1, 5)]
    assert taken(filled(*waiting, item(5, priority=1, device=DEVICES[1]))) == [5, 1, 2, 3, 4]


def test_an_urgent_message_takes_the_earlier_ones_of_its_device_along() -> None:
    backlog = filled(
        item(1, device=DEVICES[0]),
        item(2, device=DEVICES[1]),
        item(3, device=DEVICES[0]),
        item(4, device=DEVICES[1]),
        item(5, priority=1, device=DEVICES[1]),
        item(6, device=DEVICES[1]),
    )
    assert taken(backlog) == [2, 4, 5, 1, 3, 6]


def test_nothing_overtakes_where_the_order_of_the_stream_counts() -> None:
    backlog = Backlog(in_order=True)
    for each in (item(1), item(2, priority=1, device=DEVICES[0]), item(3), item(4, priority=1)):
        backlog.add(each)
    assert taken(backlog) == [1, 2, 3, 4]


def test_an_empty_backlog_has_nothing_to_take_and_counts_to_zero() -> None:
    backlog = filled(item(1), item(2, priority=1))
    assert (len(backlog), backlog.bytes, sorted(backlog.entry_ids())) == (2, 20, [b"1-0", b"2-0"])
    taken(backlog)
    assert (len(backlog), backlog.bytes, backlog.entry_ids()) == (0, 0, [])
    with pytest.raises(IndexError):
        backlog.take()


def test_what_is_remembered_of_the_order_is_bounded_while_urgent_messages_never_end() -> None:
    backlog = filled(item(1, device=DEVICES[0]), item(2, device=DEVICES[1]))
    for number in range(3, 1_000):
        backlog.add(item(number, priority=1, device=DEVICES[2]))
        assert _number(backlog.take()) == number
    assert len(backlog._order) <= 4
    assert taken(backlog) == [1, 2]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans())))
def test_order_per_device_holds_however_adding_and_taking_alternate(
    steps: list[tuple[int, bool, bool]],
) -> None:
    backlog, out, waiting = Backlog(), [], {}
    for number, (device, urgent, take) in enumerate(steps, start=1):
        each = item(number, priority=1 if urgent else 5, device=DEVICES[device])
        backlog.add(each)
        waiting[each.entry_id] = each
        if take:
            first_urgent = [e for e in waiting.values() if e.message.is_urgent]
            got = backlog.take()
            if first_urgent:
                assert got.message.addressee == first_urgent[0].message.addressee
            del waiting[got.entry_id]
            out.append(got)
    out += [backlog.take() for _ in range(len(backlog))]
    assert sorted(map(_number, out)) == list(range(1, len(steps) + 1))
    for uuid in DEVICES:
        own = [_number(each) for each in out if each.message.device_uuid == uuid]
        assert own == sorted(own)
    assert (len(backlog), backlog.bytes) == (0, 0)


def _number(each: Item) -> int:
    return int(each.entry_id.partition(b"-")[0])
