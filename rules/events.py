"""Events: the bytes a sender sends in, validated Event objects out, and their compact form in the journal. Pure."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID

import msgspec

from aemos.lib import cbor
from devices.exceptions import BadPayload, Forbidden, TooLarge

MAXIMUM_BYTES = 1_048_576
MAXIMUM_EVENTS = 1_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# No import is of a time before this.
EARLIEST = datetime(1990, 1, 1, tzinfo=UTC)
EARLIEST_US = int(EARLIEST.timestamp()) * 1_000_000
CLOCK_NOT_SET = "the sender's clock seems not to be set"
DAY_US = 86_400_000_000
MAXIMUM_FUTURE_US = DAY_US
MAXIMUM_AGE_US = 30 * DAY_US


class EventType(StrEnum):
    SCHEDULED = "scheduled"
    CRITICAL_ALARM = "critical-alarm"
    TELEMETRY_DATA = "telemetry-data"
    DEVICE_STATE_CHANGE = "device-state-change"
    BATCH_OPERATION = "batch-operation"


class Lane(StrEnum):
    """A journal stream and an RQ queue; in the order in which workers serve them."""

    CRITICAL = "critical"
    NORMAL = "normal"
    LOW = "low"


# The server, not the sender, says how urgent a type is.
PRIORITIES: Mapping[str, int] = {
    EventType.SCHEDULED.value: 1,
    EventType.CRITICAL_ALARM.value: 1,
    EventType.TELEMETRY_DATA.value: 5,
    EventType.DEVICE_STATE_CHANGE.value: 5,
    EventType.BATCH_OPERATION.value: 10,
}
# What a sender may call its event; "scheduled" is the scheduler's.
CLAIMABLE = frozenset(EventType) - {EventType.SCHEDULED}


def lane_of(priority: int) -> Lane:
    if priority <= 2:
        return Lane.CRITICAL
    return Lane.NORMAL if priority <= 5 else Lane.LOW


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened, as the journal keeps it. Times are microseconds since 1970, UTC.

    `id` is the canonical text of a UUID: to make one as an object takes longer than all else that is done to a reading.
    `timestamp_us` is when it counts as having happened: what its sender says, or, where that is ahead, when it was received.
    Then `claimed_us` is what the sender says, which history keeps; it is 0 where both are the same.
    `trace` is a W3C traceparent or empty. After `command_deadline_us` the event switches no device any more; 0 is never.
    `attempt` counts runs that failed before. `chains` names the chains that it is for, None meaning all that wait for it: of
    another attempt those that are still to run, of a timer the one whose time has come.
    """

    id: str
    type: str
    priority: int
    source_type: str
    originator_uuid: str
    organization_id: int
    values: dict[str, Any]
    timestamp_us: int
    received_us: int
    protocol: str
    trace: str = ""
    command_deadline_us: int = 0
    attempt: int = 0
    chains: tuple[str, ...] | None = None
    claimed_us: int = 0

    @property
    def stored_us(self) -> int:
        """The time that history keeps."""
        return self.claimed_us or self.timestamp_us

    @property
    def lane(self) -> Lane:
        return lane_of(self.priority)


class Originator(Protocol):
    """What must be known of a sender to judge its events (devices.catalogue.Originator)."""

    @property
    def source_type(self) -> str: ...
    @property
    def uuid(self) -> str: ...
    @property
    def organization_id(self) -> int: ...
    @property
    def fields(self) -> Mapping[str, Any]: ...
    @property
    def has_clock(self) -> bool: ...


