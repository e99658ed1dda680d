"""Replays step by step, beside a gateway whose pace the test decides: nothing twice, nothing left out, nothing overtaken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from aemos.lib import keys, redis
from gateway import cursors
from gateway.people import Login
from gateway.socketio import history
from gateway.socketio.replay import SLICE, Replayer
from gateway.socketio.sessions import ORGANIZATION, Session
from notifications import outbox
from notifications.messages import Message
from notifications.publisher import Entry, append
from tests import builders
from tests.gateway_process import new_message

pytestmark = pytest.mark.usefixtures("empty_redis")
OWNER = "11111111-1111-4111-8111-111111111111"
LONG_AGO = "1-0"


class Outlet:
    """Stands in for the transport: what each session was sent, in order."""

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.position = LONG_AGO
        self.sent: dict[str, list[tuple[str, Any]]] = {}
        self.full: set[str] = set()
        self.replayer = Replayer(self)

    def comes_back(self, sid: str, position: str, *, organization: str = OWNER) -> None:
        rooms = {ORGANIZATION + organization: organization}
        self.sessions[sid] = Session(
            login=Login(1, ""), expires_at=0.0, organizations={organization: "viewer"}, rooms=rooms, is_live=False
        )
        self.sent[sid] = []
        self.replayer.begin(sid, position)

    def serve(self) -> None:
        """Until the replayer has nothing to do."""
        while self.replayer._serve_next():
            pass

    def delivers(self, position: str) -> None:
        """The gateway comes to a message, and gives it to those who are live."""
        self.replayer.admit(position)
        self.position = position
        for sid, session in self.sessions.items():
            if session.is_live:
                self.sent[sid].append(("alert", {"position": position}))

    def send(self, event: str, data: Mapping[str, Any], sids: Sequence[str]) -> None:
        for sid in sids:
            self.sent[sid].append((event, data))

    def has_room(self, sid: str) -> bool:
        return sid not in self.full

    def go_live(self, sid: str) -> None:
        self.sessions[sid].is_live = True

    def told(self, sid: str) -> list[str]:
        """The positions of the messages that the session was sent."""
        return [data["position"] for event, data in self.sent[sid] if event == "alert"]


@pytest.fixture
def outlet() -> Outlet:
    return Outlet()


def published(count: int, *, organization: str = OWNER) -> list[str]:
    """Messages on the stream; their positions."""
    sent: list[Message] = [new_message(organization) for _ in range(count)]
    append(map(Entry, sent))
    entries: Any = redis.client().xrevrange(keys.NOTIFICATIONS, count=count)
    return [entry_id.decode() for entry_id, _ in reversed(entries)]


def test_a_session_that_was_given_more_than_the_gateway_has_delivered_waits_for_it(outlet: Outlet) -> None:
    first, *missed = published(4)
    outlet.comes_back("a", first)
    outlet.serve()
    assert outlet.told("a") == missed
    for position in missed:
        outlet.delivers(position)
        assert not outlet.sessions["a"].is_live
    (news,) = published(1)
    outlet.delivers(news)
    assert outlet.sessions["a"].is_live
    assert outlet.told("a") == [*missed, news]


def test_what_the_gateway_delivers_while_the_stream_is_read_is_not_left_out(
    outlet: Outlet, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *missed = published(3)
    late: list[str] = []
    read = cursors.slice_after

    def slow_read(*arguments: Any, **options: Any) -> Any:
        found = read(*arguments, **options)
        if not late:  # published and delivered after the read and before its answer is here
            late.extend(published(1))
            outlet.delivers(late[0])
        return found

    monkeypatch.setattr(cursors, "slice_after", slow_read)
    outlet.comes_back("a", first)
    outlet.serve()
    assert outlet.told("a") == missed + late
    assert outlet.sessions["a"].is_live


def test_sessions_at_different_positions_share_what_is_read(outlet: Outlet, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *rest = published(SLICE)
    reads: list[bytes] = []
    read = cursors.slice_after

    def counted_read(client: Any, position: bytes, *, count: int) -> cursors.StreamSlice:
        reads.append(position)
        return read(client, position, count=count)

    monkeypatch.setattr(cursors, "slice_after", counted_read)
    for number, position in enumerate([first, *rest[:20]]):
        outlet.comes_back(str(number), position)
    outlet.serve()
    assert len(reads) == 1
    assert [outlet.told(str(number)) for number in range(21)] == [rest[number:] for number in range(21)]


def test_a_session_without_room_is_left_behind_and_goes_on_later(outlet: Outlet) -> None:
    first, *missed = published(SLICE * 2)
    for sid in "ab":
        outlet.comes_back(sid, first)
    outlet.full.add("b")
    outlet.serve()
    assert (outlet.told("a"), outlet.told("b")) == (missed, [])
    outlet.full.clear()
    outlet.serve()
    assert outlet.told("b") == missed


def test_a_gateway_that_steps_back_is_not_waited_for(outlet: Outlet) -> None:
    first, second, _ = published(3)
    outlet.delivers(second)
    outlet.comes_back("a", first)
    outlet.serve()
    assert not outlet.sessions["a"].is_live
    outlet.delivers(first)
    assert outlet.sessions["a"].is_live


def test_who_leaves_during_a_replay_is_forgotten(outlet: Outlet) -> None:
    first, *_ = published(SLICE * 3)
    outlet.comes_back("a", first)
    assert outlet.replayer._serve_next()
    outlet.replayer.forget("a")
    del outlet.sessions["a"]
    outlet.serve()
    assert len(outlet.told("a")) == SLICE


@pytest.mark.django_db
def test_everyone_who_begins_on_an_empty_stream_is_given_the_states(outlet: Outlet) -> None:
    pump = builders.device(builders.organization())
    owner = str(pump.organization.uuid)
    outlet.comes_back("a", "0-0", organization=owner)
    for _ in range(2):  # the gap, the states
        outlet.replayer._serve_next()
    outlet.comes_back("b", "0-0", organization=owner)  # may not share the empty stream that is read next
    outlet.serve()
    for sid in "ab":
        assert [event for event, _ in outlet.sent[sid]] == ["gap", "snapshot", "position"]
        assert outlet.sent[sid][1][1]["states"][0]["device"] == str(pump.uuid)
        assert outlet.sessions[sid].is_live


@pytest.mark.django_db
def test_a_message_that_table_and_stream_both_hold_is_sent_once(outlet: Outlet) -> None:
    owner = builders.organization()
    sent: list[Message] = [new_message(str(owner.uuid)) for _ in range(30)]
    for message in sent:
        outbox.publish(outbox.write([(message, owner.pk, None)]))
    redis.client().xtrim(keys.NOTIFICATIONS, maxlen=20, approximate=False)
    position = history.position_at(history.moment_of(published(1)[0]))  # type: ignore[arg-type]  # it is no future one
    outlet.comes_back("a", position, organization=str(owner.uuid))
    outlet.serve()
    told = [data["id"] for event, data in outlet.sent["a"] if event == "alert"]
    assert told == [str(message.id) for message in sent]
