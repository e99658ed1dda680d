"""Tables of who speaks: organizations and members, sensors and their variables, devices and their states, tokens, readings."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MinValueValidator
from django.db import connection, models
from django.utils import timezone

from devices import tokens
from devices.quality.reasons import Reason
from devices.values import Datatype, measured, value_problem


class Identified(models.Model):
    """Integers inside, uuids outside: the uuid is what people, devices and rules say."""

    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        abstract = True


class Organization(Identified):
    """A farm or a company: the boundary that nothing and nobody sees across."""

    name = models.CharField(max_length=200, unique=True)
    keep_readings_days = models.PositiveIntegerField(
        "keep readings, days",
        null=True,
        blank=True,
        help_text="Single readings are deleted after so many days; what they were in each hour and day stays. Empty: never.",
    )
    keep_hours_days = models.PositiveIntegerField(
        "keep hours, days",
        null=True,
        blank=True,
        help_text="What readings were in each hour is deleted after so many days; each day stays. Empty: never.",
    )

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name


class Role(models.TextChoices):
    VIEWER = "viewer", "viewer: sees everything"
    OPERATOR = "operator", "operator: also switches devices and edits rules"
    ADMIN = "admin", "admin: also manages members, sensors, devices and tokens"


class Membership(models.Model):
    """A person's role in an organization."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="memberships")
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=20, choices=Role.choices, default=Role.VIEWER)
    # Not set to none with its area: that would be the right to all of them.
    area = models.ForeignKey(
        "devices.Area", null=True, blank=True, on_delete=models.RESTRICT, related_name="memberships",
        help_text="An operator may be limited to an area and its parts: to switch what stands in them, and to acknowledge their "
        "alarms. What belongs to the whole farm, such as its rules, is then only looked at.",
    )  # fmt: skip

    class Meta:
        constraints = [models.UniqueConstraint(fields=["user", "organization"], name="one_membership_per_organization")]
        ordering = ["organization", "user"]

    def __str__(self) -> str:
        where = f" in {self.area}" if self.area else ""
        return f"{self.user}, {self.role} of {self.organization}{where}"

    def clean(self) -> None:
        check_place(self)
        check_limit(self.role, self.area)
        if self.role != Role.ADMIN and self.is_last_admin:
            raise ValidationError({"role": "is that of the only admin: make somebody else one first"})

    @property
    def is_last_admin(self) -> bool:
        """As it is stored: without this one, nobody could invite anybody any more."""
        admins = Membership.objects.filter(organization=self.organization_id, role=Role.ADMIN)
        return bool(self.pk) and list(admins.values_list("pk", flat=True)[:2]) == [self.pk]


class Sensor(Identified):
    """Something that measures one or more variables."""

    class Clock(models.TextChoices):
        SENDER = "sender", "its own: it says when it measured"
        NONE = "none", "none: what it says of time is ignored"

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="sensors")
    area = models.ForeignKey("devices.Area", null=True, blank=True, on_delete=models.SET_NULL, related_name="sensors")
    name = models.CharField(max_length=200)
    clock = models.CharField(max_length=10, choices=Clock.choices, default=Clock.SENDER)
    late_after_seconds = models.PositiveIntegerField(
        "late after, seconds",
        null=True,
        blank=True,
        help_text="A reading that comes later than this after it was taken is history: it is kept and shown, and switches "
        "nothing. Empty: LATE_AFTER_SECONDS. Longer for a sensor that gathers readings and sends them together.",
    )

    class Meta:
        constraints = [models.UniqueConstraint(fields=["organization", "name"], name="sensor_name_in_organization")]
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        check_place(self)


