"""Tables of the rules: chains and their nodes, and the events that could not be accepted or could not be finished."""

from __future__ import annotations

import uuid
from typing import Any, ClassVar

from django.core.exceptions import ValidationError
from django.db import models
from django.utils import timezone

from devices.models import Area, Device, Identified, Organization, Sensor
from rules.engine import cron
from rules.engine.cron import Schedule


class RuleChainQuerySet(models.QuerySet["RuleChain"]):
    def running(self) -> RuleChainQuerySet:
        """Those that may run: switched on, and not suspended."""
        return self.filter(enabled=True, suspended_at=None)

    def locked(self) -> RuleChainQuerySet:
        """Unchanged by others until the end of the transaction."""
        return self.select_for_update(of=("self",)).select_related("organization")


class RuleChain(Identified):
    """What a grower wants to happen: an ordered graph of nodes that an event runs through."""

    class ExecutionType(models.TextChoices):
        EVENT_TRIGGERED = "event-triggered"
        SCHEDULE_ONLY = "schedule-only"
        HYBRID = "hybrid"

    class MissedRuns(models.TextChoices):
        ONCE = "once", "run once, late"
        SKIP = "skip", "leave out"

    class LateEvents(models.TextChoices):
        HISTORY = "history", "do not run: they are history"
        RUN = "run", "run all the same"

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="rule_chains")
    name = models.CharField(max_length=200)
    enabled = models.BooleanField(default=True)
    version = models.PositiveIntegerField(default=1, editable=False)
    execution_type = models.CharField(
        max_length=20, choices=ExecutionType.choices, default=ExecutionType.EVENT_TRIGGERED
    )
    priority = models.PositiveSmallIntegerField(default=5, help_text="Of chains that one event triggers, 1 runs first.")
    max_retries = models.PositiveSmallIntegerField(default=3)
    late_events = models.CharField(
        max_length=10,
        choices=LateEvents.choices,
        default=LateEvents.HISTORY,
        help_text="What to do about readings that come late, or after a newer one.",
    )
    cron = models.CharField(
        max_length=100, blank=True, help_text="Of a scheduled chain: minute hour day month weekday, such as 0 6 * * *."
    )
    timezone = models.CharField(
        max_length=63, default="UTC", help_text="In which the schedule counts, such as Europe/Berlin."
    )
    missed_runs = models.CharField(
        max_length=10,
        choices=MissedRuns.choices,
        default=MissedRuns.ONCE,
        help_text="What to do about times at which no scheduler ran.",
    )
    next_run_at = models.DateTimeField(null=True, blank=True, editable=False, db_index=True)
    last_run_at = models.DateTimeField(null=True, blank=True, editable=False)
    suspended_at = models.DateTimeField(
        null=True,
        blank=True,
        editable=False,
        help_text="Since then it does not run, because it failed too often in a row.",
    )
    updated_at = models.DateTimeField(auto_now=True)

    objects: ClassVar = RuleChainQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["organization", "name"], name="chain_name_in_organization")]
        ordering = ["priority", "name"]

    def __str__(self) -> str:
        return self.name

    @property
    def stopped(self) -> str:
        """Why it does not run, "switched off" or "suspended"; empty when it may."""
        if not self.enabled:
            return "switched off"
        return "suspended" if self.suspended_at else ""

    @property
    def schedule(self) -> Schedule | None:
        """None of a chain that only events trigger."""
        return None if self.execution_type == self.ExecutionType.EVENT_TRIGGERED else Schedule(self.cron, self.timezone)

    def schedule_problems(self) -> dict[str, str]:
        """What is wrong with the schedule, by field; empty when nothing is."""
        return cron.problems(self.cron, self.timezone, is_scheduled=self.schedule is not None)

    def clean(self) -> None:
        problems = self.schedule_problems()
        if problems:
            raise ValidationError(problems)


