"""What the table of notifications still tells of the past, in slices, on either database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from django.utils import timezone

from devices.models import Organization
from gateway.socketio import history
from notifications import outbox
from notifications.messages import Message, Protocol
from notifications.models import Notification, Unpublished
from tests import builders
from tests.gateway_process import new_message

pytestmark = pytest.mark.django_db
NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def written(owner: Organization, *, seconds: float | None, protocol: Protocol = Protocol.SOCKETIO) -> UUID:
    """A notification that was published so long after noon; None: not yet."""
    message: Message = new_message(str(owner.uuid), protocols=(protocol,))
    outbox.write([(message, owner.pk, None)])
    if seconds is not None:
        Notification.objects.filter(uuid=message.id).update(published_at=NOON + timedelta(seconds=seconds))
        Unpublished.objects.filter(uuid=message.id).delete()
    return message.id


def published(owner: Organization, *, until: float | None = None) -> list[UUID]:
    """All from noon on, slice by slice."""
    end = None if until is None else NOON + timedelta(seconds=until)
    past = history.Published(protocol=Protocol.SOCKETIO, since=NOON, until=end)
    found: list[UUID] = []
    while rows := past.slice([str(owner.uuid)]):
        found += [message.id for _, message in rows]
    return found


def test_messages_come_in_the_order_of_publication_not_of_writing() -> None:
    owner = builders.organization()
    late, early = written(owner, seconds=9), written(owner, seconds=1)
    assert published(owner) == [early, late]


def test_slices_neither_repeat_nor_leave_out_messages_of_the_same_moment() -> None:
    owner = builders.organization()
    ids = [written(owner, seconds=number // 150) for number in range(250)]
    assert published(owner) == ids


def test_only_what_was_published_in_time_for_the_organization_and_protocol_is_told() -> None:
    owner, other = builders.organization(), builders.organization()
    wanted = written(owner, seconds=0)
    written(owner, seconds=-1)
    written(owner, seconds=5)
    written(owner, seconds=None)
    written(owner, seconds=1, protocol=Protocol.MQTT)
    written(other, seconds=1)
    assert published(owner, until=4) == [wanted]


def test_a_message_read_from_the_table_is_the_one_that_was_written() -> None:
    owner = builders.organization()
    pump = builders.device(owner)
    message: Message = new_message(
        str(owner.uuid),
        device=str(pump.uuid),
        payload={"a": [1, "ä"]},
        protocols=(Protocol.SOCKETIO,),
        expires_at=NOON.timestamp(),
    )
    outbox.write([(message, owner.pk, pump.pk)])
    Notification.objects.update(published_at=NOON)
    Unpublished.objects.all().delete()
    ((moment, found),) = history.Published(protocol=Protocol.SOCKETIO, since=NOON).slice([str(owner.uuid)])
    assert (moment, found) == (NOON, message)


def test_states_are_those_of_the_organizations_and_devices_asked_for_and_no_others() -> None:
    owner, other = builders.organization(), builders.organization()
    pump, lamp, foreign = builders.device(owner), builders.device(other), builders.device(other)
    states = history.States(organizations=[str(owner.uuid)], devices=[str(lamp.uuid)])
    found = states.slice()
    assert {state["device"] for state in found} == {str(pump.uuid), str(lamp.uuid)}
    assert str(foreign.uuid) not in str(found)
    assert states.slice() == []


def test_a_position_and_a_time_are_told_apart_by_the_margin_of_the_clocks() -> None:
    position = history.position_at(NOON)
    assert history.moment_of(position) == NOON - history.margin()
    ahead = timezone.now() + timedelta(seconds=history.CLOCKS_AGREE_SECONDS * 3)
    assert history.moment_of(history.position_at(ahead)) is None


def test_what_is_older_than_the_retention_is_not_taken_for_complete(settings: object) -> None:
    settings.NOTIFICATION_RETENTION_DAYS = 2  # type: ignore[attr-defined]
    assert history.is_kept(timezone.now() - timedelta(days=1, hours=23))
    assert not history.is_kept(timezone.now() - timedelta(days=2))