class Variable(Identified):
    """One quantity a sensor measures, such as ph or waterLevel."""

    sensor = models.ForeignKey(Sensor, on_delete=models.CASCADE, related_name="variables")
    name = models.CharField(max_length=100)
    datatype = models.CharField(max_length=10, choices=Datatype.choices, default=Datatype.NUMBER)
    unit = models.CharField(max_length=20, blank=True)
    keep_readings_days = models.PositiveIntegerField(
        "keep readings, days",
        null=True,
        blank=True,
        help_text="Another number of days than the organization's, for this one.",
    )
    keep_hours_days = models.PositiveIntegerField(
        "keep hours, days",
        null=True,
        blank=True,
        help_text="Another number of days than the organization's, for what this one was in each hour.",
    )
    target_minimum = models.FloatField(
        "target from",
        null=True,
        blank=True,
        help_text="What plants and fish need: pages show when it is left. Rules do not look.",
    )
    target_maximum = models.FloatField("target to", null=True, blank=True)
    minimum = models.FloatField(
        null=True, blank=True, help_text="A number below this is suspect: kept and shown, and not believed by rules."
    )
    maximum = models.FloatField(null=True, blank=True, help_text="A number above this is suspect.")
    maximum_step = models.FloatField(
        "maximum step", null=True, blank=True, help_text="A change by more than this in the time beside it is suspect."
    )
    maximum_step_seconds = models.PositiveIntegerField(
        "maximum step per, seconds", default=60, validators=[MinValueValidator(1)]
    )
    stuck_after_seconds = models.PositiveIntegerField(
        "stuck after, seconds",
        null=True,
        blank=True,
        validators=[MinValueValidator(1)],
        help_text="A number that has stayed exactly the same for this long is suspect, until it moves.",
    )
    maximum_age_seconds = models.PositiveIntegerField(
        "maximum age, seconds",
        null=True,
        blank=True,
        validators=[MinValueValidator(1)],
        help_text="For rules, a value older than this is none. Empty: they see the last one, however old it is.",
    )

    class Meta:
        constraints = [models.UniqueConstraint(fields=["sensor", "name"], name="variable_name_in_sensor")]
        ordering = ["sensor", "name"]

    def __str__(self) -> str:
        return f"{self.sensor}: {self.name}"

    def missed_target(self, value: object) -> float | None:
        """The end of the target range beyond which a value lies; None within the range, and where there is none."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        if self.target_minimum is not None and value < self.target_minimum:
            return self.target_minimum
        if self.target_maximum is not None and value > self.target_maximum:
            return self.target_maximum
        return None

    def clean(self) -> None:
        named = ("minimum", "maximum", "maximum_step", "stuck_after_seconds", "target_minimum", "target_maximum")
        limits = {name: getattr(self, name) for name in named}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if self.datatype != Datatype.NUMBER and given:
            raise ValidationError(dict.fromkeys(given, f"is for numbers only, and this is a {self.datatype}"))
        errors = {name: "must be a finite number" for name, limit in given.items() if not math.isfinite(limit)}
        if not errors and "maximum_step" in given and given["maximum_step"] <= 0:
            errors["maximum_step"] = "must be above 0"
        if not errors and {"minimum", "maximum"} <= given.keys() and given["minimum"] >= given["maximum"]:
            errors["maximum"] = f"must be above the minimum, {given['minimum']:g}"
        target = [given[name] for name in ("target_minimum", "target_maximum") if name in given]
        if not errors and target != sorted(set(target)):
            errors["target_maximum"] = f"must be above {target[0]:g}, where the target range begins"
        if errors:
            raise ValidationError(errors)


class Device(Identified):
    """Something that acts: a pump, a fan, a lamp."""

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="devices")
    area = models.ForeignKey("devices.Area", null=True, blank=True, on_delete=models.SET_NULL, related_name="devices")
    name = models.CharField(max_length=200)
    # What the device, or for it the broker, said last. None: it has never said.
    connected = models.BooleanField(null=True, blank=True, editable=False)
    connection_changed_at = models.DateTimeField(null=True, blank=True, editable=False)
    last_seen_at = models.DateTimeField(null=True, blank=True, editable=False)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["organization", "name"], name="device_name_in_organization")]
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        check_place(self)


# Of a state with many values, a speed for example, so many are remembered with the time of their last command.
COMMANDED_VALUES = 8
CLOCK_TOLERANCE = timedelta(minutes=5)


class DeviceStateQuerySet(models.QuerySet["DeviceState"]):
    def newest_values(self, ids: Collection[int]) -> dict[int, Any]:
        """By id, what `newest` says of each that exists; without the objects."""
        elements = (
            "json_array_elements_text(%s)::bigint" if connection.vendor == "postgresql" else "value FROM json_each(%s)"
        )
        with connection.cursor() as cursor:
            cursor.execute(f"{_NEWEST_VALUES} (SELECT {elements})", [json.dumps([*ids])])
            return {pk: None if value is None else json.loads(value) for pk, value in cursor.fetchall()}


# What DeviceState.newest says, without building a query anew for each batch of events; of what is momentary nothing lasts.
_NEWEST_VALUES = """
SELECT id, CASE WHEN kind = 'momentary' THEN NULL
    WHEN reported_at > COALESCE(changed_at, '0001-01-01') THEN reported_value ELSE value END
