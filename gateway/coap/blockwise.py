"""Block-wise transfer (RFC 7959): assemble bodies from blocks, and cut replies into blocks."""

from __future__ import annotations

import dataclasses
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from gateway.coap.codec import OVERHEAD_BYTES, Block, Code, Message, Reply

K = TypeVar("K")
V = TypeVar("V")
Clock = Callable[[], float]
SMALLEST_BLOCK_BYTES = 16  # RFC 7959 2.2


class ExpiringMap(Generic[K, V]):
    """At most `max_entries`, each for `lifetime_seconds` after its last `put`; the one put longest ago makes room."""

    def __init__(self, *, max_entries: int, lifetime_seconds: float, clock: Clock) -> None:
        self._max_entries = max_entries
        self._lifetime_seconds = lifetime_seconds
        self._clock = clock
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()  # one lifetime for all: oldest expires first

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        entry = self._entries.get(key)
        return entry[1] if entry is not None and entry[0] > self._clock() else None

    def put(self, key: K, value: V) -> None:
        self._entries[key] = (self._clock() + self._lifetime_seconds, value)
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def pop(self, key: K) -> V | None:
        entry = self._entries.pop(key, None)
        return entry[1] if entry is not None else None

    def expire(self) -> None:
        now = self._clock()
        while self._entries and next(iter(self._entries.values()))[0] <= now:
            self._entries.popitem(last=False)


class Uploads:
    """Joins Block1 payloads into bodies.

    When all places are taken the upload idle for longest gives way: refusing the newest instead would let a few forged
    first blocks keep every sensor out for a whole lifetime.
    """

    def __init__(self, kept: ExpiringMap[object, bytearray], *, max_body_bytes: int) -> None:
        self.kept = kept
        self._max_body_bytes = max_body_bytes

    def add(self, message: Message) -> bytes | Reply:
        """The whole body once the last block is there, until then the reply to this block."""
        block = message.block1 or Block(0, False, self._max_body_bytes)
        if max(block.offset + len(message.payload), message.size1 or 0) > self._max_body_bytes:
            self.kept.pop(message.transfer)
            return Reply(code=Code.TOO_LARGE, size1=self._max_body_bytes)
        if message.block1 is None:
            return message.payload
        if len(message.payload) > block.size or (block.more and len(message.payload) < block.size):
            return Reply(code=Code.BAD_REQUEST, payload=b"the payload does not fill its block")
        body = bytearray() if block.number == 0 else self.kept.get(message.transfer)
        if body is None or len(body) < block.offset:
            return Reply(code=Code.INCOMPLETE, payload=b"blocks are missing")
        body[block.offset :] = message.payload  # a block sent twice replaces itself
        if block.more:
            self.kept.put(message.transfer, body)
            return Reply(code=Code.CONTINUE, block1=block)
        self.kept.pop(message.transfer)
        return bytes(body)


class Downloads:
    """Cuts replies into Block2 payloads and keeps the whole for a while: all blocks are to be of one representation."""

    def __init__(self, kept: ExpiringMap[object, Reply], *, block_bytes: int) -> None:
        self.kept = kept
        self._block_bytes = block_bytes

    def cut(self, message: Message, reply: Reply, *, room: int) -> Reply:
        """The reply itself if it fits and no block was asked for, else the block; errors are short and stay whole.

        `room`: the bytes that may be sent, out of which the block has to be found.
        """
        wanted = message.block2 or Block(0, False, self._block_bytes)
        size = self._size(wanted, room)
        if reply.code.is_error or (message.block2 is None and len(reply.payload) <= size):
            return reply
        reply = dataclasses.replace(reply, etag=zlib.crc32(reply.payload).to_bytes(4, "big"))
        if len(reply.payload) > size:
            self.kept.put(message.transfer, dataclasses.replace(reply, observe=None))
        return self._block(reply, wanted, size=size)

    def is_cramped(self, message: Message, reply: Reply, *, room: int) -> bool:
        """Whether more room would bring more of the reply at once."""
        wanted = message.block2 or Block(0, False, self._block_bytes)
        unhampered = min(len(reply.payload), self._size(wanted, self._block_bytes + OVERHEAD_BYTES))
        return not reply.code.is_error and self._size(wanted, room) < unhampered

    def held_for(self, message: Message) -> Reply | None:
        """The reply that block 1 and up are cut from; None where the handler has to make the representation (again)."""
        if message.block2 is None or message.block2.number == 0:
            return None
        whole = self.kept.get(message.transfer)
        if whole is not None:
            return whole
        if message.is_get:
            return None
        # Asking the handler would do a POST, PUT or DELETE a second time.
        return Reply(code=Code.INCOMPLETE, payload=b"the response is no longer kept")

    def _size(self, wanted: Block, room: int) -> int:
        affordable = 1 << (max(room - OVERHEAD_BYTES, SMALLEST_BLOCK_BYTES).bit_length() - 1)
        return min(wanted.size, self._block_bytes, affordable)

    def _block(self, whole: Reply, wanted: Block, *, size: int) -> Reply:
        start, end = wanted.offset, wanted.offset + size
        if start > 0 and start >= len(whole.payload):
            return Reply(code=Code.BAD_REQUEST, payload=b"there is no such block")
        block = Block(start // size, end < len(whole.payload), size)
        return dataclasses.replace(whole, payload=whole.payload[start:end], block2=block)
