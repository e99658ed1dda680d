"""What each environment allows, cell by cell, seen on processes that are really started."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.programs import REPOSITORY

GOOD = {
    "REDIS_PASSWORD": secrets.token_urlsafe(32),
    "SECRET_KEY": secrets.token_urlsafe(48),
    "JWT_SECRET": secrets.token_urlsafe(48),
    "MQTT_PASSWORD": secrets.token_urlsafe(32),
}
IDS = {"REDIS_PASSWORD": "001", "SECRET_KEY": "002", "JWT_SECRET": "003"}
MANAGE = (sys.executable, "manage.py")
WAYS_IN = {
    "check": (*MANAGE, "check"),
    "migrate": (*MANAGE, "migrate"),
    "rqworker": (*MANAGE, "rqworker", "--burst"),
    "rungateway": (*MANAGE, "rungateway"),
    "runscheduler": (*MANAGE, "runscheduler", "--once"),
    "gunicorn": (sys.executable, "-m", "gunicorn", "-c", "aemos/gunicorn.conf.py", "aemos.wsgi:application"),
}


def run(way_in: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The process with only these variables of ours: nothing that this test run was started with leaks in."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environment |= {"VAR_DIR": str(folder), "PYTHONWARNINGS": "error", **variables}
    return subprocess.run(
        WAYS_IN[way_in], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in GOOD.items() if name not in names}


@pytest.mark.parametrize("way_in", WAYS_IN)
def test_production_without_secrets_stops_every_way_in_and_names_every_problem(way_in: str, tmp_path: Path) -> None:
    ended = run(way_in, tmp_path, AEMOS_ENV="production")

    assert ended.returncode not in (0, None), ended.stdout
    for name, number in IDS.items():
        assert f"aemos.E{number}: {name}" in ended.stderr
    assert ended.stderr.count("How to mend it:") == 3
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", IDS)
def test_production_without_one_secret_names_that_one_only(name: str, tmp_path: Path) -> None:
    ended = run("check", tmp_path, AEMOS_ENV="production", **without(name))

    assert ended.returncode == 1
    assert f"aemos.E{IDS[name]}: {name} is missing" in ended.stderr
    assert ended.stderr.count("aemos.E") == 1


@pytest.mark.parametrize("name", ["SECRET_KEY", "JWT_SECRET"])
@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("x" * 20 + "y0aZ", "fewer than 32 characters"),
        ("change-me-" + "0123456789abcdef" * 3, "placeholder"),
        ("django-insecure-0123456789abcdefghijklmnop", "placeholder"),
        ("a" * 40, "repeats"),
    ],
)
def test_production_refuses_weak_secrets_without_showing_them(
    name: str, value: str, complaint: str, tmp_path: Path
) -> None:
    ended = run("check", tmp_path, AEMOS_ENV="production", **without(name), **{name: value})

    assert ended.returncode == 1
    assert complaint in ended.stderr
    assert value not in ended.stderr + ended.stdout


def test_production_with_good_secrets_starts(tmp_path: Path) -> None:
    ended = run("check", tmp_path, AEMOS_ENV="production", **GOOD)

    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("name", IDS)
def test_staging_warns_of_a_missing_secret_and_starts(name: str, tmp_path: Path) -> None:
    ended = run("check", tmp_path, AEMOS_ENV="staging", **without(name))

    assert ended.returncode == 0
    assert f"aemos.W{IDS[name]}" in ended.stderr
    assert "HINT" in ended.stderr


def test_staging_warns_of_a_weak_secret_and_starts(tmp_path: Path) -> None:
    ended = run("check", tmp_path, AEMOS_ENV="staging", **without("SECRET_KEY"), SECRET_KEY="short")

    assert ended.returncode == 0
    assert "aemos.W002" in ended.stderr


@pytest.mark.parametrize(("environment", "status", "identifier"), [("production", 1, "E007"), ("staging", 0, "W007")])
def test_a_metrics_token_must_not_be_easy_to_guess(
    environment: str, status: int, identifier: str, tmp_path: Path
) -> None:
    ended = run("check", tmp_path, AEMOS_ENV=environment, **GOOD, METRICS_TOKEN="scrape")

    assert ended.returncode == status
    assert f"aemos.{identifier}" in ended.stderr
    assert "METRICS_TOKEN has fewer than 32 characters" in ended.stderr


@pytest.mark.parametrize("environment", ["development", "test"])
def test_development_and_test_start_without_secrets_and_without_warnings(environment: str, tmp_path: Path) -> None:
    ended = run("check", tmp_path, AEMOS_ENV=environment)

    assert (ended.returncode, ended.stderr) == (0, "")


def test_development_keeps_its_made_up_secret_to_itself_and_over_restarts(tmp_path: Path) -> None:
    run("check", tmp_path, AEMOS_ENV="development")
    kept = tmp_path / "development-secret"
    first = kept.read_text()
    run("check", tmp_path, AEMOS_ENV="development")

    assert len(first) >= 32
    assert kept.read_text() == first
    assert kept.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("environment", ["production", "staging", "development", "test"])
@pytest.mark.parametrize(
    ("variables", "identifier", "named"),
    [
        ({"QUEUE_CRITICAL_THRESHOLD": "9000"}, "aemos.E005", "QUEUE_RECOVERY_THRESHOLD < QUEUE_WARNING_THRESHOLD"),
        ({"DATA_COLLECTION_TIMEOUT_MS": "30000"}, "aemos.E006", "RULE_CHAIN_TIMEOUT_MS"),
        ({"REDIS_PORT": "sixty"}, "aemos.E004", "REDIS_PORT is 'sixty'"),
        ({"MQTT_TLS": "perhaps"}, "aemos.E004", "MQTT_TLS is 'perhaps'"),
    ],
)
def test_wrong_values_and_relations_stop_every_environment(
    environment: str, variables: dict[str, str], identifier: str, named: str, tmp_path: Path
) -> None:
    ended = run("check", tmp_path, AEMOS_ENV=environment, **GOOD, **variables)

    assert ended.returncode == 1
    assert identifier in ended.stderr
    assert named in ended.stderr


def test_an_unknown_environment_is_refused_by_name(tmp_path: Path) -> None:
    ended = run("check", tmp_path, AEMOS_ENV="prod")

    assert ended.returncode == 1
    assert "AEMOS_ENV is 'prod'" in ended.stderr
    assert "production, staging, development, test" in ended.stderr


def test_secrets_may_come_from_files(tmp_path: Path) -> None:
    files = {}
    for name in IDS:
        (tmp_path / name).write_text(GOOD[name] + "\n")
        files[f"{name}_FILE"] = str(tmp_path / name)
    ended = run("check", tmp_path, AEMOS_ENV="production", **files)

    assert ended.returncode == 0, ended.stderr


def test_a_secret_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    ended = run("check", tmp_path, AEMOS_ENV="production", **without("SECRET_KEY"), SECRET_KEY_FILE=gone)

    assert ended.returncode == 1
    assert f"SECRET_KEY_FILE names '{gone}', which cannot be read: No such file or directory" in ended.stderr


def test_a_secret_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(GOOD["SECRET_KEY"])
    ended = run("check", tmp_path, AEMOS_ENV="production", **GOOD, SECRET_KEY_FILE=str(tmp_path / "key"))

    assert ended.returncode == 1
    assert "SECRET_KEY is set and so is SECRET_KEY_FILE" in ended.stderr


def test_a_renamed_setting_is_read_under_its_earlier_name_with_a_warning(tmp_path: Path) -> None:
    ended = run("check", tmp_path, AEMOS_ENV="production", **GOOD, DATA_COLLECTION_TIMEOUT="29999")
    refused = run("check", tmp_path, AEMOS_ENV="production", **GOOD, DATA_COLLECTION_TIMEOUT="30000")

    assert ended.returncode == 0, ended.stderr
    assert "aemos.W008" in ended.stderr
    assert "DATA_COLLECTION_TIMEOUT_MS" in ended.stderr
    assert (refused.returncode, "aemos.E006" in refused.stderr) == (1, True)


def test_a_setting_under_both_names_is_refused(tmp_path: Path) -> None:
    ended = run("check", tmp_path, **GOOD, WORKER_TIMEOUT="61000", WORKER_TIMEOUT_MS="60000")

    assert ended.returncode == 1
    assert "aemos.E004: WORKER_TIMEOUT_MS is set and so is WORKER_TIMEOUT" in ended.stderr