FROM devices_devicestate WHERE id IN
"""


class DeviceState(Identified):
    """One switchable property of a device: the value it should have (`value`), and the one that the device reports.

    A report never changes the wish: a pump that says "off" although it should be on is seen as one that differs.
    """

    class Kind(models.TextChoices):
        LEVEL = "level"
        MOMENTARY = "momentary"

    device = models.ForeignKey(Device, on_delete=models.CASCADE, related_name="states")
    name = models.CharField(max_length=100)
    kind = models.CharField(
        max_length=10,
        choices=Kind.choices,
        default=Kind.LEVEL,
        help_text="Level: it keeps its value, such as on, or 40 %. Momentary: a dose or a pulse, sent once as a command, and "
        "never again to a device that comes back.",
    )
    datatype = models.CharField(max_length=10, choices=Datatype.choices, default=Datatype.STRING)
    allowed_values = models.JSONField(
        default=list, blank=True, help_text='For example ["on", "off"]; empty allows any value.'
    )
    safe_value = models.JSONField(
        null=True,
        blank=True,
        help_text='The value that is off, such as "off": where the state goes when an interlock or the end of a chain says so.',
    )
    locked_until = models.DateTimeField(null=True, blank=True, editable=False)
    locked_by = models.CharField(max_length=150, blank=True, editable=False)
    lock_reason = models.CharField(max_length=200, blank=True, editable=False)
    # By value as JSON, when it was commanded last, in microseconds by the clock of the server: what cooldowns are counted from.
    commanded = models.JSONField(default=dict, blank=True, editable=False)
    value = models.JSONField(null=True, blank=True, editable=False)
    changed_at = models.DateTimeField(null=True, blank=True, editable=False)
    # The StateChange that the value comes from: the id that the device knows the command by.
    command_uuid = models.UUIDField(null=True, blank=True, editable=False)
    reported_value = models.JSONField(null=True, blank=True, editable=False)
    reported_at = models.DateTimeField(null=True, blank=True, editable=False)
    differs_since = models.DateTimeField(null=True, blank=True, editable=False)

    objects: ClassVar = DeviceStateQuerySet.as_manager()

    # What `set_desired` and `report` set, with the types of PostgreSQL.
    VALUE_FIELDS: ClassVar = {
        "value": "jsonb",
        "changed_at": "timestamptz",
        "command_uuid": "uuid",
        "reported_value": "jsonb",
        "reported_at": "timestamptz",
        "differs_since": "timestamptz",
        "commanded": "jsonb",
    }

    class Meta:
        constraints = [models.UniqueConstraint(fields=["device", "name"], name="state_name_in_device")]
        ordering = ["device", "name"]

    def __str__(self) -> str:
        return f"{self.device}: {self.name}"

    def clean(self) -> None:
        if not isinstance(self.allowed_values, list):
            raise ValidationError({"allowed_values": "must be a list of values"})
        for index, value in enumerate(self.allowed_values):
            problem = value_problem(value, self.datatype)
            if problem:
                raise ValidationError({"allowed_values": f"item {index}: {problem}"})
        if self.safe_value is not None and self.is_momentary:
            raise ValidationError({"safe_value": "is for level states: a momentary one does nothing by itself"})
        if self.safe_value is not None and (problem := self.problem_with(self.safe_value)):
            raise ValidationError({"safe_value": problem})
        interlock = Interlock.objects.filter(state=self.pk).first() if self.pk else None
        if interlock is not None:
            interlock.state = self
            try:
                interlock.clean()
            except ValidationError as error:
                raise ValidationError(f"Its interlock does not fit any more: {'; '.join(error.messages)}") from error

    def save(self, *args: Any, **fields: Any) -> None:
        super().save(*args, **fields)
        reconcile_run(self)

    def lock(self, until: datetime, *, by: str, reason: str = "") -> None:
        """Until then only an interlock that must switch it off changes it."""
        self.locked_until, self.locked_by, self.lock_reason = until, by, reason
        self.save(update_fields=["locked_until", "locked_by", "lock_reason"])

    def unlock(self) -> None:
        self.locked_until, self.locked_by, self.lock_reason = None, "", ""
        self.save(update_fields=["locked_until", "locked_by", "lock_reason"])

    @property
    def is_momentary(self) -> bool:
        return self.kind == self.Kind.MOMENTARY

    @property
    def is_counted(self) -> bool:
        """Whether it is known when it is on, so that an interlock can limit it."""
        return self.is_momentary or self.safe_value is not None

    def is_on(self, value: Any) -> bool:
        """Whether a level state with a safe value is on at that value; a state without any value is not."""
        return None not in (self.safe_value, value) and bool(value != self.safe_value)

    @property
    def newest(self) -> tuple[Any, datetime | None]:
        """The last word about the state, and when it was said: by whoever wants it changed, or by the device."""
        if self.reported_at is not None and (self.changed_at is None or self.reported_at > self.changed_at):
            return self.reported_value, self.reported_at
        return self.value, self.changed_at

    @property
    def differs(self) -> bool | None:
        """Whether the device says something else than it should; None while one of the two is not known."""
        if self.is_momentary or self.changed_at is None or self.reported_at is None:
            return None
        return bool(self.value != self.reported_value)

    def rests_until(self, value: Any, *, cooldown_us: int, now: datetime) -> datetime | None:
        """Until when the same must not be commanded again, so long after it was; of a momentary state anything is the same."""
        last_us = self.commanded.get(self._command_key(value))
        if last_us is None:
            return None
        since = now - datetime.fromtimestamp(last_us / 1_000_000, UTC)
        # What was commanded later than a little after now was so by a clock that was wrong: it must not suppress until then.
        is_resting = -CLOCK_TOLERANCE <= since < timedelta(microseconds=cooldown_us)
        return now - since + timedelta(microseconds=cooldown_us) if is_resting else None

    def note_command(self, value: Any, *, now: datetime) -> None:
        """For `rests_until`, of the newest values. Saving is the caller's."""
        self.commanded[self._command_key(value)] = int(now.timestamp() * 1_000_000)
        if len(self.commanded) > COMMANDED_VALUES:
            del self.commanded[min(self.commanded, key=self.commanded.__getitem__)]

    def _command_key(self, value: Any) -> str:
        return "" if self.is_momentary else json.dumps(value)[:200]

    def set_desired(self, value: Any, *, at: datetime, command_uuid: uuid.UUID) -> None:
        """Sets what the state should be; a momentary one has no value that it should keep. Saving is the caller's."""
        self.value = None if self.is_momentary else value
        self.changed_at, self.command_uuid = at, command_uuid
        self._compare()

    def report(self, value: Any, *, at: datetime) -> bool:
        """Sets what the device says, unless it has said something newer; True when it was set. Saving is the caller's."""
        if self.reported_at is not None and self.reported_at > at:
            return False
        self.reported_value, self.reported_at = value, at
        self._compare()
        return True

    def _compare(self) -> None:
        _, since = self.newest
        self.differs_since = (self.differs_since or since) if self.differs else None

    def problem_with(self, value: object) -> str:
        """Why the state cannot take the value, as the end of a sentence; empty when it can."""
        problem = value_problem(value, self.datatype)
        if problem:
            return problem
        # 1 == True in Python, and "on" is not 1: the datatype was checked above, so plain membership is exact here.
        if self.allowed_values and value not in self.allowed_values:
            return f"must be one of {self.allowed_values}"
        return ""


