"""Tests of a baked image: its description in EC2, its content, and the checks of the last bake step. For each check,
the tests plant a defect.

The machine is launched without user-data, because the image must contain no data of a stack.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from scripts import lock

if TYPE_CHECKING:
    from scripts.local_cloud import LocalCloud

pytestmark = pytest.mark.machine

PROVISIONING = Path(__file__).resolve().parents[2] / "provisioning"
STEPS = PROVISIONING / "steps"
BOOT_SECONDS = 120


@dataclass(frozen=True)
class Machine:
    """A machine that runs the image. The shell commands of the tests run as root on the machine."""

    cloud: LocalCloud
    instance_id: str

    def shell(self, script: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = self.cloud.exec(self.instance_id, ["bash", "-c", script])
        if check and done.returncode:
            pytest.fail(f"{script}\nended with {done.returncode}:\n{done.stdout}{done.stderr}", pytrace=False)
        return done

    def run_step(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a bake step like Packer: from a file in /tmp that is deleted after the run."""
        text = (STEPS / name).read_text(encoding="utf-8")
        put = f"cat >/tmp/{name} <<'END_OF_STEP'\n{text}END_OF_STEP\nchmod +x /tmp/{name}\n"
        return self.shell(
            f"{put}/tmp/{name} {' '.join(arguments)}; status=$?; rm -f /tmp/{name}; exit $status", check=False
        )

    def assert_image(self, check: str) -> list[str]:
        """Run one check of the last bake step on this machine, and return the faults that the check reports."""
        done = self.run_step("assert_image.py", check)
        found = [line.partition(": ")[2] for line in done.stderr.splitlines() if line.startswith("assert_image: ")]
        assert done.returncode == (1 if found else 0), done.stdout + done.stderr
        return found


@pytest.fixture(scope="module")
def machine(cloud: LocalCloud, image: Mapping[str, Any]) -> Iterator[Machine]:
    """Launch a machine of the image without user-data, and yield the machine after its boot."""
    ec2 = cloud.client("ec2")
    started = ec2.run_instances(ImageId=image["ami_id"], InstanceType="t3.small", MinCount=1, MaxCount=1)
    instance_id = str(started["Instances"][0]["InstanceId"])
    machine = Machine(cloud, instance_id)
    try:
        ec2.get_waiter("instance_running").wait(InstanceIds=[instance_id], WaiterConfig={"Delay": 1})
        deadline = time.monotonic() + BOOT_SECONDS
        # The state is polled, because `--wait` fails if systemd does not respond yet.
        while not is_booted(cloud, instance_id):
            assert time.monotonic() < deadline, f"{instance_id} did not boot within {BOOT_SECONDS} s"
            time.sleep(1)
        yield machine
    finally:
        ec2.terminate_instances(InstanceIds=[instance_id])


def is_booted(cloud: LocalCloud, instance_id: str) -> bool:
    from scripts.local_cloud import LocalCloudError

    try:
        said = cloud.exec(instance_id, ["systemctl", "is-system-running"]).stdout.strip()
    except LocalCloudError:
        return False
    return said in ("running", "degraded")


