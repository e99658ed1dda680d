"""What senders may send, and how a refusal names item and field."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aemos.lib import cbor
from devices.exceptions import BadPayload, Forbidden, Refusal, TooLarge
from devices.values import Datatype, value_problem
from rules import events
from rules.events import Event, EventType, Lane

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
SENSOR = "0b0f6f3a-2f65-4f0e-9c2e-3b7f4a1c2d10"


@dataclass(frozen=True)
class Field:
    datatype: str

    def problem_with(self, value: object) -> str:
        return value_problem(value, self.datatype)


@dataclass(frozen=True)
class Originator:
    source_type: str = "sensor"
    uuid: str = SENSOR
    organization_id: int = 7
    fields: Mapping[str, Any] = field(
        default_factory=lambda: {
            "ph": Field(Datatype.NUMBER),
            "mode": Field(Datatype.STRING),
            "leak": Field(Datatype.BOOLEAN),
        }
    )
    has_clock: bool = True


def decode(payload: bytes, *, highest_priority: int = 5, originator: Originator | None = None) -> list[Event]:
    return events.decode(
        payload, originator or Originator(), highest_priority=highest_priority, now=NOW, protocol="http"
    )


def test_a_single_event_takes_time_and_id_from_the_server_when_it_has_none() -> None:
    (event,) = decode(b'{"values": {"ph": 6.1}}')

    assert event.timestamp_us == event.received_us == events.microseconds(NOW)
    assert UUID(event.id).version == 4
    assert str(UUID(event.id)) == event.id
    assert (event.type, event.priority, event.lane) == (EventType.TELEMETRY_DATA, 5, Lane.NORMAL)
    assert (event.source_type, event.originator_uuid, event.organization_id) == ("sensor", SENSOR, 7)


def test_events_of_a_batch_without_times_are_no_duplicates_of_each_other() -> None:
    batch = decode(b'{"events": [{"values": {"ph": 6.1}}, {"values": {"ph": 6.2}}]}')

    assert batch[0].timestamp_us < batch[1].timestamp_us


def test_the_senders_time_and_id_are_kept() -> None:
    payload = b'{"values": {"ph": 6}, "timestamp": "2026-05-01T13:00:00.25+02:00", "eventId": "%s"}' % SENSOR.encode()
    (event,) = decode(payload)

    assert events.moment(event.timestamp_us) == datetime(2026, 5, 1, 11, 0, 0, 250_000, tzinfo=UTC)
    assert event.id == SENSOR


@pytest.mark.parametrize(
    ("payload", "index", "name", "said"),
    [
        (b'{"values": {"pH": 6}}', None, "values.pH", "is not a variable of this sensor (known: leak, mode, ph)"),
        (b'{"values": {"ph": "6"}}', None, "values.ph", "must be a number, not a string"),
        (b'{"values": {"ph": true}}', None, "values.ph", "must be a number, not true or false"),
        (b'{"values": {"ph": [6]}}', None, "values.ph", "must be a number, not a list"),
        (b'{"values": {"leak": 1}}', None, "values.leak", "must be true or false, not a number"),
        (b'{"values": {"mode": "a\\u0000b"}}', None, "values.mode", "holds a NUL character"),
        (b'{"values": {"mode": "%s"}}' % (b"x" * 1001), None, "values.mode", "is longer than 1000 characters"),
        (b'{"values": {"ph": NaN}}', None, "values.ph", "is not a finite number"),
        (b'{"values": {"ph": -Infinity}}', None, "values.ph", "is not a finite number"),
        (b'{"values": {"ph": 1e999}}', None, "values.ph", "is not a finite number"),
        (b'{"values": {"ph": 1%s}}' % (b"0" * 400), None, "values.ph", "at most 53 bits"),
        (b'{"values": {"ph": 9223372036854775808}}', None, "values.ph", "at most 53 bits"),
        (b'{"values": {"ph": -9223372036854775808}}', None, "values.ph", "at most 53 bits"),
        (b'{"events": [{"values": {"ph": 6}}, {"values": {"ph": NaN}}]}', 1, "values.ph", "events[1].values.ph"),
        (b'{"events": [{"values": {"ph": 6}}, {"values": {}}]}', 1, "values", "events[1].values is empty"),
        (b'{"events": [{"values": {"ph": 6}}, {}]}', 1, "values", "missing required field 'values'"),
        (b'{"events": [{"values": {"ph": 6}, "timstamp": 1}]}', 0, "timstamp", "unknown field 'timstamp'"),
        (b'{"events": []}', None, "events", "events is empty"),
        (b'{"events": {}}', None, "events", "Expected 'array'"),
        (b'{"values": {"ph": 6}, "timestamp": "2026-05-01T12:00:00"}', None, "timestamp", "has no time zone"),
        (b'{"values": {"ph": 6}, "timestamp": "yesterday"}', None, "timestamp", "Invalid RFC3339"),
        (b'{"values": {"ph": 6}, "timestamp": 1777636800}', None, "timestamp", "got 'int'"),
        (b'{"values": {"ph": 6}, "timestamp": "1970-01-01T00:00:10Z"}', None, "timestamp", "clock seems not to be set"),
        (b'{"values": {"ph": 6}, "timestamp": "0001-01-01T00:00:00+14:00"}', None, "timestamp", "before 1990"),
        (b'{"values": {"ph": 6}, "timestamp": "9999-12-31T23:59:59Z"}', None, "timestamp", "24 hours in the future"),
        (b'{"values": {"ph": 6}, "eventId": "7"}', None, "eventId", "Invalid UUID"),
        (b'{"values": {"ph": 6}, "type": "scheduled"}', None, "type", "is not one of"),
        (b'{"values": 6}', None, "values", "Expected 'object'"),
        (b'{"values": {"ph": 6}', None, "", "not valid JSON"),
        (b'{"values": {"m\xff": 6}}', None, "", "not valid JSON"),
        (b"", None, "", "not valid JSON"),
        (b"6.1", None, "", "Expected 'object'"),
        (b"[" * 100_000, None, "", "object"),
        (b'{"values": {"ph": ' + b"[" * 100_000, None, "", "nested too deeply"),
    ],
)
def test_bad_input_is_refused_naming_item_and_field(payload: bytes, index: int | None, name: str, said: str) -> None:
    with pytest.raises(BadPayload) as refusal:
        decode(payload)

    assert (refusal.value.index, refusal.value.field) == (index, name)
    assert said in refusal.value.detail


def test_cbor_is_taken_like_the_same_in_json() -> None:
    timestamp = datetime(2026, 5, 1, 11, 59, 58, 250_000, tzinfo=UTC)
    (event,) = decode(cbor.dumps({"values": {"ph": 6.5, "leak": True}, "timestamp": timestamp}))
    assert event.values == {"ph": 6.5, "leak": True}
    assert event.timestamp_us == events.microseconds(timestamp)
    batch = decode(b"\xd9\xd9\xf7" + cbor.dumps({"events": [{"values": {"ph": 6}}, {"values": {"mode": "auto"}}]}))
    assert [event.values for event in batch] == [{"ph": 6}, {"mode": "auto"}]


@pytest.mark.parametrize(
    ("document", "index", "name", "said"),
    [
        ({"values": {"ph": "six"}}, None, "values.ph", "must be a number"),
        ({"events": [{"values": {"ph": 6}}, {"values": {"ph": math.nan}}]}, 1, "values.ph", "not a finite number"),
        ({"values": {"ph": 6}, "timestamp": 5}, None, "timestamp", "Expected"),
        ({"values": {"ph": 6}, "more": 5}, None, "more", "unknown field"),
    ],
)
def test_bad_cbor_values_are_refused_naming_item_and_field(
    document: dict[str, Any], index: int | None, name: str, said: str
) -> None:
    with pytest.raises(BadPayload, match=said) as raised:
        decode(cbor.dumps(document))
    assert (raised.value.index, raised.value.field) == (index, name)


def test_broken_cbor_is_refused_with_its_place() -> None:
    with pytest.raises(BadPayload, match="not valid CBOR: it ends in the middle"):
        decode(cbor.dumps({"values": {"ph": 6.5}})[:-1])
    with pytest.raises(BadPayload, match="a byte string at byte 12"):
        decode(b"\xa1\x66values\xa1\x62ph\x41x")


def test_a_timestamp_up_to_24_hours_ahead_is_taken_and_one_beyond_is_not() -> None:
    def at(moment: datetime) -> bytes:
        return msgspec.json.encode({"values": {"ph": 6}, "timestamp": moment})

    assert decode(at(NOW + timedelta(hours=24)))
    with pytest.raises(BadPayload):
        decode(at(NOW + timedelta(hours=24, microseconds=1)))


def test_a_thousand_events_are_taken_and_one_more_is_too_large() -> None:
    item = b'{"values": {"ph": 6}}'

    assert len(decode(b'{"events": [%s]}' % b",".join([item] * 1_000))) == 1_000
    with pytest.raises(TooLarge, match="1001 events, at most 1000"):
        decode(b'{"events": [%s]}' % b",".join([item] * 1_001))


def test_more_than_a_megabyte_is_too_large() -> None:
    with pytest.raises(TooLarge, match="at most 1048576"):
        decode(b'{"values": {"ph": 6}}' + b" " * 1_048_576)


def test_someone_elses_uuid_is_forbidden() -> None:
    with pytest.raises(Forbidden, match=r"events\[0\].uuid: the token belongs to another sensor"):
        decode(b'{"events": [{"values": {"ph": 6}, "uuid": "11111111-1111-4111-8111-111111111111"}]}')


def test_a_sender_cannot_claim_more_urgency_than_its_token_has() -> None:
    payload = b'{"values": {"ph": 6}, "type": "critical-alarm"}'

    with pytest.raises(Forbidden, match="its limit is priority 5"):
        decode(payload)
    (event,) = decode(payload, highest_priority=1)
    assert (event.priority, event.lane) == (1, Lane.CRITICAL)


def test_what_a_device_reports_is_a_state_change() -> None:
    (event,) = decode(b'{"values": {"mode": "on"}}', originator=Originator(source_type="device"))

    assert event.type == EventType.DEVICE_STATE_CHANGE


@pytest.mark.parametrize(
    ("priority", "lane"),
    [(1, "critical"), (2, "critical"), (3, "normal"), (5, "normal"), (6, "low"), (10, "low")],
)
def test_every_priority_has_its_lane(priority: int, lane: str) -> None:
    assert events.lane_of(priority) == lane


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["values", "events", "timestamp", "eventId", "type", "uuid", "ph", "x"]), inner, max_size=3
    ),
).map(msgspec.json.encode))  # fmt: skip
def test_whatever_arrives_ends_as_events_or_as_a_refusal(payload: bytes) -> None:
    with contextlib.suppress(Refusal):
        assert decode(payload)


def test_journal_entries_give_back_the_same_events() -> None:
    batch = decode(b'{"events": [{"values": {"ph": 6.1, "mode": "a", "leak": true}}, {"values": {"ph": 7}}]}')
    batch += decode(b'{"values": {"ph": 8}, "type": "batch-operation"}')

    assert events.decode_entry(events.encode(batch)) == batch
    retried = msgspec.structs.replace(batch[0], attempt=2, chains=(SENSOR,))
    assert events.decode_retry(events.encode_retry(retried)) == retried


def test_a_batch_of_a_hundred_events_takes_at_most_45_bytes_each() -> None:
    batch = decode(b'{"events": [%s]}' % b",".join([b'{"values": {"ph": 6.1}}'] * 100))

    assert len(events.encode(batch)) <= 45 * 100
