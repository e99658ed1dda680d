"""Order what a transport still has to deliver: one message at a time, urgent ones first.

An urgent message overtakes all but the earlier messages of its own addressee, which go out before it: a device must
never hear "off" and then the "on" that came before. People get messages in the order of the stream, whatever is urgent,
because they resume from the last position they have seen. Pure: no Django, no Redis.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import NamedTuple

from notifications.messages import Message


class Item(NamedTuple):
    """A message, the id of its entry in the stream, and how many bytes it took there. `read_ns`: when, if it is traced."""

    entry_id: bytes
    message: Message
    size: int
    read_ns: int = 0


class Backlog:
    """`in_order`: nothing overtakes. `bytes` is the size of all that waits."""

    def __init__(self, *, in_order: bool = False) -> None:
        self._in_order = in_order
        self._of: dict[str, deque[Item]] = {}
        # One token per item, in stream order. What is taken leaves its token over: the first so many of its addressee.
        self._order: deque[str] = deque()
        self._over: defaultdict[str, int] = defaultdict(int)
        self._urgent: deque[str] = deque()
        self._count = 0
        self.bytes = 0

    def __len__(self) -> int:
        return self._count

    def add(self, item: Item) -> None:
        addressee = item.message.addressee
        if addressee not in self._of:
            self._of[addressee] = deque()
        self._of[addressee].append(item)
        self._order.append(addressee)
        if self._is_urgent(item):
            self._urgent.append(addressee)
        self._count += 1
        self.bytes += item.size

    def take(self) -> Item:
        """The next to deliver; IndexError when nothing waits."""
        addressee = self._urgent[0] if self._urgent else self._order[0]
        item = self._pop(addressee)
        if self._is_urgent(item):
            self._urgent.popleft()
        self._over[addressee] += 1
        self._drop_tokens()
        return item

    def entry_ids(self) -> list[bytes]:
        return [item.entry_id for items in self._of.values() for item in items]

    def _is_urgent(self, item: Item) -> bool:
        return item.message.is_urgent and not self._in_order

    def _pop(self, addressee: str) -> Item:
        items = self._of[addressee]
        item = items.popleft()
        if not items:
            del self._of[addressee]
        self._count -= 1
        self.bytes -= item.size
        return item

    def _drop_tokens(self) -> None:
        """Those that are over: at the front, and everywhere once they are more than what waits, as when the urgent never end."""
        while self._order and self._is_over(self._order[0]):
            self._order.popleft()
        if len(self._order) > 2 * self._count:
            self._order = deque(addressee for addressee in self._order if not self._is_over(addressee))

    def _is_over(self, addressee: str) -> bool:
        """Whether its next token is left over; the answer yes uses that up."""
        if not self._over.get(addressee):
            return False
        self._over[addressee] -= 1
        if not self._over[addressee]:
            del self._over[addressee]
        return True
