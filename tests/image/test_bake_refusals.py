"""Tests of bake.py: refusals before anything is started, the image's digest, and the removal of temporary resources."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws

from scripts import aws_session, bake
from scripts.baking import cleanup, packer_run, request, source_images, template
from scripts.imaging import ec2_images, record

REPOSITORY = Path(__file__).resolve().parents[2]
REGION = "eu-central-1"


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start an EC2 API that contains only moto's own images."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_EC2", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    with mock_aws():
        yield boto3.client("ec2", region_name=REGION)


def run_bake(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run bake.py like a user, with only the given credentials."""
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


def test_missing_packer_is_reported_with_the_installation() -> None:
    assert_refused(run_bake(PATH="/nonexistent"), "Packer is not installed", "make prepare")


def test_another_program_called_packer_is_recognised(tmp_path: Path) -> None:
    other = tmp_path / "packer"
    other.write_text("#!/bin/sh\necho cracklib-packer\n")
    other.chmod(0o755)
    assert_refused(run_bake(PATH=f"{tmp_path}:/usr/bin:/bin"), "not HashiCorp's Packer", "cracklib-packer")


def test_missing_credentials_are_reported_with_option_local() -> None:
    assert_refused(run_bake(), "no AWS credentials", "aws configure", "bake.py --local")


def test_unreachable_endpoint_is_one_error_sentence() -> None:
    done = run_bake(
        AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="y", AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1"
    )
    assert_refused(done, "cannot be reached", "127.0.0.1:9", "bake.py --local")


def test_without_a_default_vpc_the_remedies_are_named(ec2: Any) -> None:
    request.require_network(ec2, None)
    [default] = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    for subnet in ec2.describe_subnets()["Subnets"]:
        ec2.delete_subnet(SubnetId=subnet["SubnetId"])
    ec2.delete_vpc(VpcId=default["VpcId"])
    with pytest.raises(request.BakeRefused, match=r"eu-central-1 has no default VPC.*create-default-vpc.*--subnet"):
        request.require_network(ec2, None)
    request.require_network(ec2, "subnet-1")


