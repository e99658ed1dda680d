"""From the nodes of a rule chain to a `Chain`, which turns one event into an `Outcome` with its effects."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol

import msgspec

from rules.engine.actions import Command, compile_action
from rules.engine.conditions import compile_condition
from rules.engine.context import Run, Trigger
from rules.engine.effect_types import DeviceCommand, Effect
from rules.engine.exceptions import ChainFailed, ErrorCode, InvalidChain, Problem
from rules.engine.fields import check_name
from rules.engine.transforms import compile_transform
from rules.engine.values import Reference, Source, TemporalCondition, Timer

MAX_STEPS = 1_000
"""Nodes in one chain, and so steps in one run, because no run meets a node twice."""

MAX_REFERENCES = 10_000
"""Variables that may trigger one chain, because every one of them is an entry in the index of every worker."""

SHOWN_NAMES = 10

NO_WAKES: Mapping[Source, int] = MappingProxyType({})

ERROR_KEY = "error"
"""Under which the nodes after a failed one find what went wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """One configured node: `type` is filter, transform or action; only a filter may have `on_false`.

    What follows at `on_failure` finds the error's text among the values, as `error`.
    """

    name: str
    type: str
    config: Mapping[str, object]
    next: str | None = None
    on_false: str | None = None
    on_failure: str | None = None

    @property
    def targets(self) -> list[str]:
        """The names of the nodes that may follow: true before false before failed."""
        return [name for name in (self.next, self.on_false, self.on_failure) if name]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSpec:
    """One configured chain; the order of `nodes` means nothing but the position that problems name."""

    uuid: str
    version: int
    nodes: tuple[NodeSpec, ...]
    is_scheduled: bool = False


class Outcome(msgspec.Struct, frozen=True):
    """What a run came to: its effects in order, the references it found without a value (each once), its steps.

    `filters_true` and `filters_false` are how many of the steps were filters that said so; `stopped_at` is the filter that
    said no and had nowhere to go, or None if the chain ran to an end. `wakes` is when the outcome may be another one although
    the source says nothing, in microseconds since 1970 (UTC).
    """

    effects: tuple[Effect, ...]
    missing: tuple[Reference, ...]
    stopped_at: str | None
    steps: int
    filters_true: int = 0
    filters_false: int = 0
    wakes: Mapping[Source, int] = NO_WAKES


class _Node:
    """A compiled node, linked to those that follow it; `execute` is false only where a filter says no."""

    __slots__ = ("execute", "is_filter", "name", "on_failure", "on_false", "on_true")

    def __init__(self, name: str, execute: Callable[[Run], bool], *, is_filter: bool) -> None:
        self.name = name
        self.execute = execute
        self.is_filter = is_filter
        self.on_true: _Node | None = None
        self.on_false: _Node | None = None
        self.on_failure: _Node | None = None


