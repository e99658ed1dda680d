"""Live device tokens in, the broker's clients and roles out: compared again and again, so that no missed signal matters.

The table of BrokerAccount is what the broker was given. It is compared with the live tokens about once a second when
something can have changed, and with the broker itself at the start, every minute and whenever the connection came back: a
broker that lost its data is given everything again, and what it knows too much is taken away. Every step may be repeated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

from django.db import Error as DatabaseError
from django.db import connection
from django.db.models import Min
from django.utils import timezone

from aemos.lib import keys, metrics
from aemos.lib.batched import batched
from aemos.lib.leader import Leader
from aemos.lib.rate_limited_log import RateLimitedLog
from devices import tokens
from devices.models import CatalogueVersion, DeviceToken
from gateway.mqtt import device_status, dynamic_security, topics
from gateway.mqtt.connection import BrokerAway, BrokerError
from gateway.mqtt.dynamic_security import Command, CommandFailed, DynamicSecurity
from notifications.models import BrokerAccount

log = logging.getLogger(__name__)
T = TypeVar("T")
POLL_SECONDS = 1.0
# Without any sign of a change: what was written past the models or changed in the broker by others is found by then.
SWEEP_SECONDS = 60.0
RETRY_SECONDS = 5.0
# Accounts in one request. While the broker works on it (3 s with 10,000 devices) it serves nobody else, and the leadership
# must be renewed after it; larger requests are no faster.
BATCH = 5
QUERY_ROWS = 500
_EXISTS = frozenset({"Role already exists", "Client already exists"})
_MISSING = frozenset({"Role not found", "Client not found"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Counts of accounts: made, taken away, and left for another attempt because the broker refused a command."""

    created: int = 0
    removed: int = 0
    failed: int = 0

    def __add__(self, other: Changes) -> Changes:
        return Changes(
            created=self.created + other.created,
            removed=self.removed + other.removed,
            failed=self.failed + other.failed,
        )


class Stop(Protocol):
    """An event of threading or gevent."""

    def wait(self, timeout: float) -> bool: ...


class LeadershipLost(Exception):
    """Another process has begun to do this work; it will compare everything again."""


def _always() -> None:
    """Nothing stands in the way of the next batch."""


@contextmanager
def connected(*, timeout_seconds: float = 10.0) -> Iterator[DynamicSecurity]:
    """A connection of its own to the broker's accounts. Raises BrokerAway."""
    with DynamicSecurity() as security:
        if not security.ready.wait(timeout_seconds):
            raise BrokerAway(f"the MQTT broker cannot be used within {timeout_seconds:g} s")
        yield security


def sync_once(*, timeout_seconds: float = 10.0) -> Changes:
    """Brings the broker in step over a connection of its own. Raises BrokerError."""
    with connected(timeout_seconds=timeout_seconds) as security:
        return verify(security)


def difference(security: DynamicSecurity) -> Changes:
    """What `verify` would do, counted; changes nothing. Raises BrokerError."""
    clients, roles = security.clients(), security.roles()
    accounts = set(BrokerAccount.objects.values_list("username", flat=True))
    live = {
        prefix: topics.role_name(str(sensor or device))
        for prefix, sensor, device in DeviceToken.objects.live().values_list("prefix", "sensor__uuid", "device__uuid")
    }
    missing = [
        username
        for username, role in live.items()
        if username not in accounts or role not in clients.get(username, ()) or role not in roles
    ]
    of_devices = {name for name, held in clients.items() if any(map(topics.is_role_of_an_originator, held))}
    return Changes(created=len(missing), removed=len((accounts | of_devices) - live.keys()))


def verify(security: DynamicSecurity, *, before_batch: Callable[[], None] = _always) -> Changes:
    """Compares with what the broker really has, as well as with the tokens. Raises BrokerError."""
    clients, roles = security.clients(), security.roles()
    lost = [
        username
        for username, originator in BrokerAccount.objects.values_list("username", "originator_uuid").iterator()
        if (name := topics.role_name(str(originator))) not in clients.get(username, ()) or name not in roles
    ]
    for batch in batched(lost, QUERY_ROWS):
        BrokerAccount.objects.filter(username__in=batch).delete()
    if lost:
        log.warning("The MQTT broker does not know %d device accounts any more; they are made again", len(lost))
    changes = reconcile(security, before_batch=before_batch)
    return changes + _remove_strangers(security, before_batch=before_batch)


