"""Load rule chains from the database and compile them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

from django.db.models import Model, QuerySet

from aemos.lib.batched import batched
from rules.engine import chains
from rules.engine.chains import Chain, ChainSpec, NodeSpec
from rules.engine.exceptions import InvalidChain
from rules.models import RuleChain, RuleNode

# Rows named in one query; SQLite takes 32,766 values.
LOOKUP_BATCH = 5_000
M = TypeVar("M", bound=Model)


def spec_of(chain: RuleChain, nodes: Iterable[RuleNode]) -> ChainSpec:
    """What `chains.compile` takes, from rows."""
    specs = (
        NodeSpec(
            name=node.name,
            type=node.type,
            config=node.config,
            next=node.next or None,
            on_false=node.on_false or None,
            on_failure=node.on_failure or None,
        )
        for node in nodes
    )
    is_scheduled = chain.execution_type != RuleChain.ExecutionType.EVENT_TRIGGERED
    return ChainSpec(uuid=str(chain.uuid), version=chain.version, nodes=tuple(specs), is_scheduled=is_scheduled)


def compiled(ids: Collection[int]) -> Iterator[tuple[RuleChain, Chain | InvalidChain]]:
    """The chains with what they compile to, or why they do not. Nodes are read after their chain: its version is never newer."""
    for rows in batches(ids, RuleChain.objects.all(), "pk"):
        found = list(rows)
        nodes: defaultdict[int, list[RuleNode]] = defaultdict(list)
        for node in RuleNode.objects.filter(chain_id__in=[row.pk for row in found]).order_by("position", "id"):
            nodes[node.chain_id].append(node)
        for row in found:
            try:
                yield row, chains.compile(spec_of(row, nodes[row.pk]))
            except InvalidChain as error:
                yield row, error


def batches(values: Collection[int], rows: QuerySet[M], field: str) -> Iterator[QuerySet[M]]:
    """The rows whose field has one of the values, in as many queries as the number of values needs."""
    for batch in batched(sorted(values), LOOKUP_BATCH):
        yield rows.filter(**{f"{field}__in": batch})
