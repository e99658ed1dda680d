"""A rule chain for people: the names of what it mentions, its sentence and its graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from aemos.lib.batched import batched
from devices.models import Device, Sensor
from rules.authoring import graph, validation
from rules.authoring.sentences import ChainDescriber, Names
from rules.models import RuleChain, RuleNode
from rules.processing import loading


def names_of(organization_id: int, nodes: Iterable[RuleNode]) -> Names:
    """Of every sensor and device of the organization that the nodes mention; two queries at most."""
    wanted: dict[str, set[str]] = {"sensor": set(), "device": set()}
    for node in nodes:
        for mention in validation.mentions(node, ""):
            wanted[mention.source_type].add(mention.uuid)
    return dict(_named(organization_id, wanted))


def sentence_of(chain: RuleChain, nodes: Iterable[RuleNode], names: Names | None = None) -> str:
    """The chain in words, with its schedule. `names`: of all that it mentions, where somebody has them already."""
    nodes = list(nodes)
    names = names_of(chain.organization_id, nodes) if names is None else names
    text = ChainDescriber(names).chain(loading.spec_of(chain, nodes).nodes)
    return f"{_when(chain)} {text[:1].lower()}{text[1:]}" if chain.cron and text else text


def graph_of(chain: RuleChain, nodes: Iterable[RuleNode]) -> str:
    """The chain drawn, as an SVG element for a page."""
    nodes = list(nodes)
    teller = ChainDescriber(names_of(chain.organization_id, nodes))
    specs = loading.spec_of(chain, nodes).nodes
    return graph.svg(specs, {spec.name: teller.node(spec) for spec in specs}, title=f"Graph of {chain.name}")


def _when(chain: RuleChain) -> str:
    only = chain.execution_type == RuleChain.ExecutionType.SCHEDULE_ONLY
    also = "" if only else ", and with every value reported"
    return f"At the times {chain.cron} ({chain.timezone}){also}:"


def _named(organization_id: int, wanted: Mapping[str, set[str]]) -> Iterator[tuple[tuple[str, str], str]]:
    for source_type, model in (("sensor", Sensor), ("device", Device)):
        for batch in batched(sorted(wanted[source_type]), validation.LOOKUP_BATCH):
            rows = model._default_manager.filter(organization_id=organization_id, uuid__in=batch)
            for uuid, name in rows.values_list("uuid", "name"):
                yield (source_type, str(uuid)), name