class DeviceTokenQuerySet(models.QuerySet["DeviceToken"]):
    def issue(self, owner: Sensor | Device, **fields: Any) -> tuple[DeviceToken, str]:
        """A new token of a sensor or device: the row, and the token itself, which cannot be had again."""
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


class DeviceToken(Identified):
    """The right of one sensor or one device to speak. The token itself is shown once and never stored: see devices.tokens."""

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="device_tokens")
    sensor = models.ForeignKey(Sensor, null=True, blank=True, on_delete=models.CASCADE, related_name="tokens")
    device = models.ForeignKey(Device, null=True, blank=True, on_delete=models.CASCADE, related_name="tokens")
    name = models.CharField(max_length=200, blank=True)
    prefix = models.CharField(max_length=20, unique=True, editable=False)
    digest = models.CharField(max_length=64, editable=False)
    highest_priority = models.PositiveSmallIntegerField(
        default=5, help_text="The most urgent priority the token may claim: 1 is the most urgent, 10 the least."
    )
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True, editable=False)

    objects: ClassVar = DeviceTokenQuerySet.as_manager()

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=models.Q(sensor__isnull=True) ^ models.Q(device__isnull=True),
                name="token_of_sensor_xor_device",
            ),
            models.CheckConstraint(
                condition=models.Q(highest_priority__gte=1, highest_priority__lte=10), name="token_priority_1_to_10"
            ),
        ]
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return f"{self.prefix}… of {self.sensor or self.device}"

    @property
    def owner(self) -> Sensor | Device:
        owner = self.sensor or self.device
        assert owner is not None  # noqa: S101  the check constraint says so
        return owner

    def clean(self) -> None:
        if (self.sensor is None) == (self.device is None):
            raise ValidationError("A token belongs to one sensor or to one device.")
        if self.owner.organization_id != self.organization_id:
            raise ValidationError("The sensor or device belongs to another organization.")