def reconcile(security: DynamicSecurity, *, before_batch: Callable[[], None] = _always) -> Changes:
    """Takes away the accounts of tokens that are not live, then makes those that live tokens lack. Raises BrokerError.

    `before_batch` may raise to stop in between; nothing is half done then that a later call would not finish.
    """
    live = DeviceToken.objects.live()
    changes = Changes()
    stale = BrokerAccount.objects.exclude(username__in=live.values("prefix")).order_by("username")
    for accounts in batched(list(stale), BATCH):
        before_batch()
        changes += _remove(security, accounts)
    missing = live.exclude(prefix__in=BrokerAccount.objects.values("username"))
    for batch in batched(list(missing.select_related("sensor", "device", "organization").order_by("id")), BATCH):
        before_batch()
        changes += _create(security, batch)
    return changes


def _create(security: DynamicSecurity, batch: Sequence[DeviceToken]) -> Changes:
    accounts = [
        BrokerAccount(
            username=token.prefix, originator_uuid=token.owner.uuid, organization_uuid=token.organization.uuid
        )
        for token in batch
    ]
    problems = _make(security, accounts)
    made = [account for account in accounts if account.username not in problems]
    # Of two instances at work at the same time, the second finds the row of the first.
    BrokerAccount.objects.bulk_create(made, ignore_conflicts=True)
    return Changes(created=len(made), failed=len(problems))


def _make(security: DynamicSecurity, accounts: Sequence[BrokerAccount]) -> set[str]:
    """Makes roles and clients, also over remains of an earlier attempt; gives the usernames that failed."""
    grants = {
        topics.role_name(str(account.originator_uuid)): topics.grants(
            str(account.originator_uuid), str(account.organization_uuid)
        )
        for account in accounts
    }
    bad_roles = _put(
        security,
        [
            (name, dynamic_security.create_role(name, each), dynamic_security.modify_role(name, each))
            for name, each in grants.items()
        ],
    )
    clients = []
    for account in accounts:
        name, password = topics.role_name(str(account.originator_uuid)), tokens.token_for(account.username)
        create = dynamic_security.create_client(account.username, password=password, rolename=name)
        modify = dynamic_security.modify_client(account.username, password=password, rolename=name)
        clients.append((account.username, create, modify))
    bad_clients = _put(security, clients)
    return bad_clients | {
        account.username for account in accounts if topics.role_name(str(account.originator_uuid)) in bad_roles
    }


def _put(security: DynamicSecurity, wanted: Sequence[tuple[str, Command, Command]]) -> set[str]:
    """(name, command that creates, command that modifies what is there already); gives the names that failed."""
    outcomes = security.execute([create for _, create, _ in wanted])
    there = [
        (name, modify) for (name, _, modify), outcome in zip(wanted, outcomes, strict=True) if outcome.error in _EXISTS
    ]
    names = [name for name, *_ in wanted] + [name for name, _ in there]
    outcomes += security.execute([modify for _, modify in there])
    return _failures(names, outcomes, tolerated=_EXISTS)


def _remove(security: DynamicSecurity, accounts: Sequence[BrokerAccount]) -> Changes:
    """Clients first: that ends their live connections. A role goes with the last account of its originator."""
    usernames = [account.username for account in accounts]
    problems = _take_away(security, usernames, dynamic_security.delete_client)
    gone = [account for account in accounts if account.username not in problems]
    originators = {account.originator_uuid for account in gone}
    others = BrokerAccount.objects.filter(originator_uuid__in=originators)
    others = others.exclude(username__in=[account.username for account in gone])
    unused = originators - set(others.values_list("originator_uuid", flat=True))
    _delete_roles(security, [topics.role_name(str(uuid)) for uuid in unused])
    device_status.end(unused)
    BrokerAccount.objects.filter(username__in=[account.username for account in gone]).delete()
    return Changes(removed=len(gone), failed=len(problems))


def _remove_strangers(security: DynamicSecurity, *, before_batch: Callable[[], None]) -> Changes:
    """Clients and roles that only AEMOS can have made and that belong to no live token: remains of a crash or a restore."""
    changes = Changes()
    accounts = dict(BrokerAccount.objects.values_list("username", "originator_uuid"))
    strangers = [
        username
        for username, held in security.clients().items()
        if username not in accounts and any(map(topics.is_role_of_an_originator, held))
    ]
    for batch in batched(strangers, BATCH):
        before_batch()
        failed = len(_take_away(security, batch, dynamic_security.delete_client))
        changes += Changes(removed=len(batch) - failed, failed=failed)
    known = {topics.role_name(str(uuid)) for uuid in accounts.values()}
    unused = [role for role in security.roles() if topics.is_role_of_an_originator(role) and role not in known]
    for batch in batched(unused, BATCH):
        before_batch()
        _delete_roles(security, batch)
    return changes


