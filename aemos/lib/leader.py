"""Leadership among equal processes: a key in, whether this process leads out. A leader that dies is replaced in seconds."""

from __future__ import annotations

import time
import uuid

from aemos.lib import redis

TERM_MS = 5_000

# What it does: takes the key, or lengthens it if it is ours; who has resigned leaves it empty. KEYS: leader key. ARGV: our token,
# term in ms, 1 while another's term must not be over: then a missing key is not taken. Returns: -1 when it is ours, else for how
# many ms it is another's.
_LEAD = """
local holder = redis.call('GET', KEYS[1])
if not holder and ARGV[3] == '1' then return 0 end
if holder and holder ~= '' and holder ~= ARGV[1] then return math.max(redis.call('PTTL', KEYS[1]), 0) end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return -1
"""
_OURS = -1

# What it does: gives the key up if it is ours. KEYS: leader key. ARGV: our token. Returns: nothing of interest.
_RESIGN = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], '', 'KEEPTTL') end"


class Leader:
    """One candidate. Ask `leads` at least every two seconds; work that must not be doubled still needs its own key.

    A Redis that was emptied does not make two leaders: who leads takes the key again, and the others wait for the end of the
    term that they know of.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._token = uuid.uuid4().hex
        self._anothers_until = 0.0

    def leads(self) -> bool:
        """Whether this process leads for the next five seconds. Raises RedisError."""
        waits = time.monotonic() < self._anothers_until
        answer = redis.client().eval(_LEAD, 1, self._key, self._token, TERM_MS, int(waits))
        if answer > 0:
            self._anothers_until = time.monotonic() + answer / 1_000
        return bool(answer == _OURS)

    def resign(self) -> None:
        """Lets another take over at once. Raises RedisError."""
        redis.client().eval(_RESIGN, 1, self._key, self._token)