class RuleNode(models.Model):
    """One step of a chain: a filter, a transform or an action. Names, not ids, link nodes, so that a chain can be read."""

    class Type(models.TextChoices):
        FILTER = "filter"
        TRANSFORM = "transform"
        ACTION = "action"

    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    chain = models.ForeignKey(RuleChain, on_delete=models.CASCADE, related_name="nodes")
    name = models.CharField(max_length=100)
    type = models.CharField(max_length=10, choices=Type.choices)
    config = models.JSONField(default=dict)
    next = models.CharField(max_length=100, blank=True, help_text="The node that follows; empty ends the chain.")
    on_false = models.CharField(
        max_length=100, blank=True, help_text="Of a filter: the node that follows when it is false."
    )
    on_failure = models.CharField(
        max_length=100,
        blank=True,
        help_text="The node that follows when this one fails; without it, the event is tried again.",
    )
    position = models.PositiveIntegerField(default=0, editable=False)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["chain", "name"], name="node_name_in_chain")]
        ordering = ["chain", "position", "id"]

    def __str__(self) -> str:
        return f"{self.chain}: {self.name}"

    def clean(self) -> None:
        if self.on_false and self.type != self.Type.FILTER:
            raise ValidationError({"on_false": "only a filter has a false branch"})


class ChainStatistics(models.Model):
    """How a chain has fared so far. A row of its own, so that counting neither locks nor changes the chain."""

    chain = models.OneToOneField(RuleChain, primary_key=True, on_delete=models.CASCADE, related_name="statistics")
    executions = models.PositiveBigIntegerField(default=0)
    failures = models.PositiveBigIntegerField(default=0)
    failures_in_a_row = models.PositiveIntegerField(default=0)
    seconds = models.FloatField(default=0.0, help_text="Spent in all executions together.")
    last_executed_at = models.DateTimeField(null=True, blank=True)
    last_failed_at = models.DateTimeField(null=True, blank=True)
    last_error = models.CharField(max_length=500, blank=True)

    class Meta:
        verbose_name_plural = "chain statistics"

    def __str__(self) -> str:
        return f"{self.chain}: {self.executions} executions, {self.failures} failures"


class Severity(models.TextChoices):
    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


class Alarm(Identified):
    """Something that needs a person: of one type at one originator there is at most one that is not cleared."""

    originator_name = ""  # no column: rules.effects.alarms.name_originators looks it up

    class State(models.TextChoices):
        ACTIVE = "active", "active: nobody has taken it up"
        ACKNOWLEDGED = "acknowledged", "acknowledged: somebody knows"
        CLEARED = "cleared", "cleared: it is over"

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="alarms")
    source_type = models.CharField(max_length=10, help_text="sensor, device or chain")
    originator_uuid = models.UUIDField(db_index=True)
    type = models.CharField(max_length=100, help_text="What is wrong, in a few words, such as pH too high.")
    severity = models.CharField(max_length=10, choices=Severity.choices, default=Severity.WARNING)
    state = models.CharField(max_length=12, choices=State.choices, default=State.ACTIVE, db_index=True)
    message = models.CharField(max_length=500, blank=True)
    chain = models.ForeignKey(RuleChain, null=True, blank=True, on_delete=models.SET_NULL, related_name="alarms")
    node = models.CharField(max_length=100, blank=True)
    raised_at = models.DateTimeField(help_text="When it began, by the event that raised it.")
    last_raised_at = models.DateTimeField(help_text="The last event that would have raised it.")
    last_event_at = models.DateTimeField(
        default=timezone.now, help_text="The newest event that raised or cleared it: an older one comes too late."
    )
    times_raised = models.PositiveIntegerField(
        default=1, help_text="Events that would have raised it until it was cleared."
    )
    is_flapping = models.BooleanField(
        default=False, help_text="It comes and goes too often for a notification every time."
    )
    acknowledged_at = models.DateTimeField(null=True, blank=True)
    acknowledged_by = models.CharField(max_length=150, blank=True)
    cleared_at = models.DateTimeField(null=True, blank=True)
    cleared_by = models.CharField(max_length=150, blank=True, help_text="A person, or the chain and node.")

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["organization", "source_type", "originator_uuid", "type"],
                condition=~models.Q(state="cleared"),
                name="one_open_alarm_per_originator_and_type",
            )
        ]
        # The scheduler asks every second which have calmed down: almost always none is flapping.
        indexes = [models.Index(fields=["id"], condition=models.Q(is_flapping=True), name="alarm_flapping")]
        ordering = ["-raised_at", "-id"]

    def __str__(self) -> str:
        return f"{self.type} ({self.severity}, {self.state})"

    @property
    def area(self) -> Area | None:
        """Where the sensor or device stands that it is about."""
        model = {"sensor": Sensor, "device": Device}.get(self.source_type)
        if model is None:
            return None
        return Area.objects.filter(**{f"{model._meta.model_name}s__uuid": self.originator_uuid}).first()


