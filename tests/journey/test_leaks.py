"""The tests search for the value of every secret of a stack in every place that must not contain it.

The secrets are those of the launched server. The value of each secret is random and long, so every match is a leak.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from scripts.local_cloud import LocalCloud
from tests.support.canaries import logged, names, secrets_of
from tests.support.servers import BUILD, Server, describe_server

pytestmark = pytest.mark.machine


@pytest.fixture(scope="module")
def secrets(server: Server, cloud: LocalCloud, example_runs: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    with secrets_of(server, cloud) as found:
        yield found


def test_nothing_that_the_launch_leaves_behind_holds_a_secret(
    server: Server, cloud: LocalCloud, secrets: Mapping[str, str]
) -> None:
    attribute = cloud.client("ec2").describe_instance_attribute(InstanceId=server.instance_id, Attribute="userData")
    user_data = base64.b64decode(attribute["UserData"]["Value"]).decode()
    instances = cloud.client("ec2").describe_instances(InstanceIds=[server.instance_id])
    objects = [
        f"{name} {key}"
        for name in server.buckets.values()
        for page in cloud.client("s3").get_paginator("list_objects_v2").paginate(Bucket=name)
        for key in (each["Key"] for each in page.get("Contents", []))
    ]
    assert objects
    places = {
        "user-data": user_data,
        "instance": str(instances),
        "console": cloud.console_output(server.instance_id),
        "object names": "\n".join(objects),
        "stack's state": "\n".join(path.read_text() for path in cloud.places.root.glob("rehearsal*.json")),
        "object store's log": (cloud.places.root / "object-store.log").read_text(errors="replace"),
        "cloud's log": cloud.places.log.read_text(errors="replace"),
        "log groups": "\n".join(each["message"] for each in logged(cloud)),
        "logs of the bakes": "\n".join(path.read_text(errors="replace") for path in Path(BUILD).rglob("*.log")),
        "facts": "\n".join(path.read_text() for path in Path(BUILD).rglob("*.json")),
    }
    assert "format = 1" in user_data, "the user-data was not searched"
    assert {place: found for place, text in places.items() if (found := names(secrets, text))} == {}


SEARCH = r"""
import json, os, subprocess, sys
secrets = json.load(sys.stdin)
found = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    for what in ("cmdline", "environ"):
        try:
            text = open(f"/proc/{pid}/{what}", "rb").read()
            unit = open(f"/proc/{pid}/cgroup").read().rsplit("/", 1)[-1].strip()
        except OSError:
            continue
        if int(pid) != os.getpid():
            found += [(name, what, unit) for name, value in secrets.items() if value.encode() in text]
command = ["journalctl", "--namespace=*", "--no-pager", "--output=export", "--all"]
journal = subprocess.run(command, capture_output=True).stdout
found += [(name, "journal", "") for name, value in secrets.items() if value.encode() in journal]
places = ["/etc", "/home", "/opt", "/root", "/run", "/srv", "/tmp", "/usr", "/var"]
grep = ["grep", "-rlF", "--null", "--devices=skip", "-f", "-", *places]
patterns = "\n".join(secrets.values()).encode()
for path in filter(None, subprocess.run(grep, input=patterns, capture_output=True).stdout.split(b"\0")):
    status, text = os.stat(path), open(path, "rb").read()
    where = (path.decode(), f"{status.st_uid} {status.st_mode & 0o777:o}")
    found += [(name, *where) for name, value in secrets.items() if value.encode() in text]
print(json.dumps({"found": found, "journal": len(journal), "swap": open("/proc/swaps").read().count("\n") - 1}))
"""


def search(server: Server, cloud: LocalCloud, secrets: Mapping[str, str]) -> set[tuple[str, ...]]:
    """Return a tuple for each place with a secret: (secret's name, path of a file, owner and mode), (secret's name,
    "cmdline" or "environ", unit of a process) or (secret's name, "journal", "")."""
    done = cloud.exec(server.instance_id, ["python3", "-c", SEARCH], input=json.dumps(dict(secrets)), timeout=300)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["journal"] > 10_000
    return {tuple(each) for each in answer["found"]}


PLANT = """
echo {canary} >/var/lib/{name}; echo "a line of {canary}" | systemd-cat; journalctl --sync
systemd-run --quiet --unit={name} --setenv=SECRET={canary} sh -c 'sleep 300; : {canary}'
"""


def test_a_secret_that_is_anywhere_on_the_machine_is_found(server: Server, cloud: LocalCloud) -> None:
    """If the search could not find a planted secret, an empty result of the next test would prove nothing."""
    name, canary = "leak-canary", uuid.uuid4().hex
    try:
        planted = cloud.exec(server.instance_id, ["sh", "-ec", PLANT.format(name=name, canary=canary)])
        assert planted.returncode == 0, planted.stderr
        found = search(server, cloud, {"canary": canary})
    finally:
        cloud.exec(server.instance_id, ["sh", "-c", f"systemctl stop {name}; rm /var/lib/{name}"])
    assert {("canary", "journal", ""), ("canary", f"/var/lib/{name}", "0 644")} <= found
    assert {("canary", what, f"{name}.service") for what in ("cmdline", "environ")} <= found


def test_only_the_necessary_places_on_the_machine_contain_a_secret(
    server: Server, cloud: LocalCloud, secrets: Mapping[str, str]
) -> None:
    """MLflow reads the passphrase from its environment. Only MLflow's processes and a file of root may contain the
    passphrase."""
    found = search(server, cloud, secrets)
    assert ("passphrase", "/run/mlflow-host/mlflow.env", "0 600") in found, "the search finds nothing at all"
    allowed = {("passphrase", "/run/mlflow-host/mlflow.env", "0 600")} | {
        each for each in found if each[:2] == ("passphrase", "environ") and each[2].startswith("mlflow-server@")
    }
    assert found - allowed == set()


def test_passwords_are_on_the_machine_as_hashes_that_mlflow_cannot_read(server: Server, cloud: LocalCloud) -> None:
    users = cloud.exec(server.instance_id, ["cat", "/run/mlflow-host/nginx/users"]).stdout.splitlines()
    assert all(line.split(":", 1)[1].startswith("{SSHA}") for line in users)
    shown = cloud.exec(server.instance_id, ["stat", "-c", "%U:%G %a", "/run/mlflow-host/nginx/users"]).stdout.strip()
    assert shown == "root:www-data 640"
    assert describe_server() == server
