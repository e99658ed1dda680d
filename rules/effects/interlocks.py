"""The last gate before a state changes: what interlocks veto, and when states were on, in the caller's transaction.

Every change passes here, whoever asks for it. The rows of states are locked by the caller, so no two transactions judge one
state at the same time; what it must not be on together with is locked with it (`rivals_of`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any

from django.db.models import F, Q
from django.utils import timezone

from devices import latest
from devices.interlocks import judge
from devices.interlocks.judge import Situation, Values, Vetoed
from devices.latest import Key
from devices.models import DeviceState, Interlock, StateRun, Veto

MAXIMUM_DETAIL = 500


def rivals_of(ids: Collection[int]) -> dict[int, set[int]]:
    """By id of a state, those that must not be on at the same time; one of two may name the other."""
    found: defaultdict[int, set[int]] = defaultdict(set)
    through = Interlock.excludes.through.objects
    pairs = through.filter(Q(interlock__state__in=ids) | Q(devicestate__in=ids))
    for one, other in pairs.values_list("interlock__state_id", "devicestate_id"):
        if one != other:
            found[one].add(other)
            found[other].add(one)
    return found


def required_by(ids: Collection[int]) -> list[Key]:
    """The variables that must be known before these states change."""
    rows = Interlock.objects.filter(state__in=ids, requirements__isnull=False)
    named = rows.values_list("requirements__variable__sensor__uuid", "requirements__variable__name").distinct()
    return [("sensor", str(uuid), name) for uuid, name in named]


def veto_now(state_id: int, value: Any, values: Values | None = None) -> Vetoed | None:
    """As things are at this moment, without a lock and without a record of it. `values`: as for `states.apply`, read if they are
    not given. Raises RedisError."""
    rivals = rivals_of([state_id])
    states = DeviceState.objects.filter(pk__in={state_id}.union(*rivals.values())).select_related("device")
    found = {row.pk: row for row in states}
    values = latest.recall(required_by([state_id])) if values is None else values
    return Interlocks(found, rivals, values).veto(found[state_id], value) if state_id in found else None


class Interlocks:
    """Of the states that one transaction changes. Without a state that is counted or locked there is no query."""

    def __init__(
        self, states: Mapping[int, DeviceState], rivals: Mapping[int, Collection[int]], values: Values
    ) -> None:
        self.now = timezone.now()
        self._states = states
        self._rivals = rivals
        self._values = values
        self._situations: dict[int, Situation] | None = None
        self._changed: dict[int, StateRun] = {}
        self._begun: list[StateRun] = []
        self._vetoes: dict[tuple[int, str, str, str, str], Veto] = {}

    def veto(self, state: DeviceState, value: Any) -> Vetoed | None:
        """Why the state must not be set to the value now; None when it may."""
        if not state.is_counted:
            return judge.veto(Situation(state=state, now=self.now), value) if state.locked_until else None
        found = judge.veto(self._situation(state), value)
        if found and found.kind is Veto.Kind.MINIMUM_ON:
            self._end_later(state)
        return found

    def alarms_for(self, state: DeviceState) -> bool:
        """Whether a veto at the state is to raise an alarm."""
        interlock = self._situation(state).interlock if state.is_counted else None
        return interlock is not None and interlock.alarm_on_veto

    def note_veto(
        self, state: DeviceState, vetoed: Vetoed, value: Any, *, source: str, actor: str, overridden: str = ""
    ) -> None:
        """Counts it for the list of vetoes; `overridden` is the reason for which it was done all the same."""
        key = (state.pk, vetoed.kind.value, source, actor[:200], overridden)
        row = self._vetoes.get(key)
        if row is None:
            row = self._vetoes[key] = Veto(state=state, kind=vetoed.kind, source=source, actor=actor[:200], count=0)
        row.count += 1
        row.value, row.detail, row.overridden_reason = (
            value,
            vetoed.detail[:MAXIMUM_DETAIL],
            overridden[:MAXIMUM_DETAIL],
        )
        row.first_at = row.last_at = self.now

    def note_change(self, state: DeviceState, value: Any) -> None:
        """A run begins or ends by what was commanded or reported; a momentary command is a run of its own."""
        if not state.is_counted:
            return
        situation = self._situation(state)
        if state.is_momentary:
            amount = float(abs(value)) if isinstance(value, int | float) and not isinstance(value, bool) else None
            situation.runs.append(StateRun(state=state, began_at=self.now, ended_at=self.now, amount=amount))
            self._begun.append(situation.runs[-1])
            return
        run, is_on = situation.running, state.is_on(value)
        if is_on and run is None:
            situation.runs.append(StateRun(state=state, began_at=self.now))
            self._begun.append(situation.runs[-1])
        elif run is not None and (not is_on or run.off_wanted):
            run.ended_at = None if is_on else max(self.now, run.began_at)
            run.off_wanted = False
            self._note(run)

    def save(self) -> None:
        """After the changes. Runs that end before those that begin: of a state at most one goes on."""
        StateRun.objects.bulk_update(self._changed.values(), ["ended_at", "off_wanted"])
        StateRun.objects.bulk_create(self._begun)
        for row in self._vetoes.values():
            _write(row)

    def _end_later(self, state: DeviceState) -> None:
        run = self._situation(state).running
        if run is not None and not run.off_wanted:
            run.off_wanted = True
            self._note(run)

    def _note(self, run: StateRun) -> None:
        if run.pk is not None:
            self._changed[run.pk] = run

    def _situation(self, state: DeviceState) -> Situation:
        if self._situations is None:
            self._situations = situations(self._states.values(), self._rivals, self._values, now=self.now)
        return self._situations[state.pk]


def situations(
    states: Iterable[DeviceState], rivals: Mapping[int, Collection[int]], values: Values, *, now: datetime
) -> dict[int, Situation]:
    """Of those states that are counted, by id. The rivals are among the states; those that are not count as off."""
    counted = {state.pk: state for state in states if state.is_counted}
    by_id = {state.pk: state for state in states}
    interlocks = {
        row.state_id: row
        for row in Interlock.objects.filter(state__in=counted).prefetch_related(
            "requirements__variable__sensor__organization"
        )
    }
    runs: defaultdict[int, list[StateRun]] = defaultdict(list)
    lately = Q(ended_at__gt=now - judge.DAY, state__in=interlocks) | Q(ended_at=None, state__in=counted)
    for run in StateRun.objects.filter(lately).order_by("began_at", "id"):
        runs[run.state_id].append(run)
    return {
        pk: Situation(
            state=state,
            now=now,
            interlock=interlocks.get(pk),
            runs=runs[pk],
            rivals=[by_id[rival] for rival in sorted(rivals.get(pk, ())) if rival in by_id],
            requirements=list(interlocks[pk].requirements.all()) if pk in interlocks else (),
            values=values,
        )
        for pk, state in counted.items()
    }


def _write(row: Veto) -> None:
    """What is like it counts on; the state is locked, so nobody inserts the same meanwhile."""
    if row.overridden_reason:
        row.save()
        return
    alike = Veto.objects.filter(
        state=row.state, kind=row.kind, source=row.source, actor=row.actor, overridden_reason=""
    )
    newest = {"count": F("count") + row.count, "value": row.value, "detail": row.detail, "last_at": row.last_at}
    if not alike.update(**newest):
        row.save()
