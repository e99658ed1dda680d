"""Encode and decode CoAP messages (RFC 7252, 3).

CoapRequest and CoapResponse are the two ends a handler sees; Message and Reply add what only the protocol needs.

Replies are written by CoAPthon3's Serializer. Its reader is used for single option headers only: given a whole datagram
it loses every payload that is not UTF-8, turns an empty path segment into the text "b''" and a block option of zero
into None, accepts options longer than the datagram, and leaves through IndexError and TypeError.

    CoapError
    +-- Malformed      not a message: answered with RST where RFC 7252 says so, otherwise with silence
    +-- Unacceptable   a message whose request cannot be served: answered with a code and a short text
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from types import MappingProxyType
from typing import Any

from coapthon import defines
from coapthon.messages.option import Option
from coapthon.messages.response import Response
from coapthon.serializer import Serializer

Source = tuple[str, int]

# The library carries no annotations; these names keep the untyped calls in one place.
_option: Any = Option
_response: Any = Response
_serializer: Any = Serializer
_registry = defines.OptionRegistry

# 64 are three times what any route and query here needs; a datagram of 65,000 empty options is not worth a tuple.
MAX_OPTIONS = 64
MAX_TOKEN_BYTES = 8
# The most that stands before the payload of a reply: header and token, ETag, Observe, Content-Format, Max-Age, Block2,
# Block1 or Size1, payload marker.
OVERHEAD_BYTES = 12 + 5 + 4 + 3 + 5 + 4 + 5 + 1


class Kind(IntEnum):
    """The message type in the header."""

    CON = 0
    NON = 1
    ACK = 2
    RST = 3


class Code(IntEnum):
    """Response codes, class * 32 + detail (RFC 7252 12.1.2, RFC 7959, RFC 8132, RFC 8516)."""

    CREATED = 65
    DELETED = 66
    VALID = 67
    CHANGED = 68
    CONTENT = 69
    CONTINUE = 95
    BAD_REQUEST = 128
    UNAUTHORIZED = 129
    BAD_OPTION = 130
    FORBIDDEN = 131
    NOT_FOUND = 132
    METHOD_NOT_ALLOWED = 133
    NOT_ACCEPTABLE = 134
    INCOMPLETE = 136
    CONFLICT = 137
    PRECONDITION_FAILED = 140
    TOO_LARGE = 141
    UNSUPPORTED_FORMAT = 143
    UNPROCESSABLE = 150
    TOO_MANY_REQUESTS = 157
    INTERNAL_ERROR = 160
    NOT_IMPLEMENTED = 161
    BAD_GATEWAY = 162
    UNAVAILABLE = 163
    GATEWAY_TIMEOUT = 164
    PROXYING_NOT_SUPPORTED = 165

    @property
    def is_error(self) -> bool:
        return self >= Code.BAD_REQUEST


# The library refuses to write codes it does not list: 4.01, 4.02, 4.09, 4.22 and 4.29 among them.
for _code in Code:
    defines.Codes.LIST.setdefault(int(_code), defines.CodeItem(int(_code), _code.name))

EMPTY = 0
GET = 1
HEADER_BYTES = 4
METHODS: Mapping[int, str] = MappingProxyType({GET: "GET", 2: "POST", 3: "PUT", 4: "DELETE"})

# Option number -> (shortest, longest value in bytes, may repeat), RFC 7252 5.10, RFC 7641 2, RFC 7959 2.1 and 4.
# What is not here is unknown to this server, whatever the library's registry lists: If-Match, for one, is not honoured.
_UNDERSTOOD: Mapping[int, tuple[int, int, bool]] = MappingProxyType(
    {
        _registry.URI_HOST.number: (1, 255, False),
        _registry.OBSERVE.number: (0, 3, False),
        _registry.URI_PORT.number: (0, 2, False),
        _registry.URI_PATH.number: (0, 255, True),
        _registry.CONTENT_TYPE.number: (0, 2, False),
        _registry.URI_QUERY.number: (0, 255, True),
        _registry.ACCEPT.number: (0, 2, False),
        _registry.BLOCK2.number: (0, 3, False),
        _registry.BLOCK1.number: (0, 3, False),
        _registry.SIZE1.number: (0, 4, False),
    }
)
_PROXYING = (_registry.PROXY_URI.number, _registry.PROXY_SCHEME.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoapRequest:
    """One request, its body whole; `path` and `query` are decoded texts, of a repeated query key the last counts."""

    method: str
    path: tuple[str, ...]
    query: Mapping[str, str]
    payload: bytes
    content_format: int | None
    accept: int | None
    source: Source
    observe: bool  # this GET registers, or re-evaluates, an observation
    more: bool = False  # `payload` is one block, and others follow: CONTINUE has the body gathered, all else ends it


@dataclass(frozen=True, slots=True, kw_only=True)
class CoapResponse:
    """What a handler answers; `max_age` in seconds, with 4.29 and 5.03 the time after which to try again.

    `observable`: a successful GET whose representation may be observed. ValueError for numbers CoAP cannot carry.
    """

    code: Code
    payload: bytes = b""
    content_format: int | None = None
    max_age: int | None = None
    observable: bool = False

    def __post_init__(self) -> None:
        Code(self.code)
        # The codec would shift a negative number for ever.
        if not 0 <= (self.max_age or 0) < 2**32 or not 0 <= (self.content_format or 0) < 2**16:
            raise ValueError(f"max_age {self.max_age} or content_format {self.content_format} is out of range")


class CoapError(Exception):
    """A datagram that cannot be served."""


class Malformed(CoapError):
    """A message format error; `reset` is the message id to answer with RST, None where silence is the answer."""

    def __init__(self, reason: str, *, reset: int | None = None) -> None:
        super().__init__(reason)
        self.reset = reset


class Unacceptable(CoapError):
    """A well-formed request that is refused by `code` before any handler sees it."""

    def __init__(self, code: Code, diagnostic: str) -> None:
        super().__init__(diagnostic)
        self.code = code


@dataclass(frozen=True, slots=True)
class Header:
    """The first four bytes and the token."""

    kind: Kind
    code: int
    mid: int
    token: bytes

    @property
    def is_request(self) -> bool:
        low, high = defines.REQUEST_CODE_LOWER_BOUND, defines.REQUEST_CODE_UPPER_BOUND
        return self.kind in (Kind.CON, Kind.NON) and low <= self.code <= high

    def malformed(self, reason: str) -> Malformed:
        """RFC 7252 4.2 and 4.3: only a confirmable message is rejected with RST, the rest are ignored."""
        return Malformed(reason, reset=self.mid if self.kind is Kind.CON else None)


@dataclass(frozen=True, slots=True)
class Block:
    """A Block1 or Block2 value (RFC 7959 2.2); `size` in bytes, a power of two from 16 to 1,024."""

    number: int
    more: bool
    size: int

    @property
    def offset(self) -> int:
        return self.number * self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One request as it came, block by block; texts are as the options carry them, which is never percent-encoded."""

    source: Source
    header: Header
    path: tuple[str, ...]
    query: tuple[str, ...]
    payload: bytes
    observe: int | None
    content_format: int | None
    accept: int | None
    block1: Block | None
    block2: Block | None
    size1: int | None
    received_bytes: int

    def to_request(self, *, body: bytes, observe: bool, more: bool = False) -> CoapRequest:
        return CoapRequest(
            method=METHODS[self.header.code],
            path=self.path,
            query={name: value for name, _, value in (item.partition("=") for item in self.query)},
            payload=body,
            content_format=self.content_format,
            accept=self.accept,
            source=self.source,
            observe=observe,
            more=more,
        )

    @property
    def is_get(self) -> bool:
        return self.header.code == GET

    @property
    def observation(self) -> tuple[Source, bytes]:
        """What identifies an observation (RFC 7641)."""
        return self.source, self.header.token

    @property
    def transfer(self) -> tuple[object, ...]:
        """What joins the blocks of one body; the token is left out, because clients take a new one for each block."""
        return self.source, self.header.code, self.path, self.query, self.accept


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A response with the options that the endpoint adds to what a handler said."""

    code: Code
    payload: bytes = b""
    content_format: int | None = None
    max_age: int | None = None
    observe: int | None = None
    block1: Block | None = None
    block2: Block | None = None
    size1: int | None = None
    etag: bytes | None = None

    def within(self, room: int) -> Reply:
        """The reply with what can be left out of an error left out: it is to take at most `room` bytes.

        Half a text is still of use, half a document is not.
        """
        longest = max(room - OVERHEAD_BYTES, 0)
        if not self.code.is_error or len(self.payload) <= longest:
            return self
        if self.content_format is not None:
            return replace(self, payload=b"", content_format=None)
        return replace(self, payload=self.payload[:longest].decode("utf-8", "ignore").encode())


def read_header(datagram: bytes) -> Header:
    """Raises Malformed; a datagram too short for a message id or of another version is to be ignored (RFC 7252 3)."""
    if len(datagram) < HEADER_BYTES or datagram[0] >> 6 != defines.VERSION:
        raise Malformed("not a CoAP version 1 message")
    kind, token_length = Kind(datagram[0] >> 4 & 3), datagram[0] & 15
    header = Header(kind, datagram[1], int.from_bytes(datagram[2:4], "big"), datagram[4 : 4 + token_length])
    if token_length > MAX_TOKEN_BYTES or len(header.token) < token_length:
        raise header.malformed("the token is cut off or too long")
    if header.code == EMPTY and len(datagram) > HEADER_BYTES:
        raise header.malformed("an empty message carries bytes")
    return header


def read_request(header: Header, datagram: bytes, *, source: Source) -> Message:
    """Raises Malformed for bytes that are no message, Unacceptable for a request this server cannot serve."""
    options, payload = _split(header, datagram)
    if header.code not in METHODS:
        raise Unacceptable(Code.METHOD_NOT_ALLOWED, "unknown method")
    values = _understood(options)
    return Message(
        source=source,
        header=header,
        path=_texts(values, _registry.URI_PATH.number),
        query=_texts(values, _registry.URI_QUERY.number),
        payload=payload,
        observe=_number(values, _registry.OBSERVE.number),
        content_format=_number(values, _registry.CONTENT_TYPE.number),
        accept=_number(values, _registry.ACCEPT.number),
        block1=_block(values, _registry.BLOCK1.number),
        block2=_block(values, _registry.BLOCK2.number),
        size1=_number(values, _registry.SIZE1.number),
        received_bytes=len(datagram),
    )


def _split(header: Header, datagram: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The options as (number, value) and the payload, unchanged."""
    options: list[tuple[int, bytes]] = []
    number, position = 0, HEADER_BYTES + len(header.token)
    while position < len(datagram):
        if datagram[position] == defines.PAYLOAD_MARKER:
            if position + 1 == len(datagram):
                raise header.malformed("a payload marker without payload")
            return options, datagram[position + 1 :]
        try:
            delta, length, position = _serializer.read_option_value_len_from_byte(
                datagram[position], position + 1, datagram
            )
        except (AttributeError, IndexError, struct.error) as error:
            raise header.malformed("a broken option header") from error
        number, end = number + delta, position + length
        if end > len(datagram) or len(options) == MAX_OPTIONS:
            raise header.malformed("an option is cut off, or there are too many")
        options.append((number, datagram[position:end]))
        position = end
    return options, b""


