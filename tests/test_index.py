"""The rule index: kept up to date change by change, and always what building it whole would give."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
from django.db import OperationalError
from django.db.models import F
from django.utils import timezone

from devices import catalogue
from devices.models import CatalogueVersion, Device, DeviceState, Organization, Sensor
from rules import jobs
from rules.authoring import editing
from rules.engine import chains
from rules.engine.bound import DeployedChain
from rules.models import RuleChain, RuleNode
from rules.processing import index
from rules.processing.index import RuleIndex
from tests import builders

pytestmark = pytest.mark.django_db


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Farm:
    """A sensor with ph and ec, a pump, and an index that has seen them."""

    def __init__(self) -> None:
        self.organization = builders.organization()
        self.sensor = builders.sensor(self.organization, variables={"ph": "number", "ec": "number"})
        self.pump = builders.device(self.organization)
        self.clock = Clock()
        self.index = RuleIndex(self.clock)
        self.index.refresh()

    def chain(self, key: str = "ph", **fields: Any) -> RuleChain:
        nodes = [
            builders.node("low", builders.leaf(self.sensor, key), next="switch"),
            builders.node("switch", builders.command(self.pump)),
        ]
        return builders.chain(self.organization, nodes, **fields)

    def heard(self, *names: str, by: RuleIndex | None = None) -> list[str]:
        """Names of the chains that these values of the sensor trigger, after a look at what changed."""
        self.index.refresh(at_once=True)
        source = ("sensor", str(self.sensor.uuid))
        return [
            chain.name for chain in (by or self.index).triggered(source, names, organization_id=self.organization.pk)
        ]

    def bound(self, row: RuleChain) -> DeployedChain:
        self.index.refresh(at_once=True)
        found = self.index.by_uuid(str(row.uuid))
        assert found is not None
        return found


@pytest.fixture
def farm() -> Farm:
    return Farm()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Uuids of the chains that were compiled since, in order."""
    seen: list[str] = []
    compile_chain = chains.compile

    def counting(spec: chains.ChainSpec) -> chains.Chain:
        seen.append(spec.uuid)
        return compile_chain(spec)

    monkeypatch.setattr(chains, "compile", counting)
    return seen


def test_a_value_triggers_the_chains_that_wait_for_it_the_most_urgent_first(farm: Farm) -> None:
    farm.chain(name="third", priority=5)
    farm.chain(name="first", priority=1)
    farm.chain("ec", name="second", priority=3)
    farm.chain(name="last", priority=5)

    assert farm.heard("ph") == ["first", "third", "last"]
    assert farm.heard("ec") == ["second"]
    assert farm.heard("ec", "ph") == farm.heard("ph", "ec") == ["first", "second", "third", "last"]


def test_a_chain_that_waits_for_two_values_of_an_event_is_triggered_once(farm: Farm) -> None:
    both = {"type": "OR", "expressions": [builders.leaf(farm.sensor, "ph"), builders.leaf(farm.sensor, "ec")]}
    builders.chain(farm.organization, [builders.node("either", both)], "either")
    farm.chain("ec", name="ec")

    assert farm.heard("ph", "ec") == ["either", "ec"]


def test_what_no_chain_waits_for_triggers_none_and_costs_no_query(farm: Farm, django_assert_num_queries: Any) -> None:
    farm.chain()
    farm.index.refresh(at_once=True)

    with django_assert_num_queries(0):
        for source in (("sensor", str(farm.sensor.uuid)), ("device", str(farm.pump.uuid)), ("sensor", "unheard of")):
            assert not farm.index.triggered(source, ["humidity"], organization_id=farm.organization.pk)


def test_a_chain_does_not_hear_of_another_organizations_sensor(farm: Farm) -> None:
    stranger = builders.organization()
    row = RuleChain.objects.create(organization=stranger, name="eavesdropper")
    RuleNode.objects.create(chain=row, name="low", type="filter", config=builders.leaf(farm.sensor))
    catalogue.mark_changed(stranger.pk)

    assert farm.heard("ph") == []
    assert farm.bound(row).name == "eavesdropper"


def test_saving_one_chain_compiles_that_one_alone_again(farm: Farm, compiled: list[str]) -> None:
    rows = [farm.chain() for _ in range(5)]
    farm.index.refresh(at_once=True)
    kept = farm.bound(rows[1])
    compiled.clear()
    rows[0].name = "renamed"
    editing.save(rows[0])
    farm.index.refresh(at_once=True)

    assert compiled == [str(rows[0].uuid)]
    assert farm.bound(rows[0]).name == "renamed"
    assert farm.bound(rows[1]) is kept


