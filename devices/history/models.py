"""Tables of history."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.utils import timezone


class Rollup(models.Model):
    """The good readings of one variable within one hour or one day (UTC), as numbers."""

    class Interval(models.TextChoices):
        HOUR = "hour"
        DAY = "day"

    id = models.BigAutoField(primary_key=True)
    # No constraint in the database, as for readings: who deletes a variable deletes these.
    variable = models.ForeignKey(
        "devices.Variable", on_delete=models.CASCADE, related_name="rollups", db_index=False, db_constraint=False
    )
    interval = models.CharField(max_length=4, choices=Interval.choices)
    start = models.DateTimeField()
    count = models.PositiveIntegerField(help_text="Readings, without those that are suspect.")
    minimum = models.FloatField()
    maximum = models.FloatField()
    total = models.FloatField(help_text="Divided by the count, the mean.")
    in_range = models.PositiveIntegerField(
        null=True, help_text="Readings within the target range that the variable had then; none where it had none."
    )
    last_at = models.DateTimeField()
    last = models.FloatField(null=True)

    objects: ClassVar[models.Manager[Rollup]] = models.Manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["variable", "interval", "start"], name="one_rollup_per_span")]

    def __str__(self) -> str:
        return f"{self.variable_id} {self.interval} {self.start:%Y-%m-%dT%H:%M}"


class RollupState(models.Model):
    """How far rollups have come. One row.

    `until`: all hours before it are rolled up. `readings`: what came late among readings up to that id is, too. `newest_seen` is
    the highest id that was there at `seen_at`: transactions that took lower ids end within minutes.
    """

    until = models.DateTimeField()
    readings = models.PositiveBigIntegerField(default=0)
    newest_seen = models.PositiveBigIntegerField(default=0)
    seen_at = models.DateTimeField(default=timezone.now)

    objects: ClassVar[models.Manager[RollupState]] = models.Manager()

    def __str__(self) -> str:
        return f"{self.until:%Y-%m-%dT%H:%M}"
