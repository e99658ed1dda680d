"""What is drawn into the charts of a sensor: limits of the rules that read it, what they switched, and its alarms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from django.db.models import Q
from django.http import HttpRequest, JsonResponse
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from devices.models import Sensor, StateChange
from rules.authoring import validation
from rules.models import Alarm, RuleChain, RuleNode

MAXIMUM_CHANGES = 300
MAXIMUM_ALARMS = 100
_ONE_LIMIT = frozenset({">", ">=", "<", "<="})
_ON_THE_VALUE = frozenset(
    {"sourceType", "UUID", "key", "operator", "value", "for", "times", "within", "releaseAt", "off"}
)


def answer(request: HttpRequest, sensor: Sensor) -> JsonResponse:
    """From `from` to `to`; 400 when one of them is no time."""
    begin, end = (_moment(request, name) for name in ("from", "to"))
    if begin is None or end is None:
        return JsonResponse({"detail": "from and to must be times, such as 2026-05-01T00:00:00Z"}, status=400)
    chains = _reading(sensor)
    return JsonResponse(
        {
            "thresholds": list(_thresholds(sensor, chains)),
            "changes": list(_changes(chains, begin, end)),
            "alarms": list(_alarms(sensor, begin, end)),
        }
    )


def _moment(request: HttpRequest, name: str) -> datetime | None:
    try:
        found = parse_datetime(request.GET.get(name, ""))
    except ValueError:
        return None
    return found if found is None or timezone.is_aware(found) else None


def _reading(sensor: Sensor) -> dict[RuleChain, list[RuleNode]]:
    """The running chains of its organization with a filter that reads it."""
    nodes: defaultdict[RuleChain, list[RuleNode]] = defaultdict(list)
    rows = RuleNode.objects.filter(chain__in=RuleChain.objects.running().filter(organization=sensor.organization_id))
    for node in rows.select_related("chain"):
        nodes[node.chain].append(node)
    return {chain: own for chain, own in nodes.items() if any(_leaves(own, sensor))}


def _leaves(nodes: Sequence[RuleNode], sensor: Sensor) -> Iterator[dict[str, Any]]:
    for node in nodes:
        if node.type == RuleNode.Type.FILTER:
            for _, leaf in validation.leaves(node.config, ""):
                if str(leaf.get("UUID")).lower() == str(sensor.uuid):
                    yield dict(leaf)


def _thresholds(sensor: Sensor, chains: dict[RuleChain, list[RuleNode]]) -> Iterator[dict[str, Any]]:
    """Of comparisons with the value itself: not with its change or its median, which are other scales."""
    for chain, nodes in chains.items():
        for leaf in _leaves(nodes, sensor):
            if leaf.keys() - _ON_THE_VALUE:
                continue
            value, operator = leaf.get("value"), leaf.get("operator")
            values = (
                value
                if operator == "between" and isinstance(value, list)
                else [value]
                if operator in _ONE_LIMIT
                else []
            )
            for each in values:
                yield {"variable": leaf.get("key"), "value": each, "rule": chain.name, "uuid": str(chain.uuid)}


def _changes(chains: dict[RuleChain, list[RuleNode]], begin: datetime, end: datetime) -> Iterator[dict[str, Any]]:
    """The newest of those states that the chains set, whoever set them."""
    targets = Q(pk=None)
    organizations = {chain.organization_id for chain in chains}
    for nodes in chains.values():
        for node in nodes:
            if node.config.get("type") == "device_command":
                targets |= Q(
                    state__device__uuid=node.config.get("deviceUuid"), state__name=node.config.get("stateName")
                )
    rows = StateChange.objects.filter(
        targets, timestamp__gte=begin, timestamp__lte=end, state__device__organization__in=organizations
    )
    for row in rows.select_related("state__device").order_by("-timestamp", "-id")[:MAXIMUM_CHANGES]:
        yield {"at": row.timestamp.isoformat(), "state": str(row.state), "value": row.value, "actor": row.actor}


def _alarms(sensor: Sensor, begin: datetime, end: datetime) -> Iterator[dict[str, Any]]:
    rows = Alarm.objects.filter(
        Q(cleared_at=None) | Q(cleared_at__gte=begin),
        organization=sensor.organization_id, source_type="sensor", originator_uuid=sensor.uuid, raised_at__lte=end,
    )  # fmt: skip
    for row in rows[:MAXIMUM_ALARMS]:
        yield {
            "from": row.raised_at.isoformat(),
            "to": row.cleared_at.isoformat() if row.cleared_at else None,
            "type": row.type,
            "severity": row.severity,
        }
