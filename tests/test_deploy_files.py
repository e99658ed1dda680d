"""What deploy/ ships for machines, containers and clusters: other people's tools find nothing wrong, and the files agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from deploy.production import configure, redis_users
from deploy.programs import REPOSITORY, get

DEPLOY = REPOSITORY / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("aemos-*.service"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
COMMANDS = {
    "web": "gunicorn -c aemos/gunicorn.conf.py aemos.wsgi:application",
    "worker": "python manage.py rqworker critical normal low",
    "gateway": "python manage.py rungateway",
    "scheduler": "python manage.py runscheduler",
}


def run(*command: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the containers are given."""
    folder = tmp_path_factory.mktemp("config")
    assert configure.main([str(folder), "--host", "farm.example.org", "--containers"]) == 0
    return folder


# systemd


def test_systemd_finds_nothing_wrong_and_little_exposed(tmp_path: Path) -> None:
    program = get("systemd-analyze")
    folder = tmp_path / "system"
    run("cp", "-r", str(DEPLOY / "systemd"), str(folder))
    for file in folder.rglob("*.*"):
        if file.is_file():
            file.write_text(file.read_text().replace("/opt/aemos", str(REPOSITORY)))
    sockets = [str(folder / "aemos-web.socket")]
    units = [str(folder / unit.name.replace("@.", "@1.")) for unit in UNITS]
    environment = {**program.environment, "SYSTEMD_UNIT_PATH": f"{folder}:"}
    assert run(str(program.path), "verify", *units, *sockets, str(folder / "aemos.target"), env=environment) == ""
    for unit in units:
        said = run(str(program.path), "security", "--offline=true", "--threshold=20", unit, env=environment)
        assert "Overall exposure level" in said


def test_each_unit_starts_what_containers_start() -> None:
    started = {
        unit.stem.removeprefix("aemos-").rstrip("@"): re.findall(r"^ExecStart=(.*)", unit.read_text(), re.MULTILINE)
        for unit in UNITS
    }
    assert started == {name: [f"/opt/aemos/.venv/bin/{command}"] for name, command in COMMANDS.items()}


# Docker


def test_hadolint_finds_nothing_wrong() -> None:
    assert run(str(Path(sys.executable).parent / "hadolint"), str(DEPLOY / "docker/Dockerfile")) == ""


def test_the_image_holds_every_package_and_no_secret_of_the_machine() -> None:
    dockerfile = (DEPLOY / "docker/Dockerfile").read_text()
    packages = {folder.parent.name for folder in REPOSITORY.glob("*/apps.py")} | {"deploy"}
    assert packages <= set(re.findall(r"^COPY (\w+) \w+$", dockerfile, re.MULTILINE))
    ignored, *admitted = [
        line for line in (DEPLOY / "docker/Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in "#"
    ]
    assert ignored == "*"
    assert packages <= {line.removeprefix("!") for line in admitted}
    assert "deploy/docker/config" in admitted


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "docker/compose.yml").read_text())
    return found


def test_the_compose_file_is_one() -> None:
    document = {key: value for key, value in compose().items() if not key.startswith("x-")}
    PyCompose.from_yaml(json.dumps(document)).validate()


def test_containers_run_with_few_rights_and_the_settings_that_exist(config: Path) -> None:
    services = compose()["services"]
    for name, command in COMMANDS.items():
        service = services[name]
        assert " ".join(service["command"]) == command
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        files = [each["path"].removeprefix("config/") for each in service["env_file"]]
        assert files == ["aemos.env", f"{name}.env"]
        assert f"REDIS_USERNAME={name}" in (config / files[1]).read_text()
    mounted = [
        volume for service in services.values() for volume in service.get("volumes", []) if "./config/" in volume
    ]
    assert len(mounted) >= 8
    missing = [volume for volume in mounted if not (config / volume.split(":")[0].removeprefix("./config/")).exists()]
    assert missing == []
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert sorted(published) == ["443:443", "5683:5683/udp", "80:80", "8883:8883"]