class StepListener(Protocol):
    """Told of each step of a run after it: whether the node was true, or how it failed."""

    def __call__(self, node: str, run: Run, *, passed: bool, error: ChainFailed | None) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain:
    """A compiled chain; safe to keep and to run any number of times, since a run leaves nothing behind.

    `references` trigger the chain and must be known to the lookup: what its filters read and, where a filter reads
    the result of a transform before it, also what that transform reads. `watches` are what its conditions over time
    remember, which the caller keeps; `timers` those that time alone can make true. `commands` are the devices and states
    that its actions address; whether they exist in the organization is the caller's to check. `questioned` are the references of
    which its filters ask whether they are believed. `main_source` is what its first condition reads: there its alarms are,
    whatever made it run.
    """

    spec: ChainSpec
    references: frozenset[Reference]
    watches: tuple[TemporalCondition, ...]
    timers: tuple[Timer, ...]
    commands: tuple[Command, ...]
    questioned: frozenset[Reference]
    main_source: Source | None
    _start: _Node = field(repr=False)

    @property
    def timers_key(self) -> str:
        """The same as long as what time alone can change is the same."""
        return ",".join(sorted({timer.key for timer in self.timers}))

    def run(self, trigger: Trigger, on_step: StepListener | None = None) -> Outcome:
        """Run the chain for one event; raises ChainFailed if a node cannot do its work and names none for that case."""
        run = Run(trigger)
        steps = filters_true = filters_false = 0
        stopped_at: str | None = None
        node: _Node | None = self._start
        while node is not None:
            steps += 1
            if time.monotonic() > trigger.deadline:
                raise self._late(node)
            try:
                passed, error = node.execute(run), None
                if node.on_failure is not None:
                    self._require_no_veto(node, run)
            except ChainFailed as failure:
                if node.on_failure is None:
                    raise
                passed, error = False, failure
            if on_step:
                on_step(node.name, run, passed=passed, error=error)
            if passed:
                filters_true += node.is_filter
                node = node.on_true
            elif error:
                run.values[ERROR_KEY] = error.cause
                node = node.on_failure
            else:
                filters_false += 1
                if node.on_false is None:
                    stopped_at = node.name
                node = node.on_false
        return Outcome(
            effects=tuple(run.effects),
            missing=tuple(dict.fromkeys(run.missing)) if run.missing else (),
            stopped_at=stopped_at,
            steps=steps,
            filters_true=filters_true,
            filters_false=filters_false,
            wakes=run.wakes or NO_WAKES,
        )

    def _require_no_veto(self, node: _Node, run: Run) -> None:
        """Raises ChainFailed when the command that the node asks for is vetoed. It stays among the effects, to be counted."""
        command = run.effects[-1] if run.effects else None
        if not isinstance(command, DeviceCommand) or command.node != node.name:
            return
        if veto := run.trigger.vetoes(command.device_uuid, command.state_name, command.value):
            run.effects[-1] = msgspec.structs.replace(command, vetoed=True)
            raise ChainFailed(self.spec.uuid, node.name, veto)

    def _late(self, node: _Node) -> ChainFailed:
        cause = "the chain took too long and was stopped here"
        return ChainFailed(self.spec.uuid, node.name, cause, code=ErrorCode.RULE_CHAIN_TIMEOUT)


def compile(spec: ChainSpec) -> Chain:
    """Judge and compile a chain; the only judge there is, asked on save and on load.

    A valid chain has names that are unique, links that lead to its own nodes, one node to start from, no cycle and, unless
    it runs on a schedule, at least one filter. It need not have an action.

    Raises InvalidChain with every problem of the chain, except that a chain of too many nodes is refused unread.
    """
    if len(spec.nodes) > MAX_STEPS:
        raise InvalidChain([Problem("nodes", len(spec.nodes), f"must not have more than {MAX_STEPS} nodes")])
    problems = _name_problems(spec.nodes)
    edges = _edges(spec.nodes, problems)
    order = _topological_order(spec.nodes, edges, problems)
    start = _find_start(spec.nodes, edges, problems)
    parts = _parts(spec, problems)
    if problems:
        raise InvalidChain(problems)
    references = _triggers(order, edges, parts, problems)
    if problems:
        raise InvalidChain(problems)
    if len(references) > MAX_REFERENCES:
        raise InvalidChain([Problem("nodes", None, f"must not read more than {MAX_REFERENCES} variables")])
    return Chain(
        spec=spec,
        references=references,
        watches=tuple({watch.key: watch for part in parts for watch in part.watches}.values()),
        timers=tuple(dict.fromkeys(timer for part in parts for timer in part.timers)),
        commands=tuple(command for part in parts for command in part.commands),
        questioned=frozenset(reference for part in parts for reference in part.questioned),
        main_source=next((first[:2] for position in order if (first := parts[position].first)), None),
        _start=_link(spec.nodes, edges, parts)[start],
    )


Edges = list[dict[str, int]]
"""Per node position: the link's name (next, onFalse, onFailure) -> the position it leads to."""