def test_packer_gets_the_credentials_of_any_kind_of_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This profile gets its credentials from a program. Old Packer releases do not support such profiles."""
    printed = {"Version": 1, "AccessKeyId": "AKIAX", "SecretAccessKey": "hush", "SessionToken": "token"}
    (tmp_path / "keys").write_text(json.dumps(printed))
    (tmp_path / "config").write_text(f"[profile odd]\ncredential_process = cat {tmp_path / 'keys'}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "odd")
    given = request.for_packer(aws_session.choose(REGION), {"AWS_PROFILE": "odd", "PATH": "/bin"})
    assert given == {
        "PATH": "/bin",
        "AWS_ACCESS_KEY_ID": "AKIAX",
        "AWS_SECRET_ACCESS_KEY": "hush",
        "AWS_SESSION_TOKEN": "token",
    }


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--base", "debian13"], "--local"),
        (["--local", "--region", "eu-west-1"], "--region"),
        (["--local", "--base", "debian13", "--architecture", "arm64"], "only base for arm64 is debian12"),
        (["--mlflow-version", "2.*"], "3.12.0"),
        (["--mlflow-version", "latest"], "3.12.0"),
        (["--kms-key", "x", "--unencrypted"], "exclude"),
        (["--mlflow-version", "3.8.1"], "the oldest supported release is 3.9.0"),
        (["--validate", "--mlflow-version", "2.22.1"], "the oldest supported release is 3.9.0"),
    ],
)
def test_contradicting_options_are_refused(arguments: list[str], word: str) -> None:
    assert_refused(run_bake(*arguments), word)


def test_help_explains_the_options() -> None:
    done = run_bake("--help")
    assert done.returncode == 0
    for word in (
        "--local",
        "--mlflow-version",
        "--architecture",
        "--source-ami",
        "--validate",
        "--if-changed",
        "--json",
        "build/bake",
    ):
        assert word in done.stdout


def test_region_without_the_source_image_is_refused(ec2: Any) -> None:
    with pytest.raises(
        request.BakeRefused, match=r"region eu-central-1 has no source image .*noble.* --source-ami.*--region"
    ):
        source_images.find_source_image(ec2, None, source_images.SOURCE_OWNERS, "x86_64")
    with pytest.raises(request.BakeRefused, match="ami-0123456789abcdef0"):
        source_images.find_source_image(ec2, "ami-0123456789abcdef0", source_images.SOURCE_OWNERS, "x86_64")


def test_newest_matching_source_image_is_taken(ec2: Any) -> None:
    found = source_images.find_source_image(ec2, "ubuntu/images/*", source_images.SOURCE_OWNERS, "x86_64")
    every = ec2.describe_images(
        Owners=list(source_images.SOURCE_OWNERS), Filters=[{"Name": "name", "Values": ["ubuntu/images/*"]}]
    )
    assert len(every["Images"]) > 1
    newest = max(every["Images"], key=lambda image: image["CreationDate"])
    assert found.name == newest["Name"]
    assert source_images.find_source_image(ec2, found.id, (), "x86_64") == found


def test_source_image_is_of_the_images_architecture(ec2: Any) -> None:
    from moto.ec2.models import ec2_backends

    def find(wanted: str | None) -> source_images.SourceImage:
        return source_images.find_source_image(ec2, wanted, (), "arm64")

    with pytest.raises(request.BakeRefused, match=r"noble-24\.04-arm64-server.* for arm64: .*another --architecture"):
        find(None)
    intel, arm = (
        ec2.register_image(Name=f"somebodys-{name}", RootDeviceName="/dev/sda1")["ImageId"] for name in ("a", "b")
    )
    there = ec2_backends["123456789012"][REGION].amis
    there[intel].architecture, there[arm].architecture = "x86_64", "arm64"
    assert find(arm).id == arm
    with pytest.raises(request.BakeRefused, match=f"{arm} is for arm64, .* for x86_64: add --architecture arm64"):
        source_images.find_source_image(ec2, arm, (), "x86_64")
    with pytest.raises(request.BakeRefused, match=f"{intel} is for x86_64, but the image is built for arm64"):
        find(intel)


def test_bake_for_arm64_gives_the_template_its_architecture_and_reuses_no_image_for_x86(tmp_path: Path) -> None:
    folder = request.Bake("id", "v", tmp_path)
    for name in ("packer", "provisioning"):
        (tmp_path / name).mkdir()
    sources = [source_images.SourceImage(f"ami-{each}", each, "1") for each in source_images.SOURCE_NAMES]
    assert len({template.digest(folder, source) for source in sources}) == 2
    for architecture in source_images.SOURCE_NAMES:
        arguments = bake.parse(["--architecture", architecture])
        given = template.variables(arguments, folder, request.Checkout("x", False), None, {})
        assert f"-var=architecture={architecture}" in given
        assert not any(each.startswith(("-var=source_ami_name", "-var=instance_type")) for each in given)
    assert bake.parse([]).architecture == "x86_64"


def test_ca_bundle_of_this_host_is_used_and_a_missing_one_refused(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_text("x")
    assert request.find_ca_bundle(None, {}) is None
    assert request.find_ca_bundle(None, {"REQUESTS_CA_BUNDLE": str(bundle)}) == bundle
    assert request.find_ca_bundle(str(bundle), {"SSL_CERT_FILE": "/nonexistent"}) == bundle
    with pytest.raises(request.BakeRefused, match="SSL_CERT_FILE or REQUESTS_CA_BUNDLE names /nonexistent"):
        request.find_ca_bundle(None, {"SSL_CERT_FILE": "/nonexistent"})
    with pytest.raises(request.BakeRefused, match="--ca-bundle"):
        request.find_ca_bundle("/nonexistent", {})


def test_credentials_that_cannot_store_the_record_are_refused_before_packer_starts(
    ec2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ssm = boto3.client("ssm", "eu-central-1")
    source = ec2.describe_images(Filters=[{"Name": "name", "Values": ["ubuntu/images/*"]}])["Images"][0]["ImageId"]
    started: list[list[str]] = []

    def refuse(**_: object) -> None:
        raise ClientError({"Error": {"Code": "AccessDeniedException", "Message": "not authorized"}}, "PutParameter")

    def run_packer(packer: object, command: list[str], *_: object) -> None:
        if command[0] == "init":
            return
        started.append(command)
        assert [each["Name"].endswith("/baking") for each in ssm.describe_parameters()["Parameters"]] == [True]
        raise request.BakeFailed("Packer was started")

    monkeypatch.setattr(bake, "find_packer", lambda: packer_run.Packer("packer", (1, 11, 2)))
    monkeypatch.setattr(bake, "run_packer", run_packer)
    monkeypatch.setattr(bake, "connect", lambda *_: (ec2, ssm))
    with monkeypatch.context() as lacking:
        lacking.setattr(ssm, "put_parameter", refuse)
        for module in (bake, cleanup):
            lacking.setattr(module, "BUILDS", tmp_path / "lacking")
        assert bake.main(["--source-ami", source]) == 1
    assert not started
    assert "lack a right" in capsys.readouterr().err

    for module in (bake, cleanup):
        monkeypatch.setattr(module, "BUILDS", tmp_path / "enough")
    assert bake.main(["--source-ami", source]) == 1
    assert len(started) == 1
    assert ssm.describe_parameters()["Parameters"] == []  # no part of the record is left


def test_only_one_bake_has_the_image_version_of_a_second(ec2: Any, tmp_path: Path) -> None:
    ssm = boto3.client("ssm", region_name=REGION)
    first, second = (request.Bake(f"20261101t000000z-{pid}", "20261101T000000Z", tmp_path) for pid in (7, 8))
    bake.reserve(ssm, first)
    with pytest.raises(request.BakeRefused, match="another bake has the image version 20261101T000000Z"):
        bake.reserve(ssm, second)
    bake.reserve(ssm, first)  # botocore repeats a request if the response was lost
    assert record.reserved(ssm) == {"20261101T000000Z": first.id}


# ── The staged folder and the digest ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a small checkout that has some of this project's files."""
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
    monkeypatch.setattr(template, "REPOSITORY", tmp_path / "repository")
    return tmp_path / "repository"