# Kubernetes


def test_kubernetes_takes_the_manifests() -> None:
    checked = [str(file) for file in MANIFESTS if file.name not in ("kustomization.yaml", "keda.yaml")]
    run(str(Path(sys.executable).parent / "kubernetes-validate"), "--strict", *checked)


def test_pods_run_with_few_rights_and_the_settings_that_exist(config: Path) -> None:
    documents = [each for file in MANIFESTS for each in yaml.safe_load_all(file.read_text())]
    secrets = {each["name"]: each["envs"] for each in documents_of(documents, "Kustomization")[0]["secretGenerator"]}
    assert all((config / Path(file).name).exists() for files in secrets.values() for file in files)
    deployments = {each["metadata"]["name"]: each for each in documents_of(documents, "Deployment")}
    assert set(deployments) == set(COMMANDS)
    for name, deployment in deployments.items():
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert " ".join(container["command"]) == COMMANDS[name]
        assert [each["secretRef"]["name"] for each in container["envFrom"]] == ["aemos", f"aemos-{name}"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {each["metadata"]["name"] for each in documents_of(documents, "PodDisruptionBudget")} >= {
        "web",
        "worker",
        "gateway",
    }
    assert {each["spec"]["scaleTargetRef"]["name"] for each in documents_of(documents, "HorizontalPodAutoscaler")} == {
        "web"
    }
    (scaled,) = documents_of(documents, "ScaledObject")
    metrics = set(re.findall(r"[a-z]\w+_\w+", scaled["spec"]["triggers"][0]["metadata"]["query"]))
    documented = re.findall(r"^\| `(\w+)", (REPOSITORY / "docs/monitoring.md").read_text(), re.MULTILINE)
    assert metrics <= set(documented)


def documents_of(documents: list[Any], kind: str) -> list[Any]:
    return [each for each in documents if each and each["kind"] == kind]


# The command that writes the files


def test_configuring_again_keeps_secrets_and_own_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path), "--host", "farm.example.org", "--broker-plugin", "/x.so"]
    assert configure.main(arguments) == 0
    with (tmp_path / "aemos.env").open("a") as file:
        file.write("WEB_WORKERS=2\n")
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert configure.main(arguments) == 0
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before
    private = [path for path in before if path.stat().st_mode & 0o007 and path.suffix not in (".crt", ".srl")]
    assert private == []
    secrets = re.findall(r"^\w+(?:KEY|SECRET|PASSWORD|TOKEN)=(.*)", before[tmp_path / "aemos.env"], re.MULTILINE)
    assert len(secrets) == 5
    said = capsys.readouterr()
    assert not [secret for secret in secrets if secret in said.out + said.err]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--host is None; give the name alone, such as farm.example.org"),
        (["--host", "https://farm.example.org"], "give the name alone"),
        (["--host", "farm.example.org", "--group", "nobody-has-this"], "there is no group nobody-has-this"),
        (["--new-redis-passwords"], "has no redis/users.acl; write it first, with --host"),
    ],
)
def test_what_cannot_be_configured_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert configure.main([str(tmp_path / "etc"), "--broker-plugin", "/x.so", *arguments]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "etc").exists()


def test_a_second_change_of_passwords_waits_for_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path)
    assert configure.main([folder, "--host", "farm.example.org", "--broker-plugin", "/x.so"]) == 0
    assert configure.main([folder, "--new-redis-passwords"]) == 0
    users = (tmp_path / "redis/users.acl").read_text()
    assert redis_users.has_two_passwords(users)
    assert configure.main([folder, "--new-redis-passwords"]) == 1
    assert "--forget-old-redis-passwords" in capsys.readouterr().err
    assert (tmp_path / "redis/users.acl").read_text() == users
    assert configure.main([folder, "--forget-old-redis-passwords"]) == 0
    assert not redis_users.has_two_passwords((tmp_path / "redis/users.acl").read_text())