class Reading(models.Model):
    """One measured value. The pair (variable, timestamp) is what makes it a duplicate of another."""

    id = models.BigAutoField(primary_key=True)
    # No constraint in the database: it would look the variable up for each row, a third of the cost of storing one. Who stores
    # readings locks their variables once for all of them, and so does who deletes one (devices.row_locks).
    variable = models.ForeignKey(
        Variable, on_delete=models.CASCADE, related_name="readings", db_index=False, db_constraint=False
    )
    timestamp = models.DateTimeField()
    received_at = models.DateTimeField(
        null=True, help_text="Where its own time was ahead of that: when it was received, and so counts as taken."
    )
    number = models.FloatField(null=True, help_text="The value of a number; 1 or 0 for true or false.")
    text = models.TextField(null=True, help_text="The value of a string.")
    suspect = models.CharField(max_length=20, null=True, help_text="Why rules do not believe it; empty when they do.")

    class Meta:
        # The unique index also serves "the readings of a variable in a time span", the one question charts ask.
        constraints = [
            models.UniqueConstraint(fields=["variable", "timestamp"], name="one_reading_per_variable_and_time")
        ]

    @property
    def value(self) -> float | str | bool | None:
        """What was measured, as the datatype of its variable has it."""
        return measured(self.number, self.text, self.variable.datatype)

    def __str__(self) -> str:
        return f"{self.variable_id} {self.timestamp:%Y-%m-%dT%H:%M:%S.%fZ}: {self.number if self.text is None else self.text}"


class StateChange(models.Model):
    """One change of a device's state: who or what, from which value to which. The effect key makes it happen once.

    A change that a rule or a person wishes is a command to the device, and its row says how far that has come.
    """

    class Source(models.TextChoices):
        RULE = "rule"
        PERSON = "person"
        DEVICE = "device"
        INTERLOCK = "interlock", "interlock: the state went to its safe value by itself"

    class CommandState(models.TextChoices):
        QUEUED = "queued", "queued: no gateway has sent it yet"
        SENT = "sent", "sent: the broker has it"
        ACKNOWLEDGED = "acknowledged", "acknowledged by the device"
        APPLIED = "applied", "applied: the device says that it is so"
        FAILED = "failed", "failed: the device says that it cannot"
        EXPIRED = "expired", "expired: not sent, or not acknowledged, in time"

    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    effect_key = models.CharField(max_length=200)
    # No constraint in the database: who writes a change has locked the state, and so has who deletes one (devices.row_locks).
    state = models.ForeignKey(DeviceState, on_delete=models.CASCADE, related_name="changes", db_constraint=False)
    value = models.JSONField(null=True)
    previous = models.JSONField(null=True)
    source = models.CharField(max_length=10, choices=Source.choices)
    actor = models.CharField(max_length=200, help_text="The rule chain and node, the user name, or the token prefix.")
    timestamp = models.DateTimeField(db_index=True)
    command_state = models.CharField(
        max_length=12, choices=CommandState.choices, blank=True, help_text="Empty for what the device itself reported."
    )
    deadline = models.DateTimeField(null=True, blank=True, help_text="The command is not sent after this.")
    sent_at = models.DateTimeField(null=True, blank=True)
    acknowledged_at = models.DateTimeField(null=True, blank=True)
    settled_at = models.DateTimeField(null=True, blank=True, help_text="When it was applied, failed or expired.")
    command_error = models.CharField(max_length=500, blank=True)

    class Meta:
        ordering = ["-timestamp", "-id"]
        # Asked every second by the scheduler for commands that are overdue: almost always none.
        indexes = [
            models.Index(
                fields=["deadline"],
                condition=models.Q(command_state__in=["queued", "sent"]),
                name="commands_under_way",
            )
        ]
        # Not `unique=True`: Django would add an index for searches by pattern, which nobody makes.
        constraints = [models.UniqueConstraint(fields=["effect_key"], name="one_state_change_per_effect")]

    def __str__(self) -> str:
        return f"{self.state}: {self.previous!r} -> {self.value!r}"


