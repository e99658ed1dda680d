"""Warn of what looks wrong with a rule chain that may be saved all the same.

A warning refuses nothing. Contradictions follow from the conditions alone
(rules.authoring.satisfiability); the rest is asked of the database.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import or_
from typing import NamedTuple

from django.db.models import Exists, OuterRef, Q
from django.utils.translation import gettext as _

from aemos.lib.batched import batched
from devices.models import DeviceState, Interlock, Reading, Variable
from devices.values import Datatype
from rules.authoring import graph, satisfiability, validation
from rules.authoring.satisfiability import Region
from rules.engine import chains
from rules.engine.chains import ChainSpec, NodeSpec
from rules.engine.exceptions import InvalidChain, Problem
from rules.engine.fields import is_number
from rules.engine.operators import OPERATORS
from rules.engine.values import Reference
from rules.models import RuleChain, RuleNode
from rules.processing import loading

MAXIMUM_OTHERS = 100
"""Other chains that a chain is compared with."""

SHOWN_OPPONENTS = 5
CHUNK = 200


def warnings_of(chain: RuleChain, nodes: Sequence[RuleNode], rivals: OtherWriters | None = None) -> list[Problem]:
    """Everything that looks wrong; nothing of a chain that cannot be compiled, whose problems come first.

    `rivals` gives what other chains do to the same states, so that whoever looks at all chains need not ask for each.
    """
    spec = loading.spec_of(chain, nodes)
    try:
        chains.compile(spec)
    except InvalidChain:
        return []
    flow = _Flow(spec.nodes)
    leaves = _leaves_of(nodes)
    known = _variables(chain, leaves) | _states(chain, leaves)
    return [
        *(found for place, node in enumerate(spec.nodes) if node.type == "filter" for found in _clashes(node, place)),
        *flow.never_reached(),
        *_never_reported(leaves, known),
        *_arbitrarily_old(spec, leaves, known),
        *_undone_on_the_way(flow),
        *_actuators(chain, flow),
        *_conflicting_writers(chain, flow, rivals or partial(_rivals_of, chain)),
    ]


class StateWrite(NamedTuple):
    """An action that sets a state to a fixed value: where it stands and under which conditions it is reached."""

    chain: str
    node: str
    place: int
    device_uuid: str
    state_name: str
    value: object
    region: Region

    def opposes(self, other: StateWrite) -> bool:
        same = (self.device_uuid, self.state_name) == (other.device_uuid, other.state_name)
        return same and self.value != other.value and bool(satisfiability.meet(self.region, other.region))


OtherWriters = Callable[[Sequence[StateWrite]], Iterable[StateWrite]]
"""What other running chains of the organization do to the states that are driven here."""


class OrganizationWriters:
    """What all running chains of an organization do to states, read at once."""

    def __init__(self, organization_id: int) -> None:
        self._drives: defaultdict[tuple[str, str], list[StateWrite]] = defaultdict(list)
        rows = RuleChain.objects.running().filter(organization_id=organization_id).prefetch_related("nodes")
        for chain in rows.iterator(chunk_size=CHUNK):
            for drive in _drives_of(chain):
                self._drives[drive.device_uuid, drive.state_name].append(drive)

    def __call__(self, drives: Sequence[StateWrite]) -> Iterable[StateWrite]:
        found: list[StateWrite] = []
        for state in {(drive.device_uuid, drive.state_name) for drive in drives}:
            found += [other for other in self._drives[state] if other.chain != drives[0].chain][:MAXIMUM_OTHERS]
        return found


class _Flow:
    """The nodes of a chain that compiles, with the region in which each is reached."""

    def __init__(self, nodes: Sequence[NodeSpec]) -> None:
        self.nodes = nodes
        self._places = {node.name: place for place, node in enumerate(nodes)}
        self.regions: dict[str, Region] = {}
        self._arriving: dict[str, list[Region]] = {}
        for name in graph.order({node.name: node for node in nodes}):
            self.regions[name] = (
                satisfiability.join(self._arriving[name]) if name in self._arriving else satisfiability.EVERYTHING
            )
            for target, region in self._leaving(self.nodes[self._places[name]]):
                self._arriving.setdefault(target, []).append(region)

    def never_reached(self) -> Iterator[Problem]:
        """The first node on each way that contradictions close."""
        for place, node in enumerate(self.nodes):
            before = [each for each in self.nodes if node.name in each.targets and self.regions[each.name]]
            if not self.regions[node.name] and any(not self._is_impossible(each) for each in before):
                yield Problem(f"nodes[{place}]", node.name, _("is never reached: the filters before it contradict it"))

    def drives(self, chain: str = "") -> list[StateWrite]:
        found = []
        for place, node in enumerate(self.nodes):
            config = node.config
            if node.type == "action" and config.get("type") == "device_command" and "value" in config:
                device, state = str(config.get("deviceUuid")).lower(), str(config.get("stateName"))
                found.append(
                    StateWrite(chain, node.name, place, device, state, config["value"], self.regions[node.name])
                )
        return found

    def follows(self, name: str) -> set[str]:
        """Every node that a run may still meet after this one."""
        found: set[str] = set()
        stack = [name]
        while stack:
            for target in self.nodes[self._places[stack.pop()]].targets:
                if target not in found:
                    found.add(target)
                    stack.append(target)
        return found

    def _is_impossible(self, node: NodeSpec) -> bool:
        """A filter that is never true has a warning of its own."""
        return node.type == "filter" and not satisfiability.where_true(node.config)

    def _leaving(self, node: NodeSpec) -> Iterator[tuple[str, Region]]:
        here = self.regions[node.name]
        passed = here
        if node.type == "filter":
            passed = satisfiability.meet(here, satisfiability.where_true(node.config))
        elif node.type == "transform":
            target = node.config.get("target", node.config.get("key"))
            passed = satisfiability.forget(here, str(target))
            if node.config.get("operation") == "rename":
                passed = satisfiability.forget(passed, str(node.config.get("key")))
        if node.next:
            yield node.next, passed
        if node.on_false:
            yield node.on_false, satisfiability.meet(here, satisfiability.where_false(node.config))
        if node.on_failure:
            yield node.on_failure, here


def _clashes(node: NodeSpec, place: int) -> Iterator[Problem]:
    """The expression of an AND that cannot be true together with those before it."""
    stack: list[tuple[Mapping[str, object], str]] = [(node.config, f"nodes[{place}].config")]
    while stack:
        config, path = stack.pop()
        parts = config.get("expressions")
        if not isinstance(parts, list):
            continue
        stack.extend((part, f"{path}.expressions[{index}]") for index, part in enumerate(parts))
        before = satisfiability.EVERYTHING
        for index, part in enumerate(parts) if config.get("type") == "AND" else ():
            here = satisfiability.where_true(part)
            if not here:
                break  # reported for the part itself
            before = satisfiability.meet(before, here)
            if not before:
                text = _("can never be true together with the conditions before it, so all of them together never are")
                yield Problem(f"{path}.expressions[{index}]", part.get("value"), text)
                break


def _leaves_of(nodes: Sequence[RuleNode]) -> _Leaves:
    """Of what is measured or set, not of what a transform makes."""
    derived = {node.config.get("target") for node in nodes if node.type == RuleNode.Type.TRANSFORM}
    return [
        (mention.path, mention.config, satisfiability.reference_of(mention.config))
        for place, node in enumerate(nodes)
        if node.type == RuleNode.Type.FILTER
        for mention in validation.mentions(node, f"nodes[{place}].config")
        if mention.config.get("key") not in derived
    ]


def _never_reported(leaves: _Leaves, known: Facts) -> Iterator[Problem]:
    """Comparisons with what was never reported, and with what is of another kind."""
    for path, leaf, reference in leaves:
        if (fact := known.get(tuple(reference))) is None:
            continue
        if not fact.is_heard:
            text = (
                _("is a variable that has no value yet: the sensor has never reported it")
                if reference.source_type == "sensor"
                else _("is a state that has no value yet: the device has never reported it")
            )
            yield Problem(f"{path}.key", reference.key, text)
        if complaint := _kind_complaint(leaf, fact.datatype):
            yield Problem(f"{path}.value", leaf.get("value"), complaint)


def _actuators(chain: RuleChain, flow: _Flow) -> Iterator[Problem]:
    """Commands that an interlock vetoes every time, and doses that nothing limits."""
    writes = flow.drives()
    rows = DeviceState.objects.filter(
        device__organization=chain.organization_id, device__uuid__in={write.device_uuid for write in writes}
    )
    rows = rows.select_related("device", "interlock").prefetch_related("interlock__requirements__variable__sensor")
    states = {(str(row.device.uuid), row.name): row for row in rows} if writes else {}
    for write in writes:
        state = states.get((write.device_uuid, write.state_name))
        if state is None:
            continue
        interlock: Interlock | None = getattr(state, "interlock", None)
        path = f"nodes[{write.place}].config"
        if interlock and (why := _always_vetoed(interlock, state, write)):
            text = _("is always vetoed by the interlock of {state}: {why}").format(state=state, why=why)
            yield Problem(f"{path}.value", write.value, text)
        elif state.is_momentary and interlock is None and "cooldown" not in flow.nodes[write.place].config:
            text = _("is done at every event that leads here: give the action a cooldown, or the state an interlock")
            yield Problem(path, write.state_name, text)


def _always_vetoed(interlock: Interlock, state: DeviceState, write: StateWrite) -> str:
    if not (state.is_momentary or state.is_on(write.value)):
        return ""
    if 0 in (interlock.maximum_runs_per_hour, interlock.maximum_runs_per_day):
        return _("it may run 0 times")
    limits = [
        each for each in (interlock.maximum_amount_per_hour, interlock.maximum_amount_per_day) if each is not None
    ]
    if limits and is_number(write.value) and abs(write.value) > min(limits):
        return _("it may dose {amount}").format(amount=f"{min(limits):g}")
    for requirement in interlock.requirements.all():
        region = write.region
        for operator, limit in ((">=", requirement.minimum), ("<=", requirement.maximum), ("==", requirement.equals)):
            if limit is not None and region:
                leaf = {
                    "sourceType": "sensor",
                    "UUID": requirement.key[1],
                    "key": requirement.key[2],
                    "operator": operator,
                    "value": limit,
                }
                region = satisfiability.meet(region, satisfiability.where_true(leaf))
        if write.region and not region:
            return _("it requires {requirement}, and the filters before it say otherwise").format(
                requirement=requirement
            )
    return ""


_ASKS_AGE = {"newerThan", "inLast", "olderThan", "valueNewerThan", "valueInLast"}


def _arbitrarily_old(spec: ChainSpec, leaves: _Leaves, known: Facts) -> Iterator[Problem]:
    """Readings on which an actuator moves, however long ago they were taken.

    A chain that only its one variable runs always sees a new value; the clock, or another variable, may run it at any time.
    """
    if not any(node.type == "action" and node.config.get("type") == "device_command" for node in spec.nodes):
        return
    references = {reference for _path, _leaf, reference in leaves}
    if not spec.is_scheduled and len(references) == 1:
        return
    asked = {reference for _path, leaf, reference in leaves if leaf.get("operator") in _ASKS_AGE or "within" in leaf}
    for path, _leaf, reference in leaves:
        fact = known.get(tuple(reference))
        if reference.source_type == "sensor" and reference not in asked and fact and not fact.has_maximum_age:
            asked.add(reference)
            text = _(
                "may be of any age when a device is switched: give the variable a maximum age, or ask here how old it is"
            )
            yield Problem(f"{path}.key", reference.key, text)


class _Fact(NamedTuple):
    datatype: str
    is_heard: bool
    has_maximum_age: bool = False


Facts = dict[tuple[str, ...], _Fact]
"""(source type, uuid, name) -> what is known of it."""
_Leaves = Sequence[tuple[str, Mapping[str, object], Reference]]


def _variables(chain: RuleChain, leaves: _Leaves) -> Facts:
    found: Facts = {}
    heard = Exists(Reading.objects.filter(variable=OuterRef("pk")))
    for uuids in _batches(leaves, "sensor"):
        rows = Variable.objects.filter(sensor__organization_id=chain.organization_id, sensor__uuid__in=uuids)
        columns = ("sensor__uuid", "name", "datatype", "heard", "maximum_age_seconds")
        for uuid, name, datatype, is_heard, maximum_age in rows.annotate(heard=heard).values_list(*columns):
            found["sensor", str(uuid), name] = _Fact(datatype, is_heard, maximum_age is not None)
    return found


def _states(chain: RuleChain, leaves: _Leaves) -> Facts:
    found: Facts = {}
    for uuids in _batches(leaves, "device"):
        rows = DeviceState.objects.filter(device__organization_id=chain.organization_id, device__uuid__in=uuids)
        columns = ("device__uuid", "name", "datatype", "changed_at", "reported_at")
        for uuid, name, datatype, changed_at, reported_at in rows.values_list(*columns):
            found["device", str(uuid), name] = _Fact(datatype, (changed_at or reported_at) is not None)
    return found


def _batches(leaves: _Leaves, source_type: str) -> Iterator[Sequence[str]]:
    wanted = sorted({reference.uuid for _path, _leaf, reference in leaves if reference.source_type == source_type})
    return batched(wanted, validation.LOOKUP_BATCH)


def _kind_complaint(leaf: Mapping[str, object], datatype: str) -> str:
    operator, value = str(leaf.get("operator")), leaf.get("value")
    if operator in OPERATORS and OPERATORS[operator].is_numeric and datatype != Datatype.NUMBER:
        return _("is a number, and what is compared is of the kind {kind}: this is never true").format(kind=datatype)
    if operator == "==" and _datatype_of(value) != datatype:
        return _("is of another kind than what is compared, {kind}: this is never true").format(kind=datatype)
    return ""


def _datatype_of(value: object) -> str:
    return Datatype.NUMBER if is_number(value) else Datatype.BOOLEAN if isinstance(value, bool) else Datatype.STRING


def _undone_on_the_way(flow: _Flow) -> Iterator[Problem]:
    drives = flow.drives()
    for first in drives:
        after = flow.follows(first.node)
        for second in drives:
            if second.node in after and first.opposes(second):
                text = _("is set again in the same run, to another value, by the node {name}")
                text = text.format(name=repr(second.node))
                yield Problem(f"nodes[{first.place}].config.value", first.value, text)


def _conflicting_writers(chain: RuleChain, flow: _Flow, rivals: OtherWriters) -> Iterator[Problem]:
    """Enabled chains that may drive the same state to another value at the same time."""
    mine = [drive for drive in flow.drives(chain.name) if drive.region] if chain.enabled else []
    others = list(rivals(mine)) if mine else []
    for drive in mine:
        opponents = [other for other in others if drive.opposes(other)]
        if not opponents:
            continue
        shown, hidden = opponents[:SHOWN_OPPONENTS], opponents[SHOWN_OPPONENTS:]
        one = _("{chain} (node {node}) to {value}")
        named = [one.format(chain=repr(each.chain), node=repr(each.node), value=repr(each.value)) for each in shown]
        text = _("may be set at the same time to something else: by the chain {chains}").format(chains=", ".join(named))
        more = _(" and {count} more").format(count=len(hidden)) if hidden else ""
        yield Problem(f"nodes[{drive.place}].config.value", drive.value, text + more)


def _rivals_of(chain: RuleChain, drives: Sequence[StateWrite]) -> Iterator[StateWrite]:
    """Asked of the database for one chain."""
    devices = sorted({drive.device_uuid for drive in drives})
    # People may write a uuid in upper case.
    named = reduce(or_, (Q(config__deviceUuid__iexact=uuid) for uuid in devices[:MAXIMUM_OTHERS]))
    others = RuleChain.objects.running().filter(organization_id=chain.organization_id).exclude(uuid=chain.uuid)
    rows = RuleNode.objects.filter(named, type=RuleNode.Type.ACTION, chain__in=others).order_by()
    ids = list(rows.values_list("chain_id", flat=True).distinct()[:MAXIMUM_OTHERS])
    for other in RuleChain.objects.filter(pk__in=ids).prefetch_related("nodes"):
        yield from _drives_of(other)


def _drives_of(chain: RuleChain) -> list[StateWrite]:
    spec = loading.spec_of(chain, chain.nodes.all())
    try:
        chains.compile(spec)
    except InvalidChain:
        return []  # it does not run
    return [drive for drive in _Flow(spec.nodes).drives(chain.name) if drive.region]
