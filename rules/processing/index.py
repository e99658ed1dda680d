"""The rule index: a source and the names of its values in, the compiled chains that they trigger out, without a scan.

Built whole when a worker starts. When an organization's CatalogueVersion moves, only its chains whose own version moved are
read, compiled and put in place again.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter

from aemos.lib.per_process import per_process
from devices import catalogue
from devices.models import CatalogueVersion, DeviceState
from rules.engine.bound import DeployedChain
from rules.engine.chains import Chain
from rules.engine.exceptions import InvalidChain
from rules.models import RuleChain
from rules.processing.loading import batches, compiled

log = logging.getLogger(__name__)
# With a slice of work of 0.2 s under way, a chain that was saved runs within a second.
REFRESH_SECONDS = 0.7
# So many that were loaded at once are kept from the collector of cycles, as those are with which a worker began.
MANY_CHAINS = 1_000
Source = tuple[str, str]  # source type, uuid
States = dict[tuple[str, str], int]


ByName = dict[str, tuple[DeployedChain, ...]]


class RuleIndex:
    """All chains that may run, of all organizations: those that are enabled and not suspended. One per process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._checked_at = float("-inf")
        self._catalogue: dict[int, int] = {}  # organization -> version of its catalogue
        self._running_versions: dict[
            int, dict[int, int]
        ] = {}  # organization -> chain -> version, also of those not valid
        self._states: defaultdict[int, States] = defaultdict(dict)
        self._by_id: dict[int, DeployedChain] = {}
        self._by_uuid: dict[str, DeployedChain] = {}
        self._by_source: dict[tuple[int, str, str], ByName] = {}

    def triggered(self, source: Source, names: Iterable[str], *, organization_id: int) -> Sequence[DeployedChain]:
        """The organization's chains that wait for one of these values, the most urgent first; one look-up when none does."""
        # Saving refuses a chain that names another organization's sensor; should one exist, it must not hear of it.
        by_name = self._by_source.get((organization_id, *source))
        if by_name is None:
            return ()
        found = [waiting for name in names if (waiting := by_name.get(name))]
        if len(found) == 1:
            return found[0]
        return sorted({bound.id: bound for waiting in found for bound in waiting}.values(), key=attrgetter("sort_key"))

    def by_uuid(self, uuid: str) -> DeployedChain | None:
        return self._by_uuid.get(uuid)

    def refresh_if_missing(self, uuids: Iterable[str]) -> None:
        """Refreshes at once when one of these chains does not run: it may have been switched on a moment ago."""
        if any(uuid not in self._by_uuid for uuid in uuids):
            self.refresh(at_once=True)

    def named(self, uuids: Iterable[str], *, organization_id: int) -> list[DeployedChain]:
        """Those of these chains that run."""
        found = (self._by_uuid.get(uuid) for uuid in uuids)
        return [bound for bound in found if bound and bound.organization_id == organization_id]

    def refresh(self, *, at_once: bool = False) -> None:
        """Takes over what changed; looks every 0.7 s at most unless `at_once`. Raises django.db.Error and changes nothing."""
        now = self._clock()
        if not at_once and now - self._checked_at < REFRESH_SECONDS:
            return
        # Read before the rows: what is saved in between moves it again, and is seen the next time.
        versions = dict(CatalogueVersion.objects.values_list("organization_id", "version"))
        changed = {
            key for key in self._catalogue.keys() | versions.keys() if self._catalogue.get(key) != versions.get(key)
        }
        if changed:
            self._update(versions, changed)
        self._catalogue = versions
        self._checked_at = now

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[DeployedChain]:
        return iter(self._by_id.values())

    def _update(self, versions: Mapping[int, int], organizations: set[int]) -> None:
        running = _running_versions(organizations)
        moved: list[int] = []
        gone: list[int] = []
        for key, now in running.items():
            before = self._running_versions.get(key, {})
            keeps = catalogue.is_same_build(self._catalogue.get(key), versions.get(key))
            moved += [pk for pk, version in now.items() if not keeps or before.get(pk) != version]
            gone += before.keys() - now.keys()
        states = _states_of(organizations)
        loaded = [_bound(row, chain, self._states[row.organization_id]) for row, chain in _valid(moved)]
        # From here on nothing waits for the database: whoever looks sees all of it or nothing.
        for key in organizations:
            self._states[key].clear()
            self._states[key].update(states[key])
        self._replace({pk for pk in (*moved, *gone) if self._is_of(pk, organizations)}, loaded)
        self._running_versions |= running
        if len(loaded) >= MANY_CHAINS:
            _keep_from_collector()

    def _is_of(self, pk: int, organizations: set[int]) -> bool:
        bound = self._by_id.get(pk)
        return bound is not None and bound.organization_id in organizations

    def _replace(self, old: set[int], new: Iterable[DeployedChain]) -> None:
        touched: defaultdict[tuple[int, str, str], defaultdict[str, list[DeployedChain]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for pk in old:
            bound = self._by_id.pop(pk)
            del self._by_uuid[bound.uuid]
            for source, name in _index_keys(bound):
                touched[source][name] = touched[source][name]
        for bound in new:
            self._by_id[bound.id] = self._by_uuid[bound.uuid] = bound
            for source, name in _index_keys(bound):
                touched[source][name].append(bound)
        for source, additions in touched.items():
            self._put(source, additions, without=old)

    def _put(
        self, source: tuple[int, str, str], additions: Mapping[str, list[DeployedChain]], *, without: Collection[int]
    ) -> None:
        by_name = self._by_source.setdefault(source, {})
        for name, added in additions.items():
            waiting = [bound for bound in by_name.pop(name, ()) if bound.id not in without] + added
            if waiting:
                by_name[name] = tuple(sorted(waiting, key=attrgetter("sort_key")))
        if not by_name:
            del self._by_source[source]


def _index_keys(bound: DeployedChain) -> Iterator[tuple[tuple[int, str, str], str]]:
    """The places where a chain waits."""
    for source_type, uuid, name in bound.compiled.references if bound.event_triggered else ():
        yield (bound.organization_id, source_type, uuid), name


def _running_versions(organizations: Collection[int]) -> dict[int, dict[int, int]]:
    """Organization -> chain -> version, of the chains that may run."""
    found: dict[int, dict[int, int]] = {organization: {} for organization in organizations}
    for rows in batches(organizations, RuleChain.objects.running(), "organization_id"):
        for organization, pk, version in rows.values_list("organization_id", "pk", "version"):
            found[organization][pk] = version
    return found


def _states_of(organizations: Collection[int]) -> dict[int, States]:
    found: dict[int, States] = {organization: {} for organization in organizations}
    for rows in batches(organizations, DeviceState.objects.all(), "device__organization_id"):
        for organization, uuid, name, pk in rows.values_list("device__organization_id", "device__uuid", "name", "pk"):
            found[organization][str(uuid), name] = pk
    return found


def _valid(ids: Collection[int]) -> Iterator[tuple[RuleChain, Chain]]:
    for row, result in compiled(ids):
        if isinstance(result, InvalidChain):
            # Saving refuses such a chain; one that got past it must not stop the others.
            log.error(
                "Rule chain %s (%s) does not run, it is not valid: %s",
                row.name,
                row.uuid,
                result,
                extra={"chain": str(row.uuid)},
            )
        else:
            yield row, result


def _bound(row: RuleChain, chain: Chain, states: States) -> DeployedChain:
    return DeployedChain(
        id=row.pk,
        name=row.name,
        organization_id=row.organization_id,
        priority=row.priority,
        max_retries=row.max_retries,
        compiled=chain,
        states=states,
        hears_late=row.late_events == RuleChain.LateEvents.RUN,
        event_triggered=row.execution_type != RuleChain.ExecutionType.SCHEDULE_ONLY,
    )


@per_process
def shared() -> RuleIndex:
    """The index of this process."""
    return RuleIndex()


def load() -> None:
    """Builds the index of this process before its work begins. Raises django.db.Error.

    What is loaded stays: the collector of cycles, which would look through all of it again and again, for 0.4 s each time
    at 10,000 chains, is made to pass it over.
    """
    gc.disable()
    try:
        shared().refresh(at_once=True)
        _keep_from_collector()
    finally:
        gc.enable()


def _keep_from_collector() -> None:
    """What was garbage by now is collected first: afterwards nobody would."""
    gc.collect()
    gc.freeze()
