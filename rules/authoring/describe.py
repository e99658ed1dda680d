"""A rule chain for people: the names of what it mentions, its sentence and its graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from aemos.lib.batched import batched
from devices.models import Device, Sensor, Variable
from devices.units import AS_STORED, Scale, Units
from rules.authoring import graph, validation
from rules.authoring.sentences import ChainDescriber, Names, Say
from rules.models import RuleChain, RuleNode
from rules.processing import loading


def names_of(organization_id: int, nodes: Iterable[RuleNode]) -> Names:
    """Of every sensor and device of the organization that the nodes mention; two queries at most."""
    return dict(_named(organization_id, _mentioned(nodes)))


def teller_of(
    organization_id: int, nodes: Iterable[RuleNode], *, units: Units = AS_STORED, say: Say = str
) -> ChainDescriber:
    """Knows all that the nodes mention, by name and unit; three queries at most. `say` translates phrases."""
    wanted = _mentioned(nodes)
    names = dict(_named(organization_id, wanted))
    return ChainDescriber(names, scales=dict(_scales(organization_id, wanted["sensor"], units)), say=say)


def sentence_of(chain: RuleChain, nodes: Iterable[RuleNode], teller: ChainDescriber | None = None) -> str:
    """The chain in words, with its schedule. `teller`: who knows all that it mentions, where somebody has one already."""
    nodes = list(nodes)
    teller = teller or teller_of(chain.organization_id, nodes)
    text = teller.chain(loading.spec_of(chain, nodes).nodes)
    return f"{_when(chain, teller.say)} {text[:1].lower()}{text[1:]}" if chain.cron and text else text


def graph_of(chain: RuleChain, nodes: Iterable[RuleNode], teller: ChainDescriber | None = None) -> str:
    """The chain drawn, as an SVG element for a page."""
    nodes = list(nodes)
    teller = teller or teller_of(chain.organization_id, nodes)
    specs = loading.spec_of(chain, nodes).nodes
    title = teller.say("Graph of {name}").format(name=chain.name)
    return graph.svg(specs, {spec.name: teller.node(spec) for spec in specs}, title=title, say=teller.say)


def _when(chain: RuleChain, say: Say) -> str:
    if chain.execution_type == RuleChain.ExecutionType.SCHEDULE_ONLY:
        phrase = say("At the times {times} ({zone}):")
    else:
        phrase = say("At the times {times} ({zone}), and with every value reported:")
    return phrase.format(times=chain.cron, zone=chain.timezone)


def _mentioned(nodes: Iterable[RuleNode]) -> dict[str, set[str]]:
    wanted: dict[str, set[str]] = {"sensor": set(), "device": set()}
    for node in nodes:
        for mention in validation.mentions(node, ""):
            wanted[mention.source_type].add(mention.uuid)
    return wanted


def _scales(organization_id: int, sensors: set[str], units: Units) -> Iterator[tuple[tuple[str, str, str], Scale]]:
    for batch in batched(sorted(sensors), validation.LOOKUP_BATCH):
        rows = Variable.objects.filter(sensor__organization_id=organization_id, sensor__uuid__in=batch).exclude(unit="")
        for uuid, name, unit in rows.values_list("sensor__uuid", "name", "unit"):
            yield ("sensor", str(uuid), name), units.scale_of(unit)


def _named(organization_id: int, wanted: Mapping[str, set[str]]) -> Iterator[tuple[tuple[str, str], str]]:
    for source_type, model in (("sensor", Sensor), ("device", Device)):
        for batch in batched(sorted(wanted[source_type]), validation.LOOKUP_BATCH):
            rows = model._default_manager.filter(organization_id=organization_id, uuid__in=batch)
            for uuid, name in rows.values_list("uuid", "name"):
                yield (source_type, str(uuid)), name
