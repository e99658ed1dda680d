"""The graph of a rule chain: its nodes and a text for each in, one SVG element for a page out. Pure.

Drawn from top to bottom: every node stands below all that lead to it. Colours are the page's own, so that it reads in light
and in dark; kinds of nodes and links differ in words and strokes, not in colour alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from xml.sax.saxutils import escape

from rules.chains import NodeSpec

MAXIMUM_NODES = 200
WIDTH, GAP_X, GAP_Y = 250, 40, 56
LINE, PADDING, CHARACTERS, MAXIMUM_LINES = 17, 12, 34, 6
LINKS = (("next", "yes"), ("on_false", "no"), ("on_failure", "if it fails"))

_STYLE = """
.chain-graph{max-width:100%;height:auto;font:13px system-ui,sans-serif}
.chain-graph rect{fill:var(--darkened-bg,Canvas);stroke:var(--body-quiet-color,GrayText);stroke-width:1.2}
.chain-graph .filter rect{rx:18px}
.chain-graph .action rect{stroke-width:2.6}
.chain-graph .transform rect{stroke-dasharray:7 3}
.chain-graph text{fill:var(--body-fg,CanvasText)}
.chain-graph .name{font-weight:600}
.chain-graph .kind{fill:var(--body-quiet-color,GrayText);font-size:11px}
.chain-graph .link{fill:none;stroke:var(--body-quiet-color,GrayText);stroke-width:1.5}
.chain-graph .on_false .link{stroke-dasharray:6 4}
.chain-graph .on_failure .link{stroke-dasharray:2 3}
.chain-graph .tip{fill:var(--body-quiet-color,GrayText);stroke:none}
.chain-graph .label{font-size:12px;paint-order:stroke;stroke:var(--body-bg,Canvas);stroke-width:5px}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """One node where it stands; x and y are of its upper left corner."""

    node: NodeSpec
    lines: Sequence[str]
    x: float
    y: float
    height: float


def svg(nodes: Sequence[NodeSpec], texts: Mapping[str, str], *, title: str) -> str:
    """The drawing; `texts` says by name what each node does. Links that lead nowhere are left out, and cycles drawn."""
    if not nodes or len(nodes) > MAXIMUM_NODES:
        return f"<p>{escape(_undrawn(len(nodes)))}</p>"
    boxes = _placed({node.name: node for node in reversed(nodes)}, texts)
    width = max(box.x for box in boxes.values()) + WIDTH + GAP_X
    height = max(box.y + box.height for box in boxes.values()) + PADDING
    drawn = [*_links(boxes), *(_drawn(box) for box in boxes.values())]
    return (
        f'<svg class="chain-graph" role="img" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">'
        f"<title>{escape(title)}</title><desc>{escape(_described(nodes, texts))}</desc>"
        f"<style>{_STYLE}</style>{''.join(drawn)}</svg>"
    )


def _undrawn(number: int) -> str:
    return f"{number} nodes are too many to draw." if number else "There are no nodes yet."


def _described(nodes: Sequence[NodeSpec], texts: Mapping[str, str]) -> str:
    """For those who cannot see it."""
    parts = []
    for node in nodes:
        links = ", ".join(f"{label}: {target}" for label, target in _labelled(node))
        parts.append(f"{node.name} ({node.type}): {texts.get(node.name, '')}" + (f"; {links}" if links else ""))
    return ". ".join(parts)


def _labelled(node: NodeSpec) -> Iterator[tuple[str, str]]:
    for link, label in LINKS:
        target = getattr(node, link)
        if target:
            yield ("then" if link == "next" and node.type != "filter" else label), target


