"""Changes of rule chains: a chain and its new nodes in, a validated chain with a new version in the database.

REST and admin both save through `save` and `delete`; all of one chain's changes happen one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TypeVar

from django.db import transaction
from django.db.models import Model

from devices import catalogue
from rules.authoring import validation
from rules.effects import suspension
from rules.engine.exceptions import InvalidChain, Problem
from rules.models import RuleChain, RuleNode
from rules.processing import schedules

MAXIMUM_NAME_LENGTH = 200
Row = TypeVar("Row", bound=Model)


def locked(chain_id: int) -> RuleChain:
    """The chain as it is now, until the end of the transaction unchanged by others. Raises RuleChain.DoesNotExist."""
    found: RuleChain = RuleChain.objects.locked().get(pk=chain_id)
    return found


@transaction.atomic
def save(chain: RuleChain, nodes: Sequence[RuleNode] | None = None, *, by: str = "an edit", lift: bool = False) -> None:
    """Writes the chain and, if given, these nodes in place of all it had; its version grows by one.

    Raises InvalidChain and changes nothing. A chain that keeps its nodes is judged only where `must_be_judged` says so: one
    whose sensor was deleted can still be renamed and switched off. A suspension ends with `lift`, and with new nodes, because
    it was the old ones that failed; `by` says who ended it.
    """
    stored = locked(chain.pk) if chain.pk else None
    chain.suspended_at = stored.suspended_at if stored and nodes is None and not lift else None
    judged = nodes if nodes is not None or not must_be_judged(chain, stored) else list(chain.nodes.all())
    problems = validation.problems_of(chain, judged) if judged is not None else []
    if not schedules.is_unchanged(chain, stored):
        problems = schedules.problems_of(chain) + problems
    if problems:
        raise InvalidChain(problems)
    schedules.plan(chain, stored)
    chain.version = stored.version + 1 if stored else 1
    chain.save()
    if nodes is not None:
        _replace_nodes(chain, nodes)
    if stored and stored.suspended_at and not chain.suspended_at:
        suspension.resume(chain, by)
    catalogue.mark_changed(chain.organization_id)


def switch(chain: RuleChain, *, enabled: bool, by: str) -> None:
    """Switches the chain on or off. Either ends a suspension, because somebody has looked. Raises InvalidChain."""
    chain.enabled = enabled
    save(chain, by=by, lift=True)


@transaction.atomic
def duplicate(chain: RuleChain, *, name: str = "") -> RuleChain:
    """A copy of the chain and its nodes under a new name, switched off. Raises InvalidChain."""
    nodes = [_copied(node, RuleNode) for node in chain.nodes.all()]
    copy = _copied(chain, RuleChain)
    copy.name, copy.enabled = name or _free_name(chain), False
    copy.next_run_at = copy.last_run_at = None
    save(copy, nodes)
    return copy


def _copied(row: Row, model: type[Row]) -> Row:
    """The row without what makes it this one; `save` gives a node its chain."""
    own = {"id", "uuid", "chain", "created_at", "updated_at"}
    return model(
        **{field.name: getattr(row, field.name) for field in model._meta.concrete_fields if field.name not in own}
    )


def _free_name(chain: RuleChain) -> str:
    """As long as a name may be, and in the organization nobody's yet."""
    taken = set(RuleChain.objects.filter(organization=chain.organization_id).values_list("name", flat=True))
    endings = (" (copy)" if number == 1 else f" (copy {number})" for number in count(1))
    return next(
        name for ending in endings if (name := chain.name[: MAXIMUM_NAME_LENGTH - len(ending)] + ending) not in taken
    )


@transaction.atomic
def delete(chain: RuleChain) -> None:
    organization_id = chain.organization_id
    chain.delete()
    catalogue.mark_changed(organization_id)


def must_be_judged(chain: RuleChain, stored: RuleChain | None) -> bool:
    """Whether the nodes that it has must do for something new: it is to run again, or is triggered in another way."""
    if stored is None or chain.stopped:
        return False
    return bool(stored.stopped) or chain.execution_type != stored.execution_type


def _replace_nodes(chain: RuleChain, nodes: Sequence[RuleNode]) -> None:
    """Deletes and inserts instead of updating, so that two nodes can swap their names; uuids stay."""
    chain.nodes.all().delete()
    for position, node in enumerate(nodes):
        node.pk, node.chain, node.position = None, chain, position
        node._state.adding = True
    RuleNode.objects.bulk_create(nodes)


def insert(nodes: list[RuleNode], new: RuleNode, *, after: str | None) -> list[RuleNode]:
    """Links a node in after the one named, or at the end of the main line. The new node's own `next` wins over the old.

    Raises InvalidChain when no node has that name.
    """
    if not nodes:
        return [new]
    previous = _by_name(nodes, after) if after else _end_of_main_line(nodes)
    if previous is None:
        raise InvalidChain([Problem("previous", after, "names no node of this chain")])
    new.next = new.next or previous.next
    previous.next = new.name
    position = nodes.index(previous) + 1
    return [*nodes[:position], new, *nodes[position:]]


def rename(nodes: list[RuleNode], old: str, new: str) -> None:
    """Lets the links that led to a node follow its new name."""
    _relink(nodes, old, new)


def remove(nodes: list[RuleNode], gone: RuleNode) -> list[RuleNode]:
    """Takes a node out and links those before it to its `next`."""
    left = [node for node in nodes if node is not gone]
    _relink(left, gone.name, gone.next)
    return left


def _relink(nodes: list[RuleNode], old: str, new: str) -> None:
    for node in nodes:
        node.next = new if node.next == old else node.next
        node.on_false = new if node.on_false == old else node.on_false
        node.on_failure = new if node.on_failure == old else node.on_failure


def _by_name(nodes: list[RuleNode], name: str) -> RuleNode | None:
    return next((node for node in nodes if node.name == name), None)


def _end_of_main_line(nodes: list[RuleNode]) -> RuleNode:
    """From the node that no other points to along `next`, as far as it leads."""
    pointed_to = {name for node in nodes for name in (node.next, node.on_false, node.on_failure)}
    here = next((node for node in nodes if node.name not in pointed_to), nodes[0])
    seen = {here.name}
    while (following := _by_name(nodes, here.next)) is not None and following.name not in seen:
        seen.add(following.name)
        here = following
    return here
