"""What bake.py refuses, before anything is started, and in which words; and what it calls the same image."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bake
import boto3
import images
import pytest
from moto import mock_aws

REPOSITORY = Path(__file__).resolve().parents[2]
REGION = "eu-central-1"


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An EC2 API that knows only moto's own images."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_EC2", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    with mock_aws():
        yield boto3.client("ec2", region_name=REGION)


def run_bake(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """bake.py as a person runs it, with no credentials but those given."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    nowhere = {"AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent"}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "bake.py"), *arguments],
        env=clean | nowhere | {"AWS_EC2_METADATA_DISABLED": "true"} | environment,
        capture_output=True,
        text=True,
    )


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, last


def test_without_packer_it_says_how_to_get_it() -> None:
    assert_refused(run_bake(PATH="/nonexistent"), "Packer is not installed", "make prepare")


def test_another_program_called_packer_is_recognised(tmp_path: Path) -> None:
    other = tmp_path / "packer"
    other.write_text("#!/bin/sh\necho cracklib-packer\n")
    other.chmod(0o755)
    assert_refused(run_bake(PATH=f"{tmp_path}:/usr/bin:/bin"), "not HashiCorp's Packer", "cracklib-packer")


def test_without_credentials_it_mentions_the_way_without_an_account() -> None:
    assert_refused(run_bake(), "no AWS credentials", "aws configure", "bake.py --local")


def test_unreachable_endpoint_is_a_sentence() -> None:
    done = run_bake(
        AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="y", AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1"
    )
    assert_refused(done, "does not accept the credentials", "127.0.0.1:9", "bake.py --local")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--base", "debian13"], "--local"),
        (["--local", "--region", "eu-west-1"], "--region"),
        (["--mlflow-version", "2.*"], "3.12.0"),
        (["--mlflow-version", "latest"], "3.12.0"),
        (["--kms-key", "x", "--unencrypted"], "exclude"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], word: str) -> None:
    assert_refused(run_bake(*arguments), word)


def test_help_teaches() -> None:
    done = run_bake("--help")
    assert done.returncode == 0
    for word in ("--local", "--mlflow-version", "--source-ami", "--validate", "--if-changed", "--json", "build/bake"):
        assert word in done.stdout


def test_region_without_the_source_image_is_refused(ec2: Any) -> None:
    with pytest.raises(
        bake.BakeRefused, match=r"region eu-central-1 has no source image .*noble.* --source-ami.*--region"
    ):
        bake.find_source_image(ec2, None, bake.SOURCE_OWNERS)
    with pytest.raises(bake.BakeRefused, match="ami-0123456789abcdef0"):
        bake.find_source_image(ec2, "ami-0123456789abcdef0", bake.SOURCE_OWNERS)


def test_newest_matching_source_image_is_taken(ec2: Any) -> None:
    found = bake.find_source_image(ec2, "ubuntu/images/*", bake.SOURCE_OWNERS)
    every = ec2.describe_images(
        Owners=list(bake.SOURCE_OWNERS), Filters=[{"Name": "name", "Values": ["ubuntu/images/*"]}]
    )
    assert len(every["Images"]) > 1
    newest = max(every["Images"], key=lambda image: image["CreationDate"])
    assert found.name == newest["Name"]
    assert bake.find_source_image(ec2, found.id, ()) == found


