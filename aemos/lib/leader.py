"""Leadership among equal processes: one leads at a time, and one that dies is replaced in seconds."""

from __future__ import annotations

import logging
import time
import uuid

from redis.exceptions import RedisError

from aemos.lib import redis
from aemos.lib.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

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
        self._log = RateLimitedLog(log)

    def leads(self) -> bool:
        """Whether this process leads for the next five seconds. Raises RedisError."""
        waits = time.monotonic() < self._anothers_until
        answer = redis.client().eval(_LEAD, 1, self._key, self._token, TERM_MS, int(waits))
        if answer > 0:
            self._anothers_until = time.monotonic() + answer / 1_000
        return bool(answer == _OURS)

    def leads_or(self, fallback: bool) -> bool:
        """As `leads`; `fallback` when Redis does not answer, which is logged at a limited rate.

        The fallback is False for work that needs Redis anyway, and what `leads` said last for work that does not: nobody else
        can take over while Redis is away.
        """
        try:
            leads = self.leads()
        except RedisError as error:
            self._log.log("redis", logging.WARNING, "Who leads (%s) is unknown: %s", self._key, redis.explain(error))
            return fallback
        self._log.recovered("redis", "Who leads (%s) is known again", self._key)
        return leads

    def resign(self) -> None:
        """Lets another take over at once; when Redis does not answer, another takes over at the end of the term."""
        try:
            redis.client().eval(_RESIGN, 1, self._key, self._token)
        except RedisError as error:
            log.warning("another takes over %s in %d s: %s", self._key, TERM_MS // 1_000, redis.explain(error))
