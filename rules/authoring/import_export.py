"""Rule chains as JSON documents that another organization can import.

A document holds the names of the sensors and devices it mentions, so that whoever imports it knows what to put in their place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rules.authoring import describe
from rules.engine.exceptions import InvalidChain, Problem
from rules.engine.fields import check_uuid
from rules.models import RuleChain, RuleNode

FORMAT = "aemos-rule-chain"
VERSION = 1
CHAIN_FIELDS: Mapping[str, str] = {
    "name": "name",
    "executionType": "execution_type",
    "cron": "cron",
    "timezone": "timezone",
    "missedRuns": "missed_runs",
    "priority": "priority",
    "maxRetries": "max_retries",
    "lateEvents": "late_events",
}
_UUID_KEYS = ("UUID", "deviceUuid")


def exported(chain: RuleChain) -> dict[str, Any]:
    """The document of a chain."""
    nodes = list(chain.nodes.all())
    names = describe.names_of(chain.organization_id, nodes)
    return {
        "format": FORMAT,
        "version": VERSION,
        "chain": {key: getattr(chain, name) for key, name in CHAIN_FIELDS.items()}
        | {"nodes": [_node(n) for n in nodes]},
        "sources": [{"sourceType": kind, "UUID": uuid, "name": name} for (kind, uuid), name in sorted(names.items())],
    }


def _node(node: RuleNode) -> dict[str, Any]:
    links = {"next": node.next, "onFalse": node.on_false, "onFailure": node.on_failure}
    given = {link: name for link, name in links.items() if name}
    return {"name": node.name, "type": node.type, "config": node.config, **given}


def chain_of(document: object, mapping: Mapping[str, str]) -> dict[str, Any]:
    """The chain of a document as the REST API takes it, with the uuids of `mapping` (theirs -> ours) put in place.

    Raises InvalidChain with every problem of the envelope; what stands in the chain is judged when it is saved.
    """
    problems = [*_envelope_problems(document), *_mapping_problems(mapping)]
    if problems or not isinstance(document, Mapping):
        raise InvalidChain(problems)
    chain = copy.deepcopy(document["chain"])
    ours = {theirs.lower(): uuid for theirs, uuid in mapping.items()}
    used: set[str] = set()
    nodes = chain.get("nodes")
    for node in nodes if isinstance(nodes, list) else ():
        if isinstance(node, Mapping):
            _replace(node.get("config"), ours, used)
    unused = [Problem(f"mapping.{uuid}", uuid, "stands nowhere in the document") for uuid in ours if uuid not in used]
    if unused:
        raise InvalidChain(unused)
    return dict(chain)


def named(problems: Sequence[Problem], document: Mapping[str, Any]) -> list[Problem]:
    """The problems, those about a uuid with the name that the document gives it."""
    sources = document.get("sources")
    names = {
        str(source.get("UUID")).lower(): source.get("name")
        for source in (sources if isinstance(sources, list) else ())
        if isinstance(source, Mapping)
    }
    return [
        Problem(each.path, each.value, f"{each.message}; the document calls it {names[each.value]!r}")
        if isinstance(each.value, str) and names.get(each.value)
        else each
        for each in problems
    ]


def _envelope_problems(document: object) -> Iterator[Problem]:
    if not isinstance(document, Mapping):
        yield Problem("document", document, "must be an object")
        return
    if document.get("format") != FORMAT:
        yield Problem("document.format", document.get("format"), f"must be {FORMAT!r}")
    if document.get("version") != VERSION or isinstance(document.get("version"), bool):
        yield Problem("document.version", document.get("version"), f"must be {VERSION}, the version known here")
    if not isinstance(document.get("chain"), Mapping):
        yield Problem("document.chain", document.get("chain"), "must be an object")
    for key in document:
        if key not in ("format", "version", "chain", "sources"):
            yield Problem(f"document.{key}", document[key], "unknown key; known here: format, version, chain, sources")


def _mapping_problems(mapping: Mapping[str, str]) -> Iterator[Problem]:
    for theirs, ours in mapping.items():
        for uuid in (theirs, ours):
            if complaint := check_uuid(uuid):
                yield Problem(f"mapping.{theirs}", uuid, complaint)


def _replace(config: object, ours: Mapping[str, str], used: set[str]) -> None:
    """Puts our uuids in place of theirs wherever a filter or an action names one; in place, with a stack of its own."""
    stack = [config]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, dict):
            for key in _UUID_KEYS:
                theirs = str(value.get(key)).lower()
                if theirs in ours:
                    used.add(theirs)
                    value[key] = ours[theirs]
            stack.extend(value.values())
