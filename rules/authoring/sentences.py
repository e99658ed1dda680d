"""Describe a rule chain in a sentence that a grower can read. Pure.

Chains that cannot be compiled are described as far as they can be read, because those are the ones people look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rules.engine.chains import NodeSpec
from rules.engine.conditions import MAX_DEPTH
from rules.engine.durations import check_duration
from rules.engine.operators import OPERATORS
from rules.engine.temporal import RELEASE_KEYS

Names = Mapping[tuple[str, str], str]
"""(source type, lower-case uuid) -> name."""

MAXIMUM_CHARACTERS = 5_000
MAXIMUM_NODES = 100
"""Of a longer chain only the beginning is described."""
_SHOWN_UUID = 8
_SHOWN_ITEMS = 5

TRANSFORMS: Mapping[str, str] = {
    "add": "take {key} plus {value}{target}",
    "subtract": "take {key} minus {value}{target}",
    "multiply": "take {key} times {value}{target}",
    "divide": "take {key} divided by {value}{target}",
    "scale": "take {key} times {factor}, plus {offset}{target}",
    "rename": "call {key} {target_name}",
    "set": "take {target_name} as {value}",
}


class ChainDescriber:
    """Says what the nodes of one chain do; `names` gives the names of what they mention."""

    def __init__(self, names: Names) -> None:
        self._names = names

    def chain(self, nodes: Sequence[NodeSpec]) -> str:
        """The whole chain, from the node that no other points to; empty for a chain without nodes."""
        by_name = {node.name: node for node in reversed(nodes)}
        pointed_to = {name for node in nodes for name in node.targets}
        start = next((node for node in nodes if node.name not in pointed_to), nodes[0] if nodes else None)
        if start is None:
            return ""
        text = self._from(start, by_name, seen=set())
        shown = text if len(text) <= MAXIMUM_CHARACTERS else text[:MAXIMUM_CHARACTERS] + "…"
        return shown[0].upper() + shown[1:] + ("" if shown.endswith("…") else ".")

    def node(self, node: NodeSpec) -> str:
        """One node alone."""
        config = node.config if isinstance(node.config, Mapping) else {}
        if node.type == "filter":
            return self.condition(config)
        if node.type == "transform":
            return _transform(config)
        kind = config.get("type")
        action = ACTIONS.get(kind) if isinstance(kind, str) else None
        text = action(self, config) if action else f"do {_value(kind)}"
        return f"{text}, at most once in {_duration(config['cooldown'])}" if "cooldown" in config else text

    def condition(self, config: object, depth: int = 0) -> str:
        """A leaf, or a group with its parts."""
        if not isinstance(config, Mapping):
            return _value(config)
        parts = config.get("expressions")
        if not isinstance(parts, list):
            return self._leaf(config)
        if depth > MAX_DEPTH:
            return "…"
        texts = [self.condition(part, depth + 1) for part in parts]
        kinds = [isinstance(part, Mapping) and "expressions" in part for part in parts]
        grouped = [f"({text})" if group else text for text, group in zip(texts, kinds, strict=True)]
        return (" or " if config.get("type") == "OR" else " and ").join(grouped)

    def source(self, source_type: object, uuid: object) -> str:
        """Its name; of one that does not exist, the beginning of its uuid."""
        known = self._names.get((str(source_type), str(uuid).lower()))
        return known or f"{source_type} {str(uuid)[:_SHOWN_UUID]}"

    def _leaf(self, leaf: Mapping[str, object]) -> str:
        operator, value = _value(leaf.get("operator")), _value(leaf.get("value"))
        operand = {
            "value": _range(leaf) if operator == "between" else value,
            "duration": _duration(leaf.get("duration")),
        }
        text = f"{self.source(leaf.get('sourceType'), leaf.get('UUID'))} {_value(leaf.get('key'))} "
        if "per" in leaf:
            text = f"the change of {text}in {_duration(leaf['per'])} "
        elif "increase" in leaf:
            text = f"the increase of {text}in {_duration(leaf['increase'])} "
        elif "median" in leaf:
            text = f"the median of the newest {_value(leaf['median'])} of {text}"
        known = OPERATORS.get(operator)
        text += known.predicate.format(**operand) if known else f"{operator} {value}"
        return text + "".join(phrase.format(_duration(leaf[key])) for key, phrase in _OVER_TIME.items() if key in leaf)

    def _from(self, node: NodeSpec, by_name: Mapping[str, NodeSpec], seen: set[str]) -> str:
        """What happens from here on. Where branches meet, the second refers to the first."""
        if node.name in seen:
            return f"continue with “{node.name}”"
        if len(seen) >= MAXIMUM_NODES:
            return "…"
        seen.add(node.name)
        text, node = self._joined(node, by_name, seen)
        following = by_name.get(node.next or "")
        if node.type == "filter":
            return self._branches(text, node, by_name, seen)
        failing = by_name.get(node.on_failure or "")
        if failing:
            text += f" (if that fails: {self._from(failing, by_name, seen)})"
        if following is None:
            return text
        rest = self._from(following, by_name, seen)
        return f"{text}, then {rest}" if following.type != "filter" else f"{text}; then {rest}"

    def _joined(self, node: NodeSpec, by_name: Mapping[str, NodeSpec], seen: set[str]) -> tuple[str, NodeSpec]:
        """Filters that follow one another and go nowhere when false are one condition."""
        texts = [self.node(node)]
        while node.type == "filter" and not node.on_false:
            following = by_name.get(node.next or "")
            if following is None or following.type != "filter" or following.on_false or following.name in seen:
                break
            seen.add(following.name)
            texts.append(self.node(following))
            node = following
        return " and ".join(f"({text})" if len(texts) > 1 and " or " in text else text for text in texts), node

    def _branches(self, text: str, node: NodeSpec, by_name: Mapping[str, NodeSpec], seen: set[str]) -> str:
        branches = [by_name.get(node.next or ""), by_name.get(node.on_false or "")]
        yes, no = (
            (self._from(each, by_name, seen), each.type == "filter") if each else ("do nothing", False)
            for each in branches
        )
        then = f"when {text}, {_bracketed(*yes)}"
        return f"{then}; otherwise {_bracketed(*no)}" if branches[1] else then

    def _command(self, config: Mapping[str, object]) -> str:
        value = f"the value of {_value(config['valueFrom'])}" if "valueFrom" in config else _value(config.get("value"))
        again = ", also when it is so already" if config.get("force") is True else ""
        return (
            f"set {self.source('device', config.get('deviceUuid'))} {_value(config.get('stateName'))} to {value}{again}"
        )

    def _notify(self, config: Mapping[str, object]) -> str:
        text = f"notify people “{_value(config.get('title') or config.get('message'))}”"
        return f"{text} ({_value(config['severity'])})" if "severity" in config else text

    def _raise_alarm(self, config: Mapping[str, object]) -> str:
        severity = f"{_value(config['severity'])} " if "severity" in config else ""
        return f"raise the {severity}alarm “{_value(config.get('alarm'))}”"

    def _clear_alarm(self, config: Mapping[str, object]) -> str:
        return f"clear the alarm “{_value(config.get('alarm'))}”"


ACTIONS: Mapping[str, Callable[[ChainDescriber, Mapping[str, object]], str]] = {
    "device_command": ChainDescriber._command,
    "notify": ChainDescriber._notify,
    "raise_alarm": ChainDescriber._raise_alarm,
    "clear_alarm": ChainDescriber._clear_alarm,
}

_OVER_TIME: Mapping[str, str] = {
    **dict.fromkeys(RELEASE_KEYS, " (until it is beyond {})"),
    "for": " for {}",
    "times": " at least {} times",
    "within": " within {}",
}


def _bracketed(text: str, is_filter: bool) -> str:
    """A branch that begins with a condition of its own, set apart from what comes after it."""
    return f"({text})" if is_filter else text


def _transform(config: Mapping[str, object]) -> str:
    operation, key, target = _value(config.get("operation")), config.get("key"), config.get("target")
    phrase = TRANSFORMS.get(operation)
    if phrase is None:
        return f"{operation} {_value(key)}"
    renamed = f" as {_value(target)}" if target is not None and target != key else ""
    texts = {name: _value(config.get(name)) for name in ("key", "value", "factor")}
    return phrase.format(**texts, offset=_value(config.get("offset", 0)), target=renamed, target_name=_value(target))


def _range(leaf: Mapping[str, object]) -> str:
    value = leaf.get("value")
    if isinstance(value, list) and len(value) == 2:
        return f"{_value(value[0])} and {_value(value[1])}"
    return _value(value)


def _value(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        items = [_value(item) for item in value[:_SHOWN_ITEMS]]
        return ", ".join([*items, "…"] if len(value) > _SHOWN_ITEMS else items)
    return str(value)[:100]


def _duration(value: object) -> str:
    """5 m of 5m; anything else, such as how many times, as it is."""
    if isinstance(value, str) and check_duration(value) is None:
        return f"{value[:-1]} {value[-1]}"
    return _value(value)
