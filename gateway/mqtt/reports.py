"""Take in what devices report over MQTT: their status, and acknowledgements of commands.

What waits is written together, and a message is acknowledged to the broker only after the database has what it says.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

import msgspec
from django.db import DatabaseError
from django.utils import timezone
from paho.mqtt.subscribeoptions import SubscribeOptions

from aemos.lib import keys
from devices import commands, presence
from devices.commands import Acknowledgement
from devices.exceptions import BadPayload
from gateway import acknowledgements
from gateway.mqtt import device_status, topics
from gateway.mqtt.inbound import Channel
from gateway.mqtt.sender_queues import Arrival
from rules.ingest import Receipt

log = logging.getLogger(__name__)
# What is only noted, and may be lost: when devices spoke last. The rest waits in the broker.
MAXIMUM_SEEN = 100_000
SEEN_EVERY_SECONDS = 10.0
# Commands of which it is not written yet that they were sent, or that they were not: a minute of a database that is away.
MAXIMUM_NOTES = 50_000

# A status is retained by many devices: after the broker has lost its sessions, what they said last is said again.
REPORTS = Channel(
    name="reports",
    leader_key=keys.MQTT_REPORTS_LEADER,
    topics={
        topics.STATUSES: SubscribeOptions.RETAIN_SEND_IF_NEW_SUB,
        topics.ACKNOWLEDGEMENTS: SubscribeOptions.RETAIN_DO_NOT_SEND,
    },
)


class _Status(msgspec.Struct):
    """Devices may add fields of their own, such as their firmware."""

    status: Literal["online", "offline"]


_status_decoder = msgspec.json.Decoder(_Status)


@dataclass(slots=True, eq=False)
class Report:
    """One message that waits to be written; exactly one of `online` and `acknowledgement` is set.

    `is_alive`: the device said it just now. A retained message is old, and a last will is said for a device that is gone.
    """

    write: Callable[[], None]
    device_uuid: UUID
    is_alive: bool = False
    online: bool | None = None
    acknowledgement: Acknowledgement | None = None
    written: bool = False
    error: Exception | None = None

    def wait(self) -> Receipt:
        """Writes all that waits, unless that was done for another one; raises what the writing raised, or a Refusal."""
        if not self.written:
            self.write()
        if self.error:
            raise self.error
        return Receipt(accepted=1)


class Reports:
    """Takes what devices say, and notes what the gateway did with their commands.

    `take` belongs to the thread of the channel; the others may be called from any, and `saw` and `sent` never wait.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.dropped = 0
        self._clock = clock
        self._next_seen = 0.0
        self._waiting: list[Report] = []
        self._seen: set[str] = set()
        self._sent: deque[UUID] = deque()
        self._unreported = 0
        self._flushing = threading.Lock()

    def take(self, arrival: Arrival, _before: object = None) -> Report:
        """Raises BadPayload naming the field."""
        report = self._read(arrival)
        self._waiting.append(report)
        return report

    def saw(self, device_uuid: str) -> None:
        if len(self._seen) < MAXIMUM_SEEN:
            self._seen.add(device_uuid)

    def sent(self, command: UUID) -> None:
        self._note(self._sent, command)

    def _note(self, notes: deque[UUID], command: UUID) -> None:
        if len(notes) < MAXIMUM_NOTES:
            notes.append(command)
        else:
            self.dropped += 1
            self._unreported += 1

    def flush(self) -> None:
        """Writes the notes; when the database is away, they wait."""
        with self._flushing:
            self._write_all(self._sent, commands.note_sent)
        if self._clock() >= self._next_seen:
            self._next_seen = self._clock() + SEEN_EVERY_SECONDS
            self._write_seen()
        if self._unreported:
            log.error("%d commands were sent without a note of it: the database is away too long", self._unreported)
            self._unreported = 0

    def _write_seen(self) -> None:
        seen, self._seen = self._seen, set()
        try:
            presence.note_seen({UUID(each) for each in seen}, at=timezone.now())
        except DatabaseError as error:
            log.debug("When %d devices were seen is not noted: %s", len(seen), error)

    def _write_all(self, notes: deque[UUID], write: Callable[[Sequence[UUID]], None]) -> None:
        taken = [notes.popleft() for _ in range(len(notes))]
        try:
            write(taken)
        except DatabaseError as error:
            log.warning("%d commands wait to be noted as sent or expired: %s", len(taken), error)
            notes.extendleft(reversed(taken))

    def _read(self, arrival: Arrival) -> Report:
        uuid = topics.originator_of(arrival.topic)
        if uuid is None:
            raise BadPayload("the topic names no device", field="topic")
        if topics.is_status(arrival.topic):
            online = _online(arrival.payload)
            return Report(self._write, UUID(uuid), is_alive=online and not arrival.retained, online=online)
        said = acknowledgements.read(arrival.payload, UUID(uuid))
        return Report(self._write, UUID(uuid), is_alive=True, acknowledgement=said)

    def _write(self) -> None:
        taken, self._waiting = self._waiting, []
        for report in taken:
            report.written = True
        try:
            device_status.record(_statuses(taken))
            presence.note_seen({each.device_uuid for each in taken if each.is_alive}, at=timezone.now())
            _refuse(taken, commands.acknowledge([each.acknowledgement for each in taken if each.acknowledgement]))
        except Exception as error:  # noqa: BLE001  whatever it is, each message hears of it and comes again
            for report in taken:
                report.error = error


def _statuses(reports: Sequence[Report]) -> dict[UUID, bool]:
    return {each.device_uuid: each.online for each in reports if each.online is not None}


def _refuse(reports: Sequence[Report], foreign: Sequence[Acknowledgement]) -> None:
    for report in reports:
        if report.acknowledgement in foreign:
            report.error = acknowledgements.foreign()


def _online(payload: bytes) -> bool:
    """`online` or `offline`, bare or as the status of an object."""
    word = payload.strip()
    if word in (b"online", b"offline"):
        return word == b"online"
    try:
        return _status_decoder.decode(payload).status == "online"
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadPayload(f'status must be online or offline, bare or in {{"status": ...}}: {error}') from None
