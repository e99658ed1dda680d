"""Tables of what an actuator may do: interlocks of states, what they require, when states were on, and what was vetoed."""

from __future__ import annotations

import math
import uuid
from typing import TYPE_CHECKING, Any, ClassVar
from zoneinfo import available_timezones

from django.core.exceptions import ValidationError
from django.core.validators import MinValueValidator
from django.db import models
from django.utils import timezone

if TYPE_CHECKING:
    from devices.models import DeviceState

DAY_SECONDS = 86_400


def _seconds(label: str, help_text: str) -> Any:
    return models.PositiveIntegerField(
        label, null=True, blank=True, validators=[MinValueValidator(1)], help_text=help_text
    )


class Interlock(models.Model):
    """What a state must never do, whoever asks: rules, schedules, replays and people. Empty fields limit nothing.

    A level state is on while its value is another than its safe value; a momentary one is on for no time, and each command
    counts as a run.
    """

    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    state = models.OneToOneField("devices.DeviceState", on_delete=models.CASCADE, related_name="interlock")
    minimum_on_seconds = _seconds(
        "minimum on, seconds", "Asked to go off earlier, it goes off by itself when this time is over."
    )
    minimum_off_seconds = _seconds(
        "minimum off, seconds", "After it went off, or after a dose, it rests for this long."
    )
    maximum_on_seconds = _seconds("maximum on, seconds", "After this long it goes to its safe value by itself.")
    maximum_runs_per_hour = models.PositiveIntegerField("runs per hour", null=True, blank=True)
    maximum_runs_per_day = models.PositiveIntegerField("runs per day", null=True, blank=True)
    maximum_on_seconds_per_hour = _seconds("on per hour, seconds", "In any 60 minutes; then it goes to its safe value.")
    maximum_on_seconds_per_day = _seconds("on per day, seconds", "In any 24 hours; then it goes to its safe value.")
    maximum_amount_per_hour = models.FloatField(
        "amount per hour", null=True, blank=True, help_text="Of doses in any 60 minutes, in the unit of the state."
    )
    maximum_amount_per_day = models.FloatField(
        "amount per day", null=True, blank=True, help_text="Of doses in any 24 hours."
    )
    allowed_from = models.TimeField(null=True, blank=True, help_text="It may go on from this time of day …")
    allowed_until = models.TimeField(
        null=True, blank=True, help_text="… until this one, when it goes to its safe value; may be on the next day."
    )
    timezone = models.CharField(
        "time zone", max_length=50, default="UTC", help_text="Of the times of day, such as Europe/Berlin."
    )
    excludes = models.ManyToManyField(
        "devices.DeviceState",
        blank=True,
        related_name="excluded_by",
        help_text="States that must not be on at the same time as this one.",
    )
    alarm_on_veto = models.BooleanField(
        default=False, help_text="Raise an alarm at the device when it vetoes a command."
    )

    class Meta:
        ordering = ["state"]

    def __str__(self) -> str:
        return f"interlock of {self.state}"

    # Field -> what it is called, of those that have no meaning for a momentary state, and for all but numeric momentary ones.
    _OF_LEVELS: ClassVar = (
        "minimum_on_seconds",
        "maximum_on_seconds",
        "maximum_on_seconds_per_hour",
        "maximum_on_seconds_per_day",
    )
    _OF_DOSES: ClassVar = ("maximum_amount_per_hour", "maximum_amount_per_day")

    def clean(self) -> None:
        if not hasattr(self, "state"):
            return  # what is missing is said by the field
        if not self.state.is_momentary and self.state.safe_value is None:
            name = self.state.name
            raise ValidationError(
                f"{name} needs a safe value first: it says which value is off, and where the state goes when it must."
            )
        errors = self._not_of_this_kind() | self._wrong_hours()
        if (self.minimum_off_seconds or 0) > DAY_SECONDS:
            errors["minimum_off_seconds"] = f"must not be more than a day, {DAY_SECONDS}"
        minimum, maximum = self.minimum_on_seconds, self.maximum_on_seconds
        if minimum is not None and maximum is not None and minimum > maximum:
            errors["maximum_on_seconds"] = f"must not be below the minimum, {minimum}"
        if errors:
            raise ValidationError(errors)

    def _not_of_this_kind(self) -> dict[str, str]:
        """Limits that mean nothing for the state, and amounts that are none."""
        state, errors = self.state, dict[str, str]()
        if state.is_momentary:
            given = [name for name in self._OF_LEVELS if getattr(self, name) is not None]
            errors |= dict.fromkeys(given, f"is for level states, and {state.name} is momentary: it is never on")
        for name in self._OF_DOSES:
            limit = getattr(self, name)
            if limit is None:
                continue
            if not state.is_momentary or state.datatype != "number":
                errors[name] = "is for momentary states that are numbers"
            elif not math.isfinite(limit) or limit < 0:
                errors[name] = "must be a number that is not negative"
        return errors

    def _wrong_hours(self) -> dict[str, str]:
        errors = {}
        if (self.allowed_from is None) != (self.allowed_until is None):
            missing = "allowed_from" if self.allowed_from is None else "allowed_until"
            errors[missing] = "is needed, too: give both times of day or none"
        elif self.allowed_from is not None and self.allowed_from == self.allowed_until:
            errors["allowed_until"] = "must differ from the time from which it is allowed"
        if self.timezone not in available_timezones():
            errors["timezone"] = "is not the name of a time zone, such as Europe/Berlin"
        return errors