def _name_problems(nodes: tuple[NodeSpec, ...]) -> list[Problem]:
    problems = []
    seen: set[str] = set()
    for position, node in enumerate(nodes):
        if (complaint := check_name(node.name)) is not None:
            problems.append(Problem(f"nodes[{position}].name", node.name, complaint))
        elif node.name in seen:
            problems.append(Problem(f"nodes[{position}].name", node.name, "is the name of an earlier node"))
        seen.add(node.name)
    return problems


def _edges(nodes: tuple[NodeSpec, ...], problems: list[Problem]) -> Edges:
    """Resolve the names of all links; of nodes with the same name the first is meant."""
    positions = {node.name: position for position, node in reversed(list(enumerate(nodes)))}
    edges: Edges = [{} for _ in nodes]
    for position, node in enumerate(nodes):
        for link, name in (("next", node.next), ("onFalse", node.on_false), ("onFailure", node.on_failure)):
            if name is None:
                continue
            if name in positions:
                edges[position][link] = positions[name]
            else:
                problems.append(Problem(f"nodes[{position}].{link}", name, "names no node of this chain"))
        if node.on_false is not None and node.type != "filter":
            problems.append(Problem(f"nodes[{position}].onFalse", node.on_false, "is for filters only"))
        if node.on_failure is not None and node.type == "filter":
            problems.append(Problem(f"nodes[{position}].onFailure", node.on_failure, "a filter cannot fail"))
    return edges


def _topological_order(nodes: tuple[NodeSpec, ...], edges: Edges, problems: list[Problem]) -> list[int]:
    """Order the positions so that every link leads forward, and add a problem for every link that closes a cycle.

    A depth-first walk without recursion: `path` holds the nodes from the root to here, each with its links to come.
    """
    done: dict[int, None] = {}
    for root in range(len(nodes)):
        path: dict[int, Iterator[tuple[str, int]]] = {} if root in done else {root: iter(edges[root].items())}
        while path:
            here = next(reversed(path))
            for link, target in path[here]:
                if target in path:
                    problems.append(_cycle(nodes, [*path], here=here, link=link, target=target))
                elif target not in done:
                    path[target] = iter(edges[target].items())
                    break
            else:
                del path[here]
                done[here] = None
    return [*reversed(done)]


def _cycle(nodes: tuple[NodeSpec, ...], path: list[int], *, here: int, link: str, target: int) -> Problem:
    names = [nodes[position].name for position in path[path.index(target) :]]
    message = f"closes a cycle of {_count(len(names))}: {_listed([*names, names[0]], ' -> ')}"
    return Problem(f"nodes[{here}].{link}", nodes[target].name, message)


def _find_start(nodes: tuple[NodeSpec, ...], edges: Edges, problems: list[Problem]) -> int:
    """Find the position of the one node that no other points to; where there is none, the cycle is the problem."""
    pointed_to = {target for source, links in enumerate(edges) for target in links.values() if target != source}
    first_of_name = {node.name: position for position, node in reversed(list(enumerate(nodes)))}
    starts = sorted(set(first_of_name.values()) - pointed_to)
    if len(starts) > 1:
        names = [nodes[position].name for position in starts]
        message = f"must have one start, but no other node points to {_count(len(names))}: {_listed(names, ', ')}"
        problems.append(Problem("nodes", len(names), message))
    return starts[0] if starts else 0


def _count(number: int) -> str:
    return "1 node" if number == 1 else f"{number} nodes"


def _listed(names: list[str], separator: str) -> str:
    return separator.join([*names[:SHOWN_NAMES], "..."] if len(names) > SHOWN_NAMES else names)


class _Part(NamedTuple):
    """What one node's config compiles to; `derives` is a transform's (target, key), without a key for a fixed value."""

    execute: Callable[[Run], bool]
    references: frozenset[Reference] = frozenset()
    watches: tuple[TemporalCondition, ...] = ()
    timers: tuple[Timer, ...] = ()
    derives: tuple[str, str | None] | None = None
    commands: tuple[Command, ...] = ()
    questioned: frozenset[Reference] = frozenset()
    first: Reference | None = None