def _delete_roles(security: DynamicSecurity, names: Sequence[str]) -> None:
    """Leaves roles that a client still holds: Mosquitto 2.0.11 deletes those, too, and then crashes."""
    if names:
        held = frozenset[str]().union(*security.clients().values())
        _take_away(security, [name for name in names if name not in held], dynamic_security.delete_role)


def _take_away(security: DynamicSecurity, names: Sequence[str], command: Callable[[str], Command]) -> set[str]:
    return _failures(names, security.execute([command(name) for name in names]), tolerated=_MISSING)


def _failures(
    names: Sequence[str], outcomes: Sequence[dynamic_security.Outcome], *, tolerated: frozenset[str]
) -> set[str]:
    failed = set()
    for name, outcome in zip(names, outcomes, strict=True):
        if outcome.error and outcome.error not in tolerated:
            failed.add(name)
            log.error("The MQTT broker refused %s of %s", CommandFailed(outcome.command, outcome.error), name)
    return failed


class BrokerSync:
    """Keeps the broker in step until it is stopped. Several processes may run it; one at a time does the work."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        leader: Leader | None = None,
    ) -> None:
        self._clock = clock
        self._leader = leader or Leader(keys.BROKER_SYNC_LEADER)
        self._security = DynamicSecurity()
        self._log = RateLimitedLog(log)
        self._verified = 0  # the connection that the broker's own tables were last compared over; 0 for none
        self._versions: dict[int, int] = {}
        self._next_expiry: datetime | None = None
        self._next_sweep = float("-inf")

    def run(self, stop: Stop) -> None:
        """Blocks until `stop` is set; looks once a second."""
        self._security.start()
        try:
            while not stop.wait(POLL_SECONDS):
                self._guarded_step()
        finally:
            self._security.stop()
            self._leader.resign()

    def _guarded_step(self) -> None:
        try:
            self._step()
        except (BrokerError, LeadershipLost) as error:
            self._log.log(type(error).__name__, logging.WARNING, "Device accounts of the broker wait: %s", error)
            self._verified = 0
        except DatabaseError as error:
            self._log.log("database", logging.WARNING, "Device accounts of the broker wait for the database: %s", error)
            self._next_sweep = float("-inf")
        except Exception:  # noqa: BLE001  process loop: one bad row must not end the revoking of tokens
            metrics.GATEWAY_FAILURES.labels("accounts").inc()
            self._log.log("failure", logging.ERROR, "The broker could not be brought in step", trace=True)
            self._verified = 0
        finally:
            connection.close()  # outside a request nobody else would give it back

    def _step(self) -> None:
        self._security.revive()
        if not self._leader.leads_or(False):
            self._verified = 0
            return
        if not self._security.ready.is_set():
            return  # the connection has said so
        versions = dict(CatalogueVersion.objects.values_list("organization_id", "version"))
        device_status = self._security.connections
        if device_status != self._verified or self._clock() >= self._next_sweep:
            comparison = verify
        elif versions != self._versions or self._has_expired():
            comparison = reconcile
        else:
            return
        # Before the comparison: what expires during it is then still ahead.
        next_expiry = DeviceToken.objects.live().aggregate(next=Min("expires_at"))["next"]
        changes = comparison(self._security, before_batch=self._check_leadership)
        if changes != Changes():
            counts = (changes.created, changes.removed, changes.failed)
            log.info("Device accounts of the broker: %d made, %d taken away, %d failed", *counts)
        self._verified, self._versions, self._next_expiry = device_status, versions, next_expiry
        if comparison is verify or changes.failed:
            self._next_sweep = self._clock() + (RETRY_SECONDS if changes.failed else SWEEP_SECONDS)

    def _has_expired(self) -> bool:
        return self._next_expiry is not None and timezone.now() >= self._next_expiry

    def _check_leadership(self) -> None:
        if not self._leader.leads_or(False):
            raise LeadershipLost("another process keeps the broker in step")
