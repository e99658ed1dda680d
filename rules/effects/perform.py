"""Apply the effects that chains ask for in the caller's transaction, and publish them after its commit.

An effect has a key derived from its event and node, and the database takes each key once: StateChange for commands,
Notification for every message. An alarm also knows by the event's time what it has seen (rules.effects.alarm_lifecycle).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import msgspec

from aemos.lib import bulk, metrics
from devices import catalogue
from devices.interlocks.judge import NO_VALUES, Values
from devices.models import Organization, StateChange
from notifications import messages, outbox
from notifications.messages import Message, Protocol
from rules import events
from rules.effects import alarms, device_alarms, states
from rules.effects.alarm_lifecycle import Clear, Raise
from rules.effects.cooldowns import Cooldown, Cooldowns
from rules.engine.bound import DeployedChain
from rules.engine.effect_types import ClearAlarm, DeviceCommand, Effect, Notify, RaiseAlarm
from rules.engine.exceptions import ChainFailed
from rules.engine.values import Value
from rules.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class NotificationDraft:
    """A notification to be written: about a device, or without one for its organization."""

    effect_key: str
    organization_id: int
    device_id: int | None
    device_uuid: str | None
    severity: str
    timestamp_us: int
    payload: Mapping[str, Any]
    cooldown: Cooldown | None = None


OtherEffect = NotificationDraft | Raise | Clear
ResolvedEffect = states.StateChangeRequest | OtherEffect
"""An effect with everything looked up that it needs to be done."""


@dataclass(slots=True, kw_only=True)
class Applied:
    """What was done, for `publish`."""

    changes: list[states.Change] = field(default_factory=list)
    notes: list[Message] = field(default_factory=list)
    alarms: list[Message] = field(default_factory=list)
    suppressed: int = 0
    vetoed: int = 0

    def carry(self, traces: Mapping[str, str]) -> None:
        """Messages carry the trace of the event that led to them: `traces` by event id, with which effect keys begin."""

        def carrying(message: Message) -> Message:
            trace = traces.get(message.effect_key.partition(":")[0], "")
            return msgspec.structs.replace(message, trace=trace) if trace else message

        self.changes = [replace(change, message=carrying(change.message)) for change in self.changes]
        self.notes = [carrying(message) for message in self.notes]
        self.alarms = [carrying(message) for message in self.alarms]

    def __iadd__(self, other: Applied) -> Applied:
        self.changes += other.changes
        self.notes += other.notes
        self.alarms += other.alarms
        self.suppressed += other.suppressed
        self.vetoed += other.vetoed
        return self


def refuses(device_uuid: str, state_name: str, value: Value) -> str:
    """Why a state cannot be set to the value, as a sentence; empty when it can. No query once the device is known."""
    device = catalogue.shared().originator("device", device_uuid)
    state = device.fields.get(state_name) if device else None
    if device is None or state is None:
        return f"device {device_uuid} has no state {state_name!r} any more"
    problem = state.problem_with(value)
    return f"{device.name} cannot be set: {state_name} {problem}" if problem else ""


def resolve(effect: Effect, bound: DeployedChain, event: Event) -> ResolvedEffect:
    """Raises ChainFailed when what the effect needs does not exist any more."""
    return RESOLVERS[type(effect)](effect, bound, event)


def apply(effects: Sequence[ResolvedEffect], values: Values = NO_VALUES) -> Applied:
    """Applies the effects in the current transaction, but for those applied before, actions that are cooling down, and commands
    that an interlock vetoes. `values`: the newest of what interlocks require.
    """
    commands = [each for each in effects if isinstance(each, states.StateChangeRequest)]
    fresh = _not_applied_before([each for each in effects if not isinstance(each, states.StateChangeRequest)])
    cooldowns = Cooldowns(each.cooldown for each in fresh)
    made = states.apply(commands, values)
    notes = [
        each
        for each in fresh
        if isinstance(each, NotificationDraft) and cooldowns.permits(each.cooldown, each.effect_key)
    ]
    of_alarms = [each for each in fresh if not isinstance(each, NotificationDraft)]
    applied = Applied(
        changes=made.changes,
        notes=_write(notes),
        alarms=alarms.apply([*of_alarms, *device_alarms.of_vetoes(made.vetoed)], cooldowns.permits),
    )
    cooldowns.save()
    applied.suppressed = cooldowns.suppressed + len(made.suppressed)
    applied.vetoed = len(made.vetoed)
    return applied


def publish(applied: Applied) -> None:
    """After the commit. What fails here, the sweep publishes."""
    states.publish(applied.changes)
    outbox.publish(applied.notes)
    alarms.publish(applied.alarms)
    if applied.suppressed:
        metrics.ACTIONS_SUPPRESSED.inc(applied.suppressed)
    if applied.vetoed:
        metrics.COMMANDS_VETOED.inc(applied.vetoed)


def _command(effect: DeviceCommand, bound: DeployedChain, event: Event) -> states.StateChangeRequest:
    state_id = bound.states.get((effect.device_uuid, effect.state_name))
    if state_id is None:
        cause = f"device {effect.device_uuid} has no state {effect.state_name!r} any more"
        raise ChainFailed(effect.chain_uuid, effect.node, cause)
    return states.StateChangeRequest(
        effect_key=effect.effect_key,
        state_id=state_id,
        value=effect.value,
        source=StateChange.Source.RULE,
        actor=_actor(effect, bound),
        timestamp_us=effect.timestamp_us,
        priority=event.priority,
        always=effect.force,
        cooldown_us=effect.cooldown_us,
        vetoed=effect.vetoed,
    )


def _notify(effect: Notify, bound: DeployedChain, event: Event) -> NotificationDraft:
    payload = {
        "title": effect.title,
        "message": effect.message,
        "severity": effect.severity,
        "sourceType": event.source_type,
        "originator": event.originator_uuid,
        "originatorName": effect.originator,
        "ruleChain": bound.uuid,
        "ruleChainName": bound.name,
        "node": effect.node,
    }
    return NotificationDraft(
        effect_key=effect.effect_key,
        organization_id=bound.organization_id,
        device_id=_device_id(effect, bound),
        device_uuid=effect.device_uuid,
        severity=effect.severity,
        timestamp_us=effect.timestamp_us,
        payload=payload | ({"roles": list(effect.roles)} if effect.roles else {}),
        cooldown=_cooldown(effect, bound, event),
    )


def _device_id(effect: Notify, bound: DeployedChain) -> int | None:
    if effect.device_uuid is None:
        return None
    key = ("device", effect.device_uuid)
    device = catalogue.shared().originators([key]).get(key)
    if device is None or device.organization_id != bound.organization_id:
        raise ChainFailed(effect.chain_uuid, effect.node, f"device {effect.device_uuid} does not exist any more")
    return device.id


def _raise(effect: RaiseAlarm, bound: DeployedChain, event: Event) -> Raise:
    about = _about(effect, bound, event)
    return Raise(**about, severity=effect.severity, message=effect.message, chain_id=bound.id, node=effect.node)


def _clear(effect: ClearAlarm, bound: DeployedChain, event: Event) -> Clear:
    return Clear(**_about(effect, bound, event))


def _about(effect: RaiseAlarm | ClearAlarm, bound: DeployedChain, event: Event) -> dict[str, Any]:
    """An alarm is where the chain's first condition looks, whichever of several sensors, or the clock, has made it run: one that
    is raised by the silence of one sensor must be cleared by the next reading of another.
    """
    source_type, originator_uuid = bound.compiled.main_source or (event.source_type, event.originator_uuid)
    return {
        "effect_key": effect.effect_key,
        "organization_id": bound.organization_id,
        "source_type": source_type,
        "originator_uuid": originator_uuid,
        "type": effect.alarm,
        "timestamp_us": effect.timestamp_us,
        "actor": _actor(effect, bound),
        "cooldown": _cooldown(effect, bound, event),
    }


RESOLVERS: Mapping[type[Effect], Callable[[Any, DeployedChain, Event], ResolvedEffect]] = {
    DeviceCommand: _command,
    Notify: _notify,
    RaiseAlarm: _raise,
    ClearAlarm: _clear,
}


def _actor(effect: Effect, bound: DeployedChain) -> str:
    return f"{bound.name} / {effect.node}"


def _cooldown(effect: Effect, bound: DeployedChain, event: Event) -> Cooldown | None:
    if not effect.cooldown_us:
        return None
    return Cooldown(bound.id, effect.node, event.originator_uuid, effect.cooldown_us)


def _not_applied_before(effects: Sequence[OtherEffect]) -> list[OtherEffect]:
    """Without those that have a notification: a sender that missed the answer sends its event again, with its id."""
    if not effects:
        return []
    known = bulk.present("notifications_notification", "effect_key", [each.effect_key for each in effects])
    fresh: dict[str, OtherEffect] = {}
    for each in effects:
        if each.effect_key not in known:
            fresh.setdefault(each.effect_key, each)
    return list(fresh.values())


def _write(notes: Sequence[NotificationDraft]) -> list[Message]:
    if not notes:
        return []
    wanted = {note.organization_id for note in notes}
    organizations = dict(Organization.objects.filter(pk__in=wanted).values_list("pk", "uuid"))
    outgoing = {
        note.effect_key: (
            _message(note, str(organizations[note.organization_id])),
            note.organization_id,
            note.device_id,
        )
        for note in notes
    }
    return outbox.write(list(outgoing.values()))


def _message(note: NotificationDraft, organization_uuid: str) -> Message:
    return Message(
        id=uuid4(),
        effect_key=note.effect_key,
        organization_uuid=organization_uuid,
        device_uuid=note.device_uuid,
        event=messages.ALERT if note.severity == "critical" else messages.NOTIFICATION,
        priority=messages.PRIORITY_BY_SEVERITY[note.severity],
        timestamp=events.moment(note.timestamp_us).isoformat(),
        payload=dict(note.payload),
        # Roles are for people, and they listen on Socket.IO.
        protocols=(Protocol.SOCKETIO,) if "roles" in note.payload else messages.ALL_PROTOCOLS,
    )
