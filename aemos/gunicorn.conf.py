"""Gunicorn's configuration for the web process: gevent workers; a wrong setting stops the master before it forks."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import logging  # noqa: E402  patching comes first, or the standard library keeps unpatched locks
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import django  # noqa: E402

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "aemos.settings")


def _share_metrics() -> None:
    """Workers of one master add up what they count in files. prometheus_client decides at its import, so this comes first.

    The folder is this master's own: two on one machine differ in their port, and no other kind of process knows it.
    """
    from django.conf import settings

    folder = Path(settings.VAR_DIR) / "prometheus" / f"web-{settings.PORT}"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)


def _set_up_django() -> None:
    from aemos import checks

    try:
        _share_metrics()
        django.setup()
    except checks.UnsafeConfiguration as refusal:
        sys.exit(str(refusal))
    for message in checks.configuration_messages():
        logging.getLogger("aemos").warning("%s: %s %s", message.id, message.msg, message.hint)


_set_up_django()

from django.conf import settings  # noqa: E402
from gunicorn.glogging import Logger  # noqa: E402


class LikeAllOthers(Logger):
    """Gunicorn's lines take the way and the format of all others. Requests are logged by aemos.access_log."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


logger_class = LikeAllOthers
bind = f"{settings.BIND_HOST}:{settings.PORT}"
workers = settings.WEB_WORKERS
worker_class = "gunicorn.workers.ggevent.GeventPyWSGIWorker"
worker_connections = 1000
graceful_timeout = 8
timeout = 60
control_socket_disable = True  # one socket per user would be shared by every installation on the machine


def when_ready(server: Any) -> None:
    """Empties what an earlier master left; only now, when the port is ours, is it certain that none is running."""
    for file in Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).glob("*.db"):
        file.unlink(missing_ok=True)


def child_exit(server: Any, worker: Any) -> None:
    """The worker's counts stay, so that totals never fall; only what held while it lived goes."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def post_fork(server: Any, worker: Any) -> None:
    """A forked worker must not share the sockets that the master opened while it set Django up."""
    from aemos.lib import per_process

    per_process.forget_all()


def worker_exit(server: Any, worker: Any) -> None:
    """Refusals and problems of the last moment still wait in this process."""
    from devices.quality import data_problems
    from rules.admission import rejections

    data_problems.shared().flush(force=True)
    rejections.shared().close()