class Requirement(models.Model):
    """What must be so for a state to go on: a variable of a sensor that is fresh, not suspect, and in range."""

    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    interlock = models.ForeignKey(Interlock, on_delete=models.CASCADE, related_name="requirements")
    variable = models.ForeignKey("devices.Variable", on_delete=models.CASCADE, related_name="required_by")
    minimum = models.FloatField(null=True, blank=True, help_text="Not below this.")
    maximum = models.FloatField(null=True, blank=True, help_text="Not above this.")
    equals = models.JSONField(
        null=True, blank=True, help_text="For what is no number: true, false or a text in quotes."
    )
    fresh_seconds = models.PositiveIntegerField(
        "fresh, seconds",
        default=300,
        validators=[MinValueValidator(1)],
        help_text="A value older than this does not count.",
    )
    holds_while_on = models.BooleanField(
        "while on, too", default=True, help_text="When it is no longer so, the state goes to its safe value."
    )

    class Meta:
        ordering = ["interlock", "id"]

    def __str__(self) -> str:
        return f"{self.variable} {self.range}"

    @property
    def key(self) -> tuple[str, str, str]:
        """As devices.latest names the variable."""
        return "sensor", str(self.variable.sensor.uuid), self.variable.name

    @property
    def range(self) -> str:
        """In words: "from 20 to 80"."""
        if self.equals is not None:
            return f"= {self.equals!r}"
        if self.minimum is not None and self.maximum is not None:
            return f"from {self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"at least {self.minimum:g}"
        return f"at most {self.maximum:g}" if self.maximum is not None else "fresh"

    def clean(self) -> None:
        if not hasattr(self, "variable"):
            return  # what is missing is said by the field
        errors: dict[str, str] = {}
        number = self.variable.datatype == "number"
        for name in ("minimum", "maximum"):
            limit = getattr(self, name)
            if limit is not None and not number:
                errors[name] = f"is for numbers, and this is a {self.variable.datatype}: use equals"
            elif limit is not None and not math.isfinite(limit):
                errors[name] = "must be a finite number"
        if not errors and self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            errors["maximum"] = f"must not be below the minimum, {self.minimum:g}"
        if self.equals is not None and number:
            errors["equals"] = "is for what is no number: use minimum and maximum"
        if self.interlock_id and self.variable.sensor.organization_id != self.interlock.state.device.organization_id:
            errors["variable"] = "belongs to another organization"
        if errors:
            raise ValidationError(errors)