def test_a_change_costs_the_same_queries_however_many_chains_there_are(
    farm: Farm, django_assert_num_queries: Any
) -> None:
    rows = [farm.chain() for _ in range(20)]
    farm.index.refresh(at_once=True)
    with django_assert_num_queries(1):
        farm.index.refresh(at_once=True)
    for changed in (rows[:1], rows):
        for row in changed:
            editing.save(row)
        with django_assert_num_queries(5):
            farm.index.refresh(at_once=True)


def test_a_new_sensor_of_the_organization_compiles_nothing(farm: Farm, compiled: list[str]) -> None:
    farm.chain()
    farm.index.refresh(at_once=True)
    compiled.clear()
    builders.sensor(farm.organization)
    farm.index.refresh(at_once=True)

    assert compiled == []
    assert len(farm.index) == 1


def test_a_save_is_seen_within_a_second_without_a_query_more(farm: Farm, django_assert_num_queries: Any) -> None:
    farm.chain()
    farm.clock.now = 0.6
    with django_assert_num_queries(0):
        farm.index.refresh()
    assert len(farm.index) == 0
    farm.clock.now = 1 - jobs.SLICE_SECONDS
    farm.index.refresh()
    assert len(farm.index) == 1


def test_chains_that_are_suspended_switched_off_or_deleted_are_gone_and_come_back(farm: Farm) -> None:
    suspended, off, deleted = (farm.chain(name=name) for name in ("suspended", "off", "deleted"))
    assert farm.heard("ph") == ["suspended", "off", "deleted"]
    RuleChain.objects.filter(pk=suspended.pk).update(suspended_at=timezone.now())
    off.enabled = False
    editing.save(off)
    editing.delete(deleted)

    assert farm.heard("ph") == []
    assert len(farm.index) == 0
    RuleChain.objects.filter(pk=suspended.pk).update(suspended_at=None)
    off.enabled = True
    editing.save(off)
    assert farm.heard("ph") == ["suspended", "off"]


def test_a_deleted_organization_takes_its_chains_along(farm: Farm) -> None:
    farm.chain()
    assert farm.heard("ph")
    Organization.objects.all().delete()
    farm.index.refresh(at_once=True)

    assert len(farm.index) == 0
    assert CatalogueVersion.objects.count() == 0


def test_a_chain_that_moved_to_another_value_leaves_the_first(farm: Farm) -> None:
    row = farm.chain(name="moving")
    assert farm.heard("ph") == ["moving"]
    editing.save(row, [builders.node("low", builders.leaf(farm.sensor, "ec"))])

    assert farm.heard("ph") == []
    assert farm.heard("ec") == ["moving"]


def test_states_that_are_renamed_or_made_are_known_to_chains_that_did_not_change(
    farm: Farm, compiled: list[str]
) -> None:
    bound = farm.bound(farm.chain())
    state = DeviceState.objects.get(device=farm.pump)
    uuid = str(farm.pump.uuid)
    assert bound.states[uuid, "power"] == state.pk
    compiled.clear()
    state.name = "mains"
    state.save()
    farm.index.refresh(at_once=True)

    assert (uuid, "power") not in bound.states
    assert bound.states[uuid, "mains"] == state.pk
    assert compiled == []


def test_a_chain_knows_the_states_of_its_own_organization_only(farm: Farm) -> None:
    builders.device(builders.organization())

    assert set(farm.bound(farm.chain()).states) == {(str(farm.pump.uuid), "power")}


