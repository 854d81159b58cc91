"""Test the sandboxes of the units on a booted machine: systemd's report, and the rights of a program in a sandbox."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from scripts.local_cloud import LocalCloud
from tests.support.servers import Server

pytestmark = pytest.mark.machine

PROBE = """
import json, os, socket, sys
from pathlib import Path

def attempt(what):
    try:
        return what() or True
    except (OSError, ValueError) as error:
        return type(error).__name__

def connects(host):
    with socket.create_connection((host, 80), timeout=3):
        return True

def listed(path):
    return attempt(lambda: sorted(os.listdir(path)))

def opened(path):
    return attempt(lambda: bool(Path(path).open('rb').read(1)))

def written(path):
    return attempt(lambda: bool(Path(path, 'probe').write_text('x')))

print(json.dumps({
    "uid": os.getuid(),
    "metadata": attempt(lambda: connects("169.254.169.254")),
    "root": listed("/root"),
    "home": listed("/home"),
    "cluster": listed("/srv/mlflow/postgresql"),
    "certificates": listed("/srv/mlflow/certificates"),
    "passwords": opened("/run/mlflow-host/nginx/users"),
    "environment": opened("/run/mlflow-host/mlflow.env"),
    "shadow": opened("/etc/shadow"),
    "devices": sorted(name for name in os.listdir("/dev") if name.startswith(("nvme", "sd", "loop", "mem", "kmsg"))),
    "processes": sorted({os.stat(f"/proc/{p}").st_uid for p in os.listdir("/proc") if p.isdigit()}),
    **{f"write {path}": written(path) for path in sys.argv[1:]},
    "mounted to be written": [path for path in sys.argv[1:] if not os.statvfs(path).f_flag & os.ST_RDONLY],
    "privileges": [line.split(":")[1].strip() for line in open("/proc/self/status")
                   if line.startswith(("CapEff", "CapBnd", "NoNewPrivs", "Seccomp:"))],
}))
"""
PLACES = ("/etc", "/usr/lib/mlflow-host", "/opt/mlflow", "/srv/mlflow", "/srv/mlflow/tmp", "/var/lib", "/run", "/boot")


def in_the_sandbox_of(unit: str, cloud: LocalCloud, server: Server) -> dict[str, Any]:
    """Run the probe in place of a unit's program, in the sandbox of the unit, and return the probe's results."""
    template = re.sub(r"@\d+", "@", unit)
    text = cloud.exec(server.instance_id, ["systemctl", "cat", "--no-pager", f"{template}.service"]).stdout
    dropped = (
        "Exec",
        "Restart",
        "OnFailure",
        "Type",
        "Requi",
        "After",
        "Runtime",
        "Cache",
        "Logs",
        "Standard",
        "PartOf",
    )
    kept = [line for line in text.splitlines() if not line.startswith((*dropped, "[Install]", "WantedBy", "Assert"))]
    program = "/run/probe.py"
    command = f"/opt/mlflow/bin/python -I {program} {' '.join(PLACES)}"
    added = f"[Service]\nType=oneshot\nExecStart={command}\nStandardOutput=truncate:/run/probe.out\n"
    # The probe's unit has its own name, and therefore its own journal entries and cgroup.
    name = "probe@1.service" if "@" in unit else "probe.service"
    place = f"/run/systemd/system/{name.replace('@1', '@')}"
    for path, content in ((program, PROBE), (place, "\n".join([*kept, added]))):
        assert cloud.exec(server.instance_id, ["tee", path], input=content).returncode == 0
    try:
        started = f"chmod 644 {program} && systemctl daemon-reload && systemctl start {name} && cat /run/probe.out"
        done = cloud.exec(server.instance_id, ["sh", "-c", started])
        assert done.returncode == 0, done.stderr + cloud.exec(server.instance_id, ["journalctl", "-u", name]).stdout
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    finally:
        cloud.exec(server.instance_id, ["sh", "-c", f"rm -f {program} {place} /run/probe.out; systemctl daemon-reload"])


def test_exposure_of_each_unit_stays_below_its_ceiling(server: Server, cloud: LocalCloud) -> None:
    text = cloud.exec(server.instance_id, ["systemd-analyze", "security", "--no-pager"]).stdout
    found = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if ".service" in line.split()[0]}
    ours = {unit: exposure for unit, exposure in found.items() if unit.startswith(("mlflow-", "nginx"))}
    assert {"mlflow-server@1.service", "mlflow-host-postgresql.service", "nginx.service"} <= ours.keys()
    assert {u: e for u, e in ours.items() if e > (4.0 if u == "nginx.service" else 2.5)} == {}


def test_server_cannot_access_data_of_others(server: Server, cloud: LocalCloud) -> None:
    found = in_the_sandbox_of("mlflow-server@1", cloud, server)
    assert found["uid"] != 0
    assert found["metadata"] in ("PermissionError", "TimeoutError", "OSError"), "the machine's role can be read there"
    for what in ("root", "home"):
        assert found[what] in (True, "PermissionError", []), f"{what}: {found[what]}"
    for what in ("cluster", "certificates", "passwords", "environment", "shadow"):
        assert found[what] == "PermissionError", f"{what}: {found[what]}"
    assert found["devices"] == []
    assert found["processes"] == [found["uid"]], "it sees the processes of other users"
    writable = [path for path in PLACES if found[f"write {path}"] is True]
    assert writable == ["/srv/mlflow/tmp"]
    # Of the folders in PLACES, the sandbox mounts only /run and /srv/mlflow/tmp for writing. /run contains the folder
    # of the process's socket.
    assert set(found["mounted to be written"]) == {*writable, "/run"}
    assert found["privileges"][:2] == ["0" * 16] * 2 and found["privileges"][2:] == ["1", "2"]


def test_units_without_need_of_the_role_cannot_reach_the_metadata_service(server: Server, cloud: LocalCloud) -> None:
    for unit in ("mlflow-host-postgresql", "nginx", "mlflow-host-ready"):
        found = in_the_sandbox_of(unit, cloud, server)
        assert found["metadata"] in ("PermissionError", "TimeoutError", "OSError"), f"{unit}: {found['metadata']}"
        assert found["root"] in (True, "PermissionError", []), f"{unit}: {found['root']}"
        assert found["privileges"][3] == "2", f"{unit} runs without a system-call filter"
        if unit == "mlflow-host-postgresql":
            assert found["passwords"] == found["environment"] == found["shadow"] == "PermissionError"


def test_crash_leaves_no_memory_on_disk(server: Server, cloud: LocalCloud) -> None:
    """A core dump would contain passwords and keys."""
    cloud.exec(server.instance_id, ["systemctl", "start", "ssh"])  # Ubuntu starts sshd only at the first connection
    for unit in ("mlflow-server@1", "mlflow-host-postgresql", "nginx", "ssh"):
        read = f"cat /proc/$(systemctl show --value --property MainPID {unit})/limits"
        limits = cloud.exec(server.instance_id, ["sh", "-c", read]).stdout
        assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE), f"{unit}: {limits}"


def test_ssh_takes_keys_only_and_forwards_nothing(server: Server, cloud: LocalCloud) -> None:
    cloud.exec(server.instance_id, ["systemctl", "start", "ssh"])  # creates /run/sshd
    effective = cloud.exec(server.instance_id, ["/usr/sbin/sshd", "-T"]).stdout.splitlines()
    off = ("passwordauthentication", "kbdinteractiveauthentication", "permitrootlogin", "permitemptypasswords")
    forwarding = ("allowtcpforwarding", "allowagentforwarding", "x11forwarding", "permittunnel")
    assert {f"{option} no" for option in (*off, *forwarding)} <= set(effective)


def test_a_statement_of_the_server_ends_after_a_minute(server: Server, cloud: LocalCloud) -> None:
    asked = (
        "import os, sqlalchemy as s; e = s.create_engine(os.environ['MLFLOW_BACKEND_STORE_URI']); "
        "print(e.connect().execute(s.text('SHOW statement_timeout')).scalar())"
    )
    run = ["systemd-run", "--quiet", "--pipe", "--wait", "--uid=mlflow"]
    run += ["--property=EnvironmentFile=/run/mlflow-host/mlflow.env", "/opt/mlflow/bin/python", "-c", asked]
    done = cloud.exec(server.instance_id, run)
    assert done.stdout.strip() == "1min", done.stderr


@pytest.mark.parametrize("user", ["mlflow", "postgres", "nobody"])
def test_only_nginx_reaches_the_socket_of_the_login(user: str, server: Server, cloud: LocalCloud) -> None:
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('/run/nginx/private/login.sock')"
    run = ["runuser", "-u", user, "--", "/usr/bin/python3", "-c", connect]
    done = cloud.exec(server.instance_id, run)
    assert done.returncode == 1 and "PermissionError" in done.stderr, done.stderr
