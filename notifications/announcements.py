"""Announcements: write and publish a notification that a person gives by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID, uuid4

from django.db import transaction
from django.utils import timezone

from devices.models import Device, Organization
from notifications import messages, outbox
from notifications.messages import Message, Protocol
from notifications.models import Notification


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """`event_id` is the sender's: each makes one notification in an organization. `actor` is the name of the person."""

    organization: Organization
    device: Device | None
    title: str
    message: str
    severity: str
    protocols: Sequence[Protocol]
    event_id: UUID
    actor: str


def announce(announcement: Announcement) -> Notification:
    """The notification of this event id, published now unless it was before."""
    message = _message(announcement)
    device_id = announcement.device.pk if announcement.device else None
    with transaction.atomic():
        fresh = outbox.write([(message, announcement.organization.pk, device_id)])
    outbox.publish(fresh)
    return Notification.objects.get(effect_key=message.effect_key)


def _message(announcement: Announcement) -> Message:
    organization = str(announcement.organization.uuid)
    return Message(
        id=uuid4(),
        effect_key=f"person:{organization}:{announcement.event_id}",
        organization_uuid=organization,
        device_uuid=str(announcement.device.uuid) if announcement.device else None,
        event=messages.NOTIFICATION,
        priority=messages.PRIORITY_BY_SEVERITY[announcement.severity],
        timestamp=timezone.now().isoformat(),
        payload={
            "title": announcement.title,
            "message": announcement.message,
            "severity": announcement.severity,
            "source": "person",
            "actor": announcement.actor,
        },
        protocols=tuple(dict.fromkeys(announcement.protocols)),
    )