def test_ca_bundle_of_this_host_is_used_and_a_missing_one_refused(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_text("x")
    assert bake.find_ca_bundle(None, {}) is None
    assert bake.find_ca_bundle(None, {"REQUESTS_CA_BUNDLE": str(bundle)}) == bundle
    assert bake.find_ca_bundle(str(bundle), {"SSL_CERT_FILE": "/nonexistent"}) == bundle
    with pytest.raises(bake.BakeRefused, match="SSL_CERT_FILE or REQUESTS_CA_BUNDLE names /nonexistent"):
        bake.find_ca_bundle(None, {"SSL_CERT_FILE": "/nonexistent"})
    with pytest.raises(bake.BakeRefused, match="--ca-bundle"):
        bake.find_ca_bundle("/nonexistent", {})


# ── Staging and the digest ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of ours with little in it."""
    for name, text in {
        "packer/build.pkr.hcl": "build {}\n",
        "packer/plugins.pkr.hcl": "packer {}\n",
        "provisioning/requirements.in": "mlflow\n",
        "provisioning/requirements.lock": "mlflow==3.17.2 \\\n    --hash=sha256:0\n",
        "provisioning/rootfs/etc/motd": "hello\n",
    }.items():
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(bake, "REPOSITORY", tmp_path / "repository")
    return tmp_path / "repository"


def staged(folder: Path, version: tuple[int, ...] = (1, 6, 6)) -> bake.Bake:
    folder.mkdir()
    return bake.stage(bake.Bake("x", "20261122T101500Z", folder), bake.Packer("packer", version), None)


def test_plugins_are_left_out_for_packer_that_has_them_built_in(checkout: Path, tmp_path: Path) -> None:
    assert not (staged(tmp_path / "old").template / "plugins.pkr.hcl").exists()
    assert (staged(tmp_path / "new", (1, 11, 2)).template / "plugins.pkr.hcl").exists()


def test_mlflow_version_comes_from_the_lock_file(checkout: Path, tmp_path: Path) -> None:
    assert staged(tmp_path / "a").mlflow_version == "3.17.2"


def test_digest_follows_what_goes_into_the_image_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    source = bake.SourceImage("ami-1", "debian 12", "1")
    first = bake.digest(staged(tmp_path / "1"), source)
    (checkout / "provisioning/rootfs/__pycache__").mkdir()
    (checkout / "provisioning/rootfs/__pycache__/x.pyc").write_text("compiled by a test")
    assert bake.digest(staged(tmp_path / "2", (1, 11, 2)), source) == first
    assert bake.digest(staged(tmp_path / "3"), bake.SourceImage("ami-2", "debian 13", "1")) != first
    (checkout / "provisioning/rootfs/etc/motd").write_text("hello!\n")
    changed = bake.digest(staged(tmp_path / "4"), source)
    assert changed != first
    (checkout / "provisioning/rootfs/etc/motd").rename(checkout / "provisioning/rootfs/etc/issue")
    assert bake.digest(staged(tmp_path / "5"), source) not in (first, changed)


# ── The story ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "step"),
    [
        (
            "==> amazon-ebs.mlflow: Creating temporary keypair: mlflow-ami-bake-x",
            "create a key pair and a security group",
        ),
        ("==> amazon-ebs.mlflow: Launching a source AWS instance...", "start the builder"),
        ("==> amazon-ebs.mlflow: Waiting for SSH to become available...", "wait for the builder's SSH"),
        (
            "==> amazon-ebs.mlflow: Provisioning with shell script: /x/provisioning/steps/install_server.sh",
            "install server",
        ),
        (
            "==> amazon-ebs.mlflow: Provisioning with shell script: /x/provisioning/steps/assert_image.py",
            "assert image",
        ),
        ("==> amazon-ebs.mlflow: Stopping the source instance...", "stop the builder"),
        ("==> amazon-ebs.mlflow: Creating AMI mlflow-ami-1 from instance i-1", "create the image"),
        ("==> amazon-ebs.mlflow: Terminating the source AWS instance...", "remove the builder"),
    ],
)
def test_packers_messages_become_steps(line: str, step: str) -> None:
    assert (bake.told(line) or "").startswith(step)


def test_ordinary_output_begins_no_step() -> None:
    assert bake.told("    amazon-ebs.mlflow: Setting up nginx (1.22.1-9) ...") is None


def test_failure_tells_the_step_and_its_reason(tmp_path: Path) -> None:
    log = tmp_path / "bake.log"
    log.write_text(
        "==> amazon-ebs.mlflow: Connected to SSH!\n"
        "\x1b[1;31m==> amazon-ebs.mlflow: assert_image: no_access: user ubuntu has a password\x1b[0m\n"
        "Build 'amazon-ebs.mlflow' errored after 1 minute: Script exited with non-zero exit status: 1.\n"
    )
    text = bake.failure(log, "build")
    assert "packer build failed" in text and str(log) in text
    assert "    assert_image: no_access: user ubuntu has a password" in text
    assert "\x1b" not in text


