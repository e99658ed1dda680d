"""Queries of the devices tables that mean something to a grower."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.db import models
from django.utils import timezone

from devices import tokens

if TYPE_CHECKING:
    from devices.models import Device, DeviceToken, Sensor


class DeviceTokenQuerySet(models.QuerySet["DeviceToken"]):
    def issue(self, owner: Sensor | Device, **fields: Any) -> tuple[DeviceToken, str]:
        """A new token of a sensor or device: the row, and the token itself, which cannot be had again."""
        from devices.models import Sensor

        prefix = tokens.new_prefix()
        token = tokens.token_for(prefix)
        kind = "sensor" if isinstance(owner, Sensor) else "device"
        row = self.create(
            organization_id=owner.organization_id,
            prefix=prefix,
            digest=tokens.digest_of(token),
            **{kind: owner},
            **fields,
        )
        return row, token

    def live(self, now: datetime | None = None) -> DeviceTokenQuerySet:
        now = now or timezone.now()
        return self.filter(revoked_at=None).filter(models.Q(expires_at=None) | models.Q(expires_at__gt=now))

    def revoke(self) -> int:
        """Revokes the tokens one by one, so that each marks its organization's caches as old; returns how many."""
        revoked = 0
        for token in self.filter(revoked_at=None):
            token.revoked_at = timezone.now()
            token.save(update_fields=["revoked_at"])
            revoked += 1
        return revoked