class _Item(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    values: dict[str, Any]
    timestamp: datetime | None = None
    event_id: UUID | None = None
    type: str | None = None
    uuid: UUID | None = None


class _Single(_Item, forbid_unknown_fields=True, rename="camel"):
    strict: bool = False


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    events: list[_Item]
    strict: bool = False


class Problem(msgspec.Struct, frozen=True, rename="camel"):
    """What of a request cannot be used; the rest of it is. `index` is None where the request is one event. `left_out` is "value"
    or "event".
    """

    index: int | None
    field: str
    detail: str
    left_out: str


_single_decoder = msgspec.json.Decoder(_Single)
_batch_decoder = msgspec.json.Decoder(_Batch)
_BATCH_START = re.compile(rb'\s*\{\s*(?:"strict"\s*:\s*(?:true|false)\s*,\s*)?"events"')
_MSGSPEC_PLACE = re.compile(r" - at `\$(?:\.events\[(\d+)\])?\.?(.*)`$")


def decode(
    payload: bytes,
    originator: Originator,
    *,
    highest_priority: int,
    now: datetime,
    protocol: str,
    maximum_age_us: int = MAXIMUM_AGE_US,
    problems: list[Problem] | None = None,
) -> list[Event]:
    """The events of one request: `{"values": ...}` or `{"events": [...]}`, at most 1,000 and 1 MB, in JSON or CBOR.

    What cannot be used of it, a value or an event, is added to `problems` and left out, unless the request says `strict`.
    Raises BadPayload (naming item and field) where nothing can be used, or anything cannot and there is no list for it;
    Forbidden (another's uuid, a type more urgent than the token may claim) or TooLarge. Then nothing of the request counts.
    """
    if len(payload) > MAXIMUM_BYTES:
        raise TooLarge(f"the request has {len(payload)} bytes, at most {MAXIMUM_BYTES} are allowed")
    if cbor.begins_map(payload):
        payload = json_of(payload)
    is_batch = _BATCH_START.match(payload) is not None
    items, strict = _items(payload, is_batch=is_batch)
    if len(items) > MAXIMUM_EVENTS:
        raise TooLarge(f"the request has {len(items)} events, at most {MAXIMUM_EVENTS} are allowed")
    if not items:
        raise BadPayload("events is empty", field="events")
    reader = _Reader(originator, highest_priority, now, protocol, maximum_age_us)
    new_ids = _new_ids(len(items))
    found = []
    for index, item in enumerate(items):
        try:
            found.append(reader.event(item, index if is_batch else None, new_ids[index]))
        except BadPayload as refusal:
            reader.problems.append(Problem(refusal.index, refusal.field, refusal.detail, "event"))
    if reader.problems:
        if problems is not None:
            problems += reader.problems
        if strict or problems is None or not found:
            first = reader.problems[0]
            raise BadPayload(first.detail, index=first.index, field=first.field)
    return _as_received(found) if reader.sees_ahead else found


def _as_received(found: list[Event]) -> list[Event]:
    """Those ahead happen when they are received, in the order that their sender claims. However little it is that a clock is
    ahead: what is dated later than now would be believed longer than what is said now.
    """
    at_us = found[0].received_us
    times: dict[int, int] = {}
    for position in sorted((n for n, event in enumerate(found) if event.claimed_us), key=lambda n: found[n].claimed_us):
        times[position] = at_us
        at_us += 1
    return [
        msgspec.structs.replace(event, timestamp_us=times[position]) if position in times else event
        for position, event in enumerate(found)
    ]


# To ask the system for randomness takes longer than all else that is done for a single event, so it is asked for many. What a
# process has left over is not for those that it becomes.
SPARE_IDS = 256
_spare_ids: list[str] = []
os.register_at_fork(after_in_child=_spare_ids.clear)


def _new_ids(count: int) -> list[str]:
    if count > 1:
        return _random_ids(count)
    while True:
        try:
            return [_spare_ids.pop()]
        except IndexError:
            _spare_ids.extend(_random_ids(SPARE_IDS))


def _random_ids(count: int) -> list[str]:
    """Random UUIDs (version 4), all from one look at the system's source of randomness."""
    digits = os.urandom(16 * count).hex()
    variants = "89ab"
    return [
        f"{digits[at : at + 8]}-{digits[at + 8 : at + 12]}-4{digits[at + 13 : at + 16]}"
        f"-{variants[int(digits[at + 16], 16) & 3]}{digits[at + 17 : at + 20]}-{digits[at + 20 : at + 32]}"
        for at in range(0, 32 * count, 32)
    ]


def _id_of(data: bytes) -> str:
    """The canonical text of a UUID from its 16 bytes."""
    digits = data.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _id_bytes(identifier: str) -> bytes:
    return bytes.fromhex(identifier.replace("-", ""))


def json_of(payload: bytes) -> bytes:
    """What came as CBOR, as JSON: one reader judges both. A tagged time becomes its text."""
    try:
        return json.dumps(cbor.loads(payload), default=datetime.isoformat).encode()
    except ValueError as error:
        raise BadPayload(f"the request is not valid CBOR: {error}") from None


def _items(payload: bytes, *, is_batch: bool) -> tuple[Sequence[_Item | BadPayload], bool]:
    """The items, one that is no event as the refusal of it, and whether the request is strict."""
    try:
        if not is_batch:
            single = _single_decoder.decode(payload)
            return [single], single.strict
        batch = _batch_decoder.decode(payload)
        return batch.events, batch.strict
    except msgspec.ValidationError as error:
        found, refusal = _one_by_one(payload), _explained(error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        found, refusal = _one_by_one(payload), _malformed(error)
    if found is None:
        raise refusal from None
    return found


def _one_by_one(payload: bytes) -> tuple[Sequence[_Item | BadPayload], bool] | None:
    """Each item by itself, where one of them is bad; None when the request around them is. Also reads NaN and Infinity, which are
    not JSON, yet common in sensors' code.
    """
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    strict = document.pop("strict", False)
    items = document.get("events") if "events" in document else [document]
    if not isinstance(items, list) or ("events" in document and len(document) > 1) or not isinstance(strict, bool):
        return None
    is_batch = "events" in document
    return [_item_or_refusal(item, index if is_batch else None) for index, item in enumerate(items)], strict


def _item_or_refusal(item: object, index: int | None) -> _Item | BadPayload:
    try:
        return msgspec.convert(item, _Item)
    except (msgspec.ValidationError, RecursionError) as error:
        return _explained(error, index)


def _explained(error: Exception, index: int | None = None) -> BadPayload:
    """msgspec says "Expected `str`, got `int` - at `$.events[3].timestamp`"; senders get index and field apart."""
    text = _MSGSPEC_PLACE.sub("", str(error)).replace("`", "'")
    place = _MSGSPEC_PLACE.search(str(error))
    if place and place.group(1):
        index = int(place.group(1))
    named = re.search(r"(?:unknown|missing required) field '(.+?)'", text)
    field = named.group(1) if named else place.group(2) if place else ""
    where = f"{_place(index)}{field}".rstrip(".")
    return BadPayload(f"{where}: {text}" if where else text, index=index, field=field)


def _malformed(error: Exception) -> BadPayload:
    text = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return BadPayload(f"the request is not valid JSON: {text}")


class _Reader:
    """Turns the items of one request into events of one originator."""

    def __init__(
        self, originator: Originator, highest_priority: int, now: datetime, protocol: str, maximum_age_us: int
    ) -> None:
        self.sees_ahead = False
        self.problems: list[Problem] = []
        self._maximum_age_us = maximum_age_us
        self._originator = originator
        self._highest_priority = highest_priority
        self._received_us = microseconds(now)
        is_sensor = originator.source_type == "sensor"
        # As text: an enumeration's member takes longer to look up than all else of a type.
        self._usual_type = EventType.TELEMETRY_DATA.value if is_sensor else EventType.DEVICE_STATE_CHANGE.value
        self._protocol = protocol

    def event(self, item: _Item | BadPayload, index: int | None, new_id: str) -> Event:
        """Raises BadPayload when nothing of the item can be used; what of its values cannot is added to `problems`."""
        if isinstance(item, BadPayload):
            raise item
        kind = self._type(item, index)
        timestamp_us, claimed_us = self._times(item, index, kind)
        return Event(
            id=str(item.event_id) if item.event_id else new_id,
            type=kind,
            priority=PRIORITIES[kind],
            source_type=self._originator.source_type,
            originator_uuid=self._originator.uuid,
            organization_id=self._originator.organization_id,
            values=self._values(item, index),
            timestamp_us=timestamp_us,
            claimed_us=claimed_us,
            received_us=self._received_us,
            protocol=self._protocol,
        )

    def _type(self, item: _Item, index: int | None) -> str:
        if item.uuid is not None and str(item.uuid) != self._originator.uuid:
            raise Forbidden(f"{_place(index)}uuid: the token belongs to another {self._originator.source_type}")
        if item.type is None:
            return self._usual_type
        if item.type not in CLAIMABLE:
            known = ", ".join(sorted(CLAIMABLE))
            raise BadPayload(f"{_place(index)}type: {item.type!r} is not one of: {known}", index=index, field="type")
        if PRIORITIES[item.type] < self._highest_priority:
            raise Forbidden(
                f"{_place(index)}type: the token may not send {item.type}; its limit is priority {self._highest_priority}"
            )
        return item.type

    def _values(self, item: _Item, index: int | None) -> dict[str, Any]:
        if not item.values:
            raise BadPayload(f"{_place(index)}values is empty", index=index, field="values")
        fields, takes_null = self._originator.fields, self._originator.source_type == "sensor"
        for name, value in item.values.items():
            field = fields.get(name)
            if field is None or (not (value is None and takes_null) and field.problem_with(value)):
                return self._usable_values(item, index)
        return item.values

    def _usable_values(self, item: _Item, index: int | None) -> dict[str, Any]:
        problems = ((name, self._problem(name, value)) for name, value in item.values.items())
        bad = {name: problem for name, problem in problems if problem}
        found = [
            Problem(index, f"values.{name}", f"{_place(index)}values.{name} {text}", "value")
            for name, text in bad.items()
        ]
        if len(bad) == len(item.values):
            self.problems += found[:-1]
            raise BadPayload(found[-1].detail, index=index, field=found[-1].field)
        self.problems += found
        return {name: value for name, value in item.values.items() if name not in bad}

    def _problem(self, name: str, value: object) -> str:
        """Why it cannot be used, as the end of a sentence. null of a sensor says that there is no value now."""
        field = self._originator.fields.get(name)
        if field is not None:
            is_none = value is None and self._originator.source_type == "sensor"
            return "" if is_none else field.problem_with(value)
        kind = "variable" if self._originator.source_type == "sensor" else "state"
        known = ", ".join(sorted(self._originator.fields)) or "none"
        return f"is not a {kind} of this {self._originator.source_type} (known: {known})"

    def _times(self, item: _Item, index: int | None, kind: str) -> tuple[int, int]:
        """When it counts as having happened, and, where its sender is ahead, what that claims."""
        if item.timestamp is None or not self._originator.has_clock:
            # A microsecond apart, so that they are in order.
            return self._received_us + (index or 0), 0
        if item.timestamp.tzinfo is None:
            problem = "has no time zone: end it with Z or an offset such as +02:00"
            raise BadPayload(f"{_place(index)}timestamp {problem}", index=index, field="timestamp")
        claimed_us = microseconds(item.timestamp)
        if problem := self._timestamp_problem(claimed_us, kind):
            raise BadPayload(f"{_place(index)}timestamp {problem}", index=index, field="timestamp")
        if claimed_us <= self._received_us:
            return claimed_us, 0
        self.sees_ahead = True
        return self._received_us, claimed_us

    def _timestamp_problem(self, claimed_us: int, kind: str) -> str:
        if claimed_us - self._received_us > MAXIMUM_FUTURE_US:
            return "is more than 24 hours in the future"
        if claimed_us < EARLIEST_US:
            return f"is before {EARLIEST.year}: {CLOCK_NOT_SET}"
        if claimed_us < self._received_us - self._maximum_age_us and kind != EventType.BATCH_OPERATION:
            days = self._maximum_age_us // DAY_US
            return (
                f"is more than {days} days ago: {CLOCK_NOT_SET}. Say that it has none (clock: none), "
                "or send old data as batch-operation"
            )
        return ""


def _place(index: int | None) -> str:
    return "" if index is None else f"events[{index}]."


def microseconds(moment: datetime) -> int:
    # In parts, because dividing a timedelta takes twice as long.
    since = moment - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def moment(microseconds_since_epoch: int) -> datetime:
    return EPOCH + timedelta(microseconds=microseconds_since_epoch)


def as_sent(event: Event) -> bytes:
    """The event as a sender could send it again, with the id and time that it has now."""
    return msgspec.json.encode(
        {
            "values": event.values,
            "timestamp": moment(event.stored_us),
            "eventId": event.id,
            "type": event.type,
        }
    )


class _GroupItem(msgspec.Struct, array_like=True, frozen=True):
    """What is an event's own; the last is missing in entries of before there were clocks."""

    id: bytes
    timestamp_us: int
    values: dict[str, Any]
    claimed_us: int = 0


class _Group(msgspec.Struct, array_like=True, frozen=True):
    """Events of one request share all but id, time and values: stored once for up to 1,000 events."""

    type: str
    priority: int
    source_type: str
    originator_uuid: bytes
    organization_id: int
    received_us: int
    protocol: str
    trace: str
    command_deadline_us: int
    chains: tuple[str, ...] | None
    items: list[_GroupItem]


class _Retry(msgspec.Struct, array_like=True, frozen=True):
    attempt: int
    group: _Group


_encoder = msgspec.msgpack.Encoder()
_group_decoder = msgspec.msgpack.Decoder(list[_Group])
_retry_decoder = msgspec.msgpack.Decoder(_Retry)


def encode(events: Sequence[Event]) -> bytes:
    """The bytes of one journal entry; about 40 per event in batches of 100 with one value each."""
    groups: list[_Group] = []
    shared: tuple[Any, ...] = ()
    for event in events:
        header = _header(event)
        if header != shared:
            shared = header
            groups.append(_group(header, []))
        groups[-1].items.append(_item(event))
    return _encoder.encode(groups)


def decode_entry(data: bytes) -> list[Event]:
    """The events of a journal entry; msgspec.DecodeError when the bytes are none."""
    return [event for group in _group_decoder.decode(data) for event in _ungrouped(group)]


def encode_retry(event: Event) -> bytes:
    return _encoder.encode(_Retry(event.attempt, _group(_header(event), [_item(event)])))


def decode_retry(data: bytes) -> Event:
    retry = _retry_decoder.decode(data)
    return msgspec.structs.replace(_ungrouped(retry.group)[0], attempt=retry.attempt)


def _group(header: tuple[Any, ...], items: list[_GroupItem]) -> _Group:
    before, (originator_uuid, *after) = header[:3], header[3:]
    return _Group(*before, _id_bytes(originator_uuid), *after, items)  # type: ignore[call-arg]  # as many as it has fields


def _header(event: Event) -> tuple[Any, ...]:
    return (
        event.type,
        event.priority,
        event.source_type,
        event.originator_uuid,
        event.organization_id,
        event.received_us,
        event.protocol,
        event.trace,
        event.command_deadline_us,
        event.chains,
    )


def _item(event: Event) -> _GroupItem:
    return _GroupItem(_id_bytes(event.id), event.timestamp_us, event.values, event.claimed_us)


def _ungrouped(group: _Group) -> list[Event]:
    originator_uuid = _id_of(group.originator_uuid)
    return [
        Event(
            id=_id_of(item.id),
            type=group.type,
            priority=group.priority,
            source_type=group.source_type,
            originator_uuid=originator_uuid,
            organization_id=group.organization_id,
            values=item.values,
            timestamp_us=item.timestamp_us,
            received_us=group.received_us,
            protocol=group.protocol,
            trace=group.trace,
            command_deadline_us=group.command_deadline_us,
            chains=group.chains,
            claimed_us=item.claimed_us,
        )
        for item in group.items
    ]


CHAIN = "chain"
DEVICE = "device"
"""The source type of an event that runs the chain that is its originator."""

TIMER = "timer"
"""The protocol of an event that time alone brings about: a sensor's or device's, without values."""


def is_run(event: Event) -> bool:
    """Whether the event runs chains on what is known, instead of reporting what a sensor or device says."""
    return event.source_type == CHAIN or event.protocol == TIMER


def named(event: Event) -> tuple[str, ...] | None:
    """The uuids of the chains that the event is for; None when it is for all that wait for it."""
    return (event.originator_uuid,) if event.source_type == CHAIN else event.chains
