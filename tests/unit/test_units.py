"""Test the systemd units: sandboxes, access to the metadata service, existing programs, and failure handlers."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOTFS = Path(__file__).parents[2] / "provisioning" / "rootfs"
UNITS = ROOTFS / "usr/lib/systemd/system"
NGINX = ROOTFS / "etc/systemd/system/nginx.service"
SANDBOX = UNITS / "mlflow-.service.d/10-sandbox.conf"
SERVICES = sorted(UNITS.glob("mlflow-*.service"))

NEED_THE_ROLE = {
    "mlflow-host-configure",
    "mlflow-host-database",
    "mlflow-host-server-credentials",
    "mlflow-host-certificates",
    "mlflow-host-users",
    "mlflow-host-archive",
    "mlflow-host-base-backup",
    "mlflow-host-dump",
    "mlflow-host-adopt@",
    "mlflow-host-gc",
    "mlflow-host-metrics",
    "mlflow-host-restore",
    "mlflow-host-in-service",
    "mlflow-host-monitor",
    "mlflow-host-audit",
    "mlflow-host-logs",
}
"""Units that need the machine's AWS role: they read parameters, publish the authority and the schema in service, get
MLflow's credentials, back up, restore, remove artifacts, send metrics and logs to CloudWatch, or add the audit trail to
the backups bucket."""

NO_STEP_OF_THE_BOOT = {
    "mlflow-host-drain",
    "mlflow-host-server-credentials",
    "mlflow-host-failure@",
    "mlflow-server@",
    "mlflow-host-users",
    "mlflow-host-room",
    "mlflow-host-archive",
    "mlflow-host-base-backup",
    "mlflow-host-dump",
    "mlflow-host-adopt@",
    "mlflow-host-gc",
    "mlflow-host-metrics",
    "mlflow-host-backups-check",
    "mlflow-host-in-service",
    "mlflow-host-monitor",
    "mlflow-host-audit",
    "mlflow-host-logs",
    "mlflow-host-watchdog",
}
"""Units without which MLflow starts: if such a unit fails, the status page must not report a failed boot."""


def exposure(unit: Path) -> float:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)], capture_output=True, text=True
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stderr
    return float(found[1])


def settings(unit: Path) -> configparser.SectionProxy:
    """Return a unit's [Service] section, merged with the drop-in that systemd adds to all units named mlflow-*."""
    parser = configparser.RawConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read([unit, *([SANDBOX] if unit.name.startswith("mlflow-") else [])])
    return parser["Service"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("unit", [*SERVICES, NGINX], ids=lambda unit: unit.stem)
def test_exposure_stays_below_its_limit(unit: Path) -> None:
    assert exposure(unit) <= (4.0 if unit == NGINX else 2.5)


@pytest.mark.parametrize("unit", [*SERVICES, NGINX], ids=lambda unit: unit.stem)
def test_only_units_that_need_the_role_reach_the_metadata_service(unit: Path) -> None:
    denied = settings(unit).get("IPAddressDeny", "")
    if unit.stem in NEED_THE_ROLE:
        assert not denied
    else:
        assert denied == "any" or "169.254.169.254" in denied


@pytest.mark.parametrize("unit", [*SERVICES, NGINX], ids=lambda unit: unit.stem)
def test_no_unit_can_gain_privileges(unit: Path) -> None:
    values = settings(unit)
    assert values["NoNewPrivileges"] == "yes"
    assert values["ProtectSystem"] == "strict"
    assert values["ProtectHome"] == "yes"
    assert "CAP_SYS_PTRACE" not in values["CapabilityBoundingSet"]


def test_units_without_root_have_no_capabilities() -> None:
    users = {unit.stem: settings(unit).get("User", "root") for unit in SERVICES}
    assert users["mlflow-server@"] == "mlflow"
    assert users["mlflow-host-postgresql"] == users["mlflow-host-database"] == "postgres"
    for unit in SERVICES:
        if users[unit.stem] != "root":
            assert settings(unit)["CapabilityBoundingSet"] == ""


def test_every_module_that_a_unit_or_command_starts_exists() -> None:
    package = ROOTFS / "usr/lib/mlflow-host"
    started = {
        (file.name, module)
        for file in [*SERVICES, *(ROOTFS / "usr/bin").iterdir()]
        for module in re.findall(r"-m (mlflow_host[\w.]*)", file.read_text())
    }
    assert {file for file, _ in started} >= {unit.name for unit in SERVICES} - {"mlflow-host-drain.service"}
    missing = {each for each in started if not (package / (each[1].replace(".", "/") + ".py")).exists()}
    assert not missing


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.stem)
def test_no_unit_starts_the_mount_of_the_data_volume(unit: Path) -> None:
    """The data-volume step mounts the file system after the volume is attached. If a unit required the mount, systemd
    would start the mount too early, and the mount would fail."""
    text = unit.read_text()
    assert not re.search(r"^(Requires|Wants|BindsTo|RequiresMountsFor)=.*srv[-/]mlflow", text, re.MULTILINE)
    assert not re.search(r"^(Working|Root|State|Logs|Cache)Directory=/srv/", text, re.MULTILINE)


def test_target_wants_every_step() -> None:
    wanted = (UNITS / "mlflow-host.target").read_text()
    oneshots = {unit.name for unit in SERVICES if "@" not in unit.name}
    assert {name for name in oneshots if name not in wanted and settings(UNITS / name).get("RemainAfterExit")} == set()
    for name in re.findall(r"[\w@-]+\.service", wanted):
        assert name == "nginx.service" or (UNITS / name).exists()


def test_each_boot_step_has_the_failure_handler() -> None:
    for unit in SERVICES:
        if unit.stem not in NO_STEP_OF_THE_BOOT:
            assert "OnFailure=mlflow-host-failure@%n.service" in unit.read_text(), unit.name


def test_requests_without_a_login_cannot_displace_other_journal_lines() -> None:
    """nginx writes a line of up to 500 bytes for each request without a login; the journal keeps 200 MB."""
    found = dict(line.split("=", 1) for line in NGINX.read_text().splitlines() if line.startswith("LogRateLimit"))
    lines_a_day = int(found["LogRateLimitBurst"]) / int(found["LogRateLimitIntervalSec"].removesuffix("s")) * 86400
    assert lines_a_day * 500 < 450e6
