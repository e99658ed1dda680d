"""Tables of the audit log."""

from __future__ import annotations

import uuid
from typing import ClassVar

from django.db import models
from django.utils import timezone


class AuditEntry(models.Model):
    """One thing that a person did, or a command to an actuator. Nobody changes it; once sealed, a change would show.

    Entries are written unsealed, in any order, by whoever does something; the scheduler seals them one after the other, so that
    nobody waits for the end of the chain.
    """

    class Kind(models.TextChoices):
        REQUEST = "request", "request of a person or their program"
        LOGIN = "login", "login, or an attempt"
        COMMAND = "command", "command to a device"
        MANAGEMENT = "management", "management command on the server"

    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    at = models.DateTimeField(default=timezone.now, db_index=True)
    kind = models.CharField(max_length=12, choices=Kind.choices)
    # For rights; gone with the organization, which the uuid outlives.
    organization = models.ForeignKey(
        "devices.Organization", null=True, on_delete=models.SET_NULL, related_name="+", db_constraint=False
    )
    organization_uuid = models.UUIDField(null=True)
    actor = models.CharField(max_length=200, help_text="User, rule chain and node, or who ran a command.")
    action = models.CharField(max_length=200, help_text="Method and route of a request, or what was done.")
    target = models.CharField(max_length=500, blank=True, help_text="Path of a request, or device and state.")
    status = models.PositiveSmallIntegerField(null=True, help_text="Of the answer to a request.")
    detail = models.JSONField(default=dict, help_text="What was sent, without secrets.")
    address = models.CharField(max_length=50, blank=True)
    request_id = models.CharField(max_length=64, blank=True)
    position = models.PositiveBigIntegerField(
        null=True, unique=True, help_text="In the chain; empty until it is sealed."
    )
    hash = models.CharField(max_length=64, blank=True, help_text="SHA-256 of the hash before and this entry.")

    objects: ClassVar[models.Manager[AuditEntry]] = models.Manager()

    class Meta:
        ordering = ["-id"]
        indexes = [models.Index(fields=["id"], condition=models.Q(position=None), name="audit_unsealed")]
        verbose_name_plural = "audit log"

    def __str__(self) -> str:
        return f"{self.actor}: {self.action}"


class AuditHead(models.Model):
    """Where the chain ends, and where it begins since old entries were deleted. One row.

    `state_changes`: all changes of states up to that id have their entries. `newest_seen` is the highest id that was there
    at `seen_at`: transactions that took lower ids end within minutes.
    """

    position = models.PositiveBigIntegerField(default=0)
    hash = models.CharField(max_length=64, blank=True)
    first_position = models.PositiveBigIntegerField(default=0, help_text="Of the newest entry that was deleted.")
    first_hash = models.CharField(max_length=64, blank=True)
    state_changes = models.PositiveBigIntegerField(default=0)
    newest_seen = models.PositiveBigIntegerField(default=0)
    seen_at = models.DateTimeField(default=timezone.now)

    objects: ClassVar[models.Manager[AuditHead]] = models.Manager()

    def __str__(self) -> str:
        return f"{self.position} {self.hash}"
