"""Tests of images.py with moto's EC2 and SSM: every command, its refusals, and a second run of the command, which
changes nothing."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto import mock_aws

from scripts import audit, aws_session, images
from scripts.imaging import channels, comparing, ec2_images, list_and_show, record, retiring
from scripts.imaging.claims import Claims
from scripts.imaging.ec2_images import Place
from scripts.local_cloud import moto_corrections
from tests.support import moto_cloud

REGION, OTHER = "eu-central-1", "us-east-1"
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
ALWAYS = timedelta(0)
FACTS: dict[str, Any] = {
    "image_version": "20261129T150000Z", "git_commit": "abc", "git_dirty": False, "source_ami": "ami-1",
    "os": "debian 12", "architecture": "x86_64", "mlflow_version": "3.19.0", "migration_head": "f4a9b2c7d1e6",
    "migration_count": 70, "postgresql_major": 15, "python_version": "3.11.2", "launch_revision": 4,
    "disk_used_mib": 3072, "format": 1, "fallbacks": [],
    "packages": {"deb": {"nginx": "1.22", "zstd": "1.5"}, "python": {"mlflow": "3.19.0", "flask": "3.1"}},
    "sources": {}, "migrations": [{"revision": "a", "title": "first"}], "tables": {"runs": ["run_uuid", "name"]},
}  # fmt: skip


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    """Start an empty AWS account. The images that the tests register have no bake log on this machine."""
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setattr(record, "BUILDS", tmp_path)
    moto_corrections.install_images()
    choose = aws_session.choose

    def noted(*arguments: Any) -> Any:
        session = choose(*arguments)
        session.events.register("before-call", note_call)
        return session

    monkeypatch.setattr(aws_session, "choose", noted)
    with mock_aws():
        yield place(REGION)


CALLS: set[str] = set()
"""The AWS actions that images.py has used so far in the tests of this module."""


def note_call(params: Any, model: Any, **_: Any) -> None:
    if INSIDE:
        CALLS.add(f"{model.service_model.endpoint_prefix}:{model.name}")


INSIDE: list[bool] = []
"""This list is not empty while images.py runs. Calls that the tests themselves make are not recorded."""


def place(region: str) -> Place:
    session: Any = boto3.Session(region_name=region)
    return Place(region, lambda service: session.client(service))


def make(aws: Place, version: str, *, finished: bool = True, **facts: Any) -> str:
    """Register an image of this project with its snapshot and record, and return its ID. An image with an older version
    also has an older creation date."""
    ami = aws.ec2.register_image(
        Name=f"mlflow-ami-{version}",
        Architecture="x86_64",
        RootDeviceName="/dev/sda1",
        BlockDeviceMappings=[{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 8}}],
    )["ImageId"]
    known = {**FACTS, "image_version": version, **facts}
    tags = ec2_images.fact_tags(known) | ({ec2_images.FINISHED: "1"} if finished else {})
    [image] = aws.ec2.describe_images(ImageIds=[ami])["Images"]
    snapshots = ec2_images.read(image).snapshots
    aws.ec2.create_tags(Resources=[ami, *snapshots], Tags=ec2_images.as_tags(tags))
    record.write(aws.ssm, known)
    return ami


def run(*arguments: str, status: int = 0) -> Any:
    """Run images.py like a user. Returns the JSON document, or the error text if `status` is not 0."""
    said = run_text(*arguments, "--json", status=status)
    return json.loads(said) if status == 0 else said


def run_text(*arguments: str, status: int = 0) -> str:
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    INSIDE.append(True)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            ended = images.main(list(arguments))
    finally:
        INSIDE.pop()
    assert ended == status, err.getvalue()
    return out.getvalue() if status == 0 else err.getvalue()


def refused(*arguments: str) -> str:
    """Return the message of a refusal, and assert that the command with --dry-run prints the same message."""
    [rehearsed, said] = [run(*arguments, *more, status=2) for more in (["--dry-run"], [])]
    assert rehearsed == said
    sentence = [line for line in said.splitlines() if not line.startswith("images: in region")]
    assert len(sentence) == 1
    return str(sentence[0].removeprefix("images: "))


def stack(aws: Place, name: str, *ran: str) -> None:
    """Create the tags of a stack: on a data volume and on each image that the stack ran. The last image is current."""
    zone = f"{aws.region}a"
    tags = {"mlflow-ami:role": "data", "mlflow-ami:stack": name, "mlflow-ami:last-image": ran[-1]}
    volume = aws.ec2.create_volume(
        AvailabilityZone=zone, Size=1, TagSpecifications=[{"ResourceType": "volume", "Tags": ec2_images.as_tags(tags)}]
    )["VolumeId"]
    for ami in ran:
        aws.ec2.create_tags(Resources=[ami], Tags=ec2_images.as_tags({f"{ec2_images.STACK}{name}": volume}))


def launch(aws: Place, ami: str, name: str) -> str:
    tags = ec2_images.as_tags({"mlflow-ami:stack": name})
    started = aws.ec2.run_instances(
        ImageId=ami, MinCount=1, MaxCount=1, TagSpecifications=[{"ResourceType": "instance", "Tags": tags}]
    )
    return started["Instances"][0]["InstanceId"]


def state(aws: Place) -> Any:
    """Return everything in a region that a command of images.py could change."""
    return (
        [(each.id, each.state, each.deprecated, each.tags) for each in ec2_images.find(aws.ec2)],
        sorted(each["SnapshotId"] for each in aws.ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]),
        channels.read(aws.ssm),
        [record.read(aws.ssm, each.version) for each in ec2_images.find(aws.ec2)],
    )


def drill_file(path: Path, older: str, newer: str, aws: Place, lost: int = 0) -> str:
    """Write the output of drill.py --json for a drill between the releases of two images, and return its path."""
    about = {each.id: comparing.about(each) for each in ec2_images.find(aws.ec2)}
    ends = {"older": about[older], "newer": about[newer]}
    path.write_text(json.dumps({"lost": lost, "at": "2026-11-29T10:00:00Z", **ends, "stops": []}))
    return str(path)


# list, show


def test_list_names_content_users_channels_rollbacks_size_and_cost(aws: Place) -> None:
    older, newer = make(aws, "20261101T000000Z"), make(aws, "20261102T000000Z")
    stack(aws, "prod", older, newer)
    machine = launch(aws, newer, "prod")
    channels.write(aws.ssm, "production", newer)
    found = {each["id"]: each for each in run("list")}
    assert found[newer]["running"] == [f"{machine} of the stack prod"]
    assert (found[newer]["channels"], found[newer]["rollback_of"]) == (["production"], [])
    assert (found[older]["channels"], found[older]["rollback_of"]) == ([], ["prod"])
    assert (found[newer]["used_mib"], found[newer]["usd_per_month"]) == (3072, 0.15)
    lines = run_text("list").splitlines()
    assert any("channel production" in line and f"runs on {machine}" in line for line in lines)
    assert any("prod can roll back to it" in line and "3.0 GiB $0.15/month" in line for line in lines)


def test_show_prints_facts_packages_drills_and_history_of_the_channel(aws: Place, tmp_path: Path) -> None:
    older, newer = make(aws, "20261101T000000Z"), make(aws, "20261102T000000Z")
    run("promote", older, "staging")
    run("promote", newer, "staging", "--drill", drill_file(tmp_path / "drill.json", older, newer, aws))
    (tmp_path / "a-bake").mkdir()
    (tmp_path / "a-bake/facts.json").write_text(json.dumps({"image_version": "20261102T000000Z"}))
    found = run("show", "staging")
    assert found["id"] == newer and found["facts"]["packages"] == FACTS["packages"]
    assert [each["image"] for each in found["history"]["staging"]] == [newer, older]
    text = run_text("show", newer)
    for expected in (
        "zstd 1.5", "drill passed      with 20261101T000000Z: 2026-11-29T10:00:00Z on debian 12", "mlflow 3.19.0",
        f"bake log          {tmp_path}/a-bake/bake.log",
    ):  # fmt: skip
        assert expected in text


def test_record_survives_however_long_it_is(aws: Place) -> None:
    import random

    letters = random.Random(1)
    noise = {f"package-{number}": f"{letters.getrandbits(128):x}" for number in range(900)}
    facts = {**FACTS, "image_version": "20261103T000000Z", "packages": {"deb": noise, "python": {}}}
    record.write(aws.ssm, facts)
    names = record.parts_of(aws.ssm, "20261103T000000Z")
    assert len(names) > 3 and max(map(len, names.values())) <= 4096
    assert record.read(aws.ssm, "20261103T000000Z") == facts
    aws.ssm.delete_parameter(Name=sorted(names)[0])
    assert record.read(aws.ssm, "20261103T000000Z") is None  # a part of the record is missing
    assert record.delete(aws.ssm, "20261103T000000Z") and record.parts_of(aws.ssm, "20261103T000000Z") == {}


@pytest.mark.parametrize("verb", [["show"], ["diff", "production"], ["retire"], ["share", "--with", "111122223333"]])
def test_unknown_image_is_refused(aws: Place, verb: list[str]) -> None:
    make(aws, "20261101T000000Z")
    channels.write(aws.ssm, "production", ec2_images.find(aws.ec2)[0].id)
    for wanted in ("ami-0123456789abcdef0", "nightly"):
        said = (
            refused(verb[0], *verb[1:2], wanted, *verb[2:])
            if verb[0] == "diff"
            else refused(verb[0], wanted, *verb[1:])
        )
        assert repr(wanted) in said and "images.py list" in said


def test_channel_with_a_deleted_image_is_reported(aws: Place) -> None:
    channels.write(aws.ssm, "production", "ami-0123456789abcdef0")
    assert "names ami-0123456789abcdef0, which is deleted" in refused("show", "production")


# diff


def test_diff_names_migrations_tables_columns_packages_keys_and_size(aws: Place) -> None:
    older: dict[str, Any] = {
        "mlflow_version": "3.12.0",
        "migration_head": "a",
        "migration_count": 1,
        "launch_revision": 3,
    }
    make(aws, "20261101T000000Z", **older, enumerations={"runs.status": ["OK"]})
    newer: dict[str, Any] = {
        "migration_head": "c", "migration_count": 3, "disk_used_mib": 3100,
        "packages": {"deb": {"nginx": "1.26", "certbot": "2"}, "python": {"mlflow": "3.19.0"}},
        "migrations": [
            {"revision": "a", "title": "first"}, {"revision": "b", "title": "add jobs"},
            {"revision": "c", "title": "name"},
        ],
        "tables": {"runs": ["run_uuid", "status"], "jobs": ["id"]},
        "enumerations": {"runs.status": ["LOST", "OK"], "jobs.status": ["1"]},
    }  # fmt: skip
    make(aws, "20261102T000000Z", **newer)
    found = run("diff", "20261101T000000Z", "20261102T000000Z", "--no-vulnerabilities")
    schema = found["schema"]
    assert (schema["direction"], schema["heads"]) == ("upgrade", ["a", "c"])
    assert [each["title"] for each in schema["migrations"]["applied"]] == ["add jobs", "name"]
    assert schema["tables"] == {"added": ["jobs"], "removed": []}
    assert schema["columns"] == {"added": {"runs": ["status"]}, "removed": {"runs": ["name"]}}
    assert schema["waiting_after_rollback"] == {
        "tables": ["jobs"],
        "columns": {"runs": ["status"]},
        "values": {"runs.status": ["LOST"]},
    }
    assert found["packages"]["deb"] == {
        "added": {"certbot": "2"}, "removed": {"zstd": "1.5"}, "changed": {"nginx": ["1.22", "1.26"]},
    }  # fmt: skip
    assert found["packages"]["python"]["removed"] == {"flask": "3.1"}
    assert found["used_mib"] == [3072, 3100]
    assert "data_volume.report_parameter" in found["launch"]["added"]
    text = run_text("diff", "20261101T000000Z", "20261102T000000Z", "--no-vulnerabilities")
    for expected in (
        "Schema: upgrade a → c", "apply b  add jobs", "+ table jobs", "- column runs.name", "Size: 3072 MiB → 3100 MiB",
        "A rollback leaves in the kept database: jobs, runs.status, rows with runs.status LOST",
        "3.12.0 → 3.19.0", "nginx 1.22 → 1.26",
    ):  # fmt: skip
        assert expected in text
    back = run("diff", "20261102T000000Z", "20261101T000000Z", "--no-vulnerabilities")["schema"]
    assert back["direction"] == "rollback" and [each["revision"] for each in back["migrations"]["taken_back"]] == [
        "b",
        "c",
    ]


def test_settings_of_keys_are_named_as_pulumi_yaml_has_them() -> None:
    assert comparing.settings_of(comparing.keys()) and "amiId" not in comparing.settings_of(comparing.keys())
    named = comparing.settings_of(
        ["mlflow.deleted_retention_days", "backups.endpoint", "backups.restore_from", "web.tls", "mlflow.role"]
    )
    assert named == ["deletedRetentionDays", "backupsEndpoint", "restoreFrom", "tls"]


def test_diff_without_records_lists_the_unknown_parts(aws: Place) -> None:
    one, two = make(aws, "20261101T000000Z"), make(aws, "20261102T000000Z", migration_head="other")
    record.delete(aws.ssm, "20261101T000000Z")
    found = run("diff", one, two)
    assert found["unknown"] == [one] and found["packages"] is None and found["schema"]["known"] is False
    text = run_text("diff", one, two)
    assert "Packages: not recorded" in text and f"{one} has no record" in text
    assert "the changes of tables and columns are not recorded" in text


def test_diff_names_vulnerabilities_that_go_and_come(aws: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make(aws, "20261101T000000Z")
    two = make(aws, "20261102T000000Z", packages={"deb": {"nginx": "1.26"}, "python": {"mlflow": "3.19.0"}})
    asked: list[str] = []

    def osv(url: str, body: Any = None) -> dict[str, Any]:
        asked.append(url)
        if body is None:
            return {"id": url.rpartition("/")[2], "affected": [], "summary": "bad"}
        known = {("nginx", "1.22"): "CVE-1", ("nginx", "1.26"): "CVE-2", ("mlflow", "3.19.0"): "CVE-3"}
        found = (known.get((each["package"]["name"], each["version"])) for each in body["queries"])
        return {"results": [{"vulns": [{"id": name}]} if name else {} for name in found]}

    monkeypatch.setattr(audit, "ask", osv)
    found = run("diff", one, two, "--database", "https://osv.example/")["vulnerabilities"]
    assert [each["vulnerability"] for each in found["gone"]] == ["CVE-1"]
    assert [each["vulnerability"] for each in found["new"]] == ["CVE-2"]
    assert found["both"] == 1 and asked[0] == "https://osv.example/v1/querybatch"
    assert "1 gone, 1 new, 1 in both" in run_text("diff", one, two, "--database", "https://osv.example")


def test_diff_continues_without_the_vulnerability_database(aws: Place) -> None:
    one, two = make(aws, "20261101T000000Z"), make(aws, "20261102T000000Z")
    found = run("diff", one, two, "--database", "http://127.0.0.1:9")
    assert "127.0.0.1:9 is unreachable" in found["vulnerabilities"]["unknown"]


# promote


def test_promote_sets_a_parameter_of_the_image_type_and_keeps_history(aws: Place) -> None:
    one = make(aws, "20261101T000000Z")
    before = state(aws)
    assert run("promote", one, "staging", "--dry-run")["changed"] is True
    assert state(aws) == before
    assert run("promote", one, "staging")["changed"] is True
    value = aws.ssm.get_parameter(Name="/mlflow-ami/images/staging")["Parameter"]
    assert (value["Value"], value["DataType"]) == (one, "aws:ec2:image")
    assert run("promote", one, "staging")["changed"] is False
    assert len(channels.history(aws.ssm, "staging")) == 1
    assert "names" in run_text("promote", "20261101T000000Z", "staging")


def test_promote_without_drill_is_refused_without_the_option(aws: Place) -> None:
    one, two = make(aws, "20261101T000000Z", mlflow_version="3.12.0"), make(aws, "20261102T000000Z")
    run("promote", one, "staging")
    said = refused("promote", two, "staging")
    assert (
        f"no drill between {one} (MLflow 3.12.0)" in said
        and "--without-drill" in said
        and "drill.py 3.12.0 3.19.0" in said
    )
    assert channels.read(aws.ssm) == {"staging": one}
    assert run("promote", two, "staging", "--without-drill")["before"] == one
    assert channels.read(aws.ssm) == {"staging": two}


def test_passed_drill_lets_an_image_in_and_back(aws: Place, tmp_path: Path) -> None:
    one, two = make(aws, "20261101T000000Z", migration_head="a"), make(aws, "20261102T000000Z")
    run("promote", one, "staging")
    file = drill_file(tmp_path / "drill.json", one, two, aws)
    run("promote", two, "staging", "--drill", file)
    drilled = ec2_images.named(ec2_images.find(aws.ec2), two)
    assert drilled and "20261101T000000Z" in drilled.drills
    assert run("promote", one, "staging")["before"] == two  # a drill covers both directions


def test_failed_drill_and_another_releases_drill_are_refused(aws: Place, tmp_path: Path) -> None:
    one, two = make(aws, "20261101T000000Z", migration_head="a"), make(aws, "20261102T000000Z")
    three = make(aws, "20261103T000000Z", mlflow_version="3.20.0")
    run("promote", one, "staging")
    lost = drill_file(tmp_path / "lost.json", one, two, aws, lost=3)
    assert "3 objects are lost" in refused("promote", two, "staging", "--drill", lost)
    other = drill_file(tmp_path / "other.json", three, two, aws)
    assert "was between MLflow 3.20.0 and MLflow 3.19.0, not between" in refused(
        "promote", two, "staging", "--drill", other
    )
    (tmp_path / "nothing.json").write_text("{}")
    for name, reason in (("nothing.json", "is not the output of scripts/drill.py"), ("none.json", "cannot be read")):
        assert reason in refused("promote", two, "staging", "--drill", str(tmp_path / name))
    assert channels.read(aws.ssm) == {"staging": one}


def test_promote_refuses_images_that_no_stack_can_or_should_launch(aws: Place) -> None:
    make(aws, "20261101T000000Z")
    gone, raw = make(aws, "20261102T000000Z"), make(aws, "20261103T000000Z", finished=False)
    assert "is unfinished" in refused("promote", raw, "staging")
    run("deprecate", gone)
    assert "is deprecated since" in refused("promote", gone, "staging")
    run("retire", gone)
    assert "is disabled, so no stack can launch it: enable it with retire --undo" in refused("promote", gone, "staging")
    for channel in ("Prod", "ami-1", "a/b", ""):
        assert "is not the name of a channel" in refused("promote", "20261101T000000Z", channel)


def test_promote_refuses_another_architecture_and_a_channel_with_a_deleted_image(
    aws: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make(aws, "20261101T000000Z"), make(aws, "20261102T000000Z")
    run("promote", one, "staging")
    backend = images_of_moto(aws)
    backend[two].architecture = "arm64"
    assert "use a channel per architecture, for example staging-arm64" in refused("promote", two, "staging")
    backend[two].architecture = "x86_64"
    aws.ec2.deregister_image(ImageId=one)
    assert f"contains {one}, which does not exist in eu-central-1 any more" in refused("promote", two, "staging")
    assert run("promote", two, "staging", "--without-drill")["changed"] is True


def test_drill_on_another_architecture_counts_and_is_named(aws: Place, tmp_path: Path) -> None:
    one, two = make(aws, "20261101T000000Z", architecture="arm64"), make(aws, "20261102T000000Z", architecture="arm64")
    for each in (one, two):
        images_of_moto(aws)[each].architecture = "arm64"
    run("promote", one, "staging-arm64")
    file = tmp_path / "drill.json"
    end = {"mlflow_version": "3.19.0", "migration_head": "f4a9b2c7d1e6", "postgresql_major": "15", "os": "debian 12"}
    file.write_text(json.dumps({"lost": 0, "at": "now", "older": end, "newer": end | {"architecture": "x86_64"}}))
    said = run_text("promote", two, "staging-arm64", "--drill", str(file))
    assert "the drill ran on x86_64, and the image is for arm64" in said
    assert ec2_images.named(ec2_images.find(aws.ec2), two).drills == {  # type: ignore[union-attr]
        "20261101T000000Z": "now on debian 12 x86_64, nothing lost"
    }


def test_images_of_another_architecture_are_no_rollback_without_saying_so(aws: Place) -> None:
    intel, arm, now, other = (make(aws, f"2026110{number}T000000Z") for number in (1, 2, 3, 4))
    for each in (arm, other):
        images_of_moto(aws)[each].architecture = "arm64"
    stack(aws, "prod", intel, arm, now)
    found = {each["id"]: each for each in run("list")}
    assert [found[each]["other_architecture_of"] for each in (intel, arm)] == [[], ["prod"]]
    lines = {line.split()[0]: line for line in run_text("list").splitlines()}
    assert lines[arm].endswith("prod can roll back to it with an arm64 instance type")
    assert lines[intel].endswith("prod can roll back to it")
    assert "it is the last x86_64 image to which the stack prod can roll back" in refused("retire", intel)
    run("retire", arm)  # the stack runs on x86_64 and has another image for a rollback


def test_diff_and_show_name_the_architecture(aws: Place) -> None:
    one, two = make(aws, "20261101T000000Z"), make(aws, "20261102T000000Z", architecture="arm64")
    images_of_moto(aws)[two].architecture = "arm64"
    found = run("diff", one, two, "--no-vulnerabilities")
    assert found["changed"]["architecture"] == ["x86_64", "arm64"] and not found["same_architecture"]
    text = run_text("diff", one, two, "--no-vulnerabilities")
    assert "architecture  x86_64 → arm64" in text and "also needs another instanceType" in text
    assert re.search(r"^  architecture +arm64$", run_text("show", two), re.MULTILINE)


def images_of_moto(aws: Place) -> Any:
    from moto.ec2.models import ec2_backends

    return ec2_backends["123456789012"][aws.region].amis


# deprecate, retire


def test_retire_is_reversible_until_the_last_step(aws: Place) -> None:
    make(aws, "20261102T000000Z")
    old = make(aws, "20261101T000000Z")
    untouched = state(aws)
    for arguments in (["deprecate", old], ["retire", old]):
        assert run(*arguments, "--dry-run")["done"]
        assert state(aws) == untouched
    assert run("deprecate", old)["done"] and run("deprecate", old)["done"] == []
    assert run("deprecate", old, "--undo")["done"] and state(aws) == untouched
    assert "is available, not disabled" in refused("retire", old, "--delete")
    assert len(run("retire", old)["done"]) == 2 and run("retire", old)["done"] == []
    assert {each["id"]: each["state"] for each in run("list")}[old] == "disabled"
    assert len(run("retire", old, "--undo")["done"]) == 2 and state(aws) == untouched
    run("retire", old)
    before = state(aws)
    planned = run("retire", old, "--delete", "--dry-run")["done"]
    assert state(aws) == before
    assert run("retire", old, "--delete")["done"] == planned and len(planned) == 2
    assert [each.version for each in ec2_images.find(aws.ec2)] == ["20261102T000000Z"]
    assert record.parts_of(aws.ssm, "20261101T000000Z") == {}
    assert planned[1].removeprefix("snapshot ") not in state(aws)[1]
    assert run("retire", old, "--delete")["done"] == []


@pytest.mark.parametrize("verb", ["deprecate", "retire"])
def test_image_in_use_is_refused(aws: Place, verb: str) -> None:
    one, two = make(aws, "20261101T000000Z"), make(aws, "20261102T000000Z")
    machine = launch(aws, one, "prod")
    assert f"it runs on {machine} of the stack prod" in refused(verb, one)
    aws.ec2.terminate_instances(InstanceIds=[machine])
    channels.write(aws.ssm, "production", one)
    assert "the channel production names it" in refused(verb, one)
    channels.write(aws.ssm, "production", two)
    aws.ec2.create_tags(Resources=[one], Tags=ec2_images.as_tags({"mlflow-ami:keep": ""}))
    assert "mlflow-ami:keep" in refused(verb, one)
    aws.ec2.delete_tags(Resources=[one], Tags=[{"Key": "mlflow-ami:keep"}])
    stack(aws, "prod", one, two)
    assert "it is the last x86_64 image to which the stack prod can roll back" in refused(verb, one)
    run(verb, two, "--dry-run", status=2)  # a channel names the stack's current image
    zero = make(aws, "20261031T000000Z")
    kept = ec2_images.named(ec2_images.find(aws.ec2), one)
    assert kept
    volume = kept.tags[f"{ec2_images.STACK}prod"]
    aws.ec2.create_tags(Resources=[zero], Tags=ec2_images.as_tags({f"{ec2_images.STACK}prod": volume}))
    run(verb, one)  # the stack can roll back to the image `zero`
    if verb == "retire":  # a deprecated image can still be launched
        assert "it is the last x86_64 image to which the stack prod can roll back" in refused(verb, zero)
    aws.ec2.delete_volume(VolumeId=volume)
    run(verb, zero)  # tags of a deleted stack do not count


@pytest.mark.parametrize("verb", ["deprecate", "retire"])
def test_only_image_of_a_postgresql_major_is_refused(aws: Place, verb: str) -> None:
    fifteen = make(aws, "20261101T000000Z", postgresql_major=15)
    make(aws, "20261102T000000Z", postgresql_major=17)
    make(aws, "20261103T000000Z", postgresql_major=15, finished=False)
    assert "it is the only image with PostgreSQL 15 for x86_64" in refused(verb, fifteen)
    another = make(aws, "20261104T000000Z", postgresql_major=15)
    images_of_moto(aws)[another].architecture = "arm64"
    assert "it is the only image with PostgreSQL 15 for x86_64" in refused(verb, fifteen)
    images_of_moto(aws)[another].architecture = "x86_64"
    run(verb, fifteen)


# sweep


def image(
    number: int,
    *,
    finished: bool = True,
    kept: bool = False,
    hours_old: float = 48,
    more: Mapping[str, str] | None = None,
) -> ec2_images.Image:
    tags = {ec2_images.OURS: f"v{number}", "mlflow-ami:postgresql-major": "15", **(more or {})}
    tags |= ({ec2_images.FINISHED: "1"} if finished else {}) | ({"mlflow-ami:keep": ""} if kept else {})
    made = (NOW - timedelta(hours=hours_old)).isoformat().replace("+00:00", "Z")
    return ec2_images.Image(f"ami-{number}", f"image {number}", made, "available", tags, (f"snap-{number}",))


def ids(found: list[ec2_images.Image]) -> list[str]:
    return sorted(each.id for each in found)


def test_newest_finished_images_stay() -> None:
    found = [image(number, hours_old=48 + number) for number in range(7)]
    assert ids(retiring.superfluous(found, Claims(), 5, ALWAYS, NOW)) == ["ami-5", "ami-6"]


def test_newest_finished_images_of_each_architecture_stay() -> None:
    found = [image(number, hours_old=48 + number) for number in range(6)]
    found[:3] = [dataclasses.replace(each, architecture="arm64") for each in found[:3]]
    assert ids(retiring.superfluous(found, Claims(), 2, ALWAYS, NOW)) == ["ami-2", "ami-5"]


def test_images_younger_than_the_limit_stay() -> None:
    found = [image(number, hours_old=24 * number) for number in range(7)]
    assert ids(retiring.superfluous(found, Claims(), 1, timedelta(days=4, hours=12), NOW)) == ["ami-5", "ami-6"]


def test_old_unfinished_images_are_deleted() -> None:
    found = [image(0, finished=False, hours_old=1), image(1, finished=False, hours_old=7), image(2)]
    assert ids(retiring.superfluous(found, Claims(), 5, timedelta(days=90), NOW)) == ["ami-1"]


def test_sweep_keeps_one_image_to_roll_back_to_and_one_of_each_major() -> None:
    prod = {f"{ec2_images.STACK}prod": "vol-1"}
    found = [
        image(0), image(1, hours_old=50, more=prod), image(2, hours_old=51, more=prod), image(3, hours_old=52),
        image(4, hours_old=53, more={"mlflow-ami:postgresql-major": "17"}),
    ]  # fmt: skip
    known = Claims(current={"prod": "ami-0"}, volumes={"prod": "vol-1"})
    assert ids(retiring.superfluous(found, known, 1, ALWAYS, NOW)) == ["ami-2", "ami-3"]


@given(
    found=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.floats(0, 100)), max_size=12),
    keep=st.integers(1, 8),
)
def test_image_in_use_named_or_tagged_keep_is_never_deleted(
    found: list[tuple[bool, bool, bool, float]], keep: int
) -> None:
    every = [image(n, finished=f, kept=k, hours_old=hours) for n, (f, k, _, hours) in enumerate(found)]
    every.sort(key=lambda each: each.created, reverse=True)
    used = {f"ami-{n}" for n, (_, _, in_use, _) in enumerate(found) if in_use}
    named = {name: name for name in sorted(used)[::2]}
    known = Claims(dict.fromkeys(used - named.keys(), ("i-1",)), {f"c{name}": name for name in named})
    gone = retiring.superfluous(every, known, keep, ALWAYS, NOW)
    assert not {each.id for each in gone} & used
    assert not any(each.kept for each in gone)
    left = [each for each in every if each.finished and each not in gone]
    assert len(left) >= min(keep, sum(each.finished for each in every))


def test_sweep_deletes_images_with_their_snapshots_and_dry_run_deletes_nothing(aws: Place) -> None:
    for number in (1, 2, 3):
        make(aws, f"2026110{number}T000000Z")
    newest, before = ec2_images.find(aws.ec2)[0], state(aws)
    planned = run("sweep", "--keep", "1", "--dry-run")
    assert planned["deleted"] == [] and len(planned["planned"]) == 4 and state(aws) == before
    assert run("sweep", "--keep", "1")["deleted"] == planned["planned"]
    assert [each.id for each in ec2_images.find(aws.ec2)] == [newest.id]
    assert record.parts_of(aws.ssm, newest.version)
    assert run("sweep", "--keep", "1")["deleted"] == []


def test_leftovers_of_a_killed_bake_are_deleted_and_nothing_of_a_running_one(aws: Place) -> None:
    running = f"{datetime.now(UTC):%Y%m%dt%H%M%Sz}-7"
    for bake in ("20261101t000000z-7", running, "not-of-ours"):
        aws.ec2.create_key_pair(KeyName=f"{retiring.KEY_PAIR}{bake}")
        record.reserve(aws.ssm, bake.partition("-")[0].upper(), bake)
    left = ["key pair mlflow-ami-bake-20261101t000000z-7", "reserved image version 20261101T000000Z"]
    assert run("sweep", "--dry-run")["planned"] == left == run("sweep")["deleted"]
    assert run("sweep")["deleted"] == []
    assert record.reserved(aws.ssm) == {running.partition("-")[0].upper(): running, "NOT": "not-of-ours"}
    assert len(aws.ec2.describe_key_pairs()["KeyPairs"]) == 2


def test_snapshot_without_image_is_deleted(aws: Place) -> None:
    ami = make(aws, "20261101T000000Z")
    [snapshot] = ec2_images.find(aws.ec2)[0].snapshots
    aws.ec2.deregister_image(ImageId=ami)
    assert run("sweep")["deleted"] == [f"snapshot {snapshot}"]
    assert snapshot not in state(aws)[1]


def test_images_of_others_are_not_listed(aws: Place) -> None:
    aws.ec2.register_image(Name="somebody's", Architecture="x86_64", RootDeviceName="/dev/sda1")
    assert run("list") == [] and "no image in eu-central-1 yet" in run_text("list")


# copy, share


def test_copy_takes_tags_record_and_encryption_along(aws: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    ami, there = make(aws, "20261101T000000Z"), place(OTHER)
    stack(aws, "prod", ami)
    images_of_moto(aws)[ami].ebs_snapshot.encrypted = True
    [planned] = run("copy", ami, "--to", OTHER, "--dry-run")
    assert planned["changed"] and ec2_images.find(there.ec2) == []
    [done] = run("copy", ami, "--to", OTHER)
    [copied] = ec2_images.find(there.ec2)
    original = ec2_images.named(ec2_images.find(aws.ec2), ami)
    assert original and done["image"] == copied.id
    assert copied.tags == {key: value for key, value in original.tags.items() if not key.startswith(ec2_images.STACK)}
    assert copied.usable and copied.name == original.name
    assert record.read(there.ssm, copied.version) == record.read(aws.ssm, original.version)
    [snapshot] = there.ec2.describe_snapshots(SnapshotIds=list(copied.snapshots))["Snapshots"]
    assert snapshot["Encrypted"] and ec2_images.tags_of(snapshot) == copied.tags
    before = state(there)
    assert run("copy", "20261101T000000Z", "--to", OTHER)[0] == {**done, "changed": False}
    assert state(there) == before
    # If the argument is a version instead of an ID, `show` runs in both regions.
    assert [each["region"] for each in run("show", "20261101T000000Z", "--region", REGION, "--region", OTHER)] == [
        REGION,
        OTHER,
    ]
    assert "is in eu-central-1 already" in refused("copy", ami, "--to", REGION)


def test_interrupted_copy_is_continued(aws: Place) -> None:
    ami, there = make(aws, "20261101T000000Z"), place(OTHER)
    begun = there.ec2.copy_image(SourceImageId=ami, SourceRegion=REGION, Name="mlflow-ami-20261101T000000Z")["ImageId"]
    there.ec2.create_tags(Resources=[begun], Tags=ec2_images.as_tags({ec2_images.OURS: "20261101T000000Z"}))
    assert run("copy", ami, "--to", OTHER)[0]["image"] == begun
    assert [each.id for each in ec2_images.find(there.ec2)] == [begun] and ec2_images.find(there.ec2)[0].usable


def test_customers_key_of_one_region_needs_another_for_the_copy(aws: Place) -> None:
    ami = make(aws, "20261101T000000Z")
    key = boto3.client("kms", REGION).create_key()["KeyMetadata"]["Arn"]
    snapshot = images_of_moto(aws)[ami].ebs_snapshot
    snapshot.encrypted, snapshot.kms_key_id = True, key
    assert f"is encrypted with {key}, and a key belongs to one region" in refused("copy", ami, "--to", OTHER)
    other = boto3.client("kms", OTHER).create_key()["KeyMetadata"]["Arn"]
    run("copy", ami, "--to", OTHER, "--kms-key", other)
    [copied] = ec2_images.find(place(OTHER).ec2)
    assert images_of_moto(place(OTHER))[copied.id].ebs_snapshot.kms_key_id == other


def test_share_prints_the_key_policy_and_unshare_reverses_it(aws: Place) -> None:
    ami, account = make(aws, "20261101T000000Z"), "111122223333"
    key = boto3.client("kms", REGION).create_key()["KeyMetadata"]["Arn"]
    snapshot = images_of_moto(aws)[ami].ebs_snapshot
    snapshot.encrypted, snapshot.kms_key_id = True, key
    assert run("share", ami, "--with", account, "--dry-run")["changed"] == [account]
    assert run("unshare", ami, "--with", account)["changed"] == []
    done = run("share", ami, "--with", account)
    [statement] = done["key_statements"]
    assert done["shared_with"] == [account] and statement["Principal"]["AWS"] == [f"arn:aws:iam::{account}:root"]
    assert set(statement["Action"]) >= {"kms:Decrypt", "kms:CreateGrant", "kms:DescribeKey"}
    assert snapshot.create_volume_permission_userids == {account}
    assert run("share", ami, "--with", account)["changed"] == []
    text = run_text("share", ami, "--with", account)
    assert "as before" in text and '"kms:Decrypt"' in text and "Tags are not shared" in text
    assert run("unshare", ami, "--with", account) == {
        "region": REGION, "image": ami, "changed": [account], "shared_with": [], "key_statements": [],
    }  # fmt: skip
    assert snapshot.create_volume_permission_userids == set()


def test_share_refuses_a_wrong_account_and_awss_own_key(aws: Place) -> None:
    ami = make(aws, "20261101T000000Z")
    assert "'12' is not the ID of an AWS account" in refused("share", ami, "--with", "12")
    images_of_moto(aws)[ami].ebs_snapshot.encrypted = True
    assert "AWS's own key for EBS, which other accounts cannot use" in refused("share", ami, "--with", "111122223333")


def test_rights_in_the_readme_are_those_that_the_verbs_use(aws: Place, tmp_path: Path) -> None:
    """The test runs every command of images.py. Leftovers of a killed bake and another account make images.py send
    additional calls."""
    CALLS.clear()
    one, two, three = (make(aws, f"2026110{number}T000000Z") for number in (1, 2, 3))
    builder = aws.ec2.run_instances(ImageId=one, MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]
    aws.ec2.create_tags(Resources=[builder], Tags=ec2_images.as_tags({"mlflow-ami:bake": "an-old-one"}))
    instance_of_moto(aws, builder).launch_time = datetime(2026, 1, 1, tzinfo=UTC)
    aws.ec2.create_key_pair(KeyName=f"{retiring.KEY_PAIR}20261101t000000z-7")
    images_of_moto(aws)[two].ebs_snapshot.encrypted = True
    images_of_moto(aws)[two].ebs_snapshot.kms_key_id = boto3.client("kms", REGION).create_key()["KeyMetadata"]["Arn"]
    run("promote", three, "staging")
    run("promote", two, "staging", "--drill", drill_file(tmp_path / "drill.json", three, two, aws))
    for arguments in (
        ["list"], ["show", "staging"], ["diff", one, two, "--no-vulnerabilities"], ["sweep"],
        ["copy", two, "--to", OTHER, "--kms-key", "alias/mine"], ["share", two, "--with", "111122223333"],
        ["unshare", two, "--with", "111122223333"], ["deprecate", one], ["deprecate", one, "--undo"], ["retire", one],
        ["retire", one, "--undo"], ["retire", one], ["retire", one, "--delete"],
    ):  # fmt: skip
        run(*arguments)
    policy = (
        (Path(images.__file__).parents[1] / "infra/README.md").read_text().split("<summary>IAM policy</summary>")[1]
    )
    statements = {
        each["Sid"]: each["Action"] for each in json.loads(policy.split("```json")[1].split("```")[0])["Statement"]
    }
    allowed = statements["Images"]
    assert CALLS - {"sts:GetCallerIdentity"} == {
        each for each in CALLS if any(fnmatch.fnmatchcase(each, a) for a in allowed)
    }
    assert [each for each in allowed if not fnmatch.filter(CALLS, each)] == []


def instance_of_moto(aws: Place, instance: str) -> Any:
    from moto.ec2.models import ec2_backends

    return ec2_backends["123456789012"][aws.region].get_instance(instance)


# Tags, help


ROUTES = {"what": "2 routes for readers: only writers may call them", "why": "POST /a and POST /b"}
JOBS = {"what": "background jobs", "why": "AttributeError"}


def test_tags_of_an_image_name_its_fallbacks(aws: Place) -> None:
    tags = ec2_images.fact_tags(FACTS | {"fallbacks": [ROUTES, JOBS]})
    assert tags["mlflow-ami:fallbacks"] == f"{ROUTES['what']} / background jobs"
    make(aws, "20261101T000000Z", fallbacks=[ROUTES, JOBS])
    [shown] = run("list")
    assert "2 fallbacks" in list_and_show.line(shown)
    assert f"\n  without           {ROUTES['what']}\n  without           background jobs" in run_text(
        "show", shown["id"]
    )
    for complete in (FACTS, {key: value for key, value in FACTS.items() if key != "fallbacks"}):  # an older image
        assert "mlflow-ami:fallbacks" not in ec2_images.fact_tags(complete)


def test_tag_about_many_fallbacks_has_a_length_and_characters_that_aws_takes() -> None:
    tag = ec2_images.fallbacks_tag([{"what": f"`mlflow server`; feature {number}, (\u00e4)"} for number in range(40)])
    assert len(tag) <= 256 and tag.endswith(" ...")
    assert not set("`;,()") & set(tag)


def test_every_verb_has_dry_run_and_json_and_a_sentence() -> None:
    def help_of(*arguments: str) -> str:
        command = [sys.executable, images.__file__, *arguments, "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    verbs = re.findall(r"\{([a-z,]+)\}", help_of())[0].split(",")
    assert verbs == ["list", "show", "diff", "promote", "deprecate", "retire", "sweep", "copy", "share", "unshare"]
    for verb in verbs:
        said = help_of(verb)
        assert "--dry-run" in said and "--json" in said and "--region" in said, verb


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["sweep", "--keep", "0"], "at least one image must stay"),
        (["sweep", "--older-than", "-1"], "give a number of days"),
        (["list", "--local", "--region", "eu-west-1"], "the local cloud has one region"),
        (["retire", "ami-1", "--undo", "--delete"], "not allowed with"),
    ],
)
def test_contradicting_arguments_are_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        images.main(arguments)
    assert ended.value.code == 2 and reason in capsys.readouterr().err


def test_facts_of_the_moto_cloud_are_tags_of_an_image() -> None:
    assert {f"mlflow-ami:{name}" for name in moto_cloud.FACTS} <= {*ec2_images.fact_tags(FACTS), ec2_images.FINISHED}
