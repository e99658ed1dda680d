"""Read the states of devices for many clients that ask at the same time, with one query for all of them."""

from __future__ import annotations

from typing import Any

import gevent
from django.db import Error as DatabaseError
from django.db import close_old_connections
from gevent.event import AsyncResult, Event

from devices import commands
from devices.models import DeviceState

MAXIMUM_DEVICES = 500  # in one query; SQLite takes no more than some hundred parameters everywhere
IDLE_SECONDS = 1.0

Document = dict[str, Any]


class States:
    """Reads from the database: it has a change before anybody is notified, and also when Redis has lost everything.

    One greenlet asks for all, since every greenlet that asks opens a connection of its own, which costs more than the query.
    While one query is under way the next ones gather; nobody is given what was read before they asked.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, AsyncResult[Document]] = {}
        self._more = Event()
        self._busy = False

    def of(self, uuid: str) -> Document:
        """`{"device": uuid, "states": {name: {"value": ..., "changedAt": ...}}}`, and while there are momentary commands that the
        device has neither acknowledged nor missed, `"commands": [{"id": ..., "stateName": ..., "value": ..., "deadline": ...}]`.
        Raises django.db.Error.
        """
        result = self._waiting.setdefault(uuid, AsyncResult())
        self._more.set()
        if not self._busy:
            self._busy = True
            gevent.spawn(self._run)
        document = result.get()
        assert document is not None  # noqa: S101  without a timeout there is a result or an exception
        return document

    def _run(self) -> None:
        try:
            while self._waiting or self._more.wait(IDLE_SECONDS):
                self._more.clear()
                if self._waiting:
                    self._answer(self._next())
        finally:
            self._busy = False
            close_old_connections()

    def _next(self) -> dict[str, AsyncResult[Document]]:
        uuids = list(self._waiting)[:MAXIMUM_DEVICES]
        return {uuid: self._waiting.pop(uuid) for uuid in uuids}

    def _answer(self, asked: dict[str, AsyncResult[Document]]) -> None:
        try:
            found = _read(list(asked))
        except Exception as error:  # noqa: BLE001  whatever it is, those who wait must get it
            for result in asked.values():
                result.set_exception(error)
            if isinstance(error, DatabaseError):
                close_old_connections()  # the next query finds out whether the database is back
            return
        for uuid, result in asked.items():
            result.set({"device": uuid, **found[uuid]})


def _read(uuids: list[str]) -> dict[str, Document]:
    found: dict[str, Document] = {uuid: {"states": {}} for uuid in uuids}
    rows = DeviceState.objects.filter(device__uuid__in=uuids).order_by("name")
    momentary = set()
    for uuid, name, kind, value, changed_at in rows.values_list("device__uuid", "name", "kind", "value", "changed_at"):
        if kind == DeviceState.Kind.MOMENTARY:
            momentary.add(uuid)
        else:
            found[str(uuid)]["states"][name] = {"value": value, "changedAt": changed_at}
    for row in commands.momentary_under_way(momentary) if momentary else ():
        said = {"id": row.uuid, "stateName": row.state.name, "value": row.value, "deadline": row.deadline}
        found[str(row.state.device.uuid)].setdefault("commands", []).append(said)
    return found