class DataProblem(models.Model):
    """What one sensor or device sent that could not be used, or is not believed: one row for each kind of problem of each value.

    Written by what has counted them (devices.quality.data_problems), so that a sensor that sends bad values for ever fills
    nothing.
    """

    class Kind(models.TextChoices):
        VALUE = "value", "value that cannot be used"
        UNKNOWN = "unknown", "name that is not known"
        CLOCK = "clock", "time that cannot be"
        CLOCK_NOT_SET = "clock-not-set", "time of a clock that was not set"
        EVENT = "event", "event that cannot be read"
        BELOW_MINIMUM = Reason.BELOW_MINIMUM.value, "suspect: below the minimum"
        ABOVE_MAXIMUM = Reason.ABOVE_MAXIMUM.value, "suspect: above the maximum"
        STEP = Reason.STEP.value, "suspect: changed too much at once"
        STUCK = Reason.STUCK.value, "suspect: does not move"

    id = models.BigAutoField(primary_key=True)
    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="data_problems")
    source_type = models.CharField(max_length=10)
    originator_uuid = models.UUIDField("sensor or device")
    name = models.CharField(max_length=100, help_text="Of the variable or state; empty where it is not known.")
    kind = models.CharField(max_length=20, choices=Kind.choices)
    count = models.BigIntegerField()
    detail = models.CharField(max_length=500, help_text="Of the newest.")
    payload = models.TextField(help_text="The newest, as it was sent.")
    first_seen_at = models.DateTimeField()
    last_seen_at = models.DateTimeField(db_index=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["originator_uuid", "name", "kind"], name="one_data_problem_per_originator_name_and_kind"
            )
        ]
        ordering = ["-last_seen_at"]

    def __str__(self) -> str:
        return f"{self.name or self.source_type}: {self.detail}"


class SensorClock(models.Model):
    """What is known of a sensor's clock, and how many of its events were late or ahead."""

    sensor = models.OneToOneField(Sensor, on_delete=models.CASCADE, primary_key=True, related_name="measured_clock")
    # The median of the newest events, so that one that waited for the network says nothing. Positive: its clock is slow.
    offset_ms = models.BigIntegerField(
        "behind by, ms", null=True, help_text="Received minus claimed; negative where its clock is ahead."
    )
    late = models.BigIntegerField("late events", default=0)
    ahead = models.BigIntegerField("events ahead", default=0)
    updated_at = models.DateTimeField()

    def __str__(self) -> str:
        return f"clock of {self.sensor_id}"


class CatalogueVersion(models.Model):
    """Counts changes of an organization's sensors, devices, tokens and rules: what caches compare to know that they are old."""

    organization = models.OneToOneField(Organization, on_delete=models.CASCADE, primary_key=True, related_name="+")
    version = models.BigIntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.organization_id}: {self.version}"


# At the end: their keys lead to the tables above.
from devices.areas.models import Area, check_limit, check_place  # noqa: E402
from devices.audit.models import AuditEntry, AuditHead  # noqa: E402
from devices.history.models import Rollup, RollupState  # noqa: E402
from devices.interlocks.models import Interlock, Requirement, StateRun, Veto, reconcile_run  # noqa: E402
from devices.people.models import ApiToken, Invitation, Preferences  # noqa: E402

__all__ = [
    "ApiToken", "Area", "AuditEntry", "AuditHead", "CatalogueVersion", "DataProblem", "Device", "DeviceState", "DeviceToken",
    "Interlock", "Invitation", "Membership", "Organization", "Preferences", "Reading", "Requirement", "Role", "Rollup",
    "RollupState", "Sensor", "SensorClock", "StateChange", "StateRun", "Variable", "Veto",
]  # fmt: skip