class ActionCooldown(models.Model):
    """When an action with a cooldown was last done for an originator, written in the transaction that did it."""

    chain = models.ForeignKey(RuleChain, on_delete=models.CASCADE, related_name="cooldowns")
    node = models.CharField(max_length=100)
    originator_uuid = models.UUIDField()
    done_at = models.DateTimeField(null=True, help_text="By the clock of the server, not the time of the event.")
    suppressed = models.PositiveIntegerField(default=0, help_text="How often it was not done since then.")

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["chain", "node", "originator_uuid"], name="one_cooldown_per_originator")
        ]
        ordering = ["-id"]

    def __str__(self) -> str:
        return f"{self.chain}: {self.node}"


class Status(models.TextChoices):
    """What became of an event that is kept for people."""

    OPEN = "kept", "kept: nobody has decided yet"
    REPLAYED = "replayed", "replayed: it was sent into the queue again"
    DISCARDED = "discarded", "discarded: nobody wants it"


class Decidable(models.Model):
    """What a person may replay or discard."""

    status = models.CharField(max_length=10, choices=Status.choices, default=Status.OPEN, db_index=True)
    decided_at = models.DateTimeField(null=True, blank=True)
    decided_by = models.CharField(max_length=150, blank=True)

    class Meta:
        abstract = True


class RejectedEvent(Decidable):
    """An event, or a request that held none that could be read, that was not accepted.

    An event that can be replayed has an `event_id` and a payload that `rules.events.decode` takes; a request that could not
    be read has neither id nor priority, and its payload may be cut.
    """

    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    event_id = models.UUIDField(null=True, blank=True, db_index=True)
    organization = models.ForeignKey(
        Organization, null=True, blank=True, on_delete=models.CASCADE, related_name="rejected_events"
    )
    protocol = models.CharField(max_length=10)
    source_type = models.CharField(max_length=10, blank=True)
    originator_uuid = models.CharField(max_length=36, blank=True, db_index=True)
    type = models.CharField(max_length=30, blank=True)
    priority = models.PositiveSmallIntegerField(null=True, blank=True)
    lane = models.CharField(max_length=10, blank=True)
    timestamp = models.DateTimeField(null=True, blank=True, help_text="When it happened, by the sender's account.")
    reason = models.CharField(max_length=40, db_index=True)
    detail = models.CharField(max_length=500, blank=True)
    payload = models.TextField(blank=True)
    queue_depth = models.PositiveIntegerField(null=True, blank=True, help_text="Events queued at that moment.")
    threshold = models.PositiveIntegerField(null=True, blank=True)
    circuit_state = models.CharField(max_length=10, blank=True)
    received_at = models.DateTimeField(default=timezone.now, db_index=True)

    class Meta:
        ordering = ["-id"]

    def __str__(self) -> str:
        return f"{self.reason} over {self.protocol} at {self.received_at:%Y-%m-%d %H:%M:%S}"


