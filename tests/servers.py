"""Early pytest plugin: starts this run's own Redis, Mosquitto and PostgreSQL (--postgres) before settings are read.

Loaded with `-p tests.servers`, because the settings read the environment once, when pytest-django imports them.
Processes that tests start inherit the environment and so find the same servers.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

import gevent
import pytest

from deploy import postgresql, servers

_data = tempfile.TemporaryDirectory(prefix="aemos-tests-")
_started: dict[str, servers.Server] = {}
_greenlets: WeakSet[gevent.Greenlet[..., object]] = WeakSet()
gevent.Greenlet.add_spawn_callback(_greenlets.add)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--postgres", action="store_true", help="run on a PostgreSQL of its own instead of SQLite")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    data = Path(_data.name)
    redis = _started["redis"] = servers.start_redis(data / "redis")
    broker = _started["broker"] = servers.start_mosquitto(data / "mosquitto")
    os.environ |= {
        "AEMOS_ENV": "test",
        "VAR_DIR": str(data / "var"),
        "REDIS_PORT": str(redis.port),
        "REDIS_PASSWORD": redis.password,
        "MQTT_PORT": str(broker.port),
        "MQTT_USERNAME": broker.username,
        "MQTT_PASSWORD": broker.password,
    }
    if early_config.known_args_namespace.postgres:
        database = _started["postgres"] = postgresql.start_postgresql()
        os.environ |= {
            "DB_ENGINE": "postgresql",
            "DB_NAME": "postgres",
            "DB_PORT": str(database.port),
            "DB_USER": database.username,
            "DB_PASSWORD": database.password,
        }


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --postgres only what uses the database is run again: the rest cannot tell the difference.

    Files whose tests may take long come first: at the end of a parallel run one process would be left alone with them.
    """
    longest: defaultdict[Path, float] = defaultdict(float)
    for item in items:
        for mark in item.iter_markers("timeout"):
            longest[item.path] = max(longest[item.path], mark.args[0])
    items.sort(key=lambda item: -longest[item.path])
    if not config.option.postgres:
        return
    unconcerned = [item for item in items if item.get_closest_marker("django_db") is None]
    items[:] = [item for item in items if item not in unconcerned]
    config.hook.pytest_deselected(items=unconcerned)


def pytest_unconfigure() -> None:
    for server in _started.values():
        server.stop()
    _data.cleanup()


@pytest.fixture(scope="session")
def redis_server() -> servers.Server:
    """The Redis of this run; a test that stops it must start it again."""
    return _started["redis"]


@pytest.fixture(scope="session")
def broker() -> servers.Server:
    """The Mosquitto of this run; a test that stops it must start it again."""
    return _started["broker"]


@contextmanager
def redis_that_was_empty() -> Iterator[None]:
    """Fails if another test, or a process that it started, left something in Redis; leaves it empty in any case."""
    from aemos.lib import redis

    client = redis.client()
    left = client.keys()
    client.flushdb()  # one test fails for it, not all that follow
    assert not left, "an earlier test left keys in Redis"
    yield
    client.flushdb()


@pytest.fixture
def empty_redis() -> Iterator[None]:
    """For every test that uses Redis."""
    with redis_that_was_empty():
        yield


@pytest.fixture(autouse=True)
def _each_test_is_a_process() -> Iterator[None]:
    """Forgets after a test what the process keeps in memory: connections to Redis, caches, counts."""
    yield
    from aemos.lib import metrics, per_process

    per_process.forget_all()
    metrics.COUNTERS.discard()


@pytest.fixture(autouse=True)
def _no_greenlet_outlives_its_test() -> Iterator[None]:
    """What a test leaves to be done a little later would otherwise be done in the middle of another test."""
    before = _waiting_greenlets()
    yield
    gevent.killall(list(_waiting_greenlets() - before), timeout=5)


def _waiting_greenlets() -> set[gevent.Greenlet[..., object]]:
    """Those of this thread: another thread's are its own to end."""
    hub = gevent.get_hub()
    return {each for each in _greenlets if not each.dead and each.parent is hub}
