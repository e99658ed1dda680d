"""Switch to its safe value what has been on long enough, must not be on any more, or was left on by a chain that has ended.

By the database alone, so that neither a crash nor an emptied Redis forgets it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from django.db import transaction
from django.utils import timezone
from redis.exceptions import RedisError

from aemos.lib import redis
from aemos.lib.per_process import per_process
from devices import latest
from devices.interlocks import judge
from devices.interlocks.judge import Situation, Values
from devices.latest import Key, Latest
from devices.models import DeviceState, StateChange, StateRun
from rules import events
from rules.effects import alarms, chain_ends, device_alarms, interlocks, states

log = logging.getLogger(__name__)
SYSTEM = "interlock"


def switch_off_overdue() -> int:
    """A periodic task of the scheduler, called every second; gives how many states it switched. Raises django.db.Error."""
    ids = set(StateRun.objects.filter(ended_at=None).values_list("state_id", flat=True))
    if not ids:
        return 0
    values = _values(ids)
    due = _reasons(interlocks.situations(_read(ids), {}, values, now=timezone.now()))
    return _switch_off([*due], values) if due else 0


def _reasons(situations: Mapping[int, Situation]) -> dict[int, str]:
    """By id of the state, why it has to go off now."""
    on = {pk: situation for pk, situation in situations.items() if situation.running is not None}
    reasons = chain_ends.reasons_of(on)
    return reasons | {pk: reason for pk, situation in on.items() if (reason := judge.overdue(situation))}


@per_process
def _last_values() -> dict[Key, Latest]:
    """What was read last."""
    return {}


def _values(ids: set[int]) -> Values:
    """What the interlocks require; without Redis what was known last, which counts until it is not fresh any more."""
    known, wanted = _last_values(), interlocks.required_by(ids)
    try:
        found = latest.recall(wanted)
    except RedisError as error:
        log.warning("What interlocks require cannot be read: %s", redis.explain(error))
        return {key: known[key] for key in wanted if key in known}
    known.clear()
    known.update(found)
    return found


def _read(ids: set[int]) -> list[DeviceState]:
    return list(DeviceState.objects.filter(pk__in=ids).select_related("device__organization"))


def _switch_off(ids: list[int], values: Values) -> int:
    """Judged once more with the states locked: what was switched off meanwhile is left alone."""
    with transaction.atomic():
        locked, _ = states.lock(ids)
        rows = [locked[pk] for pk in ids if pk in locked]
        found = interlocks.situations(rows, {}, values, now=timezone.now())
        reasons = _reasons(found)
        made = states.apply([_request(found[pk], reason) for pk, reason in reasons.items()], values)
        outgoing = alarms.apply(
            [
                device_alarms.raised(
                    found[pk].state, f"{found[pk].state.name} switched off", f"{found[pk].state}: {why}"
                )
                for pk, why in reasons.items()
                if _is_alarming(found[pk])
            ]
        )
    states.publish(made.changes)
    alarms.publish(outgoing)
    for change in made.changes:
        log.warning("%s went to its safe value: %s", change.row.state, change.row.actor)
    return len(made.changes)


def _request(situation: Situation, reason: str) -> states.StateChangeRequest:
    run = situation.running
    assert run is not None  # noqa: S101  only what is on is overdue
    return states.StateChangeRequest(
        effect_key=f"interlock:{run.pk}",
        state_id=situation.state.pk,
        value=situation.state.safe_value,
        source=StateChange.Source.INTERLOCK,
        actor=f"{SYSTEM}: {reason}",
        timestamp_us=events.microseconds(situation.now),
        priority=1,
        always=True,
    )


def _is_alarming(situation: Situation) -> bool:
    """Not when somebody had asked for it, and only the minimum time had to pass."""
    run, interlock = situation.running, situation.interlock
    return interlock is not None and interlock.alarm_on_veto and not (run and run.off_wanted)