def _filter(node: NodeSpec, *, chain_uuid: str, path: str) -> _Part:
    condition = compile_condition(node.config, path=path)
    return _Part(
        condition.evaluate,
        references=condition.references,
        watches=condition.watches,
        timers=condition.timers,
        questioned=condition.questioned,
        first=condition.first,
    )


def _transform(node: NodeSpec, *, chain_uuid: str, path: str) -> _Part:
    apply, key, target = compile_transform(node.config, chain_uuid=chain_uuid, node=node.name, path=path)

    def execute(run: Run) -> bool:
        apply(run.values)
        return True

    return _Part(execute, derives=(target, key))


def _action(node: NodeSpec, *, chain_uuid: str, path: str) -> _Part:
    act, commands = compile_action(node.config, chain_uuid=chain_uuid, node=node.name, path=path)

    def execute(run: Run) -> bool:
        run.effects.append(act(run))
        return True

    return _Part(execute, commands=commands)


NODE_TYPES = {"filter": _filter, "transform": _transform, "action": _action}


def _parts(spec: ChainSpec, problems: list[Problem]) -> list[_Part]:
    """Compile every node's config; the result has a part for every node unless `problems` grew."""
    parts = []
    for position, node in enumerate(spec.nodes):
        if (compile_part := NODE_TYPES.get(node.type)) is None:
            message = f"must be one of {', '.join(NODE_TYPES)}"
            problems.append(Problem(f"nodes[{position}].type", node.type, message))
            continue
        try:
            parts.append(compile_part(node, chain_uuid=spec.uuid, path=f"nodes[{position}].config"))
        except InvalidChain as error:
            problems.extend(error.problems)
    if not spec.nodes:
        problems.append(Problem("nodes", 0, "must have a node"))
    elif not spec.is_scheduled and all(node.type != "filter" for node in spec.nodes):
        problems.append(Problem("nodes", len(spec.nodes), "must have a filter, or nothing can trigger the chain"))
    return parts


def _triggers(order: list[int], edges: Edges, parts: list[_Part], problems: list[Problem]) -> frozenset[Reference]:
    """Gather what the filters read, and behind each derived key what it may be derived from on the way there.

    Stops soon after MAX_REFERENCES: derived keys multiply, and a small configuration could fill the memory.
    """
    references: set[Reference] = set()
    arriving: defaultdict[int, dict[str, frozenset[str]]] = defaultdict(dict)
    for position in order:
        part = parts[position]
        derived = arriving.pop(position, {})
        problems += [_made_by_transform(position, watch) for watch in part.watches if watch.reference.key in derived]
        for reference in part.references:
            references.add(reference)
            references.update(reference._replace(key=key) for key in derived.get(reference.key, ()))
        if len(references) > MAX_REFERENCES:
            break
        if part.derives is not None:
            target, key = part.derives
            sources = frozenset() if key is None else derived.get(key, frozenset()) | {key}
            derived = {**derived, target: sources}
        for successor in {*edges[position].values()}:
            merged = arriving[successor]
            for target, keys in derived.items():
                merged[target] = merged[target] | keys if target in merged else keys
    return frozenset(references)


def _made_by_transform(position: int, watch: TemporalCondition) -> Problem:
    """Conditions over time observe every reading, whether or not a run comes by the transform."""
    message = "is made by a transform before it, which a condition over time does not see: ask for the original value"
    return Problem(f"nodes[{position}].config", watch.reference.key, message)


def _link(nodes: tuple[NodeSpec, ...], edges: Edges, parts: list[_Part]) -> list[_Node]:
    linked = [
        _Node(node.name, part.execute, is_filter=node.type == "filter") for node, part in zip(nodes, parts, strict=True)
    ]
    for node, links in zip(linked, edges, strict=True):
        node.on_true = linked[links["next"]] if "next" in links else None
        node.on_false = linked[links["onFalse"]] if "onFalse" in links else None
        node.on_failure = linked[links["onFailure"]] if "onFailure" in links else None
    return linked
