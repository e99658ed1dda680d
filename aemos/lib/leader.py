"""Leadership among equal processes: a key in, whether this process leads out. A leader that dies is replaced in seconds."""

from __future__ import annotations

import uuid

from aemos.lib import redis

TERM_MS = 5_000

# What it does: takes the key, or lengthens it if it is ours. KEYS: leader key. ARGV: our token, term in ms. Returns: 1 or 0.
_LEAD = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

# What it does: gives the key up if it is ours. KEYS: leader key. ARGV: our token. Returns: 1 or 0.
_RESIGN = "return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('DEL', KEYS[1]) or 0"


class Leader:
    """One candidate. Ask `leads` at least every two seconds; work that must not be doubled still needs its own key."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._token = uuid.uuid4().hex

    def leads(self) -> bool:
        """Whether this process leads for the next five seconds. Raises RedisError."""
        return bool(redis.client().eval(_LEAD, 1, self._key, self._token, TERM_MS))

    def resign(self) -> None:
        """Lets another take over at once. Raises RedisError."""
        redis.client().eval(_RESIGN, 1, self._key, self._token)
