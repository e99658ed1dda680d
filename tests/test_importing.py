"""`manage.py import_readings`: files of before, the good parts of bad ones, and what a second run does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from aemos.lib import keys, redis
from devices.history import importing, rollups
from devices.models import Reading, Rollup, Sensor
from tests import builders

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("empty_redis")]
NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


@pytest.fixture
def tank() -> Sensor:
    variables = {"ph": "number", "ec": "number", "pumpOn": "boolean", "note": "string"}
    return builders.sensor(builders.organization(), "Tank", variables=variables)


def run(tank: Sensor, path: Path, *options: str) -> tuple[str, str]:
    out, err = StringIO(), StringIO()
    try:
        call_command("import_readings", str(path), "--sensor", str(tank.uuid), *options, stdout=out, stderr=err)
    except CommandError as error:
        err.write(str(error))
    return out.getvalue(), err.getvalue()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "old.csv"
    path.write_text(text, encoding="utf-8")
    return path


def stored() -> list[tuple[str, datetime, Any]]:
    rows = Reading.objects.select_related("variable").order_by("timestamp", "variable__name")
    return [(row.variable.name, row.timestamp, row.value) for row in rows]


def test_a_wide_file_with_every_datatype(tank: Sensor, tmp_path: Path) -> None:
    text = (
        "\ufefftimestamp,ph,pumpOn,note,unknown\n2026-05-01T12:00:00Z,6.1,yes,calm,x\n"
        '2026-05-01 14:05:00+02:00,6.2,0,"a, b",\n2026-05-01T12:10:00,,,,\n'
    )
    out, err = run(tank, written(tmp_path, text))
    assert err == ""
    assert "3 lines: 6 readings stored (note 2, ph 2, pumpOn 2), 0 known already, 3 empty, 0 refused" in out
    later = NOON + timedelta(minutes=5)
    assert stored() == [
        ("note", NOON, "calm"), ("ph", NOON, 6.1), ("pumpOn", NOON, True),
        ("note", later, "a, b"), ("ph", later, 6.2), ("pumpOn", later, False),
    ]  # fmt: skip


def test_our_own_export_comes_back_and_a_second_run_changes_nothing(tank: Sensor, tmp_path: Path) -> None:
    path = written(tmp_path, "at,variable,value,suspect\n2026-05-01T12:00:00Z,ph,6.1,\n2026-05-01T12:00:00Z,ec,1.8,\n")
    assert "2 readings stored" in run(tank, path, "--dry-run")[0].replace("would be ", "")
    assert not Reading.objects.exists()
    assert "2 readings stored" in run(tank, path)[0]
    assert "0 readings stored, 2 known already" in run(tank, path)[0]
    assert len(stored()) == 2


def test_what_cannot_be_used_is_named_and_costs_nothing_else(tank: Sensor, tmp_path: Path) -> None:
    future = (timezone.now() + timedelta(days=1)).isoformat()
    text = f"at,ph,pumpOn\n2026-05-01T12:00:00Z,high,maybe\nyesterday,6.1,\n{future},6.1,\n2026-13-01T00:00:00Z,6,\n"
    text += "2026-05-01T12:05:00Z,nan,\n2026-05-01T12:10:00Z,6.3\n0001-01-01T00:00:00+14:00,6,\n"
    out, err = run(tank, written(tmp_path, text))
    for place in (
        "line 2, ph: 'high' must be a number",
        "line 2, pumpOn: 'maybe'",
        "line 3, at: 'yesterday' is no time",
    ):
        assert place in err
    assert "line 4, at" in err and "is in the future" in err  # noqa: PT018
    assert "line 6, ph: 'nan' is not a finite number" in err
    assert "line 8, at" in err and "out of range" in err  # noqa: PT018
    assert "The rest is stored" in err
    assert [value for _, _, value in stored()] == [6.3]
    assert "1 readings stored" in out


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no column of times"),
        ("ph,ec\n6,1\n", "names no column of times"),
        ("at,gold\n2026-05-01T12:00:00Z,1\n", "it has ec, note, ph, pumpOn, the file at, gold"),
        ('at,ph\n2026-05-01T12:00:00Z,"' + "9" * 200_000 + '"\n', "no CSV from here on"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tank: Sensor, tmp_path: Path, text: str, problem: str) -> None:
    _, err = run(tank, written(tmp_path, text))
    assert problem in err
    assert not Reading.objects.exists()


def test_what_is_no_file_sensor_or_text_says_so(tank: Sensor, tmp_path: Path) -> None:
    assert "No such file" in run(tank, tmp_path / "none.csv")[1]
    (tmp_path / "latin.csv").write_bytes(b"at,ph\n2026-05-01T12:00:00Z,\xe9\n")
    assert "utf-8" in run(tank, tmp_path / "latin.csv")[1]
    with pytest.raises(CommandError, match="There is no sensor"):
        call_command("import_readings", "x.csv", "--sensor", "9b0a6e0e-0000-4000-8000-000000000000")
    assert "write COLUMN=VARIABLE" in run(tank, written(tmp_path, "at,ph\n"), "--column", "ph")[1]


def test_columns_of_other_names_and_times_that_come_twice(tank: Sensor, tmp_path: Path) -> None:
    text = "Time,pH value\n2026-05-01T12:00:00Z,6.1\n2026-05-01T12:00:00Z,6.4\n"
    out, _ = run(tank, written(tmp_path, text), "--column", "pH value=ph")
    assert "1 readings stored (ph 1), 1 known already" in out


def test_a_long_file_is_stored_in_batches_and_rolled_up(
    tank: Sensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "BATCH", 50)
    lines = [f"{(NOON + timedelta(minutes=number)).isoformat()},{6 + number / 1000}" for number in range(301)]
    out, _ = run(tank, written(tmp_path, "at,ph\n" + "\n".join(lines) + "\n"))
    assert "301 readings stored" in out
    for _ in range(400):
        redis.client().delete(keys.ROLLUPS_LOCK)
        rollups.roll_up()
        if redis.client().exists(keys.ROLLUPS_LOCK):
            break
    assert Rollup.objects.filter(interval="hour").count() == 6
    assert sum(Rollup.objects.filter(interval="day").values_list("count", flat=True)) == 301