def _placed(nodes: Mapping[str, NodeSpec], texts: Mapping[str, str]) -> dict[str, _Box]:
    lines = {name: _lines(texts.get(name, "")) for name in nodes}
    boxes: dict[str, _Box] = {}
    rows = _rows(nodes)
    widest = max(len(row) for row in rows)
    y = float(PADDING)
    for row in rows:
        heights = {name: PADDING * 2 + LINE * (len(lines[name]) + 2) for name in row}
        left = GAP_X / 2 + (widest - len(row)) * (WIDTH + GAP_X) / 2
        for column, name in enumerate(row):
            x = left + column * (WIDTH + GAP_X)
            boxes[name] = _Box(node=nodes[name], lines=lines[name], x=x, y=y, height=heights[name])
        y += max(heights.values()) + GAP_Y
    return boxes


def _rows(nodes: Mapping[str, NodeSpec]) -> list[list[str]]:
    """Names by the longest way that leads to them; a link that closes a cycle counts for nothing."""
    order = _order(nodes)
    position = {name: index for index, name in enumerate(order)}
    depth = dict.fromkeys(order, 0)
    for name in order:
        for target in _targets(nodes[name], nodes):
            if position[target] > position[name]:
                depth[target] = max(depth[target], depth[name] + 1)
    rows: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for name in order:
        rows[depth[name]].append(name)
    return rows


def _order(nodes: Mapping[str, NodeSpec]) -> list[str]:
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
    return [target for _, target in _labelled(node) if target in nodes]


def _lines(text: str) -> list[str]:
    lines = wrap(text, CHARACTERS)
    return lines if len(lines) <= MAXIMUM_LINES else [*lines[: MAXIMUM_LINES - 1], "…"]


def _drawn(box: _Box) -> str:
    middle = box.x + WIDTH / 2
    kind = box.node.type if box.node.type in ("filter", "transform", "action") else "unknown"
    texts = [("kind", box.node.type), ("name", _cut(box.node.name)), *(("text", line) for line in box.lines)]
    rows = "".join(
        f'<text class="{name}" text-anchor="middle" x="{middle:g}" y="{box.y + PADDING + LINE * (index + 0.8):g}">'
        f"{escape(text)}</text>"
        for index, (name, text) in enumerate(texts)
    )
    rect = f'<rect x="{box.x:g}" y="{box.y:g}" width="{WIDTH}" height="{box.height:g}" rx="4"/>'
    return f'<g class="{kind}">{rect}{rows}</g>'


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…"


def _links(boxes: Mapping[str, _Box]) -> Iterator[str]:
    for box in boxes.values():
        found = [
            (link, label, boxes[target])
            for (label, target), link in zip(_labelled(box.node), _names(box.node), strict=True)
            if target in boxes
        ]
        for index, (link, label, target) in enumerate(found):
            start = box.x + WIDTH * (index + 1) / (len(found) + 1)
            yield _link(link, label, start=(start, box.y + box.height), target=target)


def _names(node: NodeSpec) -> list[str]:
    return [link for link, _ in LINKS if getattr(node, link)]


def _link(link: str, label: str, *, start: tuple[float, float], target: _Box) -> str:
    """A curve from the lower edge of one box to the upper edge of another, with its label near the start."""
    x1, y1 = start
    x2, y2 = target.x + WIDTH / 2, target.y
    bend = max(GAP_Y / 2, (y2 - y1) / 2)
    path = f"M{x1:g},{y1:g} C{x1:g},{y1 + bend:g} {x2:g},{y2 - bend:g} {x2:g},{y2 - 7:g}"
    x, anchor = (x1 - 8, "end") if x2 > x1 else (x1 + 8, "start")  # beside the curve, not on it
    tip = f"M{x2 - 5:g},{y2 - 9:g} L{x2 + 5:g},{y2 - 9:g} L{x2:g},{y2:g} Z"
    return (
        f'<g class="{link}"><path class="link" d="{path}"/><path class="tip" d="{tip}"/>'
        f'<text class="label" text-anchor="{anchor}" x="{x:g}" y="{y1 + 18:g}">{escape(label)}</text></g>'
    )