@pytest.mark.parametrize("damage", ["no filter", "no nodes"])
def test_a_chain_that_is_not_valid_is_named_once_and_stops_no_other(
    farm: Farm, compiled: list[str], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    broken, _ = farm.chain(name="broken"), farm.chain(name="sound")
    lost = broken.nodes.all() if damage == "no nodes" else broken.nodes.filter(type="filter")
    lost.delete()
    assert farm.heard("ph") == ["sound"]
    assert f"broken ({broken.uuid}) does not run, it is not valid" in caplog.text
    caplog.clear()
    compiled.clear()
    catalogue.mark_changed(farm.organization.pk)

    assert farm.heard("ph") == ["sound"]
    assert (compiled, caplog.text) == ([], "")


def test_without_the_database_the_index_stays_as_it_was(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    row = farm.chain(name="before")
    assert farm.heard("ph") == ["before"]
    row.name = "after"
    editing.save(row)

    def away(*_: Any) -> Any:
        raise OperationalError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(index, "_states_of", away)
        with pytest.raises(OperationalError):
            farm.index.refresh(at_once=True)
    source = ("sensor", str(farm.sensor.uuid))
    still = farm.index.triggered(source, ["ph"], organization_id=farm.organization.pk)
    assert [bound.name for bound in still] == ["before"]
    assert farm.heard("ph") == ["after"]


def test_rebuilding_everything_takes_over_what_was_changed_past_the_versions(farm: Farm, compiled: list[str]) -> None:
    rows = [farm.chain(), farm.chain()]
    farm.index.refresh(at_once=True)
    compiled.clear()
    RuleChain.objects.filter(pk=rows[0].pk).update(name="changed by hand")
    builders.organization()
    assert catalogue.rebuild_all() == 2
    farm.index.refresh(at_once=True)

    assert set(compiled) == {str(row.uuid) for row in rows}
    assert farm.heard("ph")[0] == "changed by hand"


def test_the_index_of_a_process_is_loaded_whole(farm: Farm) -> None:
    farm.chain()
    try:
        index.load()
        assert len(index.shared()) == 1
        assert gc.isenabled()
    finally:
        gc.unfreeze()


class Changes:
    """Random changes of two organizations, made in the ways in which people and programs make them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.organizations = [builders.organization(), builders.organization()]
        for organization in self.organizations:
            for _ in range(2):
                builders.sensor(organization, variables={"ph": "number", "ec": "number"})
            builders.device(organization, states={"power": ["on", "off"], "light": ["on", "off"]})

    def make(self) -> None:
        rows = list(RuleChain.objects.all())
        changes = [self.edit, self.switch, self.suspend, self.delete, self.rename]
        if rows and self.random.random() < 0.7:
            self.random.choice(changes)(self.random.choice(rows))
        else:
            self.add()

    def nodes(self, organization: Organization) -> list[RuleNode]:
        sensors, device = (
            Sensor.objects.filter(organization=organization),
            Device.objects.get(organization=organization),
        )
        leaves = [
            builders.leaf(self.random.choice(list(sensors)), self.random.choice(["ph", "ec"]))
            for _ in range(self.random.randint(1, 3))
        ]
        state = self.random.choice(list(device.states.all()))
        return [
            builders.node("filter", {"type": "OR", "expressions": leaves}, next="action"),
            builders.node("action", builders.command(device, state=state.name)),
        ]

    def add(self) -> None:
        organization = self.random.choice(self.organizations)
        builders.chain(organization, self.nodes(organization), priority=self.random.randint(1, 3))

    def edit(self, row: RuleChain) -> None:
        row.priority = self.random.randint(1, 3)
        editing.save(row, self.nodes(row.organization))

    def switch(self, row: RuleChain) -> None:
        RuleChain.objects.filter(pk=row.pk).update(enabled=not row.enabled, version=F("version") + 1)
        catalogue.mark_changed(row.organization_id)

    def suspend(self, row: RuleChain) -> None:
        RuleChain.objects.filter(pk=row.pk).update(suspended_at=None if row.suspended_at else timezone.now())
        catalogue.mark_changed(row.organization_id)

    def delete(self, row: RuleChain) -> None:
        editing.delete(row)

    def rename(self, row: RuleChain) -> None:
        state = self.random.choice(list(DeviceState.objects.filter(device__organization=row.organization)))
        state.name = self.random.choice(["one", "two"]) + str(state.pk)
        state.save()

    def view(self, of: RuleIndex) -> Any:
        """All that an index answers, by what can be asked."""
        triggered = {
            (sensor.uuid, names): [
                (bound.uuid, bound.compiled.spec, dict(bound.states))
                for bound in of.triggered(("sensor", str(sensor.uuid)), names, organization_id=sensor.organization_id)
            ]
            for sensor in Sensor.objects.all()
            for names in (("ph",), ("ec",), ("ph", "ec"))
        }
        return triggered, {bound.uuid for bound in of}, len(of._by_source)


@pytest.mark.parametrize("seed", range(5))
def test_an_index_that_followed_every_change_equals_one_that_is_built_whole(seed: int) -> None:
    changes, followed = Changes(seed), RuleIndex()
    for _ in range(25):
        for _ in range(changes.random.randint(1, 3)):
            changes.make()
        followed.refresh(at_once=True)
        whole = RuleIndex()
        whole.refresh(at_once=True)
        assert changes.view(followed) == changes.view(whole)
    assert len(followed) > 0
