"""Draw a rule chain as one SVG element. Pure.

Drawn from top to bottom: every node stands below all that lead to it. Colours are the page's own (rules/chains.css), so that it
reads in light and in dark; kinds of nodes and links differ in words and strokes, not in colour alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import fmean
from textwrap import wrap
from typing import NamedTuple
from xml.sax.saxutils import escape

from rules.authoring.sentences import Say
from rules.engine.chains import NodeSpec

MAXIMUM_NODES = 200
WIDTH, GAP_X, GAP_Y = 250, 40, 56
LINE, PADDING, CHARACTERS, MAXIMUM_LINES = 17, 12, 34, 6
LINKS = (("next", "yes"), ("on_false", "no"), ("on_failure", "if it fails"))
THEN = "then"


Item = str | tuple[str, str, int]
"""What stands in a row: a node by its name, or a link that passes through: its node, its kind and the row."""


class _Route(NamedTuple):
    """A link: its kind and label, and what it leads along, from its node to the one it leads to."""

    kind: str
    label: str
    items: Sequence[Item]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """Where an item stands; x and y are of its upper left corner. The height of a link that passes is its row's."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def svg(nodes: Sequence[NodeSpec], texts: Mapping[str, str], *, title: str, say: Say = str) -> str:
    """The drawing; `texts` says by name what each node does. Links that lead nowhere are left out, and cycles drawn.

    `say` translates the words of the drawing itself.
    """
    if not nodes or len(nodes) > MAXIMUM_NODES:
        return f"<p>{escape(_undrawn(len(nodes), say))}</p>"
    by_name = {node.name: node for node in reversed(nodes)}
    lines = {name: _lines(texts.get(name, "")) for name in by_name}
    rows, routes = _rows(by_name, say)
    boxes = _placed(rows, routes, lines)
    width = max(box.x + box.width for box in boxes.values()) + GAP_X / 2
    height = max(box.y + box.height for box in boxes.values()) + PADDING
    drawn = [*_links(routes, boxes), *(_drawn(node, boxes[name], lines[name], say) for name, node in by_name.items())]
    return (
        f'<svg class="chain-graph" role="img" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">'
        f"<title>{escape(title)}</title><desc>{escape(_described(nodes, texts, say))}</desc>"
        f"{''.join(drawn)}</svg>"
    )


def _undrawn(number: int, say: Say) -> str:
    return say("{count} nodes are too many to draw.").format(count=number) if number else say("There are no nodes yet.")


def _described(nodes: Sequence[NodeSpec], texts: Mapping[str, str], say: Say) -> str:
    """For those who cannot see it."""
    parts = []
    for node in nodes:
        links = ", ".join(f"{label}: {target}" for label, target in _labelled(node, say))
        parts.append(f"{node.name} ({say(node.type)}): {texts.get(node.name, '')}" + (f"; {links}" if links else ""))
    return ". ".join(parts)


def _labelled(node: NodeSpec, say: Say) -> Iterator[tuple[str, str]]:
    for kind, label in LINKS:
        target = getattr(node, kind)
        if target:
            yield say(THEN if kind == "next" and node.type != "filter" else label), target


def _rows(nodes: Mapping[str, NodeSpec], say: Say) -> tuple[list[list[Item]], list[_Route]]:
    """What stands in each row, and the links between. A node's row follows from the longest way that leads to it; where a
    link passes a row it takes a place in it, so that it runs behind no node. A link that closes a cycle counts for nothing.
    """
    names = order(nodes)
    position = {name: index for index, name in enumerate(names)}
    depth = dict.fromkeys(names, 0)
    for name in names:
        for target in _targets(nodes[name], nodes):
            if position[target] > position[name]:
                depth[target] = max(depth[target], depth[name] + 1)
    rows: list[list[Item]] = [[] for _ in range(max(depth.values()) + 1)]
    for name in names:
        rows[depth[name]].append(name)
    routes = []
    for name in names:
        for kind, (label, target) in zip(_kinds(nodes[name]), _labelled(nodes[name], say), strict=True):
            if target in nodes:
                passed: list[Item] = [(name, kind, row) for row in range(depth[name] + 1, depth[target])]
                for row, item in enumerate(passed, depth[name] + 1):
                    rows[row].append(item)
                routes.append(_Route(kind, label, [name, *passed, target]))
    return rows, routes