class DeadLetter(Decidable):
    """An accepted event that failed at every attempt, kept with what is needed to understand and repeat it."""

    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    failure_key = models.CharField(max_length=100, unique=True, help_text="Event and chain: each is kept once.")
    event_id = models.UUIDField(db_index=True)
    organization = models.ForeignKey(
        Organization, null=True, blank=True, on_delete=models.CASCADE, related_name="dead_letters"
    )
    lane = models.CharField(max_length=10)
    originator_uuid = models.UUIDField(null=True, blank=True, db_index=True)
    event: Any = models.JSONField()
    error = models.CharField(max_length=500)
    chain = models.ForeignKey(RuleChain, null=True, blank=True, on_delete=models.SET_NULL, related_name="dead_letters")
    node = models.CharField(max_length=100, blank=True)
    attempts = models.PositiveIntegerField()
    traceback = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now, db_index=True)

    class Meta:
        ordering = ["-id"]

    def __str__(self) -> str:
        return f"{self.event_id}: {self.error}"


class Replay(models.Model):
    """A request to send kept events into the queue again, processed in steps at a capped rate."""

    class Kind(models.TextChoices):
        REJECTED = "rejected-events"
        DEAD = "dead-letters"

    class State(models.TextChoices):
        RUNNING = "running"
        DONE = "done"
        STOPPED = "stopped"

    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    kind = models.CharField(max_length=20, choices=Kind.choices)
    organization = models.ForeignKey(
        Organization, null=True, blank=True, on_delete=models.CASCADE, related_name="replays"
    )
    criteria = models.JSONField(
        default=dict, help_text="Field look-ups that choose the rows, fixed when it was asked for."
    )
    rate = models.PositiveIntegerField(default=100, help_text="Events a second at most.")
    with_commands = models.BooleanField(default=False, help_text="Let chains switch devices for these events.")
    state = models.CharField(max_length=10, choices=State.choices, default=State.RUNNING, db_index=True)
    total = models.PositiveIntegerField(default=0)
    replayed = models.PositiveIntegerField(default=0)
    failed = models.PositiveIntegerField(default=0)
    note = models.CharField(max_length=500, blank=True, help_text="Why it waits, stopped or could not replay some.")
    last_id = models.BigIntegerField(default=0, help_text="Rows up to this id are done.")
    created_at = models.DateTimeField(default=timezone.now)
    created_by = models.CharField(max_length=150)
    ended_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-id"]

    def __str__(self) -> str:
        return f"{self.kind}: {self.replayed} of {self.total}"


class CircuitState(models.Model):
    """The one state of the queue's circuit, for all processes. Changed by compare-and-set on the version."""

    SOLE_ID = 1

    state = models.CharField(max_length=10, default="CLOSED")
    version = models.PositiveBigIntegerField(default=0)
    changed_at = models.DateTimeField(default=timezone.now)
    # Of a circuit that a person opened: it stays open until then, or until somebody closes it.
    held_by = models.CharField(max_length=150, blank=True, default="")
    held_until = models.DateTimeField(null=True, blank=True)
    note = models.CharField(max_length=200, blank=True, default="")

    class Meta:
        constraints = [models.CheckConstraint(condition=models.Q(id=1), name="one_circuit")]

    def __str__(self) -> str:
        return self.state


class CircuitTransition(models.Model):
    """Every change of the circuit's state: from, to, why, at which depth, and by whom when it was a person."""

    from_state = models.CharField(max_length=10)
    to_state = models.CharField(max_length=10)
    reason = models.CharField(max_length=40)
    queue_depth = models.PositiveIntegerField(null=True)
    actor = models.CharField(max_length=150, blank=True)
    at = models.DateTimeField(default=timezone.now, db_index=True)

    class Meta:
        ordering = ["-id"]

    def __str__(self) -> str:
        return f"{self.from_state} -> {self.to_state}: {self.reason}"
