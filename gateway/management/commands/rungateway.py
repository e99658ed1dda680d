"""Run the gateway process: Socket.IO, MQTT and CoAP until SIGTERM or SIGINT."""

from __future__ import annotations

import errno
import logging
import signal
from argparse import ArgumentParser
from typing import Any

import gevent
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from gevent import monkey
from gevent.event import Event

from gateway.dispatcher import Gateway, StartError
from gateway.transport import Ingest, Transport
from notifications.messages import Protocol

log = logging.getLogger(__name__)
STOP_SECONDS = 6.0
# In the order of the start. Socket.IO is last: whoever can connect to its port finds the others started.
_TITLES = {Protocol.MQTT: "MQTT", Protocol.COAP: "CoAP", Protocol.SOCKETIO: "Socket.IO"}


class Command(BaseCommand):
    help = (
        "Runs the gateway: takes telemetry over MQTT and CoAP, and delivers notifications over Socket.IO, MQTT and CoAP. "
        "Several gateways may run at the same time. Addresses come from SOCKETIO_HOST and SOCKETIO_PORT, MQTT_HOST and "
        "MQTT_PORT, COAP_HOST and COAP_PORT; port 0 takes a free one. SIGTERM or Ctrl-C stops it within 8 seconds."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        for protocol, title in _TITLES.items():
            parser.add_argument(f"--no-{protocol}", action="store_true", help=f"leave {title} to another gateway")

    def handle(self, *_: Any, **options: Any) -> None:
        if not monkey.is_module_patched("socket"):
            raise CommandError(
                "Start the gateway with `manage.py rungateway`: gevent has to be set up before Django is."
            )
        transports = self._compose(options)
        if not transports:
            raise CommandError("Every protocol is switched off: nothing to run.")
        background_tasks = dict(task for each in transports for task in each.background_tasks().items())
        gateway = Gateway(transports, background_tasks=background_tasks)
        stop = Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            gevent.signal_handler(number, stop.set)
        try:
            gateway.start()
        except StartError as failure:
            raise CommandError(_why(failure)) from None
        for transport in transports:
            self._say(transport.protocol, _where(transport))
        stop.wait()
        gateway.stop(timeout_seconds=STOP_SECONDS)
        self._keep_refusals()

    def _compose(self, options: dict[str, Any]) -> list[Transport]:
        from rules.ingest import submit

        return [
            _transport(protocol, submit)
            for protocol in _TITLES
            if not self._is_off(protocol, options[f"no_{protocol}"])
        ]

    def _keep_refusals(self) -> None:
        """Refusals and problems of the last moment still wait in this process."""
        from devices.quality import data_problems
        from rules.admission import rejections

        data_problems.shared().flush(force=True)
        rejections.shared().close()

    def _is_off(self, protocol: Protocol, switched_off: bool) -> bool:
        if switched_off:
            self._say(protocol, f"off (--no-{protocol})")
            return True
        if protocol is Protocol.MQTT and not settings.MQTT_ENABLED:
            self._say(protocol, "off (MQTT_ENABLED=false)")
            return True
        return False

    def _say(self, protocol: Protocol, text: str) -> None:
        if settings.LOG_FORMAT == "json":
            log.info("%s: %s", _TITLES[protocol], text)
            return
        self.stdout.write(f"{_TITLES[protocol]}: {text}")
        self.stdout.flush()


def _transport(protocol: Protocol, ingest: Ingest) -> Transport:
    if protocol is Protocol.SOCKETIO:
        from gateway.socketio.transport import SocketIoTransport

        return SocketIoTransport()
    if protocol is Protocol.COAP:
        from gateway.coap.transport import CoapTransport

        return CoapTransport(ingest)
    from gateway.mqtt.transport import MqttTransport

    return MqttTransport(ingest=ingest)


def _where(transport: Transport) -> str:
    if transport.address is None:
        return f"broker at {settings.MQTT_HOST}:{settings.MQTT_PORT}"
    host, port = transport.address
    scheme = "http" if transport.protocol is Protocol.SOCKETIO else "coap"
    return f"listening on {scheme}://{host}:{port}"


def _why(failure: StartError) -> str:
    title, prefix = _TITLES[failure.protocol], failure.protocol.upper()
    if failure.protocol is Protocol.MQTT:
        return f"{title} cannot start: {failure.error}"
    host, port = getattr(settings, f"{prefix}_HOST"), getattr(settings, f"{prefix}_PORT")
    if failure.error.errno == errno.EADDRINUSE:
        return f"{title}: port {port} on {host} is in use. Set {prefix}_PORT to another one, or stop what uses it."
    reason = failure.error.strerror or failure.error
    return f"{title} cannot listen on {host}:{port}: {reason}. Set {prefix}_HOST and {prefix}_PORT."
