"""Cooldowns: suppress an action that was done a short while ago, by a row that commits with its effect.

What counts is when an action was done by the clock of the server, not the time of its event: a sensor that was without a
network for hours reports everything at once, and a pump must not start once for each of those reports.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import NamedTuple, Protocol
from uuid import UUID

from django.utils import timezone

from rules.models import ActionCooldown

# An action that was done later than this from now was done by a clock that was wrong: it must not rest until then.
CLOCK_TOLERANCE = timedelta(minutes=5)


class Cooldown(NamedTuple):
    """How long an action is suppressed after it was done, in microseconds, for one originator."""

    chain_id: int
    node: str
    originator_uuid: str
    duration_us: int


class CooldownGate(Protocol):
    """Whether an effect may be done now; one that may begins the cooldown of its action."""

    def __call__(self, cooldown: Cooldown | None, effect_key: str) -> bool: ...


def no_cooldown(cooldown: Cooldown | None, effect_key: str) -> bool:
    """For effects of people and devices, which have none."""
    return True


_Key = tuple[int, str, UUID]


class Cooldowns:
    """Of the actions of one batch. Without any there is no query.

    Their rows are locked from the first question on until the transaction ends: after the states that the actions set, in the
    order in which a batch with reports of devices locks them, too.
    """

    def __init__(self, cooldowns: Iterable[Cooldown | None], *, now: datetime | None = None) -> None:
        self._wanted = {_key(cooldown) for cooldown in cooldowns if cooldown}
        self.suppressed = 0
        self._now = now or timezone.now()
        self._rows: dict[_Key, ActionCooldown] = {}
        self._begun_by: dict[_Key, str] = {}
        self._changed: dict[int, ActionCooldown] = {}

    def permits(self, cooldown: Cooldown | None, effect_key: str) -> bool:
        """See CooldownGate; the effect that began a cooldown may ask again."""
        if cooldown is None:
            return True
        key = _key(cooldown)
        if self._begun_by.get(key) == effect_key:
            return True
        self._rows = self._rows or _locked(self._wanted)
        row = self._rows[key]
        self._changed[row.pk] = row
        if self._is_cooling_down(row, cooldown):
            row.suppressed += 1
            self.suppressed += 1
            return False
        row.done_at, row.suppressed = self._now, 0
        self._begun_by[key] = effect_key
        return True

    def save(self) -> None:
        """After the effects, in their transaction."""
        if self._changed:
            ActionCooldown.objects.bulk_update(self._changed.values(), ["done_at", "suppressed"])

    def _is_cooling_down(self, row: ActionCooldown, cooldown: Cooldown) -> bool:
        if row.done_at is None:
            return False
        elapsed = self._now - row.done_at
        return -CLOCK_TOLERANCE <= elapsed < timedelta(microseconds=cooldown.duration_us)


def _key(cooldown: Cooldown) -> _Key:
    return cooldown.chain_id, cooldown.node, UUID(cooldown.originator_uuid)


def _locked(wanted: set[_Key]) -> dict[_Key, ActionCooldown]:
    """The rows, in the order of their ids, so that two workers that want the same never deadlock.

    What is not there is inserted before it is locked: a row that does not exist would keep no other worker out.
    """
    if not wanted:
        return {}
    found = _select(wanted)
    missing = sorted(wanted - found.keys())
    if missing:
        new = [ActionCooldown(chain_id=chain, node=node, originator_uuid=uuid) for chain, node, uuid in missing]
        ActionCooldown.objects.bulk_create(new, ignore_conflicts=True)
        found = _select(wanted)
    return found


def _select(wanted: set[_Key]) -> dict[_Key, ActionCooldown]:
    chains, nodes, originators = (set(parts) for parts in zip(*wanted, strict=True))
    rows = ActionCooldown.objects.select_for_update().order_by("pk")
    rows = rows.filter(chain_id__in=chains, node__in=nodes, originator_uuid__in=originators)
    return {key: row for row in rows if (key := (row.chain_id, row.node, row.originator_uuid)) in wanted}
