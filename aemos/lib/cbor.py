"""CBOR (RFC 8949), as far as JSON goes: the bytes of small devices in, plain values out, and back.

A general decoder would also make regular expressions, cyclic values and numbers of a million digits out of what strangers
send. Of the tags this one knows those of time (0 and 1) and of CBOR itself (55799).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

MAXIMUM_DEPTH = 16
SELF_DESCRIBED = b"\xd9\xd9\xf7"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FLOATS = {25: ">e", 26: ">f", 27: ">d"}
_SIMPLE = {20: False, 21: True, 22: None}
_BREAK = 0xFF
_INDEFINITE = 31


def loads(data: bytes) -> Any:
    """None, bool, int, float, str, aware datetime, list and dict with texts as keys; ValueError says what is wrong where."""
    reader = _Reader(data)
    value = reader.item(0)
    if reader.position < len(data):
        raise ValueError(f"bytes are left over at byte {reader.position}")
    return value


def begins_map(data: bytes) -> bool:
    """Whether the bytes are a map in CBOR rather than an object in JSON, which never begins like one."""
    return data.startswith(SELF_DESCRIBED) or (len(data) > 0 and data[0] >> 5 == 5)


class _Reader:
    """Reads items one after the other; every length is checked against what is there before anything is made of it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def item(self, depth: int) -> Any:
        start = self.position
        if depth > MAXIMUM_DEPTH:
            raise ValueError(f"nested too deeply at byte {start}")
        major, minor = divmod(self._take(1)[0], 32)
        if major in _READERS:
            return _READERS[major](self, minor, depth)
        raise ValueError(f"a byte string at byte {start}: only texts, numbers and truth values are values")

    def _take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self._data):
            raise ValueError("it ends in the middle")
        taken, self.position = self._data[self.position : end], end
        return taken

    def _argument(self, minor: int) -> int:
        if minor < 24:
            return minor
        if minor > 27:
            raise ValueError(f"a malformed item before byte {self.position}")
        return int.from_bytes(self._take(1 << (minor - 24)), "big")

    def _is_break(self) -> bool:
        if self.position < len(self._data) and self._data[self.position] == _BREAK:
            self.position += 1
            return True
        return False

    def _count(self, minor: int) -> Iterator[None]:
        """Once for each member; the last of an indefinite number is followed by a break."""
        if minor == _INDEFINITE:
            while not self._is_break():
                yield
        else:
            for _ in range(self._argument(minor)):
                yield

    def _unsigned(self, minor: int, _: int) -> int:
        return self._argument(minor)

    def _negative(self, minor: int, _: int) -> int:
        return -1 - self._argument(minor)

    def _text(self, minor: int, depth: int) -> str:
        start = self.position
        if minor == _INDEFINITE:
            chunks = [self.item(depth + 1) for _ in self._count(minor)]
            if not all(isinstance(chunk, str) for chunk in chunks):
                raise ValueError(f"the text at byte {start} is made of something else than texts")
            return "".join(chunks)
        try:
            return self._take(self._argument(minor)).decode()
        except UnicodeDecodeError:
            raise ValueError(f"the text at byte {start} is not UTF-8") from None

    def _array(self, minor: int, depth: int) -> list[Any]:
        return [self.item(depth + 1) for _ in self._count(minor)]

    def _map(self, minor: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in self._count(minor):
            start, key = self.position, self.item(depth + 1)
            if not isinstance(key, str) or key in found:
                raise ValueError(
                    f"the key at byte {start} is {'there twice' if isinstance(key, str) else 'not a text'}"
                )
            found[key] = self.item(depth + 1)
        return found

    def _tagged(self, minor: int, depth: int) -> Any:
        start, tag = self.position, self._argument(minor)
        value = self.item(depth + 1)
        if tag == 55799 or (tag == 0 and isinstance(value, str)):
            return value
        if tag != 1 or isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"tag {tag} before byte {start} cannot be used here")
        try:
            return _EPOCH + timedelta(seconds=value)
        except (OverflowError, ValueError):
            raise ValueError(f"the time at byte {start} is out of range") from None

    def _other(self, minor: int, _: int) -> float | bool | None:
        if minor in _FLOATS:
            number: float = struct.unpack(_FLOATS[minor], self._take(1 << (minor - 24)))[0]
            return number
        if minor not in _SIMPLE:
            raise ValueError(f"a simple value {minor} before byte {self.position}")
        return _SIMPLE[minor]


_READERS: Mapping[int, Callable[[_Reader, int, int], Any]] = {
    0: _Reader._unsigned,
    1: _Reader._negative,
    3: _Reader._text,
    4: _Reader._array,
    5: _Reader._map,
    6: _Reader._tagged,
    7: _Reader._other,
}


def dumps(value: Any) -> bytes:
    """The values that `loads` gives, numbers in their shortest form; TypeError for others."""
    if value is None or isinstance(value, bool):
        return bytes([0xE0 | next(number for number, simple in _SIMPLE.items() if simple is value)])
    if isinstance(value, int):
        return _head(0, value) if value >= 0 else _head(1, -1 - value)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        text = value.encode()
        return _head(3, len(text)) + text
    return _composed(value)


def _composed(value: Any) -> bytes:
    if isinstance(value, datetime):
        seconds = value.timestamp()
        return b"\xc1" + dumps(int(seconds) if seconds.is_integer() else seconds)
    if isinstance(value, Mapping):
        return _head(5, len(value)) + b"".join(dumps(key) + dumps(member) for key, member in value.items())
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return _head(4, len(value)) + b"".join(dumps(member) for member in value)
    raise TypeError(f"{type(value).__name__} cannot be written as CBOR")


def _head(major: int, argument: int) -> bytes:
    if argument < 24:
        return bytes([major << 5 | argument])
    for minor, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if argument < 1 << 8 * size:
            return bytes([major << 5 | minor]) + argument.to_bytes(size, "big")
    raise TypeError("CBOR integers have 64 bits")


def _float(value: float) -> bytes:
    for minor in (25, 26):
        try:
            packed = struct.pack(_FLOATS[minor], value)
        except OverflowError:
            continue
        if struct.unpack(_FLOATS[minor], packed)[0] == value:
            return bytes([0xE0 | minor]) + packed
    return bytes([0xE0 | 27]) + struct.pack(">d", value)