# ── Clean-up ────────────────────────────────────────────────────────────────────────────────────────────────────────


def launch(ec2: Any, bake_id: str) -> str:
    image = ec2.describe_images(Owners=list(bake.SOURCE_OWNERS))["Images"][0]["ImageId"]
    tags = [{"Key": "mlflow-ami:bake", "Value": bake_id}, {"Key": images.OURS, "Value": "20261122T101500Z"}]
    started = ec2.run_instances(
        ImageId=image, MinCount=1, MaxCount=1, TagSpecifications=[{"ResourceType": "instance", "Tags": tags}]
    )
    return str(started["Instances"][0]["InstanceId"])


def test_sweep_removes_all_of_one_bake_and_nothing_of_another(ec2: Any, tmp_path: Path) -> None:
    ours = bake.Bake("ours", "20261122T101500Z", tmp_path)
    group_name = "packer_00000000-1111-2222-3333-444444444444"
    ours.log.write_text(f"Creating temporary security group for this instance: {group_name}\n")
    for name in (group_name, "packer_99999999-1111-2222-3333-444444444444"):
        ec2.create_security_group(GroupName=name, Description="Temporary group for Packer")
    for name in ("mlflow-ami-bake-ours", "mlflow-ami-bake-other"):
        ec2.create_key_pair(KeyName=name)
    mine, other = launch(ec2, "ours"), launch(ec2, "other")
    unfinished = ec2.create_image(InstanceId=mine, Name="unfinished")["ImageId"]
    ec2.create_tags(
        Resources=[unfinished], Tags=[{"Key": "mlflow-ami:bake", "Value": "ours"}, {"Key": images.OURS, "Value": "1"}]
    )
    snapshot = images.find(ec2)[0].snapshots[0]

    for _ in range(2):  # the second time there is nothing left to remove, and that is no error
        bake.sweep(ec2, ours, finished_image=None)
        states = {
            instance["InstanceId"]: instance["State"]["Name"]
            for reservation in ec2.describe_instances()["Reservations"]
            for instance in reservation["Instances"]
        }
        assert states == {mine: "terminated", other: "running"}
        groups = {group["GroupName"] for group in ec2.describe_security_groups()["SecurityGroups"]}
        assert groups == {"default", "packer_99999999-1111-2222-3333-444444444444"}
        assert [pair["KeyName"] for pair in ec2.describe_key_pairs()["KeyPairs"]] == ["mlflow-ami-bake-other"]
        assert images.find(ec2) == []
        assert snapshot not in [each["SnapshotId"] for each in ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]]


def test_sweep_leaves_the_finished_image(ec2: Any, tmp_path: Path) -> None:
    ours = bake.Bake("ours", "20261122T101500Z", tmp_path)
    finished = ec2.create_image(InstanceId=launch(ec2, "ours"), Name="finished")["ImageId"]
    ec2.create_tags(
        Resources=[finished], Tags=[{"Key": "mlflow-ami:bake", "Value": "ours"}, {"Key": images.OURS, "Value": "1"}]
    )
    bake.sweep(ec2, ours, finished_image=finished)
    assert [image.id for image in images.find(ec2)] == [finished]


def test_what_cannot_be_removed_is_named_and_stops_nothing(
    ec2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = bake.Bake("ours", "20261122T101500Z", tmp_path)
    ec2.create_key_pair(KeyName="mlflow-ami-bake-ours")

    def refuse(**_: object) -> None:
        raise bake.ClientError({"Error": {"Code": "UnauthorizedOperation", "Message": "no"}}, "DescribeInstances")

    monkeypatch.setattr(ec2, "describe_instances", refuse)
    bake.sweep(ec2, ours, finished_image=None)
    said = capsys.readouterr().err
    assert "could not remove builders of bake ours" in said and "images.py sweep" in said
    assert ec2.describe_key_pairs()["KeyPairs"] == []
