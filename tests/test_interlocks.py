"""Interlocks: what a state may do, whoever asks, tried with requests as rules, people and devices make them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, time, timedelta
from itertools import pairwise
from typing import Any
from uuid import uuid4

import pytest
from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils import timezone
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from devices import commands
from devices.interlocks.judge import NO_VALUES
from devices.latest import Key, Latest
from devices.models import Device, DeviceState, Interlock, Requirement, StateChange, StateRun, Veto
from rules import events
from rules.authoring import editing, lint
from rules.effects import chain_ends, device_alarms, fail_safe, states, suspension
from rules.effects.states import StateChangeRequest
from rules.models import Alarm, RuleChain
from tests import builders

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)


class Clock:
    """The clock of every process; also counts as that of each request."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, **time_: float) -> None:
        self.now += timedelta(**time_)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timezone, "now", made)
    return made


class Farm:
    """Two pumps, a doser in ml, and a sensor of a level."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.organization = builders.organization()
        self.device = builders.device(self.organization, states={"pump": ["on", "off"], "drain": ["on", "off"]})
        self.device.states.update(safe_value="off")
        self.pump, self.drain = (self.device.states.get(name=name) for name in ("pump", "drain"))
        self.dose = DeviceState.objects.create(
            device=self.device, name="acid", datatype="number", kind=DeviceState.Kind.MOMENTARY
        )
        self.sensor = builders.sensor(self.organization, variables={"level": "number", "leak": "boolean"})
        self.values: dict[Key, Latest] = {}

    def limit(self, state: DeviceState, **fields: Any) -> Interlock:
        interlock = Interlock(state=state, **fields)
        interlock.full_clean()
        interlock.save()
        return interlock

    def require(self, interlock: Interlock, name: str = "level", **fields: Any) -> Requirement:
        row = Requirement(interlock=interlock, variable=self.sensor.variables.get(name=name), **fields)
        row.full_clean()
        row.save()
        return row

    def measure(self, value: Any, name: str = "level", **fields: Any) -> None:
        at_us = events.microseconds(self.clock.now)
        self.values["sensor", str(self.sensor.uuid), name] = Latest(value, at_us, **fields)

    def ask(self, state: DeviceState, value: Any, *, source: str = "rule", **fields: Any) -> str:
        """What an interlock has against it; empty when it was done, or changed nothing."""
        known = {"effect_key": f"{uuid4()}", "actor": "chain / node", **fields}
        at_us = events.microseconds(self.clock.now)
        request = StateChangeRequest(state_id=state.pk, value=value, source=source, timestamp_us=at_us, **known)
        with transaction.atomic():
            made = states.apply([request], self.values)
        return made.vetoed[0].veto.detail if made.vetoed else ""

    def value(self, state: DeviceState) -> Any:
        state.refresh_from_db()
        return state.newest[0]


@pytest.fixture
def farm(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Farm:
    made = Farm(clock)
    monkeypatch.setattr(fail_safe, "_values", lambda ids: made.values)
    return made


def test_a_pump_rests_after_it_was_off(farm: Farm, clock: Clock) -> None:
    farm.limit(farm.pump, minimum_off_seconds=60)
    assert farm.ask(farm.pump, "on") == ""
    clock.pass_(seconds=10)
    assert farm.ask(farm.pump, "off") == ""
    clock.pass_(seconds=59)
    assert farm.ask(farm.pump, "on") == "it rests for 1 min, until 2026-06-01 12:01:10 UTC"
    assert farm.value(farm.pump) == "off"
    clock.pass_(seconds=1)
    assert farm.ask(farm.pump, "on") == ""


def test_asked_to_go_off_too_early_it_goes_off_when_it_may(farm: Farm, clock: Clock) -> None:
    farm.limit(farm.pump, minimum_on_seconds=60)
    farm.ask(farm.pump, "on")
    clock.pass_(seconds=59)
    assert "at least 1 min" in farm.ask(farm.pump, "off")
    assert (fail_safe.switch_off_overdue(), farm.value(farm.pump)) == (0, "on")
    clock.pass_(seconds=1)
    assert (fail_safe.switch_off_overdue(), farm.value(farm.pump)) == (1, "off")
    assert fail_safe.switch_off_overdue() == 0
    change = StateChange.objects.first()
    assert change is not None
    assert (change.source, change.command_state) == ("interlock", "queued")


def test_who_wants_it_on_again_meanwhile_keeps_it_on(farm: Farm, clock: Clock) -> None:
    farm.limit(farm.pump, minimum_on_seconds=60)
    farm.ask(farm.pump, "on")
    clock.pass_(seconds=30)
    farm.ask(farm.pump, "off")
    farm.ask(farm.pump, "on", always=True)
    clock.pass_(seconds=60)
    assert (fail_safe.switch_off_overdue(), farm.value(farm.pump)) == (0, "on")


@pytest.mark.parametrize("source", ["rule", "person", "device"])
def test_what_was_on_for_its_maximum_goes_off_whoever_switched_it_on(farm: Farm, clock: Clock, source: str) -> None:
    farm.limit(farm.pump, maximum_on_seconds=600, alarm_on_veto=True)
    farm.ask(farm.pump, "on", source=source)
    clock.pass_(seconds=599)
    assert fail_safe.switch_off_overdue() == 0
    clock.pass_(seconds=1)
    assert fail_safe.switch_off_overdue() == 1
    assert farm.value(farm.pump) == "off"
    alarm = Alarm.objects.get()
    assert (alarm.type, alarm.originator_uuid) == ("pump switched off", farm.device.uuid)
    assert "its maximum" in alarm.message


def test_a_maximum_that_is_set_while_it_is_on_counts_from_when_it_went_on(farm: Farm, clock: Clock) -> None:
    farm.ask(farm.pump, "on")
    clock.pass_(hours=1)
    farm.limit(farm.pump, maximum_on_seconds=600)
    assert fail_safe.switch_off_overdue() == 1


def test_a_device_that_says_on_again_after_it_was_switched_off_is_switched_off_again(farm: Farm, clock: Clock) -> None:
    farm.limit(farm.pump, maximum_on_seconds=60)
    farm.ask(farm.pump, "on")
    for _ in range(2):
        clock.pass_(seconds=61)
        assert fail_safe.switch_off_overdue() == 1
        clock.pass_(seconds=1)
        farm.ask(farm.pump, "on", source="device")
    assert StateRun.objects.filter(ended_at=None).count() == 1


def test_runs_and_time_on_are_limited_in_any_hour_and_day(farm: Farm, clock: Clock) -> None:
    farm.limit(farm.pump, maximum_runs_per_hour=2, maximum_on_seconds_per_day=100)
    for _ in range(2):
        assert farm.ask(farm.pump, "on") == ""
        clock.pass_(seconds=40)
        assert farm.ask(farm.pump, "off") == ""
    assert farm.ask(farm.pump, "on") == "it ran 2 times in an hour, of 2"
    clock.pass_(hours=1)
    assert farm.ask(farm.pump, "on") == ""
    clock.pass_(seconds=20)
    assert (fail_safe.switch_off_overdue(), farm.value(farm.pump)) == (1, "off")
    clock.pass_(hours=2)
    assert farm.ask(farm.pump, "on") == "it was on for 100 s in 24 hours, of 100 s"
    clock.pass_(hours=22)
    assert farm.ask(farm.pump, "on") == ""


def test_doses_are_limited_by_amount(farm: Farm, clock: Clock) -> None:
    farm.limit(farm.dose, maximum_amount_per_hour=10, maximum_amount_per_day=25, minimum_off_seconds=60)
    assert farm.ask(farm.dose, 6) == ""
    assert farm.ask(farm.dose, 1) == "it rests for 1 min, until 2026-06-01 12:01:00 UTC"
    clock.pass_(minutes=1)
    assert farm.ask(farm.dose, 5) == "5 would be too much: 6 in an hour, of 10"
    assert farm.ask(farm.dose, 4) == ""
    clock.pass_(hours=1)
    assert farm.ask(farm.dose, 10) == ""
    clock.pass_(hours=1)
    assert farm.ask(farm.dose, 6) == "6 would be too much: 20 in 24 hours, of 25"
    assert farm.ask(farm.dose, 5) == ""


def test_two_pumps_that_exclude_one_another(farm: Farm, clock: Clock) -> None:
    interlock = farm.limit(farm.pump)
    interlock.excludes.add(farm.drain)
    assert farm.ask(farm.drain, "on") == ""
    assert farm.ask(farm.pump, "on") == f"{farm.device}: drain is on"
    farm.ask(farm.drain, "off")
    assert farm.ask(farm.pump, "on") == ""
    assert farm.ask(farm.drain, "on") == f"{farm.device}: pump is on"
    clock.pass_(seconds=1)
    farm.ask(farm.pump, "on", source="device")
    farm.ask(farm.pump, "off")
    assert farm.ask(farm.drain, "on") == f"{farm.device}: pump is on", "its device has not said that it is off"
    clock.pass_(seconds=1)
    farm.ask(farm.pump, "off", source="device")
    assert farm.ask(farm.drain, "on") == ""


@pytest.mark.parametrize(
    ("value", "fields", "said"),
    [
        (None, {}, "is not known"),
        (19.9, {}, "is 19.9, and must be from 20 to 80"),
        (50, {"suspect_us": 2**60, "reason": "stuck"}, "is suspect (stuck)"),
        (80, {}, ""),
    ],
)
def test_a_required_variable_must_be_known_good_and_in_range(
    farm: Farm, clock: Clock, value: Any, fields: Mapping[str, Any], said: str
) -> None:
    farm.require(farm.limit(farm.pump), minimum=20, maximum=80, fresh_seconds=60)
    farm.measure(value, **fields)
    assert said in farm.ask(farm.pump, "on")
    assert (farm.value(farm.pump) == "on") is (said == "")


def test_a_required_variable_must_be_fresh_and_stay_so(farm: Farm, clock: Clock) -> None:
    farm.require(farm.limit(farm.pump), minimum=20, fresh_seconds=60)
    farm.measure(50)
    clock.pass_(seconds=60)
    assert farm.ask(farm.pump, "on") == ""
    assert fail_safe.switch_off_overdue() == 0
    clock.pass_(seconds=1)
    assert (fail_safe.switch_off_overdue(), farm.value(farm.pump)) == (1, "off")
    assert "61 s old" in farm.ask(farm.pump, "on")


def test_what_is_required_to_go_on_only_does_not_end_a_run(farm: Farm, clock: Clock) -> None:
    farm.require(farm.limit(farm.pump), "leak", equals=False, holds_while_on=False)
    farm.measure(False, "leak")
    farm.ask(farm.pump, "on")
    farm.measure(True, "leak")
    assert fail_safe.switch_off_overdue() == 0
    farm.ask(farm.pump, "off")
    assert "must be = False" in farm.ask(farm.pump, "on")


@pytest.mark.parametrize(
    ("begin", "end", "allowed"), [(time(8), time(20), True), (time(14), time(20), False), (time(20), time(15), True)]
)
def test_only_at_certain_times_of_day(farm: Farm, begin: time, end: time, allowed: bool) -> None:
    """Noon in UTC is two in the afternoon in Berlin."""
    farm.limit(farm.pump, allowed_from=begin, allowed_until=end, timezone="Europe/London")
    assert (farm.ask(farm.pump, "on") == "") is allowed


def test_at_the_end_of_its_hours_it_goes_off(farm: Farm, clock: Clock) -> None:
    farm.limit(farm.pump, allowed_from=time(8), allowed_until=time(14), timezone="Europe/Berlin")
    farm.ask(farm.pump, "on")
    assert farm.value(farm.pump) is None
    clock.pass_(seconds=-1)
    farm.ask(farm.pump, "on")
    assert (fail_safe.switch_off_overdue(), farm.value(farm.pump)) == (0, "on")
    clock.pass_(seconds=1)
    assert (fail_safe.switch_off_overdue(), farm.value(farm.pump)) == (1, "off")


def test_vetoes_are_counted_by_kind_and_who_asked(farm: Farm, clock: Clock) -> None:
    farm.limit(farm.pump, maximum_runs_per_day=0, alarm_on_veto=True)
    for _ in range(3):
        farm.ask(farm.pump, "on")
        clock.pass_(seconds=1)
    veto = Veto.objects.get()
    assert (veto.kind, veto.count, veto.source, veto.actor, veto.value) == ("runs", 3, "rule", "chain / node", "on")
    assert (veto.last_at - veto.first_at) == timedelta(seconds=2)


def test_a_person_overrides_with_a_reason_that_is_kept(farm: Farm) -> None:
    farm.limit(farm.pump, maximum_runs_per_day=0)
    person = builders.member(farm.organization, "admin")
    with pytest.raises(states.ChangeVetoed, match="it ran 0 times"):
        states.change_by_person(farm.pump, "on", user=person)
    change = states.change_by_person(farm.pump, "on", user=person, override="flushing the pipe")
    assert (farm.value(farm.pump), change.source) == ("on", "person")
    assert sorted(Veto.objects.values_list("overridden_reason", "count")) == [("", 1), ("flushing the pipe", 1)]


def test_a_lock_holds_until_it_is_over(farm: Farm, clock: Clock) -> None:
    DeviceState.objects.filter(pk=farm.pump.pk).update(
        safe_value=None, locked_until=NOON + timedelta(hours=1), locked_by="Ada", lock_reason="repair"
    )
    assert farm.ask(farm.pump, "on") == "Ada holds it until 2026-06-01 13:00:00 UTC: repair"
    clock.pass_(hours=1)
    assert farm.ask(farm.pump, "on") == ""


def test_a_clock_that_was_set_back_lets_nothing_start(farm: Farm, clock: Clock) -> None:
    farm.limit(farm.pump, minimum_off_seconds=60, maximum_on_seconds=60)
    farm.ask(farm.pump, "on")
    farm.ask(farm.pump, "off")
    clock.pass_(hours=-1)
    assert "it rests" in farm.ask(farm.pump, "on")


@pytest.mark.parametrize(
    ("name", "fields", "field"),
    [
        ("pump", {"maximum_amount_per_day": 5}, "maximum_amount_per_day"),
        ("acid", {"maximum_on_seconds": 5}, "maximum_on_seconds"),
        ("pump", {"minimum_on_seconds": 5, "maximum_on_seconds": 4}, "maximum_on_seconds"),
        ("pump", {"allowed_from": time(8)}, "allowed_until"),
        ("pump", {"timezone": "Mars/Base"}, "timezone"),
        ("pump", {"minimum_off_seconds": 90_000}, "minimum_off_seconds"),
        ("acid", {"maximum_amount_per_hour": float("nan")}, "maximum_amount_per_hour"),
    ],
)
def test_an_interlock_that_means_nothing_is_refused_by_field(
    farm: Farm, name: str, fields: Mapping[str, Any], field: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        farm.limit(farm.device.states.get(name=name), **fields)
    assert list(caught.value.message_dict) == [field]


def test_an_interlock_without_a_state_or_variable_is_refused_by_field_in_the_admin(farm: Farm, client: Any) -> None:
    client.force_login(builders.user(is_superuser=True, is_staff=True))
    form = {"timezone": "UTC", "requirements-TOTAL_FORMS": "1", "requirements-INITIAL_FORMS": "0"}
    answer = client.post("/admin/devices/interlock/add/", form | {"requirements-0-minimum": "5"})
    assert answer.status_code == 200
    assert answer.context["adminform"].form.errors["state"]
    (inline,) = answer.context["inline_admin_formsets"]
    assert inline.formset.forms[0].errors["variable"]


def test_a_level_needs_a_safe_value_to_be_limited(farm: Farm) -> None:
    DeviceState.objects.filter(pk=farm.pump.pk).update(safe_value=None)
    with pytest.raises(ValidationError, match="needs a safe value first"):
        farm.limit(DeviceState.objects.get(pk=farm.pump.pk), maximum_on_seconds=5)


def chain_that_pumps(farm: Farm, **fields: Any) -> RuleChain:
    nodes = [
        builders.node("low", builders.leaf(farm.sensor, "level"), next="on"),
        builders.node("on", builders.command(farm.device, "on", state="pump")),
    ]
    return builders.chain(farm.organization, nodes, **fields)


def end(chain: RuleChain, how: str) -> None:
    if how == "disabled":
        editing.switch(chain, enabled=False, by="Ada")
    elif how == "deleted":
        editing.delete(chain)
    elif how == "suspended":
        suspension.suspend(chain.pk, "it failed")
    else:
        nodes = list(chain.nodes.all())
        nodes[1].config["value"], nodes[1].config["stateName"] = "on", "drain"
        editing.save(chain, nodes)


@pytest.mark.parametrize("how", ["disabled", "deleted", "suspended", "edited"])
def test_what_a_chain_has_switched_on_goes_off_when_the_chain_ends(farm: Farm, how: str) -> None:
    chain = chain_that_pumps(farm)
    farm.ask(farm.pump, "on", effect_key=f"{uuid4()}:{chain.uuid}:on")
    assert fail_safe.switch_off_overdue() == 0
    assert [str(each) for each in chain_ends.left_on(chain)] == [f"{farm.device}: pump is 'on' and goes to 'off'"]
    end(chain, how)
    assert (fail_safe.switch_off_overdue(), farm.value(farm.pump)) == (1, "off")
    assert fail_safe.switch_off_overdue() == 0


def test_what_a_person_has_switched_since_stays_when_the_chain_ends(farm: Farm, clock: Clock) -> None:
    chain = chain_that_pumps(farm)
    farm.ask(farm.pump, "on", effect_key=f"{uuid4()}:{chain.uuid}:on")
    clock.pass_(seconds=1)
    farm.ask(farm.pump, "on", source="person", always=True)
    end(chain, "disabled")
    assert (fail_safe.switch_off_overdue(), farm.value(farm.pump)) == (0, "on")


def test_what_has_no_safe_value_is_named_when_the_chain_ends(farm: Farm) -> None:
    farm.device.states.update(safe_value=None)
    chain = chain_that_pumps(farm)
    farm.ask(farm.pump, "on", effect_key=f"{uuid4()}:{chain.uuid}:on")
    suspension.suspend(chain.pk, "it failed")
    assert (fail_safe.switch_off_overdue(), farm.value(farm.pump)) == (0, "on")
    assert "pump is 'on' and stays so: it has no safe value" in Alarm.objects.get().message


def test_a_command_that_expires_alarms_once_until_the_device_answers(farm: Farm, clock: Clock) -> None:
    for value in ("on", "off"):
        farm.ask(farm.pump, value)
    clock.pass_(minutes=10)
    assert device_alarms.expire_commands() == 2
    alarm = Alarm.objects.get()
    assert (alarm.type, alarm.state, alarm.originator_uuid) == (
        device_alarms.UNACKNOWLEDGED,
        "active",
        farm.device.uuid,
    )
    farm.ask(farm.pump, "on")
    clock.pass_(seconds=5)
    change = StateChange.objects.first()
    assert change is not None
    said = commands.Acknowledgement(
        device_uuid=farm.device.uuid, command_uuid=change.uuid, state=StateChange.CommandState.ACKNOWLEDGED
    )
    assert commands.acknowledge([said]) == []
    assert device_alarms.expire_commands() == 0
    alarm.refresh_from_db()
    assert alarm.state == "cleared"


def test_a_dose_is_sent_each_time_and_is_no_value_that_lasts(farm: Farm, clock: Clock) -> None:
    for _ in range(2):
        assert farm.ask(farm.dose, 5) == ""
        clock.pass_(seconds=1)
    farm.dose.refresh_from_db()
    assert (farm.dose.value, StateChange.objects.filter(state=farm.dose).count()) == (None, 2)


@pytest.mark.parametrize(("state", "second", "done"), [("dose", 7, 1), ("pump", "off", 2), ("pump", "on", 1)])
def test_cooldowns_are_of_the_state_whoever_asks(farm: Farm, clock: Clock, state: str, second: Any, done: int) -> None:
    row = farm.dose if state == "dose" else farm.pump
    farm.ask(row, 5 if state == "dose" else "on", source="person", always=True)
    clock.pass_(minutes=1)
    farm.ask(row, second, cooldown_us=900_000_000, always=True)
    assert StateChange.objects.count() == done
    clock.pass_(minutes=15)
    farm.ask(row, second, cooldown_us=900_000_000, always=True)
    assert StateChange.objects.count() == done + 1


@pytest.mark.parametrize(
    ("state", "value", "fields", "operator", "said"),
    [
        ("pump", "on", {"maximum_runs_per_day": 0}, ">", "it may run 0 times"),
        ("acid", 12, {"maximum_amount_per_day": 10}, ">", "it may dose 10"),
        ("pump", "on", {}, "<", "it requires"),
        ("pump", "on", {}, ">", ""),
        ("pump", "off", {"maximum_runs_per_day": 0}, ">", ""),
        ("acid", 5, {}, ">", "give the action a cooldown, or the state an interlock"),
    ],
)
def test_what_is_always_vetoed_is_named_when_a_chain_is_saved(
    farm: Farm, state: str, value: Any, fields: Mapping[str, Any], operator: str, said: str
) -> None:
    row = farm.device.states.get(name=state)
    if state == "pump" or fields:
        interlock = farm.limit(row, **fields)
        if not fields:
            farm.require(interlock, minimum=20)
    nodes = [
        builders.node("level", builders.leaf(farm.sensor, "level", operator, 10), next="do"),
        builders.node("do", builders.command(farm.device, value, state=state)),
    ]
    chain = builders.chain(farm.organization, nodes)
    found = [
        each.message for each in lint.warnings_of(chain, list(chain.nodes.all())) if each.path.startswith("nodes[1]")
    ]
    assert any(said in text for text in found) if said else found == []


LIMITS: dict[str, dict[str, Any]] = {
    "pump": {
        "minimum_on_seconds": 20, "minimum_off_seconds": 30, "maximum_on_seconds": 300, "maximum_runs_per_hour": 4,
        "maximum_on_seconds_per_hour": 700,
    },
    "drain": {"maximum_on_seconds": 120, "maximum_runs_per_day": 9},
    "acid": {"minimum_off_seconds": 60, "maximum_amount_per_hour": 20, "maximum_amount_per_day": 55},
}  # fmt: skip
LATENCY = timedelta(seconds=30)
ACTIONS = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from(["pump", "drain"]), st.sampled_from(["on", "off"])),
    st.tuples(st.just("ask"), st.just("acid"), st.sampled_from([1, 4, 7.5, 12])),
    st.tuples(st.just("wait"), st.sampled_from([1, 7, 29, 61, 240, 900, 4_000, 40_000]), st.just("")),
)


@settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(actions=st.lists(ACTIONS, min_size=20, max_size=70), people=st.randoms(use_true_random=False))
def test_no_interlock_is_violated_in_what_was_recorded(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, actions: Sequence[tuple[str, Any, Any]], people: Any
) -> None:
    """Days of rules and people that ask for anything; the scheduler looks twice a minute, as if it were killed all the time."""
    with transaction.atomic():
        farm = Farm(clock)
        clock.now = NOON
        monkeypatch.setattr(fail_safe, "_values", lambda ids: NO_VALUES)
        for name, limits in LIMITS.items():
            interlock = farm.limit(farm.device.states.get(name=name), **limits)
            if name == "pump":
                interlock.excludes.add(farm.drain)
        for kind, what, value in actions:
            if kind == "ask":
                farm.ask(farm.device.states.get(name=what), value, source=people.choice(["rule", "person"]))
            else:
                _wait(clock, what)
        _check(farm.device)
        transaction.set_rollback(True)


def _wait(clock: Clock, seconds: int) -> None:
    """As long as something is on, the scheduler looks every few seconds; afterwards there is nothing to see."""
    end = clock.now + timedelta(seconds=seconds)
    while clock.now < end and StateRun.objects.filter(ended_at=None).exists():
        clock.now = min(clock.now + LATENCY, end)
        fail_safe.switch_off_overdue()
    clock.now = end


def _check(device: Device) -> None:
    on = {name: list(_runs(device, name)) for name in ("pump", "drain")}
    for name, runs in on.items():
        limits, lasted = LIMITS[name], [end - begin for begin, end, _ in runs]
        assert all(each <= timedelta(seconds=limits["maximum_on_seconds"]) + LATENCY for each in lasted), name
        for begin, end, by in runs:
            assert by == "interlock" or end - begin >= timedelta(seconds=limits.get("minimum_on_seconds", 0)), name
        for (_, end, _), (begin, _, _) in pairwise(runs):
            assert begin - end >= timedelta(seconds=limits.get("minimum_off_seconds", 0)), name
    assert not any(a < d and c < b for a, b, _ in on["pump"] for c, d, _ in on["drain"]), "never both"
    _at_most([(begin, 1) for begin, _, _ in on["pump"]], timedelta(hours=1), 4)
    _at_most([(begin, 1) for begin, _, _ in on["drain"]], timedelta(days=1), 9)
    doses = StateChange.objects.filter(state__name="acid", state__device=device).order_by("timestamp")
    amounts = [(change.timestamp, float(change.value or 0)) for change in doses]
    _at_most(amounts, timedelta(hours=1), 20)
    _at_most(amounts, timedelta(days=1), 55)
    for _, end, _ in on["pump"]:
        since = end - timedelta(hours=1)
        spent = sum((max(min(b, end) - max(a, since), timedelta()) for a, b, _ in on["pump"]), timedelta())
        assert spent <= timedelta(seconds=700) + LATENCY


def _runs(device: Device, name: str) -> Iterator[tuple[datetime, datetime, str]]:
    """Begin, end and who ended it, of the recorded changes; one that goes on counts as long as there are changes."""
    begin: datetime | None = None
    changes = StateChange.objects.filter(state__name=name, state__device=device).order_by("id")
    for change in changes:
        if change.value == "on":
            begin = begin or change.timestamp
        elif begin is not None:
            yield begin, change.timestamp, change.source
            begin = None
    if begin is not None:
        yield begin, timezone.now(), "interlock"


def _at_most(found: Sequence[tuple[datetime, float]], span: timedelta, limit: float) -> None:
    for end, _ in found:
        assert sum(amount for at, amount in found if end - span < at <= end) <= limit + 1e-6