class StateRun(models.Model):
    """One time that a state was on, or one command of a momentary state, by the clock of the server.

    Kept for states that have a safe value or are momentary, so that an interlock that is added later knows what was before.
    """

    id = models.BigAutoField(primary_key=True)
    state = models.ForeignKey("devices.DeviceState", on_delete=models.CASCADE, related_name="runs")
    began_at = models.DateTimeField()
    ended_at = models.DateTimeField(null=True, blank=True)
    # Asked to go off before its minimum time was over: it is switched off then.
    off_wanted = models.BooleanField(default=False)
    amount = models.FloatField(null=True, blank=True)

    class Meta:
        ordering = ["-began_at", "-id"]
        indexes = [
            models.Index(fields=["state", "ended_at"], name="state_run_by_end"),
            # Looked at every second for states that have to go off.
            models.Index(fields=["id"], condition=models.Q(ended_at=None), name="state_run_open"),
        ]
        constraints = [
            models.UniqueConstraint(fields=["state"], condition=models.Q(ended_at=None), name="one_open_run_per_state")
        ]

    def __str__(self) -> str:
        return f"{self.state_id}: {self.began_at:%Y-%m-%d %H:%M:%S} - {self.ended_at or 'now'}"


class Veto(models.Model):
    """What an interlock did not let happen, or a person overrode: one row for each kind at a state and who asked."""

    class Kind(models.TextChoices):
        LOCK = "lock", "a person holds the state"
        HOURS = "hours", "not at this time of day"
        EXCLUDES = "excludes", "another state is on"
        REQUIRES = "requires", "a variable is missing, suspect or out of range"
        MINIMUM_ON = "minimum-on", "it has to stay on a while"
        MINIMUM_OFF = "minimum-off", "it has to rest a while"
        RUNS = "runs", "it ran often enough"
        ON_TIME = "on-time", "it was on long enough"
        AMOUNT = "amount", "it dosed enough"

    id = models.BigAutoField(primary_key=True)
    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    state = models.ForeignKey("devices.DeviceState", on_delete=models.CASCADE, related_name="vetoes")
    kind = models.CharField(max_length=12, choices=Kind.choices)
    source = models.CharField(max_length=10)
    actor = models.CharField(max_length=200, help_text="Who asked: the rule chain and node, or the user name.")
    count = models.BigIntegerField(default=1)
    value = models.JSONField(null=True, help_text="The newest that was asked for.")
    detail = models.CharField(max_length=500, help_text="Why not, of the newest.")
    overridden_reason = models.CharField(
        max_length=500, blank=True, help_text="It was done all the same: what the person gave as the reason."
    )
    first_at = models.DateTimeField(default=timezone.now)
    last_at = models.DateTimeField(default=timezone.now, db_index=True)

    class Meta:
        verbose_name_plural = "vetoes"
        ordering = ["-last_at", "-id"]
        constraints = [
            # What a person overrode is kept one by one.
            models.UniqueConstraint(
                fields=["state", "kind", "source", "actor"],
                condition=models.Q(overridden_reason=""),
                name="one_veto_per_state_kind_and_actor",
            )
        ]

    def __str__(self) -> str:
        return f"{self.state}: {self.detail}"


def reconcile_run(state: DeviceState) -> None:
    """After a state was edited: a run goes on exactly when it is on, as its safe value is now."""
    value, since = state.newest
    is_on, now = not state.is_momentary and state.is_on(value), timezone.now()
    going_on = StateRun.objects.filter(state=state, ended_at=None)
    if not is_on:
        going_on.update(ended_at=now)
    elif not going_on.exists():
        StateRun.objects.create(state=state, began_at=min(since or now, now))
