"""CBOR as small devices write it: the examples of RFC 8949, appendix A, and what strangers might send instead."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime
from typing import Any

import pytest

from aemos.lib import cbor

EXAMPLES: list[tuple[str, Any]] = [
    ("00", 0),
    ("17", 23),
    ("1818", 24),
    ("1903e8", 1000),
    ("1a000f4240", 1_000_000),
    ("1bffffffffffffffff", 2**64 - 1),
    ("20", -1),
    ("3903e7", -1000),
    ("3bffffffffffffffff", -(2**64)),
    ("f90000", 0.0),
    ("f93e00", 1.5),
    ("f90001", 5.960464477539063e-8),
    ("fa47c35000", 100000.0),
    ("fb3ff199999999999a", 1.1),
    ("f97c00", math.inf),
    ("f4", False),
    ("f5", True),
    ("f6", None),
    ("60", ""),
    ("6449455446", "IETF"),
    ("62c3bc", "ü"),
    ("80", []),
    ("83010203", [1, 2, 3]),
    ("8301820203820405", [1, [2, 3], [4, 5]]),
    ("a0", {}),
    ("a26161016162820203", {"a": 1, "b": [2, 3]}),
    ("c11a514b67b0", datetime(2013, 3, 21, 20, 4, tzinfo=UTC)),
    ("c1fb41d452d9ec200000", datetime(2013, 3, 21, 20, 4, 0, 500_000, tzinfo=UTC)),
]
READ_ONLY: list[tuple[str, Any]] = [
    ("c074323031332d30332d32315432303a30343a30305a", "2013-03-21T20:04:00Z"),
    ("7f657374726561646d696e67ff", "streaming"),
    ("9f018202039f0405ffff", [1, [2, 3], [4, 5]]),
    ("bf6346756ef563416d7421ff", {"Fun": True, "Amt": -2}),
    ("d9d9f7a0", {}),
]


@pytest.mark.parametrize(("text", "value"), EXAMPLES + READ_ONLY)
def test_examples_of_the_rfc_are_read(text: str, value: Any) -> None:
    found = cbor.loads(bytes.fromhex(text))
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(("text", "value"), EXAMPLES)
def test_examples_of_the_rfc_are_written(text: str, value: Any) -> None:
    assert cbor.dumps(value).hex() == text


def test_not_a_number_is_read_and_written() -> None:
    assert math.isnan(cbor.loads(bytes.fromhex("f97e00")))
    assert math.isnan(cbor.loads(cbor.dumps(math.nan)))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "ends in the middle"),
        ("19", "ends in the middle"),
        ("7b00ffffffffffffff61", "ends in the middle"),
        ("bb00ffffffffffffff", "ends in the middle"),
        ("9f01", "ends in the middle"),
        ("ff", "simple value 31"),
        ("0001", "left over at byte 1"),
        ("1c", "malformed"),
        ("f7", "simple value 23"),
        ("4161", "a byte string at byte 0"),
        ("a16161 4161", "a byte string at byte 3"),
        ("a10102", "the key at byte 1 is not a text"),
        ("a2616101616102", "the key at byte 4 is there twice"),
        ("61ff", "not UTF-8"),
        ("7f01ff", "something else than texts"),
        ("81" * 17 + "00", "nested too deeply at byte 17"),
        ("c1f5", "tag 1"),
        ("c1fb7ff0000000000000", "out of range"),
        ("c1f97e00", "out of range"),
        ("d81c81d81d00", "tag 29"),  # a list that holds itself
        ("c24101", "a byte string"),  # a big number
        ("d8236128", "tag 35"),  # a regular expression
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        cbor.loads(bytes.fromhex(text))


@pytest.mark.parametrize("value", [b"bytes", {1}, object(), 2**64])
def test_what_json_does_not_have_is_not_written(value: Any) -> None:
    with pytest.raises(TypeError):
        cbor.dumps(value)


def test_random_bytes_are_read_or_refused_and_nothing_else() -> None:
    dice = random.Random(8949)
    read = 0
    for _ in range(20_000):
        data = dice.randbytes(dice.randrange(1, 8))
        try:
            value = cbor.loads(data)
        except ValueError:
            continue
        read += 1
        again = cbor.dumps(value)
        assert cbor.dumps(cbor.loads(again)) == again
    assert read > 500