@pytest.fixture(scope="module")
def cleaned(machine: Machine) -> Machine:
    """The machine in the state at the end of the bake: our units are stopped and their files are removed."""
    machine.shell("systemctl stop mlflow-host.target 'mlflow-*' nginx; systemctl reset-failed; rm -rf /srv/mlflow/*")
    done = machine.run_step("clean.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    return machine


# ── The description in EC2 ──────────────────────────────────────────────────────────────────────────────────────────


def test_image_and_snapshot_carry_the_facts_as_tags(cloud: LocalCloud, image: Mapping[str, Any]) -> None:
    ec2 = cloud.client("ec2")
    described = ec2.describe_images(ImageIds=[image["ami_id"]])["Images"][0]
    tags = {tag["Key"]: tag["Value"] for tag in described["Tags"]}
    version = lock.locked_version(PROVISIONING / "requirements.lock", "mlflow")
    assert tags["mlflow-ami:format"] == "1"
    assert tags["mlflow-ami:mlflow-version"] == version
    assert described["Name"] == f"mlflow-ami-{version}-{tags['mlflow-ami:image-version']}"
    assert int(tags["mlflow-ami:migration-count"]) > 60
    assert len(tags["mlflow-ami:inputs-digest"]) == 64
    # Stacks and drills add tags to the image later. These tags are not compared.
    baked = {
        key: value for key, value in tags.items() if not key.startswith(("mlflow-ami:stack:", "mlflow-ami:drill:"))
    }
    for snapshot in image["snapshots"]:
        of_snapshot = ec2.describe_snapshots(SnapshotIds=[snapshot])["Snapshots"][0]["Tags"]
        assert baked.items() <= {tag["Key"]: tag["Value"] for tag in of_snapshot}.items()


def test_instances_of_the_image_answer_imdsv2_only(cloud: LocalCloud, image: Mapping[str, Any]) -> None:
    described = cloud.client("ec2").describe_images(ImageIds=[image["ami_id"]])["Images"][0]
    assert described["ImdsSupport"] == "v2.0"


def test_nothing_temporary_of_the_bake_is_left(cloud: LocalCloud, image: Mapping[str, Any]) -> None:
    ec2 = cloud.client("ec2")
    builders = ec2.describe_instances(Filters=[{"Name": "tag-key", "Values": ["mlflow-ami:bake"]}])["Reservations"]
    assert not [i for r in builders for i in r["Instances"] if i["State"]["Name"] != "terminated"]
    assert not [
        group for group in ec2.describe_security_groups()["SecurityGroups"] if group["GroupName"].startswith("packer_")
    ]
    assert not [pair for pair in ec2.describe_key_pairs()["KeyPairs"] if pair["KeyName"].startswith("mlflow-ami-bake-")]


# ── The content of the image ────────────────────────────────────────────────────────────────────────────────────────


def test_facts_are_those_of_the_installed_system(machine: Machine, image: Mapping[str, Any]) -> None:
    facts = json.loads(machine.shell("cat /usr/share/mlflow-host/image.json").stdout)
    version = machine.shell("/opt/mlflow/bin/mlflow --version").stdout.split()[-1]
    assert facts["mlflow_version"] == facts["packages"]["python"]["mlflow"] == version
    major = facts["postgresql_major"]
    assert f"(PostgreSQL) {major}." in machine.shell(f"/usr/lib/postgresql/{major}/bin/postgres --version").stdout
    assert facts["python_version"] in machine.shell("/opt/mlflow/bin/python --version").stdout
    assert facts["nginx_version"] in machine.shell("nginx -v 2>&1").stdout
    assert facts["os"] == machine.shell('. /etc/os-release; echo "$ID $VERSION_ID"').stdout.strip()
    every = machine.shell("dpkg-query -W -f '${binary:Package}\\n' | cut -d: -f1 | sort -u").stdout.split()
    assert sorted(facts["packages"]["deb"]) == every
    assert image["facts"]["migration_head"] == facts["migration_head"]
    bill = json.loads(machine.shell("cat /usr/share/mlflow-host/sbom.cdx.json").stdout)
    wanted = [(name, each) for packages in facts["packages"].values() for name, each in packages.items()]
    assert [(each["name"], each["version"]) for each in bill["components"]] == wanted


def test_migration_is_the_one_that_mlflow_itself_expects(machine: Machine, image: Mapping[str, Any]) -> None:
    program = "import sqlalchemy; from mlflow.store.db.utils import _get_latest_schema_revision as f; print(f())"
    assert (
        machine.shell(f"/opt/mlflow/bin/python -W ignore -c '{program}'").stdout.strip()
        == image["facts"]["migration_head"]
    )


def test_no_automatic_updates_run(machine: Machine) -> None:
    for unit in ("apt-daily.timer", "apt-daily-upgrade.timer"):
        assert machine.shell(f"systemctl is-enabled {unit}", check=False).stdout.strip() in ("masked", "not-found", "")
    held = machine.shell("apt-mark showhold").stdout.split()
    assert {"postgresql", "nginx", "python3"} <= set(held)
    assert machine.shell("apt-config shell on APT::Periodic::Enable").stdout.strip() == "on='0'"


def test_ca_bundle_of_the_bake_is_removed(machine: Machine) -> None:
    assert (
        machine.shell("ls /tmp/mlflow-host-bake /usr/local/share/ca-certificates/* 2>/dev/null", check=False).stdout
        == ""
    )


def test_machines_of_one_image_have_separate_identities(machine: Machine) -> None:
    assert len(machine.shell("cat /etc/machine-id").stdout.strip()) == 32
    assert machine.shell("ls /etc/ssh/ssh_host_*_key").stdout


def test_missing_launch_document_is_the_stated_reason(machine: Machine) -> None:
    status = json.loads(machine.shell("cat /run/mlflow-host/status/configure.json").stdout)
    assert status["state"] == "failed"
    assert "launch.toml is missing: the machine has no user-data" in status["message"]
    for address in ("http://127.0.0.1/", "https://127.0.0.1/"):
        page = machine.shell(f"curl --silent --insecure --header 'Accept: text/html' {address}").stdout
        assert "MLflow could not start" in page and "launch.toml is missing" in page


# ── The last check ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_cleaned_machine_passes_every_check(cleaned: Machine) -> None:
    done = cleaned.run_step("assert_image.py")
    assert done.returncode == 0, done.stderr
    assert "11 checks, 0 found wrong" in done.stdout


@dataclass(frozen=True)
class Defect:
    """A defect that a test plants: the check that finds the defect, the commands to add and remove the defect, and the
    expected message."""

    name: str
    check: str
    plant: str
    undo: str
    says: str


SITE = "$(echo /opt/mlflow/lib/python3*/site-packages)"
DEFECTS = (
    Defect(
        "cluster",
        "no_cluster",
        "mkdir -p /var/lib/postgresql/15/main && echo 15 >/var/lib/postgresql/15/main/PG_VERSION",
        "rm -rf /var/lib/postgresql/15",
        "cluster is baked in: /var/lib/postgresql/15/main/PG_VERSION",
    ),
    Defect(
        "cluster on the data volume's place",
        "no_cluster",
        "mkdir -p /srv/mlflow/postgresql/15 && echo 15 >/srv/mlflow/postgresql/15/PG_VERSION",
        "rm -rf /srv/mlflow/postgresql",
        "/srv/mlflow/postgresql/15/PG_VERSION",
    ),
    Defect(
        "host key",
        "no_identity",
        "touch /etc/ssh/ssh_host_rsa_key",
        "rm /etc/ssh/ssh_host_rsa_key",
        "SSH host key is baked in",
    ),
    Defect(
        "machine id",
        "no_identity",
        "systemd-id128 new >/etc/machine-id",
        ": >/etc/machine-id",
        "/etc/machine-id must exist and be empty",
    ),
    Defect(
        "no machine id file",
        "no_identity",
        "rm /etc/machine-id",
        ": >/etc/machine-id",
        "/etc/machine-id must exist and be empty",
    ),
    Defect(
        "random seed",
        "no_identity",
        "echo x >/var/lib/systemd/random-seed",
        "rm /var/lib/systemd/random-seed",
        "share /var/lib/systemd/random-seed",
    ),
    Defect(
        "cloud-init's memory",
        "no_identity",
        "mkdir -p /var/lib/cloud/instances/i-1",
        "rm -r /var/lib/cloud/instances/i-1",
        "/var/lib/cloud has cloud-init's state of the builder",
    ),
    Defect(
        "authorized keys of root",
        "no_access",
        "mkdir /root/.ssh && echo ssh-ed25519 x >/root/.ssh/authorized_keys",
        "rm -r /root/.ssh",
        "/root/.ssh/authorized_keys",
    ),
    Defect(
        "authorized keys of the login user",
        "no_access",
        "mkdir ~ubuntu/.ssh && echo x >~ubuntu/.ssh/authorized_keys",
        "rm -r ~ubuntu/.ssh",
        "/home/ubuntu/.ssh/authorized_keys",
    ),
    Defect(
        "password",
        "no_access",
        "echo ubuntu:secret | chpasswd",
        "passwd -dl ubuntu; usermod -p '!' ubuntu",
        "user ubuntu has a password",
    ),
    Defect(
        "empty password",
        "no_access",
        "usermod -p '' ubuntu",
        "usermod -p '!' ubuntu",
        "user ubuntu has a password that is empty",
    ),
    Defect(
        "AWS credentials",
        "no_secrets",
        "mkdir -p /root/.aws",
        "rm -r /root/.aws",
        "/root/.aws",
    ),
    Defect(
        "AWS key in a file",
        "no_secrets",
        "echo AKIA$(printf 'A%.0s' {1..16}) >/etc/mlflow.conf",
        "rm /etc/mlflow.conf",
        "AWS access key id is baked in: /etc/mlflow.conf",
    ),
    Defect(
        "private key",
        "no_secrets",
        "echo '-----BEGIN EC PRIVATE KEY-----' >/etc/ssl/private/x.key",
        "rm /etc/ssl/private/x.key",
        "private key is baked in: /etc/ssl/private/x.key",
    ),
    Defect(
        "history",
        "no_secrets",
        "echo x >/root/.bash_history",
        "rm /root/.bash_history",
        "/root/.bash_history",
    ),
    Defect(
        "launch document",
        "no_secrets",
        "mkdir -p /etc/mlflow-host; touch /etc/mlflow-host/launch.toml",
        "rm /etc/mlflow-host/launch.toml",
        "belongs to one machine",
    ),
    Defect(
        "certificates of the bake's network",
        "no_leftovers",
        "mkdir /tmp/mlflow-host-bake",
        "rm -r /tmp/mlflow-host-bake",
        "left behind by the bake: /tmp/mlflow-host-bake",
    ),
    Defect(
        "log",
        "no_leftovers",
        "echo x >/var/log/dpkg.log",
        ": >/var/log/dpkg.log",
        "/var/log/dpkg.log",
    ),
    Defect(
        "package lists",
        "no_leftovers",
        "touch /var/lib/apt/lists/x",
        "rm /var/lib/apt/lists/x",
        "/var/lib/apt/lists/x",
    ),
    Defect(
        "policy against starting services",
        "no_leftovers",
        "touch /usr/sbin/policy-rc.d",
        "rm /usr/sbin/policy-rc.d",
        "policy-rc.d still keeps services from starting",
    ),
    Defect(
        "cache",
        "no_leftovers",
        "mkdir -p /root/.cache/pip",
        "rm -r /root/.cache",
        "/root/.cache",
    ),
    Defect(
        "target disabled",
        "units_in_order",
        "systemctl disable -q mlflow-host.target",
        "systemctl enable -q mlflow-host.target",
        "mlflow-host.target is disabled",
    ),
    Defect(
        "apt timer on",
        "units_in_order",
        "systemctl unmask -q apt-daily.timer",
        "systemctl mask -q apt-daily.timer",
        "apt-daily.timer is enabled",
    ),
    Defect(
        "failed unit",
        "units_in_order",
        "systemd-run -q --unit defect false; sleep 1",
        "systemctl reset-failed defect",
        "unit failed during the bake: defect.service",
    ),
    Defect(
        "unit that systemd refuses",
        "units_in_order",
        "printf '[Service]\\nExecStart=no/such\\n' >/usr/lib/systemd/system/mlflow-defect.service",
        "rm /usr/lib/systemd/system/mlflow-defect.service",
        "systemd rejects a unit of this project",
    ),
    Defect(
        "package not held",
        "packages_held",
        "apt-mark unhold nginx",
        "apt-mark hold nginx",
        "nginx is not installed and held",
    ),
    Defect(
        "other version than locked",
        "environment_as_locked",
        f"sed -i.kept 's/^Version: .*/Version: 0.1/' {SITE}/boto3-*.dist-info/METADATA",
        f"cd {SITE}/boto3-*.dist-info && mv METADATA.kept METADATA",
        "Python package boto3: the lock file names",
    ),
    Defect(
        "package nobody locked",
        "environment_as_locked",
        (
            f"mkdir {SITE}/extra-1.0.dist-info && "
            f"printf 'Metadata-Version: 2.1\\nName: extra\\nVersion: 1.0\\n' >{SITE}/extra-1.0.dist-info/METADATA"
        ),
        f"rm -r {SITE}/extra-1.0.dist-info",
        "Python package extra: the lock file names no such package",
    ),
    Defect(
        "boot package not seen",
        "environment_as_locked",
        f"mv {SITE}/mlflow-host.pth /var/tmp/",
        f"mv /var/tmp/mlflow-host.pth {SITE}/",
        "boot package in /usr/lib/mlflow-host is not found",
    ),
    Defect(
        "server that cannot be imported",
        "environment_as_locked",
        f"mv {SITE}/flask /var/tmp/",
        f"mv /var/tmp/flask {SITE}/",
        "server cannot be imported: ModuleNotFoundError",
    ),
    Defect(
        "not byte-compiled",
        "environment_as_locked",
        "mv /usr/lib/mlflow-host/mlflow_host/__pycache__ /var/tmp/",
        "mv /var/tmp/__pycache__ /usr/lib/mlflow-host/mlflow_host/",
        "not byte-compiled: /usr/lib/mlflow-host/mlflow_host/__init__.py",
    ),
    Defect(
        "code the server may change",
        "owned_by_root",
        "chown mlflow /opt/mlflow/bin/mlflow",
        "chown root /opt/mlflow/bin/mlflow",
        "not owned by root: /opt/mlflow/bin/mlflow",
    ),
    Defect(
        "code that any user may change",
        "owned_by_root",
        "chmod o+w /opt/mlflow/bin/mlflow",
        "chmod o-w /opt/mlflow/bin/mlflow",
        "writable by others than root: /opt/mlflow/bin/mlflow",
    ),
    Defect(
        "no facts",
        "facts_true",
        "mv /usr/share/mlflow-host/image.json /var/tmp/",
        "mv /var/tmp/image.json /usr/share/mlflow-host/",
        "image.json cannot be read",
    ),
    Defect(
        "facts of another image",
        "facts_true",
        'sed -i.kept \'s/"mlflow_version": .*/"mlflow_version": "2.0.0",/\' /usr/share/mlflow-host/image.json',
        "cd /usr/share/mlflow-host && mv image.json.kept image.json",
        "image.json says MLflow 2.0.0, installed is",
    ),
    Defect(
        "a fact missing",
        "facts_true",
        "sed -i.kept '/migration_count/d' /usr/share/mlflow-host/image.json",
        "cd /usr/share/mlflow-host && mv image.json.kept image.json",
        "image.json says migration_count = None",
    ),
    Defect(
        "an empty database of no schema",
        "blank_true",
        "cd /usr/share/mlflow-host && mv blank.dump /var/tmp/ && echo nothing >blank.dump",
        "mv /var/tmp/blank.dump /usr/share/mlflow-host/",
        "blank.dump is not an empty database at migration",
    ),
)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_last_step_detects_the_defect(defect: Defect, cleaned: Machine) -> None:
    cleaned.shell(defect.plant)
    try:
        found = cleaned.assert_image(defect.check)
    finally:
        cleaned.shell(defect.undo)
    assert [each for each in found if defect.says in each], found


def test_every_defect_was_undone(cleaned: Machine) -> None:
    """If a planted defect was not removed, later tests may have detected this defect instead of their own defects."""
    done = cleaned.run_step("assert_image.py")
    assert done.returncode == 0, done.stderr


def test_every_check_has_a_planted_defect() -> None:
    text = (STEPS / "assert_image.py").read_text(encoding="utf-8")
    listed = text.partition("CHECKS: ")[2].partition("(\n")[2].partition("\n)")[0]
    assert {line.strip().rstrip(",") for line in listed.splitlines()} == {defect.check for defect in DEFECTS}