def _understood(options: Sequence[tuple[int, bytes]]) -> dict[int, list[bytes]]:
    """Option values by number; an option of wrong length or a forbidden repetition counts as unknown (RFC 7252 5.4)."""
    values: dict[int, list[bytes]] = {}
    for number, value in options:
        shortest, longest, repeatable = _UNDERSTOOD.get(number, (1, 0, False))
        if shortest <= len(value) <= longest and (repeatable or number not in values):
            values.setdefault(number, []).append(value)
        elif number in _PROXYING:
            raise Unacceptable(Code.PROXYING_NOT_SUPPORTED, "this server is no proxy")
        elif number & 1:  # odd numbers are critical, even ones may be skipped (RFC 7252 5.4.1)
            raise Unacceptable(Code.BAD_OPTION, f"option {number} is not supported in this form")
    return values


def _texts(values: Mapping[int, list[bytes]], number: int) -> tuple[str, ...]:
    try:
        return tuple(value.decode("utf-8") for value in values.get(number, ()))
    except UnicodeDecodeError as error:
        raise Unacceptable(Code.BAD_OPTION, f"option {number} is not UTF-8") from error


def _number(values: Mapping[int, list[bytes]], number: int) -> int | None:
    return int.from_bytes(values[number][0], "big") if number in values else None


