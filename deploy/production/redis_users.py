"""The users of Redis, one for each process: takes their passwords, gives the file for Redis' `aclfile` setting (Redis 7)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

OPERATOR = "operator"
_KEYS = "~aemos:* ~rq:* &aemos:* &rq:*"
# Without @dangerous and @admin: no FLUSHALL, KEYS, CONFIG, MODULE, DEBUG, SAVE, SHUTDOWN, REPLICAOF, ACL, MONITOR. INFO is needed
# for the ledger (memory) and health (persistence); health also asks what DEFAULT is for, which ACL DRYRUN says of a user.
_COMMANDS = (
    "-@all +@read +@write +@connection +@transaction +@pubsub +eval +evalsha +script|load +script|exists +time "
    "-@dangerous -@admin +info +acl|dryrun"
)
# Taking events out of the journal is the workers' alone. XACK and XDEL work on the entries of a group that they have read.
_NOT_TAKING = "-xreadgroup -xack -xdel -xclaim -xautoclaim -xtrim"
# What a gateway has sent over MQTT it acknowledges to the stream of notifications, and to nothing else.
_NOTIFICATIONS = "(-@all +xreadgroup +xack +xautoclaim +xinfo +xgroup ~aemos:notifications)"

# Nobody can log in as the user without a name. But Redis reads its file of changes as that user, and leaves out every
# transaction in it that the user may not do (redis/redis#14541, valkey-io/valkey#3983): all that was accepted would be gone.
DEFAULT = "user default off ~* &* +@all"

RULES: Mapping[str, str] = {
    "web": f"{_KEYS} {_COMMANDS} {_NOT_TAKING}",
    "worker": f"{_KEYS} {_COMMANDS}",
    "gateway": f"{_KEYS} {_COMMANDS} {_NOT_TAKING} {_NOTIFICATIONS}",
    "scheduler": f"{_KEYS} {_COMMANDS} {_NOT_TAKING}",
    "commands": f"{_KEYS} {_COMMANDS}",
    OPERATOR: "~* &* +@all",
}
"""What each user may do, in Redis' own words. `commands` is for management commands, `operator` for people with redis-cli."""


def users_file(passwords: Mapping[str, Sequence[str]]) -> str:
    """The text of the file. Each user of RULES has at least one password; two while one is being replaced.

    The file holds SHA-256 digests, which cannot be used to log in.
    """
    lines = [DEFAULT]
    for user, rules in RULES.items():
        digests = " ".join(f"#{hashlib.sha256(each.encode()).hexdigest()}" for each in passwords[user])
        lines.append(f"user {user} on {digests} {rules}")
    return "\n".join(lines) + "\n"


def has_two_passwords(users: str) -> bool:
    """Whether a user of this file has an earlier password beside the new one."""
    return any(line.count(" #") > 1 for line in users.splitlines())
