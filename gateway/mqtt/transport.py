"""The MQTT transport: delivers messages (outbound), and takes telemetry (inbound) and reports of devices (reports)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from devices.quality import data_problems
from gateway.mqtt.accounts import BrokerSync
from gateway.mqtt.inbound import TELEMETRY, TELEMETRY_TOGETHER, Inbound, Telemetry
from gateway.mqtt.outbound import Outbound
from gateway.mqtt.reports import REPORTS, Reports
from gateway.mqtt.statistics import BrokerStatistics
from gateway.transport import BackgroundTask, Ingest, OnReport, Transport
from notifications import messages
from notifications.messages import Message


class MqttTransport(Transport):
    """`counts`: published, expired, refused, callback-failed; those of what comes in are in `telemetry.counts`, `reports.counts`.

    A message counts as delivered when the broker has acknowledged it on each of its topics. It may reach a device twice,
    after a lost connection for example: the "id" in the body says that it is the same.
    """

    protocol = messages.Protocol.MQTT

    def __init__(self, ingest: Ingest) -> None:
        kept = Reports()
        self.telemetry = Inbound(
            TELEMETRY,
            Telemetry(ingest, on_device=kept.saw).take,
            together=TELEMETRY_TOGETHER,
            # Its thread waits for messages, not for greenlets that could write them.
            on_tick=data_problems.shared().flush,
        )
        self.reports = Inbound(REPORTS, kept.take, on_tick=kept.flush)
        self._outbound = Outbound(kept)

    def background_tasks(self) -> Mapping[str, BackgroundTask]:
        return {"broker accounts": BrokerSync().run, "broker statistics": BrokerStatistics().run}

    @property
    def connected(self) -> bool:
        """Whether messages can be published now."""
        return self._outbound.connected

    @property
    def counts(self) -> Counter[str]:
        return self._outbound.counts

    def start(self) -> None:
        """Begins to connect and returns: a broker that is away is waited for."""
        self._outbound.start()
        self.telemetry.start()
        self.reports.start()

    def stop(self, *, timeout_seconds: float) -> None:
        """Takes nothing new, finishes what is in flight within the time, disconnects. The rest comes again later."""
        deadline = time.monotonic() + timeout_seconds
        self.telemetry.ask_to_stop()
        self._outbound.stop(timeout_seconds=timeout_seconds)
        self.telemetry.stop(timeout_seconds=max(deadline - time.monotonic(), 0.1))
        self.reports.stop(timeout_seconds=max(deadline - time.monotonic(), 0.1))  # last: it writes what was sent

    def on_lead(self, leads: bool) -> None:
        self._outbound.on_lead(leads)

    def deliver(self, message: Message, on_report: OnReport) -> None:
        """Hands the message to the broker; the report comes, from another thread, when the broker has all of it.

        Waits while the broker is slow; TransportError when too many messages wait, at once if the broker is away.
        """
        self._outbound.deliver(message, on_report)