def staged(folder: Path, version: tuple[int, ...] = (1, 6, 6)) -> request.Bake:
    folder.mkdir()
    return template.stage(request.Bake("x", "20261122T101500Z", folder), packer_run.Packer("packer", version), None)


def test_required_plugins_are_removed_for_packer_1_6(checkout: Path, tmp_path: Path) -> None:
    assert not (staged(tmp_path / "old").template / "plugins.pkr.hcl").exists()
    assert (staged(tmp_path / "new", (1, 11, 2)).template / "plugins.pkr.hcl").exists()


def test_mlflow_version_comes_from_the_lock_file(checkout: Path, tmp_path: Path) -> None:
    assert staged(tmp_path / "a").mlflow_version == "3.17.2"


def test_digest_depends_only_on_the_image_inputs(checkout: Path, tmp_path: Path) -> None:
    source = source_images.SourceImage("ami-1", "debian 12", "1")
    first = template.digest(staged(tmp_path / "1"), source)
    (checkout / "provisioning/rootfs/__pycache__").mkdir()
    (checkout / "provisioning/rootfs/__pycache__/x.pyc").write_text("compiled by a test")
    assert template.digest(staged(tmp_path / "2", (1, 11, 2)), source) == first
    assert template.digest(staged(tmp_path / "3"), source_images.SourceImage("ami-2", "debian 13", "1")) != first
    (checkout / "provisioning/rootfs/etc/motd").write_text("hello!\n")
    changed = template.digest(staged(tmp_path / "4"), source)
    assert changed != first
    (checkout / "provisioning/rootfs/etc/motd").rename(checkout / "provisioning/rootfs/etc/issue")
    assert template.digest(staged(tmp_path / "5"), source) not in (first, changed)


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
    assert (packer_run.step_of(line) or "").startswith(step)


def test_ordinary_output_begins_no_step() -> None:
    assert packer_run.step_of("    amazon-ebs.mlflow: Setting up nginx (1.22.1-9) ...") is None


def test_failure_names_the_step_and_its_reason(tmp_path: Path) -> None:
    log = tmp_path / "bake.log"
    log.write_text(
        "==> amazon-ebs.mlflow: Connected to SSH!\n"
        "\x1b[1;31m==> amazon-ebs.mlflow: assert_image: no_access: user ubuntu has a password\x1b[0m\n"
        "Build 'amazon-ebs.mlflow' errored after 1 minute: Script exited with non-zero exit status: 1.\n"
    )
    text = packer_run.failure(log, "build")
    assert "packer build failed" in text and str(log) in text
    assert "    assert_image: no_access: user ubuntu has a password" in text
    assert "\x1b" not in text


