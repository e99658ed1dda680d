"""Find every reason why a rule chain may not be saved.

`chains.compile` judges the graph and the configurations. What it cannot know is asked here of the database: whether the
sensors, devices and states that the nodes name exist in the chain's organization, and allow the values they are given.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from aemos.lib.batched import batched
from devices.models import Device, DeviceState, Sensor
from rules.engine import chains
from rules.engine.conditions import MAX_DEPTH, SOURCE_TYPES
from rules.engine.exceptions import InvalidChain, Problem
from rules.engine.fields import check_uuid
from rules.models import RuleChain, RuleNode
from rules.processing.loading import spec_of

LOOKUP_BATCH = 5_000  # SQLite takes no more than 32,766 values in one query


def problems_of(chain: RuleChain, nodes: Sequence[RuleNode]) -> list[Problem]:
    """Every problem of the chain as it would be with these nodes; empty when it may be saved."""
    found = list(compile_problems(chain, nodes))
    if len(nodes) > chains.MAX_STEPS:
        return found
    if not found:
        found.extend(_text_problems(nodes))
    paths = {problem.path for problem in found}
    return found + [problem for problem in _stranger_problems(chain, nodes) if problem.path not in paths]


def compile_problems(chain: RuleChain, nodes: Sequence[RuleNode]) -> Sequence[Problem]:
    """Those that keep it from running; the others keep it from being saved."""
    try:
        chains.compile(spec_of(chain, nodes))
    except InvalidChain as error:
        return error.problems
    return []


def _text_problems(nodes: Sequence[RuleNode]) -> Iterator[Problem]:
    """Configurations that PostgreSQL cannot store as JSON."""
    for position, node in enumerate(nodes):
        if "\\u0000" in json.dumps(node.config):
            yield Problem(f"nodes[{position}].config", None, "holds a NUL character")


class Mention(NamedTuple):
    """A sensor or device that a filter leaf or an action names: `path` is where that stands, `config` what stands there."""

    path: str
    uuid_key: str
    source_type: str
    uuid: str
    config: Mapping[str, object]


Known = dict[tuple[str, str], dict[str, DeviceState | None]]
"""(source type, uuid) -> its variables or states by name; only what the chain's organization has."""


def _stranger_problems(chain: RuleChain, nodes: Sequence[RuleNode]) -> Iterator[Problem]:
    found = [mention for position, node in enumerate(nodes) for mention in mentions(node, f"nodes[{position}].config")]
    known = _sensors(chain, found) | _devices(chain, found)
    derived = _derived(nodes)
    for mention in found:
        fields = known.get((mention.source_type, mention.uuid))
        if fields is None:
            path = f"{mention.path}.{mention.uuid_key}"
            yield Problem(path, mention.uuid, f"is no {mention.source_type} of this organization")
        elif mention.uuid_key == "UUID":
            yield from _key_problems(mention, fields, derived)
        else:
            yield from _command_problems(mention, fields)


def _derived(nodes: Sequence[RuleNode]) -> list[object]:
    """What transforms call their results. A list, because a broken configuration may hold anything there."""
    transforms = (node.config for node in nodes if node.type == RuleNode.Type.TRANSFORM)
    return [config.get("target") for config in transforms if isinstance(config, Mapping)]


def mentions(node: RuleNode, path: str) -> Iterator[Mention]:
    """What the node names, as far as it can be read; what cannot be read is for compile to complain of."""
    if node.type == RuleNode.Type.ACTION and isinstance(node.config, Mapping):
        yield from _mention(path, "deviceUuid", "device", node.config)
    elif node.type == RuleNode.Type.FILTER:
        for where, leaf in leaves(node.config, path):
            yield from _mention(where, "UUID", leaf.get("sourceType"), leaf)


def _mention(path: str, uuid_key: str, source_type: object, config: Mapping[str, object]) -> Iterator[Mention]:
    uuid = config.get(uuid_key)
    if isinstance(uuid, str) and check_uuid(uuid) is None and source_type in SOURCE_TYPES:
        yield Mention(path, uuid_key, str(source_type), uuid.lower(), config)


def leaves(config: object, path: str, depth: int = 0) -> Iterator[tuple[str, Mapping[str, object]]]:
    if not isinstance(config, Mapping) or depth > MAX_DEPTH:
        return
    expressions = config.get("expressions")
    if not isinstance(expressions, list):
        yield path, config
        return
    for index, expression in enumerate(expressions):
        yield from leaves(expression, f"{path}.expressions[{index}]", depth + 1)


def _sensors(chain: RuleChain, mentions: Sequence[Mention]) -> Known:
    found: Known = {}
    for uuids in _batches(mentions, "sensor"):
        rows = Sensor.objects.filter(organization_id=chain.organization_id, uuid__in=uuids).prefetch_related(
            "variables"
        )
        found |= {("sensor", str(row.uuid)): dict.fromkeys(v.name for v in row.variables.all()) for row in rows}
    return found


def _devices(chain: RuleChain, mentions: Sequence[Mention]) -> Known:
    found: Known = {}
    for uuids in _batches(mentions, "device"):
        rows = Device.objects.filter(organization_id=chain.organization_id, uuid__in=uuids).prefetch_related("states")
        found |= {("device", str(row.uuid)): {state.name: state for state in row.states.all()} for row in rows}
    return found


def _batches(mentions: Sequence[Mention], source_type: str) -> Iterator[Sequence[str]]:
    wanted = sorted({mention.uuid for mention in mentions if mention.source_type == source_type})
    return batched(wanted, LOOKUP_BATCH)


def _key_problems(mention: Mention, fields: Collection[str], derived: Collection[object]) -> Iterator[Problem]:
    """A key that the source never sends and no transform makes: the filter could never be true."""
    key = mention.config.get("key")
    if isinstance(key, str) and key and key not in fields and key not in derived:
        kind = "variable" if mention.source_type == "sensor" else "state"
        yield Problem(f"{mention.path}.key", key, f"is no {kind} of this {mention.source_type}; {_has(fields)}")


def _command_problems(mention: Mention, states: Mapping[str, DeviceState | None]) -> Iterator[Problem]:
    name, value = mention.config.get("stateName"), mention.config.get("value")
    if not isinstance(name, str) or not name:
        return
    state = states.get(name)
    if state is None:
        yield Problem(f"{mention.path}.stateName", name, f"is no state of this device; {_has(states)}")
    elif "value" in mention.config and (problem := state.problem_with(value)):
        yield Problem(f"{mention.path}.value", value, problem)


def _has(names: Collection[str]) -> str:
    return f"it has {', '.join(sorted(names))}" if names else "it has none"
