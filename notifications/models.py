"""Tables of the outbox (what is to be sent, and how far each protocol has come) and of the accounts at the broker."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import ClassVar

from django.db import models
from django.utils import timezone

from devices.models import Device, Organization, Role
from notifications.messages import Protocol

PROTOCOL_CHOICES = [(protocol.value, protocol.value) for protocol in Protocol]


class NotificationQuerySet(models.QuerySet["Notification"]):
    """Notifications by who may see them."""

    def meant_for(self, roles: Mapping[int, str]) -> NotificationQuerySet:
        """Those without `payload.roles`, and those that name the role held in their organization (its id -> role)."""
        everybody = ~models.Q(payload__has_key="roles") | models.Q(payload__roles=[])
        mine = models.Q()
        for role in set(roles.values()):
            # One lookup for each place in the list: SQLite knows no "contains".
            named = models.Q(
                *((f"payload__roles__{place}", role) for place in range(len(Role))), _connector=models.Q.OR
            )
            mine |= models.Q(organization__in=[owner for owner, held in roles.items() if held == role]) & named
        return self.filter(everybody | mine)

    def published(self) -> NotificationQuerySet:
        """Those that are on the stream, or were."""
        return self.filter(unpublished=None)


class Notification(models.Model):
    """One message to devices and people; written in the transaction of the effect that it reports."""

    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    effect_key = models.CharField(max_length=200)
    # Without constraints in the database: who writes messages locks what they belong to (devices.row_locks).
    organization = models.ForeignKey(
        Organization, on_delete=models.CASCADE, related_name="notifications", db_constraint=False
    )
    device = models.ForeignKey(
        Device, null=True, blank=True, on_delete=models.CASCADE, related_name="notifications", db_constraint=False
    )
    event = models.CharField(max_length=50)
    priority = models.PositiveSmallIntegerField(default=5)
    payload = models.JSONField(default=dict)
    timestamp = models.DateTimeField()
    created_at = models.DateTimeField(default=timezone.now)
    # As long as it is in Unpublished, when it was written. What is published late is dated anew.
    published_at = models.DateTimeField(default=timezone.now)
    expires_at = models.DateTimeField(null=True, blank=True)

    objects: ClassVar = NotificationQuerySet.as_manager()

    class Meta:
        ordering = ["-id"]
        # A client that was away for long is replayed to from the table, in the order of publication.
        indexes = [
            models.Index(fields=["published_at", "id"], name="notification_published"),
        ]
        # Not `unique=True`: Django would add an index for searches by pattern, which nobody makes.
        constraints = [models.UniqueConstraint(fields=["effect_key"], name="one_notification_per_effect")]

    def __str__(self) -> str:
        return f"{self.event} {self.uuid}"


class Unpublished(models.Model):
    """Marks a notification that is not on the stream yet. Its row lives for milliseconds, and the table is almost always empty.

    A table of its own, because noting the same in the notification would rewrite that with all its indexes. It repeats what
    is asked for, because a join with a table of which the database never knows whether it is empty is planned badly.
    """

    # Written in the transaction of its notification, so a constraint could never find anything.
    notification = models.OneToOneField(Notification, on_delete=models.CASCADE, primary_key=True, db_constraint=False)
    uuid = models.UUIDField()
    changed_device = models.UUIDField(null=True)
    written_at = models.DateTimeField(default=timezone.now)
    expires_at = models.DateTimeField(null=True)

    class Meta:
        verbose_name_plural = "unpublished"

    def __str__(self) -> str:
        return str(self.notification_id)


class Delivery(models.Model):
    """How far one notification has come on one protocol."""

    class State(models.TextChoices):
        PENDING = "pending", "pending: no gateway has sent it yet"
        SENT = "sent", "sent to those who are connected"
        ACKNOWLEDGED = "acknowledged", "acknowledged by the broker"
        FAILED = "failed", "failed for good"
        EXPIRED = "expired", "expired: nobody could be told in time"

    # Written in the transaction of its notification, so a constraint could never find anything; the unique index serves look-ups.
    notification = models.ForeignKey(
        Notification, on_delete=models.CASCADE, related_name="deliveries", db_constraint=False, db_index=False
    )
    protocol = models.CharField(max_length=10, choices=PROTOCOL_CHOICES)
    state = models.CharField(max_length=12, choices=State.choices, default=State.PENDING)
    attempts = models.PositiveIntegerField(default=0)
    last_error = models.CharField(max_length=500, blank=True)
    updated_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["id"]
        constraints = [models.UniqueConstraint(fields=["notification", "protocol"], name="one_delivery_per_protocol")]
        # The scheduler asks for what is overdue; nearly all deliveries are done within a second.
        indexes = [
            models.Index(fields=["notification"], condition=models.Q(state="pending"), name="delivery_pending"),
        ]
        verbose_name_plural = "deliveries"

    def __str__(self) -> str:
        return f"{self.protocol}: {self.state}"


class BrokerAccount(models.Model):
    """An account at the MQTT broker. Compared with the live device tokens, these rows show what the broker lacks.

    No foreign keys: the account must outlive the token, the device and the organization until the broker has let it go.
    """

    username = models.CharField(max_length=20, primary_key=True, help_text="The prefix of the device token.")
    originator_uuid = models.UUIDField(db_index=True)
    organization_uuid = models.UUIDField()
    created_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return self.username