# ── Clean-up ────────────────────────────────────────────────────────────────────────────────────────────────────────


def launch(ec2: Any, bake_id: str) -> str:
    image = ec2.describe_images(Owners=list(source_images.SOURCE_OWNERS))["Images"][0]["ImageId"]
    tags = [{"Key": "mlflow-ami:bake", "Value": bake_id}, {"Key": ec2_images.OURS, "Value": "20261122T101500Z"}]
    started = ec2.run_instances(
        ImageId=image, MinCount=1, MaxCount=1, TagSpecifications=[{"ResourceType": "instance", "Tags": tags}]
    )
    return str(started["Instances"][0]["InstanceId"])


def test_sweep_removes_all_of_one_bake_and_nothing_of_another(ec2: Any, tmp_path: Path) -> None:
    ours = request.Bake("ours", "20261122T101500Z", tmp_path)
    group_name = "packer_00000000-1111-2222-3333-444444444444"
    ours.log.write_text(f"Creating temporary security group for this instance: {group_name}\n")
    for name in (group_name, "packer_99999999-1111-2222-3333-444444444444"):
        ec2.create_security_group(GroupName=name, Description="Temporary group for Packer")
    for name in ("mlflow-ami-bake-ours", "mlflow-ami-bake-other"):
        ec2.create_key_pair(KeyName=name)
    mine, other = launch(ec2, "ours"), launch(ec2, "other")
    unfinished = ec2.create_image(InstanceId=mine, Name="unfinished")["ImageId"]
    ec2.create_tags(
        Resources=[unfinished],
        Tags=[{"Key": "mlflow-ami:bake", "Value": "ours"}, {"Key": ec2_images.OURS, "Value": "1"}],
    )
    snapshot = ec2_images.find(ec2)[0].snapshots[0]

    for _ in range(2):  # the second removal finds nothing and does not fail
        cleanup.sweep(ec2, boto3.client("ssm", "eu-central-1"), ours, finished_image=None)
        states = {
            instance["InstanceId"]: instance["State"]["Name"]
            for reservation in ec2.describe_instances()["Reservations"]
            for instance in reservation["Instances"]
        }
        assert states == {mine: "terminated", other: "running"}
        groups = {group["GroupName"] for group in ec2.describe_security_groups()["SecurityGroups"]}
        assert groups == {"default", "packer_99999999-1111-2222-3333-444444444444"}
        assert [pair["KeyName"] for pair in ec2.describe_key_pairs()["KeyPairs"]] == ["mlflow-ami-bake-other"]
        assert ec2_images.find(ec2) == []
        assert snapshot not in [each["SnapshotId"] for each in ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]]


def test_sweep_leaves_the_finished_image(ec2: Any, tmp_path: Path) -> None:
    ours = request.Bake("ours", "20261122T101500Z", tmp_path)
    finished = ec2.create_image(InstanceId=launch(ec2, "ours"), Name="finished")["ImageId"]
    ec2.create_tags(
        Resources=[finished], Tags=[{"Key": "mlflow-ami:bake", "Value": "ours"}, {"Key": ec2_images.OURS, "Value": "1"}]
    )
    cleanup.sweep(ec2, boto3.client("ssm", "eu-central-1"), ours, finished_image=finished)
    assert [image.id for image in ec2_images.find(ec2)] == [finished]


def test_failed_removal_is_reported_and_the_others_continue(
    ec2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = request.Bake("ours", "20261122T101500Z", tmp_path)
    ec2.create_key_pair(KeyName="mlflow-ami-bake-ours")

    def refuse(**_: object) -> None:
        raise ClientError({"Error": {"Code": "UnauthorizedOperation", "Message": "no"}}, "DescribeInstances")

    monkeypatch.setattr(ec2, "describe_instances", refuse)
    cleanup.sweep(ec2, boto3.client("ssm", "eu-central-1"), ours, finished_image=None)
    said = capsys.readouterr().err
    assert "could not remove builders of bake ours" in said and "images.py sweep" in said
    assert ec2.describe_key_pairs()["KeyPairs"] == []