def _placed(
    rows: Sequence[list[Item]], routes: Sequence[_Route], lines: Mapping[str, Sequence[str]]
) -> dict[Item, _Box]:
    """Every row centred, and in it every item as near as can be below those that lead to it."""
    above: dict[Item, list[Item]] = {}
    for route in routes:
        for upper, lower in pairwise(route.items):
            above.setdefault(lower, []).append(upper)
    total = max(sum(_width(item) + GAP_X for item in row) for row in rows)
    boxes: dict[Item, _Box] = {}
    y = float(PADDING)
    for row in rows:
        nearest = {
            item: fmean([boxes[each].middle for each in above.get(item, ()) if each in boxes] or [0]) for item in row
        }
        height = max(PADDING * 2 + LINE * (len(lines[item]) + 2) for item in row if isinstance(item, str))
        x = GAP_X / 2 + (total - sum(_width(item) + GAP_X for item in row)) / 2
        for item in sorted(row, key=nearest.__getitem__):
            own = PADDING * 2 + LINE * (len(lines[item]) + 2) if isinstance(item, str) else height
            boxes[item] = _Box(x=x, y=y, width=_width(item), height=own)
            x += _width(item) + GAP_X
        y += height + GAP_Y
    return boxes


def _width(item: Item) -> float:
    return WIDTH if isinstance(item, str) else 0


def order(nodes: Mapping[str, NodeSpec]) -> list[str]:
    """Every node after those that lead to it, and true branches before false ones; a walk without recursion."""
    pointed_to = {target for name in nodes for target in _targets(nodes[name], nodes)}
    done: dict[str, None] = {}
    seen: set[str] = set()
    for root in sorted(nodes, key=lambda name: name in pointed_to):
        stack = [] if root in seen else [(root, iter(_targets(nodes[root], nodes)[::-1]))]
        seen.add(root)
        while stack:
            name, targets = stack[-1]
            target = next((each for each in targets if each not in seen), None)
            if target is None:
                done[name] = None
                stack.pop()
            else:
                seen.add(target)
                stack.append((target, iter(_targets(nodes[target], nodes)[::-1])))
    return [*reversed(done)]


def _targets(node: NodeSpec, nodes: Mapping[str, NodeSpec]) -> list[str]:
    return [target for target in node.targets if target in nodes]


def _lines(text: str) -> list[str]:
    lines = wrap(text, CHARACTERS)
    return lines if len(lines) <= MAXIMUM_LINES else [*lines[: MAXIMUM_LINES - 1], "…"]


def _drawn(node: NodeSpec, box: _Box, lines: Sequence[str], say: Say) -> str:
    kind = node.type if node.type in ("filter", "transform", "action") else "unknown"
    texts = [("kind", say(node.type)), ("name", _cut(node.name)), *(("text", line) for line in lines)]
    rows = "".join(
        f'<text class="{name}" text-anchor="middle" x="{box.middle:g}" y="{box.y + PADDING + LINE * (index + 0.8):g}">'
        f"{escape(text)}</text>"
        for index, (name, text) in enumerate(texts)
    )
    rect = f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" rx="4"/>'
    return f'<g class="{kind}">{rect}{rows}</g>'


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…"


def _links(routes: Sequence[_Route], boxes: Mapping[Item, _Box]) -> Iterator[str]:
    """Those of one node leave it side by side, in the order of where they lead."""
    for _, group in groupby(routes, key=lambda route: route.items[0]):
        together = sorted(group, key=lambda route: boxes[route.items[1]].middle)
        for index, route in enumerate(together):
            source = boxes[route.items[0]]
            start = source.x + source.width * (index + 1) / (len(together) + 1)
            yield _link(route, [boxes[item] for item in route.items], start)


def _kinds(node: NodeSpec) -> list[str]:
    return [kind for kind, _ in LINKS if getattr(node, kind)]


def _link(route: _Route, along: Sequence[_Box], start: float) -> str:
    """A curve from the lower edge of one box to the upper edge of another, with its label near the start."""
    source, *passed, target = along
    x, y = start, source.y + source.height
    path = f"M{x:g},{y:g}"
    for box in passed:
        path += f"{_curve(x, y, box.middle, box.y)} V{box.y + box.height:g}"
        x, y = box.middle, box.y + box.height
    end = target.middle
    path += _curve(x, y, end, target.y - 7)
    tip = f"M{end - 5:g},{target.y - 9:g} h10 L{end:g},{target.y:g} Z"
    aside = along[1].middle - start
    beside, anchor = (start - 8, "end") if aside > 0 else (start + 8, "start")  # the curve, not on it
    return (
        f'<g class="{route.kind}"><path class="link" d="{path}"/><path class="tip" d="{tip}"/>'
        f'<text class="label" text-anchor="{anchor}" x="{beside:g}" y="{source.y + source.height + 18:g}">'
        f"{escape(route.label)}</text></g>"
    )


def _curve(x1: float, y1: float, x2: float, y2: float) -> str:
    bend = max(GAP_Y / 2, (y2 - y1) / 2)
    return f" C{x1:g},{y1 + bend:g} {x2:g},{y2 - bend:g} {x2:g},{y2:g}"
