"""What the machine, and simpler programs on it, can do: what the throughput of AEMOS is compared with."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import psycopg
import requests
from psycopg.conninfo import make_conninfo
from rq import Queue

from benchmarks import naive_job
from benchmarks.farm import SENSORS, connection_of, durable_postgresql, redis_of, until, wrk
from benchmarks.report import Figure
from benchmarks.system import own_system
from deploy import javascript
from deploy.processes import terminate
from deploy.programs import REPOSITORY
from deploy.servers import free_port

WORKER_CLASS = "gunicorn.workers.ggevent.GeventPyWSGIWorker"
READINGS = (
    "CREATE TABLE readings (variable_id bigint, timestamp timestamptz, number double precision, text varchar, "
    "PRIMARY KEY (variable_id, timestamp))"
)
# So many jobs are kept waiting for the worker of RQ.
AHEAD = 500
EXPRESS = REPOSITORY / "benchmarks" / "javascript"


def all_of_them() -> Iterator[tuple[str, Callable[[float], Figure]]]:
    """What each is, and how it is measured for so many seconds."""
    yield "hello", hello
    if shutil.which("node"):
        yield "Express + BullMQ", express_bullmq
    yield "raw inserts", raw_inserts
    yield "raw appends", raw_appends
    yield "a job of RQ for each reading", jobs_of_rq


def hello(seconds: float) -> Figure:
    port = free_port()
    with tempfile.TemporaryFile() as log:
        command = [
            sys.executable,
            "-m",
            "gunicorn",
            "-b",
            f"127.0.0.1:{port}",
            "-k",
            WORKER_CLASS,
            "benchmarks.hello:application",
        ]
        server = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        try:
            until(lambda: answers(f"http://127.0.0.1:{port}/"))
            return Figure(name="hello", rate=wrk(f"http://127.0.0.1:{port}/", seconds)[0], unit="requests")
        finally:
            terminate(server, stop_signal=signal.SIGTERM, grace_seconds=5)


def raw_inserts(seconds: float) -> Figure:
    """Readings in batches of 1,000, each in a transaction of its own, into a table like ours, without anything else."""
    with durable_postgresql() as server, psycopg.connect(**connection_of(server), autocommit=True) as connection:
        connection.execute(READINGS)
        began, done = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            columns = [
                [number % SENSORS for number in range(1_000)],
                [done + number for number in range(1_000)],
                [6.0] * 1_000,
            ]
            connection.execute(
                "INSERT INTO readings SELECT v, timestamptz 'epoch' + t * interval '1 microsecond', n, NULL "
                "FROM unnest(%b::bigint[], %b::bigint[], %b::float8[]) AS incoming(v, t, n) ON CONFLICT DO NOTHING",
                columns,
            )
            done += 1_000
        return Figure(name="raw inserts", rate=done / (time.monotonic() - began), unit="readings")


def raw_appends(seconds: float) -> Figure:
    """Entries of 60 bytes, each synced to disk before the next is sent."""
    with own_system() as system:
        client = redis_of(system)
        began, done = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            client.xadd("bench", {"b": b"x" * 60})
            done += 1
        return Figure(name="raw appends", rate=done / (time.monotonic() - began), unit="entries")


def jobs_of_rq(seconds: float) -> Figure:
    """Each reading is a job that inserts it; one worker of RQ's quickest kind, which does not fork for each."""
    with (
        durable_postgresql() as server,
        psycopg.connect(**connection_of(server), autocommit=True) as connection,
        own_system() as system,
        redis_of(system) as client,
    ):
        connection.execute(READINGS)
        database = make_conninfo("", **connection_of(server))
        url = f"redis://:{system.redis.password}@127.0.0.1:{system.redis.port}"
        command = [sys.executable, "-m", "rq.cli", "worker", "-q", "--url", url]
        command += ["--worker-class", "rq.SimpleWorker", "--disable-job-desc-logging", "readings"]
        environment = {**os.environ, "NAIVE_DATABASE": database}
        queue = Queue("readings", connection=client)
        worker = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
        try:
            done = _kept_busy(queue, connection, seconds=1.0)  # until it is warm
            began = time.monotonic()
            done = _kept_busy(queue, connection, seconds=seconds) - done
            return Figure(name="a job of RQ for each reading", rate=done / (time.monotonic() - began), unit="readings")
        finally:
            terminate(worker, stop_signal=signal.SIGTERM, grace_seconds=5)


def _kept_busy(queue: Queue, connection: psycopg.Connection, *, seconds: float) -> int:
    """How many readings are stored then."""
    deadline, count = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        if queue.count < AHEAD:
            for _ in range(AHEAD // 10):
                count += 1
                moment = time.time_ns() // 1_000
                queue.enqueue(naive_job.store, count % SENSORS, moment, 6.0, result_ttl=0)
        else:
            time.sleep(0.01)
    row = connection.execute("SELECT count(*) FROM readings").fetchone()
    return row[0] if row else 0


def express_bullmq(seconds: float) -> Figure:
    """Each request is a job that is added and waited for; no worker."""
    modules, port = javascript.modules(EXPRESS), free_port()
    with own_system() as system, tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(POST_A_READING)
        script.flush()
        command = ["node", str(EXPRESS / "server.js"), str(port), str(system.redis.port), system.redis.password]
        server = subprocess.Popen(command, env={**os.environ, "NODE_PATH": str(modules), "NODE_ENV": "production"})
        try:
            until(lambda: answers(f"http://127.0.0.1:{port}/"))
            rate, sent, refused = wrk(f"http://127.0.0.1:{port}/telemetry", seconds, script=script.name)
            if refused:
                raise RuntimeError(f"{refused} of {sent} requests were refused")
            return Figure(name="Express + BullMQ", rate=rate, unit="requests")
        finally:
            terminate(server, stop_signal=signal.SIGTERM, grace_seconds=5)


POST_A_READING = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"values":{"ph":5.9},"timestamp":"2026-05-01T12:00:00.000001Z"}'
"""


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=1).ok
    except requests.ConnectionError:
        return False
