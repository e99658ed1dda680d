"""Limits of rules: what takes too long is stopped and named, and the events behind it go on."""

from __future__ import annotations

import time
from itertools import count
from typing import Any
from uuid import uuid4

import pytest
from rq import Queue
from rq.serializers import JSONSerializer

from aemos.lib import keys, redis
from devices import latest
from devices.models import DeviceState, Reading, StateChange
from rules import events, jobs
from rules.engine.chains import ChainSpec, NodeSpec, compile
from rules.engine.context import Trigger
from rules.engine.exceptions import ChainFailed, ErrorCode
from rules.events import Event
from rules.journal import ledger, slots, tickets, writing
from rules.journal.ledger import Account
from rules.journal.slots import Slot
from rules.journal.tickets import AllowedJob
from rules.models import ChainStatistics, DeadLetter
from rules.processing import index, statistics
from rules.processing.stages import decide
from rules.worker import DrainWorker
from tests import builders

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("empty_redis")]


class Farm:
    """A pump that is on below 5.5, and a chain over another sensor, too, that switches a lamp on."""

    def __init__(self) -> None:
        self.organization = builders.organization()
        self.clock = count(1_000_000_000_000_000)
        self.sensor, self.other = builders.sensor(self.organization), builders.sensor(self.organization, "Reservoir B")
        self.pump, self.lamp = builders.device(self.organization), builders.device(self.organization)
        self.simple = builders.switching_chain(self.sensor, self.pump, name="simple", max_retries=0)
        both = [builders.leaf(self.sensor), builders.leaf(self.other)]
        nodes = [
            builders.node("both", {"type": "AND", "expressions": both}, next="lamp"),
            builders.node("lamp", builders.command(self.lamp)),
        ]
        self.wide = builders.chain(self.organization, nodes, "wide", max_retries=0)

    @property
    def slot(self) -> Slot:
        return Slot("normal", slots.partition_of(str(self.sensor.uuid)))

    def append(self, *values: float) -> list[Event]:
        made = [
            Event(
                id=str(uuid4()),
                type=events.EventType.TELEMETRY_DATA,
                priority=5,
                source_type="sensor",
                originator_uuid=str(self.sensor.uuid),
                organization_id=self.organization.pk,
                values={"ph": value},
                timestamp_us=next(self.clock),
                received_us=1,
                protocol="http",
            )
            for value in values
        ]
        writing.append({self.slot: made})
        return made

    def drain(self) -> None:
        index.shared().refresh(at_once=True)
        jobs.drain(self.slot.lane, self.slot.partition)

    def is_on(self, device: Any) -> bool:
        return DeviceState.objects.get(device=device).value == "on"


@pytest.fixture
def farm() -> Farm:
    return Farm()


def timeouts(code: ErrorCode) -> int:
    return int(redis.client().hget(keys.METRICS, f"rule_timeout_total|{code}") or 0)


def test_a_chain_past_its_deadline_is_stopped_at_a_node_that_is_named() -> None:
    nodes = tuple(
        NodeSpec(name=f"step {number}", type="transform", config={"operation": "set", "target": "x", "value": number},
                 next=f"step {number + 1}" if number < 999 else None)
        for number in range(1_000)
    )  # fmt: skip
    chain = compile(ChainSpec(uuid=str(uuid4()), version=1, nodes=nodes, is_scheduled=True))
    trigger = Trigger(
        event_id="e", source_type="chain", uuid="u", values={}, timestamp_us=1, lookup=lambda _: None,
        deadline=time.monotonic() + 30,
    )  # fmt: skip
    assert chain.run(trigger).steps == 1_000
    trigger.deadline = time.monotonic() - 1
    with pytest.raises(ChainFailed) as failed:
        chain.run(trigger)

    assert (failed.value.code, failed.value.node) == (ErrorCode.RULE_CHAIN_TIMEOUT, "step 0")


def test_a_slow_chain_is_told_by_code_and_name_and_its_slot_goes_on(farm: Farm, settings: Any) -> None:
    settings.RULE_CHAIN_TIMEOUT_MS = -1
    farm.append(5.0)
    farm.drain()
    settings.RULE_CHAIN_TIMEOUT_MS = 30_000
    letters = DeadLetter.objects.order_by("chain__name")
    assert [(letter.chain, letter.node) for letter in letters] == [(farm.simple, "low"), (farm.wide, "both")]
    assert all(letter.error.startswith("RULE_CHAIN_TIMEOUT: ") for letter in letters)
    statistics.shared().flush(force=True)
    counted = ChainStatistics.objects.get(chain=farm.simple)
    assert counted.failures == 1
    assert counted.last_error.startswith("low: ")
    assert timeouts(ErrorCode.RULE_CHAIN_TIMEOUT) == 2

    farm.append(5.1)
    farm.drain()
    assert farm.is_on(farm.pump)
    assert Reading.objects.count() == 2, "the reading stands whatever becomes of the chains"


def test_chains_whose_data_is_not_read_in_time_fail_and_the_others_run(farm: Farm, settings: Any) -> None:
    latest.remember({("sensor", str(farm.other.uuid), "ph"): latest.Latest(5.0, 1)})
    settings.DATA_COLLECTION_TIMEOUT_MS = -1
    farm.append(5.0)
    farm.drain()

    letter = DeadLetter.objects.get()
    assert letter.chain == farm.wide
    assert letter.error.startswith("DATA_COLLECTION_TIMEOUT: ")
    assert f"sensor {farm.other.uuid} ph" in letter.error
    assert (farm.is_on(farm.pump), farm.is_on(farm.lamp)) == (True, False)
    assert timeouts(ErrorCode.DATA_COLLECTION_TIMEOUT) == 1


def work_off() -> None:
    """A worker of RQ itself, with its alarm clock, until nothing is queued."""
    queues = [
        Queue(name, connection=redis.client(), serializer=JSONSerializer, job_class=AllowedJob)
        for name in ("critical", "normal", "low")
    ]
    DrainWorker(queues, connection=redis.client(), serializer=JSONSerializer, job_class=AllowedJob).work(burst=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_event_that_holds_its_worker_too_long_is_put_aside_and_the_others_act(
    farm: Farm, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.WORKER_TIMEOUT_MS = 1_000
    real = decide.decide_event

    def decide_event(event: Event, *rest: Any) -> None:
        if event.values["ph"] == 5.2:
            time.sleep(30)
        return real(event, *rest)

    monkeypatch.setattr(decide, "decide_event", decide_event)
    _, stuck, _ = farm.append(5.1, 5.2, 5.3)
    tickets.issue(farm.slot)
    began = time.monotonic()
    work_off()

    assert time.monotonic() - began < 20
    letter = DeadLetter.objects.get()
    assert str(letter.event_id) == stuck.id
    assert "died 3 times" in letter.error
    assert StateChange.objects.count() == 1
    # The first was committed by a turn that then was stopped.
    assert ledger.audit(farm.slot) == Account(accepted=3, processed=1, duplicate=1, dead=1)
    assert timeouts(ErrorCode.WORKER_TIMEOUT) >= 4
