"""The files of deploy/ fit the server and each other: options, routes, ports, names and promises that they make."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from stallfree.cli import app
from stallfree.server.door import KEYLESS

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PARAMETERS = {name: parameter for parameter in typer.main.get_command(app).commands["serve"].params for name in parameter.opts}
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
DEPLOYMENT, SERVICE = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
UNIT = (DEPLOY / "stallfree.service").read_text()


def test_every_option_in_a_file_is_one_of_the_server():
    start, unit = (DEPLOY / "start").read_text(), UNIT.partition("ExecStart=")[2].partition("\n")[0]
    words = [*COMPOSE["services"]["stallfree"]["command"], *CONTAINER["args"], *start.split("exec ")[1].split(), *unit.split()]
    used = {word for word in words if word.startswith("--")}
    assert used
    assert set() == used - PARAMETERS.keys()


def test_the_dockerfile_passes_hadolint():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stdout)


def test_the_image_runs_as_a_user_and_has_no_compiler_of_its_own():
    *_, last = (DEPLOY / "Dockerfile").read_text().split("\nFROM ")
    assert re.search(r"^USER [1-9]\d*$", last, re.MULTILINE)
    assert re.search(r'^HEALTHCHECK .*CMD \["ready"\]$', last, re.MULTILINE)
    assert not re.search(r"apt|gcc|build-essential|pip ", last)


def test_what_the_dockerfile_copies_is_not_ignored():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    copied = [path for line in copies for path in line.split()]
    assert sorted(kept) == sorted(copied)
    assert all((ROOT / path).exists() for path in copied)


@pytest.fixture
def start(tmp_path):
    """Runs deploy/start with a `stallfree` that prints its arguments."""
    fake = tmp_path / "stallfree"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment
        return subprocess.run([str(DEPLOY / "start"), *arguments], env=env, capture_output=True, text=True, check=False)

    return run


def test_a_container_without_a_key_is_refused_with_the_way_out(start):
    done = start("--slo", "tbt=100ms")
    assert (2, "") == (done.returncode, done.stdout)
    assert "set STALLFREE_API_KEY or give --api-key-file FILE; STALLFREE_OPEN=1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ((), {"STALLFREE_API_KEY": "x"}),
        ((), {"STALLFREE_OPEN": "1"}),
        (("--api-key-file", "/keys"), {}),
        (("--api-key-file=/keys",), {}),
        (("--slo", "tbt=100ms", "--api-key", "x"), {}),
    ],
)
def test_a_container_with_a_key_or_a_stated_choice_serves_with_all_its_arguments(start, arguments, environment):
    done = start(*arguments, **environment)
    assert (0, " ".join(("serve --host 0.0.0.0 --port 8000", *arguments)) + "\n") == (done.returncode, done.stdout)


def test_compose_needs_a_key_and_opens_ports_on_this_machine_alone():
    services = COMPOSE["services"]
    assert ":?" in services["stallfree"]["environment"]["STALLFREE_API_KEY"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_images_of_others_have_a_version():
    images = [service["image"] for service in COMPOSE["services"].values() if "image" in service]
    assert len(images) == 2
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) for image in images)


def test_compose_mounts_files_that_are_there():
    mounts = [volume.split(":")[0] for service in COMPOSE["services"].values() for volume in service.get("volumes", [])]
    files = [mount for mount in mounts if mount.startswith(".")]
    assert len(files) == 4
    assert all((DEPLOY / file).exists() for file in files)
    assert set(mounts) - set(files) == COMPOSE["volumes"].keys()


def test_prometheus_scrapes_the_server_with_its_key_and_grafana_reads_prometheus():
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    (source,) = yaml.safe_load((DEPLOY / "grafana" / "datasource.yaml").read_text())["datasources"]
    (secret,) = COMPOSE["services"]["prometheus"]["secrets"]
    assert {"credentials_file": f"/run/secrets/{secret}"} == job["authorization"]
    assert [{"targets": ["stallfree:8000"]}] == job["static_configs"]
    assert ("prometheus", "http://prometheus:9090", True) == (source["type"], source["url"], source["isDefault"])


def test_the_dashboard_is_where_grafana_looks_and_where_the_comment_says():
    (provider,) = yaml.safe_load((DEPLOY / "grafana" / "dashboards.yaml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in COMPOSE["services"]["grafana"]["volumes"])
    dashboard = json.loads((DEPLOY / "../docs/grafana/stallfree.json").read_text())
    assert provider["options"]["path"] == mounts["../docs/grafana"]
    assert f"http://127.0.0.1:3000/d/{dashboard['uid']}." in (DEPLOY / "compose.yaml").read_text()


def test_the_probes_ask_routes_that_need_no_key():
    probes = {name: CONTAINER[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert set(probes.values()) <= set(KEYLESS)
    assert ("/health/live", "/health/ready") == (probes["livenessProbe"], probes["readinessProbe"])


def test_the_pod_is_confined():
    assert POD["securityContext"]["runAsNonRoot"]
    assert f"USER {POD['securityContext']['runAsUser']}\n" in (DEPLOY / "Dockerfile").read_text()
    context = CONTAINER["securityContext"]
    assert (False, True) == (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"])
    assert ["ALL"] == context["capabilities"]["drop"]


def test_the_service_finds_the_pod_and_the_volumes_are_mounted():
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert labels == SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"]
    assert [port["name"] for port in CONTAINER["ports"]] == [port["targetPort"] for port in SERVICE["spec"]["ports"]]
    assert [mount["name"] for mount in CONTAINER["volumeMounts"]] == [volume["name"] for volume in POD["volumes"]]


def test_all_give_streams_more_time_to_end_than_the_server_does():
    drain_s = PARAMETERS["--drain-timeout"].default
    grace = int(COMPOSE["services"]["stallfree"]["stop_grace_period"].removesuffix("s"))
    stop = int(re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)[1])
    assert drain_s < min(grace, stop, POD["terminationGracePeriodSeconds"])


@pytest.mark.parametrize(
    "setting", ["DynamicUser=yes", "NoNewPrivileges=yes", "ProtectSystem=strict", "EnvironmentFile=/etc/stallfree.env"]
)
def test_the_unit_is_hardened(setting):
    assert f"\n{setting}\n" in UNIT


def test_the_unit_passes_systemd_analyze(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "stallfree.service"
    unit.write_text(UNIT.replace("/opt/stallfree/bin/stallfree", "/bin/true"))  # the program must exist here
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "stallfree" in line]
    assert (0, []) == (done.returncode, ours), done.stderr
