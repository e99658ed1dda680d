"""The rule index: a source and the names of its values in, the compiled chains that they trigger out, without a scan.

Built whole when a worker starts. When an organization's CatalogueVersion moves, its part is built anew; a chain whose
version stayed is not compiled again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from devices.models import CatalogueVersion, DeviceState
from rules import chains, validation
from rules.chains import Chain
from rules.exceptions import InvalidChain
from rules.models import RuleChain

log = logging.getLogger(__name__)
REFRESH_SECONDS = 1.0
Source = tuple[str, str]  # source type, uuid


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundChain:
    """A compiled chain with what its row says. `states`: (device uuid, state name) -> id, of its own organization only.

    One that does not hear events runs on its schedule alone.
    """

    id: int
    name: str
    organization_id: int
    priority: int
    max_retries: int
    compiled: Chain
    states: Mapping[tuple[str, str], int]
    hears_events: bool = True

    @property
    def uuid(self) -> str:
        return self.compiled.spec.uuid


class RuleIndex:
    """All enabled chains of all organizations. One per process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._checked_at = float("-inf")
        self._versions: dict[int, int] = {}
        self._chains: dict[str, BoundChain] = {}
        self._by_source: dict[Source, dict[str, tuple[BoundChain, ...]]] = {}

    def triggered(self, source: Source, names: Iterable[str], *, organization_id: int) -> list[BoundChain]:
        """The organization's chains that wait for one of these values, the most urgent first; one look-up when none does."""
        by_name = self._by_source.get(source)
        if by_name is None:
            return []
        found = {bound.id: bound for name in names for bound in by_name.get(name, ())}
        # Saving refuses a chain that names another organization's sensor; should one exist, it must not hear of it.
        own = [bound for bound in found.values() if bound.organization_id == organization_id]
        return sorted(own, key=lambda bound: (bound.priority, bound.id))

    def by_uuid(self, uuid: str) -> BoundChain | None:
        return self._chains.get(uuid)

    def named(self, uuids: Collection[str], *, organization_id: int) -> list[BoundChain]:
        """These chains, if they are switched on; looked for anew, as one may have been a moment ago."""
        if any(uuid not in self._chains for uuid in uuids):
            self.refresh(at_once=True)
        found = (self._chains.get(uuid) for uuid in uuids)
        return [bound for bound in found if bound and bound.organization_id == organization_id]

    def timed(self) -> Iterator[BoundChain]:
        """Those with conditions that time alone can make true."""
        return (bound for bound in self._chains.values() if bound.compiled.timers)

    def refresh(self, *, at_once: bool = False) -> None:
        """Rebuilds what changed; looks at most once a second unless `at_once`. Raises django.db.Error."""
        now = self._clock()
        if not at_once and now - self._checked_at < REFRESH_SECONDS:
            return
        versions = dict(CatalogueVersion.objects.values_list("organization_id", "version"))
        changed = {
            key for key in self._versions.keys() | versions.keys() if self._versions.get(key) != versions.get(key)
        }
        if changed:
            self._rebuild(changed)
        self._versions = versions
        self._checked_at = now

    def __len__(self) -> int:
        return len(self._chains)

    def _rebuild(self, organizations: set[int]) -> None:
        kept = {uuid: bound for uuid, bound in self._chains.items() if bound.organization_id not in organizations}
        loaded = _load(organizations, known=self._chains)
        self._chains = kept | loaded
        self._by_source = _by_source(self._chains.values())


def _by_source(bound_chains: Iterable[BoundChain]) -> dict[Source, dict[str, tuple[BoundChain, ...]]]:
    found: dict[Source, dict[str, tuple[BoundChain, ...]]] = {}
    for bound in bound_chains:
        for source_type, uuid, name in bound.compiled.references if bound.hears_events else ():
            by_name = found.setdefault((source_type, uuid), {})
            by_name[name] = (*by_name.get(name, ()), bound)
    return found


def _load(organizations: set[int], *, known: Mapping[str, BoundChain]) -> dict[str, BoundChain]:
    rows = RuleChain.objects.filter(organization_id__in=organizations, enabled=True).prefetch_related("nodes")
    compiled = [(row, chain) for row in rows if (chain := _compiled(row, known.get(str(row.uuid))))]
    states = _states_of(organizations)
    return {chain.spec.uuid: _bound(row, chain, states[row.organization_id]) for row, chain in compiled}


def _compiled(row: RuleChain, known: BoundChain | None) -> Chain | None:
    if known is not None and known.compiled.spec.version == row.version:
        return known.compiled
    try:
        return chains.compile(validation.spec_of(row, row.nodes.all()))
    except InvalidChain as error:
        # Saving refuses such a chain; one that got past it must not stop the others.
        log.error("Rule chain %s (%s) does not run, it is not valid: %s", row.name, row.uuid, error)
        return None


def _states_of(organizations: set[int]) -> dict[int, dict[tuple[str, str], int]]:
    found: dict[int, dict[tuple[str, str], int]] = {organization: {} for organization in organizations}
    rows = DeviceState.objects.filter(device__organization_id__in=organizations)
    for pk, name, uuid, organization_id in rows.values_list("id", "name", "device__uuid", "device__organization_id"):
        found[organization_id][str(uuid), name] = pk
    return found


def _bound(row: RuleChain, chain: Chain, states: Mapping[tuple[str, str], int]) -> BoundChain:
    wanted = {(command.device_uuid, command.state_name) for command in chain.commands}
    return BoundChain(
        id=row.pk,
        name=row.name,
        organization_id=row.organization_id,
        priority=row.priority,
        max_retries=row.max_retries,
        compiled=chain,
        # A state that was renamed or deleted after the save is missing here; the action then fails by name.
        states={key: states[key] for key in wanted if key in states},
        hears_events=row.execution_type != RuleChain.ExecutionType.SCHEDULE_ONLY,
    )


@cache
def shared() -> RuleIndex:
    """The index of this process."""
    return RuleIndex()
