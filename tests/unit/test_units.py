"""The units: systemd accepts them, they are sandboxed, and the metadata service is for those that need it."""

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
SERVICES = sorted(UNITS.glob("mlflow-*.service"))

NEED_THE_ROLE = {
    "mlflow-host-configure",
    "mlflow-host-database",
    "mlflow-server@",
    "mlflow-host-certificates",
    "mlflow-host-users",
    "mlflow-host-archive",
    "mlflow-host-base-backup",
    "mlflow-host-dump",
    "mlflow-host-gc",
    "mlflow-host-metrics",
    "mlflow-host-restore",
}
"""Read the credentials parameter, write the dump, move and remove artifacts, publish the authority, follow the users,
back up and restore,
feed CloudWatch."""

NO_STEP_OF_THE_BOOT = {
    "mlflow-host-failure@",
    "mlflow-server@",
    "mlflow-host-users",
    "mlflow-host-room",
    "mlflow-host-archive",
    "mlflow-host-base-backup",
    "mlflow-host-dump",
    "mlflow-host-gc",
    "mlflow-host-metrics",
    "mlflow-host-backups-check",
}
"""Whether they fail or not, MLflow starts, so the page must not say that it could not."""


def exposure(unit: Path) -> float:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)], capture_output=True, text=True
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stderr
    return float(found[1])


def settings(unit: Path) -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(unit)
    return parser["Service"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("unit", [*SERVICES, NGINX], ids=lambda unit: unit.stem)
def test_exposure_stays_below_its_ceiling(unit: Path) -> None:
    assert exposure(unit) <= (4.0 if unit == NGINX else 2.5)


@pytest.mark.parametrize("unit", [*SERVICES, NGINX], ids=lambda unit: unit.stem)
def test_metadata_service_is_for_units_that_need_the_role(unit: Path) -> None:
    denied = settings(unit).get("IPAddressDeny", "")
    if unit.stem in NEED_THE_ROLE:
        assert not denied
    else:
        assert denied == "any" or "169.254.169.254" in denied


@pytest.mark.parametrize("unit", [*SERVICES, NGINX], ids=lambda unit: unit.stem)
def test_nobody_can_gain_privileges(unit: Path) -> None:
    values = settings(unit)
    assert values["NoNewPrivileges"] == "yes"
    assert values["ProtectSystem"] == "strict"
    assert values["ProtectHome"] == "yes"
    assert "CAP_SYS_PTRACE" not in values["CapabilityBoundingSet"]


def test_server_and_database_are_their_own_users_and_hold_no_capability() -> None:
    users = {unit.stem: settings(unit).get("User", "root") for unit in SERVICES}
    assert users["mlflow-server@"] == "mlflow"
    assert users["mlflow-host-postgresql"] == users["mlflow-host-database"] == "postgres"
    for unit in SERVICES:
        if users[unit.stem] != "root":
            assert settings(unit)["CapabilityBoundingSet"] == ""


def test_target_wants_every_step() -> None:
    wanted = (UNITS / "mlflow-host.target").read_text()
    oneshots = {unit.name for unit in SERVICES if "@" not in unit.name}
    assert {name for name in oneshots if name not in wanted and settings(UNITS / name).get("RemainAfterExit")} == set()
    for name in re.findall(r"[\w@-]+\.service", wanted):
        assert name == "nginx.service" or (UNITS / name).exists()


def test_each_step_reports_its_failure() -> None:
    for unit in SERVICES:
        if unit.stem not in NO_STEP_OF_THE_BOOT:
            assert "OnFailure=mlflow-host-failure@%n.service" in unit.read_text(), unit.name
