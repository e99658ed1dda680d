"""Name what chains could switch if given events went through them: shown to a person before a replay."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from django.db.models import Q

from aemos.lib.batched import batched
from devices.models import Device
from rules.engine.exceptions import InvalidChain
from rules.models import RuleChain
from rules.processing.loading import LOOKUP_BATCH, compiled

Source = tuple[str, str]  # source type, uuid


class Movement(NamedTuple):
    """A state of a device, by name, and the chain that may set it."""

    chain: str
    device: str
    state: str


def movements(
    sources: Collection[Source], *, organization_ids: Collection[int], chain_ids: Collection[int] = ()
) -> list[Movement]:
    """What the running chains that read one of the sources may set, and what the named chains may; each once, in order.

    Compiles the organizations' chains: for a page that a person asks for, not for the path of an event.
    """
    found = {
        (row.name, command.uuid, command.name)
        for row, command in _commands(set(sources), organization_ids, set(chain_ids))
    }
    names = _device_names({uuid for _, uuid, _ in found})
    return sorted(Movement(chain, names.get(uuid, uuid), state) for chain, uuid, state in found)


class _Target(NamedTuple):
    uuid: str
    name: str


def _commands(
    sources: set[Source], organization_ids: Collection[int], chain_ids: set[int]
) -> Iterator[tuple[RuleChain, _Target]]:
    wanted = RuleChain.objects.running().filter(Q(organization_id__in=organization_ids) | Q(pk__in=chain_ids))
    for row, chain in compiled(wanted.values_list("pk", flat=True)):
        if isinstance(chain, InvalidChain):
            continue  # it does not run
        reads = {(reference.source_type, reference.uuid) for reference in chain.references} | {("chain", str(row.uuid))}
        if row.pk in chain_ids or reads & sources:
            for command in chain.commands:
                yield row, _Target(command.device_uuid, command.state_name)


def _device_names(uuids: Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for some in batched(sorted(uuids), LOOKUP_BATCH):
        found |= {str(uuid): name for uuid, name in Device.objects.filter(uuid__in=some).values_list("uuid", "name")}
    return found
