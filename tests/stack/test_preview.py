"""What cannot work, or would lose data, is refused at preview; and preview says what the boot will do to the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from stack.program import NEW, OLD, OTHER, VOLUME, Account, Image, Volume, data_volume, image_tags, run

SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    "3.16.0": {"mlflow_version": "3.16.0", "migration_head": "b7e2c1a4d9f3", "migration_count": "63"},
    "3.17.0": {"mlflow_version": "3.17.0", "migration_head": "dc11669786a5", "migration_count": "67"},
    "3.18.0": {"mlflow_version": "3.18.0", "migration_head": "f4a9b2c7d1e6", "migration_count": "68"},
}


def account(**changes: Any) -> Account:
    return Account(**changes)


@pytest.mark.parametrize(
    ("there", "config", "sentence"),
    [
        pytest.param(
            account(images={}),
            {},
            f"amiId: there is no image {NEW} in eu-central-1 that this account may launch; it may have been "
            "deregistered, or baked in another region.",
            id="deregistered image",
        ),
        pytest.param(
            account(images={NEW: Image(state="pending")}),
            {},
            f"amiId: {NEW} is pending, not available: wait for it, or bake it again.",
            id="pending image",
        ),
        pytest.param(
            account(images={NEW: Image(tags={"Name": "ubuntu"})}),
            {},
            f"amiId: {NEW} (mlflow-ami-3.17.2-20261122T101500Z) is not an image that scripts/bake.py made: it has no "
            "tag mlflow-ami:format. Tags are seen only in the account that owns the image.",
            id="foreign image",
        ),
        pytest.param(
            account(images={NEW: Image(tags=image_tags(format="2"))}),
            {},
            f"amiId: {NEW} is of image format 2, but this stack knows format 1: launch it with the release of this "
            "project that baked it.",
            id="image of another format",
        ),
        *(
            pytest.param(
                account(images={NEW: Image(tags=image_tags(**{tag: ""}))}),
                {},
                f"amiId: the tags of {NEW} are incomplete, so what it would do to the data is not known: bake it "
                "again, or tag it as its build manifest says.",
                id=f"image without {tag}",
            )
            for tag in ("image_version", "mlflow_version", "migration_head", "migration_count", "postgresql_major")
        ),
        pytest.param(
            account(images={NEW: Image(tags=image_tags(migration_count="many"))}),
            {},
            "so what it would do to the data is not known",
            id="image with a count that is no number",
        ),
        pytest.param(
            account(images={NEW: Image(architecture="arm64")}),
            {},
            f"instanceType: t3.small is a machine for x86_64, but the image {NEW} is for arm64: choose a type of that "
            "architecture.",
            id="wrong architecture",
        ),
        pytest.param(
            account(),
            {"instanceType": "t4g.small"},
            f"instanceType: t4g.small is a machine for arm64, but the image {NEW} is for x86_64",
            id="wrong architecture, the other way round",
        ),
        pytest.param(
            account(),
            {"instanceType": "t3.nano"},
            "instanceType: t3.nano has 512 MiB of memory and the server needs 700: choose a larger type.",
            id="too little memory",
        ),
        pytest.param(
            account(),
            {"instanceType": "t3.micro", "jobExecution": "true"},
            "instanceType: t3.micro has 1024 MiB of memory and the server needs 1300 with jobExecution",
            id="too little memory for jobs",
        ),
        pytest.param(
            account(),
            {"instanceType": "x1.none"},
            "instanceType: EC2 offers no 'x1.none' in eu-central-1.",
            id="instance type that is not",
        ),
        pytest.param(
            account(volumes=data_volume()),
            {"instanceType": "p5.huge"},
            "instanceType: EC2 offers no p5.huge in eu-central-1a, where the server is to run; it does in "
            "eu-central-1b, eu-central-1c.",
            id="instance type not offered where the data is",
        ),
        pytest.param(
            account(images={NEW: Image(root_gib=30)}),
            {"rootVolumeGib": "10"},
            f"rootVolumeGib: 10 is less than the 30 GiB of {NEW}: set it to 30 or more.",
            id="root volume smaller than the image",
        ),
        pytest.param(
            account(volumes=data_volume(gib=50)),
            {},
            f"dataVolumeGib: 20 is less than the 50 GiB that {VOLUME} has, and EBS volumes do not shrink: set it to 50 "
            "or more.",
            id="smaller volume",
        ),
        pytest.param(
            account(volumes=data_volume()),
            {"availabilityZone": "eu-central-1b"},
            f"availabilityZone: eu-central-1b is not where the data volume {VOLUME} is, and volumes do not move: set "
            "it to eu-central-1a, or launch a second stack there.",
            id="another zone",
        ),
        pytest.param(
            account(),
            {"availabilityZone": "eu-central-1f"},
            "availabilityZone: eu-central-1 has no zone 'eu-central-1f'; it has eu-central-1a, eu-central-1b, "
            "eu-central-1c.",
            id="zone that is not",
        ),
        pytest.param(
            account(zones=("eu-central-1a",)), {}, "eu-central-1 offers one zone only, eu-central-1a", id="one zone"
        ),
        pytest.param(
            account(volumes=data_volume(postgresql_major="17")),
            {},
            f"amiId: {NEW} has PostgreSQL 15, but the data volume {VOLUME} holds a cluster of PostgreSQL 17, which it "
            "cannot read: pin an image with PostgreSQL 17, or move by dump and restore: take a dump with "
            "`mlflow-host-dump` on the machine, and set restoreFrom to the name it prints together with this image.",
            id="another PostgreSQL major",
        ),
        pytest.param(
            account(volumes={**data_volume(), "vol-2": data_volume()[VOLUME]}),
            {},
            f"The volumes {VOLUME}, vol-2 all carry the tags of this stack's data volume: remove the tag "
            "mlflow-ami:role from those that are not.",
            id="two data volumes",
        ),
        pytest.param(
            account(), {"keyName": "lost"}, "keyName: there is no key pair 'lost' in eu-central-1.", id="key pair"
        ),
        pytest.param(
            account(),
            {"hostedZoneId": "Z0", "domainName": "mlflow.example.com"},
            "hostedZoneId: there is no hosted zone Z0 in this account.",
            id="hosted zone",
        ),
        pytest.param(
            account(hosted_zones={"Z0": "example.org."}),
            {"hostedZoneId": "Z0", "domainName": "mlflow.example.com"},
            "domainName: mlflow.example.com is not in the hosted zone Z0, which is for example.org.",
            id="name of another zone",
        ),
        pytest.param(
            account(hosted_zones={"Z0": "ample.com."}),
            {"hostedZoneId": "Z0", "domainName": "mlflow.example.com"},
            "is not in the hosted zone Z0",
            id="name that only ends alike",
        ),
    ],
)
@pytest.mark.parametrize("preview", [True, False])
def test_refused_before_anything_is_made(there: Account, config: dict[str, Any], sentence: str, preview: bool) -> None:
    refused = run(there, preview=preview, **config)
    assert len(refused.stated) == 1, refused.refusal
    assert sentence in refused.stated[0]
    assert [each.type for each in refused.registered] == ["pulumi:providers:aws"]


@pytest.mark.parametrize(
    "function",
    [
        "getAmi",
        "getEbsVolumes",
        "getVolume",
        "getAvailabilityZones",
        "getInstanceTypeOfferings",
        "getInstanceType",
        "getKeyPair",
        "getZone",
    ],
)
def test_when_aws_does_not_answer_its_reason_is_passed_on(function: str) -> None:
    there = account(volumes=data_volume(), broken={function: "ExpiredToken: the token\nhas expired"})
    refused = run(there, keyName="ours", hostedZoneId="Z0", domainName="mlflow.example.com")
    assert [
        stated for stated in refused.stated if "could not be looked up" in stated and "the token has expired" in stated
    ]
    assert [each.type for each in refused.registered] == ["pulumi:providers:aws"]


def test_deprecated_images_can_be_pinned() -> None:
    (asked,) = [arguments for function, arguments in run().lookups if function == "getAmi"]
    assert asked["includeDeprecated"] is True
    assert "owners" not in asked, "an image shared by another account is refused for its tags, not hidden"


def test_look_ups_go_through_the_same_provider_as_the_resources() -> None:
    found = run(keyName=None)
    assert {function for function, _ in found.lookups} >= {"getAmi", "getEbsVolumes", "getInstanceType"}
    provider = found.registered[0]
    assert provider.type == "pulumi:providers:aws"
    assert {each.request.provider for each in found.registered if each.type.startswith("aws:")} == {
        f"{provider.urn}::aws-id"
    }


def on(schema: str, last: str | None, last_image: str = OLD) -> tuple[Account, str]:
    volumes = data_volume(last_image, **SCHEMAS[last]) if last else {}
    there = account(images={NEW: Image(tags=image_tags(**SCHEMAS[schema]))}, volumes=volumes)
    ((level, line),) = run(there, preview=True).log
    assert level == "INFO"
    return there, line


@pytest.mark.parametrize(
    ("schema", "last", "line"),
    [
        (
            "3.17.0",
            None,
            f"New data volume: {NEW} (MLflow 3.17.0, image 20261122T101500Z) creates schema dc11669786a5 on it.",
        ),
        (
            "3.17.0",
            "3.17.0",
            f"Same schema dc11669786a5, nothing to migrate: {VOLUME} was last on {OLD} (MLflow 3.17.0, image "
            f"20261122T101500Z), now {NEW} (MLflow 3.17.0, image 20261122T101500Z).",
        ),
        (
            "3.18.0",
            "3.16.0",
            f"Upgrade over 5 migrations, schema b7e2c1a4d9f3 → f4a9b2c7d1e6: {VOLUME} was last on {OLD} (MLflow "
            f"3.16.0, image 20261122T101500Z), now {NEW} (MLflow 3.18.0, image 20261122T101500Z).",
        ),
        ("3.18.0", "3.17.0", "Upgrade over 1 migration, schema dc11669786a5 → f4a9b2c7d1e6:"),
        ("3.16.0", "3.18.0", "Rollback over 5 migrations, schema f4a9b2c7d1e6 → b7e2c1a4d9f3:"),
        ("3.17.0", "3.18.0", "Rollback over 1 migration, schema f4a9b2c7d1e6 → dc11669786a5:"),
    ],
)
def test_preview_says_in_one_line_what_will_happen_to_the_data(schema: str, last: str | None, line: str) -> None:
    assert on(schema, last)[1].startswith(line)


def test_an_unchanged_image_is_named_once() -> None:
    assert on("3.17.0", "3.17.0", NEW)[1] == (
        f"Same image as before, {NEW} (MLflow 3.17.0, image 20261122T101500Z), and the same schema dc11669786a5."
    )


def test_a_volume_without_a_record_is_said_to_have_none() -> None:
    bare = {VOLUME: Volume({"mlflow-ami:project": "mlflow-ami", "mlflow-ami:stack": "dev", "mlflow-ami:role": "data"})}
    ((_, line),) = run(account(volumes=bare)).log
    assert line.startswith(f"Data volume {VOLUME} has no record of an image: {NEW} ")


def test_what_one_run_records_the_next_one_reads() -> None:
    """The record is written with the volume, so ahead of the boot that it announces."""
    images = {
        OLD: Image(tags=image_tags(**SCHEMAS["3.16.0"])),
        NEW: Image(tags=image_tags(**SCHEMAS["3.18.0"], image_version="20270101T000000Z")),
    }
    volumes: dict[str, Volume] = {}
    lines = []
    for pinned in (OLD, NEW, OLD):
        found = run(account(images=images, volumes=volumes), amiId=pinned)
        lines.append(found.log[0][1].split(":")[0])
        volume, instance = found.one("ebs.Volume"), found.one("ec2.Instance")
        assert volume.inputs["tags"]["mlflow-ami:last-image"] == pinned
        assert volume.urn in instance.dependencies
        provider_tags = json.loads(found.registered[0].inputs["defaultTags"])["tags"]
        volumes = {VOLUME: Volume({**provider_tags, **volume.inputs["tags"]})}
    assert lines == [
        "New data volume",
        "Upgrade over 5 migrations, schema b7e2c1a4d9f3 → f4a9b2c7d1e6",
        "Rollback over 5 migrations, schema f4a9b2c7d1e6 → b7e2c1a4d9f3",
    ]


def test_other_stacks_volumes_are_left_alone() -> None:
    foreign = dict(data_volume()[VOLUME].tags)
    there = account(
        volumes={
            f"vol-{change}": Volume({**foreign, f"mlflow-ami:{change}": "other"}, zone="eu-central-1c")
            for change in ("project", "stack", "role")
        }
    )
    found = run(there)
    assert found.log[0][1].startswith("New data volume")
    assert found.one("ebs.Volume").inputs["availabilityZone"] == "eu-central-1a"


def test_an_image_of_another_account_with_the_right_id_does_not_pass_for_ours() -> None:
    refused = run(account(images={OTHER: Image(tags={})}), amiId=OTHER)
    assert "is not an image that scripts/bake.py made" in refused.stated[0]


def test_another_postgresql_major_is_taken_with_a_dump_to_restore() -> None:
    moved = run(account(volumes=data_volume(postgresql_major="17")), restoreFrom="latest")
    assert moved.refusal == ""


def test_preview_says_what_is_restored() -> None:
    (said,) = [line for _, line in run(restoreFrom="latest").log if line.startswith("Restore of latest")]
    assert "what is there now is kept aside" in said
    assert not [line for _, line in run().log if line.startswith("Restore")]
