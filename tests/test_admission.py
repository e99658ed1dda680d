"""One truth about overload: what a person decided, and what the scheduler measured, holds in every process and is said."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from rules.admission import circuit_store, control, shared_rates
from rules.admission.circuit import Reason, State, Verdict
from rules.admission.circuit_store import Hold
from rules.admission.control import Admission
from rules.admission.shared_rates import Measured
from rules.events import Lane

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]


def test_a_circuit_that_a_person_opened_stays_open_for_its_time_and_then_moves_on() -> None:
    now = datetime.now(UTC)
    circuit_store.hold_open(Hold(by="ada", until=now + timedelta(hours=1), note="cleaning"), queue_depth=0)
    stored = circuit_store.load()
    assert (stored.state, str(stored.held(now)).endswith(": cleaning")) == (State.OPEN, True)
    assert stored.held(now + timedelta(hours=2)) is None
    admission = Admission()
    assert [admission.verdict(priority).reason for priority in (5, 1)] == [Reason.HELD, Reason.OVERRIDE]
    circuit_store.reset("bo", 0)
    assert circuit_store.load().hold is None


def test_every_process_goes_by_the_rates_that_the_scheduler_measured() -> None:
    fast = Measured(drained=dict.fromkeys(Lane, 0.5), arrived=dict.fromkeys(Lane, 2.0), total=0.5)
    shared_rates.publish(fast)
    for process in (Admission(), Admission()):
        seen = process.snapshot()
        assert (seen.total_drain_rate, seen.limited_by_drain_rate) == (0.5, True)
        assert seen.thresholds.critical == seen.configured.critical // 10
    verdict = Verdict(accept=False, reason=Reason.CRITICAL, queue_depth=390, threshold=15, circuit_state="OPEN")
    text = control.refusal_text(verdict, seen)[1]
    assert text == (
        "The queue holds 390 events, the limit is 15: workers finish 0.5 events a second, and nothing should wait for more than "
        "30 s (configured: 50000)."
    )