def _block(values: Mapping[int, list[bytes]], number: int) -> Block | None:
    value = _number(values, number)
    if value is None:
        return None
    if value & 7 == 7:
        raise Unacceptable(Code.BAD_REQUEST, "block size 7 is reserved")
    return Block(value >> 4, bool(value & 8), 16 << (value & 7))


def write_empty(kind: Kind, mid: int) -> bytes:
    """An empty ACK or RST."""
    return struct.pack("!BBH", defines.VERSION << 6 | kind << 4, EMPTY, mid)


def write_reply(reply: Reply, *, kind: Kind, mid: int, token: bytes) -> bytes:
    response = _response()
    response.type, response.code, response.mid, response.token = kind, reply.code, mid, token
    for number, value in _reply_options(reply):
        if value is not None:
            option = _option()
            option.number, option.value = number, value
            response.add_option(option)
    response.payload = reply.payload
    return bytes(_serializer.serialize(response))


def _reply_options(reply: Reply) -> tuple[tuple[int, int | bytes | None], ...]:
    return (
        (_registry.ETAG.number, reply.etag),
        (_registry.OBSERVE.number, reply.observe),
        (_registry.CONTENT_TYPE.number, reply.content_format),
        (_registry.MAX_AGE.number, reply.max_age),
        (_registry.BLOCK2.number, _block_value(reply.block2)),
        (_registry.BLOCK1.number, _block_value(reply.block1)),
        (_registry.SIZE1.number, reply.size1),
    )


def _block_value(block: Block | None) -> int | None:
    if block is None:
        return None
    return block.number << 4 | block.more << 3 | block.size.bit_length() - 5
