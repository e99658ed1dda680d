"""Redis clients of this process, one for each purpose, with password, TLS and bounded waiting."""

from __future__ import annotations

from typing import Any

import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

from aemos.lib.per_process import per_process

# A request makes at most two calls before it is answered, so a Redis that hangs costs a device two seconds, not a minute.
SOCKET_TIMEOUT_SECONDS = 1.0


# redis-py annotates answers for clients that decode and for those that do not at once; these do not: answers are bytes.
Client = Any


@per_process
def client() -> Client:
    """For everything that is not tied to a partition: latest values, the notification stream, leader locks."""
    return connect(SOCKET_TIMEOUT_SECONDS)


def journal_client(partition: int) -> Client:
    """The server that holds the partition. Always asked for by partition, so that partitions can be spread over servers."""
    return client()


@per_process
def blocking_client() -> Client:
    """For reads that wait for news on a stream: the socket timeout must outlast the wait."""
    return connect(SOCKET_TIMEOUT_SECONDS + 10)


@per_process
def script(source: str) -> Script:
    """Called with keys, args and client, it sends the digest of `source`, and the source only where the server lacks it."""
    return Script(client(), source)


def connect(timeout_seconds: float) -> Client:
    # One retry covers a connection that Redis closed while it was idle. Ten, the default, would push twice and wait long;
    # a call that timed out may have been carried out and is not repeated at all.
    options: dict[str, Any] = {
        "host": settings.REDIS_HOST,
        "port": settings.REDIS_PORT,
        "db": settings.REDIS_DB,
        "username": settings.REDIS_USERNAME or None,
        "password": settings.REDIS_PASSWORD or None,
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": SOCKET_TIMEOUT_SECONDS,
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        "protocol": 2,
    }
    if settings.REDIS_TLS:
        options |= {"ssl": True, "ssl_ca_certs": settings.REDIS_CA_FILE or None}
    return redis.Redis(**options)


def explain(error: RedisError) -> str:
    """What went wrong in one line that says where to look; never holds the password."""
    where = f"Redis at {settings.REDIS_HOST}:{settings.REDIS_PORT}"
    if isinstance(error, AuthenticationError) or "NOAUTH" in str(error) or "WRONGPASS" in str(error):
        return f"{where} refuses the password: check REDIS_PASSWORD and REDIS_USERNAME"
    if isinstance(error, redis.TimeoutError):
        return f"{where} does not answer within {SOCKET_TIMEOUT_SECONDS:g} s"
    if isinstance(error, redis.ConnectionError):
        return f"{where} cannot be reached"
    return f"{where} answered: {error}"


def weaknesses() -> list[str]:
    """What in Redis' own settings may cost accepted events, one sentence each. Raises RedisError."""
    with client().pipeline(transaction=False) as pipeline:
        pipeline.info("persistence").info("memory")
        persistence, memory = pipeline.execute()
    found = []
    if not persistence.get("aof_enabled"):
        found.append("Redis keeps accepted events in memory alone: set appendonly yes.")
    elif _appendfsync() in ("everysec", "no"):
        found.append(
            "Redis may lose the accepted events of its last seconds when it is killed: set appendfsync always."
        )
    if memory.get("maxmemory_policy", "noeviction") != "noeviction":
        found.append(f"Redis may drop accepted events ({memory['maxmemory_policy']}): set maxmemory-policy noeviction.")
    if persistence.get("aof_enabled") and (complaint := _complaint_of_default_user()):
        found.append(complaint)
    return found


def _complaint_of_default_user() -> str:
    """Redis reads its file of changes as the user without a name, and leaves out the transactions that this user may not do.

    Whoever is that user may do what was done. Empty when all is well.
    """
    if settings.REDIS_USERNAME in ("", "default"):
        return ""
    try:
        answer = client().execute_command("ACL", "DRYRUN", "default", "SET", "key", "value")
    except redis.ResponseError as error:
        return (
            "Redis may lose accepted events when it starts again: whether its user default may do everything cannot be asked "
            f"({error}). Write users.acl anew with deploy.production.configure, or allow this user +acl|dryrun."
        )
    if answer in (b"OK", "OK"):
        return ""
    return (
        "Redis loses accepted events when it starts again, because its user default may not do everything: in users.acl, "
        "write user default off ~* &* +@all, then ACL LOAD."
    )


def _appendfsync() -> str:
    """Empty where it may not be asked, as with some providers."""
    try:
        answer = client().config_get("appendfsync")
    except redis.ResponseError:
        return ""
    return str(answer.get("appendfsync", ""))
