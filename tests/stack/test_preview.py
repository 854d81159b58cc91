"""Preview refuses settings that cannot work or would lose data, and prints the effect of the boot on the data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.stack.program import NEW, OLD, OTHER, VOLUME, Account, Image, Volume, data_volume, image_tags, report, run

SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    release: {
        "mlflow_version": release,
        "migration_head": head,
        "migration_count": count,
        "image_version": f"v{release}",
    }
    for release, head, count in (
        ("3.16.0", "b7e2c1a4d9f3", "63"),
        ("3.17.0", "dc11669786a5", "67"),
        ("3.17.2", "dc11669786a5", "67"),
        ("3.18.0", "f4a9b2c7d1e6", "68"),
    )
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
            "disabled or deregistered, or baked in another region.",
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
            "tag mlflow-ami:format. Tags are visible only in the account that owns the image.",
            id="foreign image",
        ),
        pytest.param(
            account(images={NEW: Image(tags=image_tags(format="2"))}),
            {},
            f"amiId: {NEW} is of image format 2, but this stack reads format 1: launch it with the release of this "
            "project that baked it.",
            id="image of another format",
        ),
        *(
            pytest.param(
                account(images={NEW: Image(tags=image_tags(**{tag: ""}))}),
                {},
                f"amiId: the tags of {NEW} are incomplete, so its schema is unknown: bake it again, or add the tags of "
                "its build manifest.",
                id=f"image without {tag}",
            )
            for tag in ("image_version", "mlflow_version", "migration_head", "migration_count", "postgresql_major")
        ),
        pytest.param(
            account(images={NEW: Image(tags=image_tags(migration_count="many"))}),
            {},
            "so its schema is unknown",
            id="image with a count that is not a number",
        ),
        pytest.param(
            account(images={NEW: Image(architecture="arm64")}),
            {},
            f"instanceType: t3.small is a machine for x86_64, but the image {NEW} is for arm64: choose a type of that "
            "architecture, such as t4g.small, or an image baked with `scripts/bake.py --architecture x86_64`.",
            id="wrong architecture",
        ),
        pytest.param(
            account(),
            {"instanceType": "t4g.small"},
            f"instanceType: t4g.small is a machine for arm64, but the image {NEW} is for x86_64: choose a type of that "
            "architecture, such as t3.small, or an image baked with `scripts/bake.py --architecture arm64`.",
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
            id="instance type that does not exist",
        ),
        pytest.param(
            account(volumes=data_volume()),
            {"instanceType": "p5.huge"},
            "instanceType: EC2 offers no p5.huge in eu-central-1a, the server's zone, but in "
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
            id="zone that does not exist",
        ),
        pytest.param(
            account(zones=("eu-central-1a",)), {}, "eu-central-1 offers one zone only, eu-central-1a", id="one zone"
        ),
        pytest.param(
            account(volumes=data_volume(postgresql_major="17")),
            {},
            f"amiId: {NEW} has PostgreSQL 15, but the data volume {VOLUME} holds a cluster of PostgreSQL 17, which the "
            "image cannot read. Pin an image with PostgreSQL 17, or move by dump and restore: run `mlflow-host-dump` "
            "on the machine, and set restoreFrom to the name that it prints, together with this image.",
            id="another PostgreSQL major",
        ),
        pytest.param(
            account(volumes={**data_volume(), "vol-2": data_volume()[VOLUME]}),
            {},
            f"The volumes {VOLUME}, vol-2 all have the tags of this stack's data volume: remove the tag "
            f"mlflow-ami:role from each volume that is not the data volume.",
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
            id="name with the same end only",
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
        "getParametersByPath",
        "getAvailabilityZones",
        "getInstanceTypeOfferings",
        "getInstanceType",
        "getKeyPair",
        "getZone",
    ],
)
def test_error_of_aws_is_quoted(function: str) -> None:
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


def on(schema: str, last: str | None, last_image: str = OLD, reported: str = "") -> str:
    """Return the line that preview prints for an image with `schema`. The last `up` used the schema `last`, and the
    machine reported the schema `reported`."""
    volumes = data_volume(last_image, **SCHEMAS[last]) if last else {}
    parameters = report(**SCHEMAS[reported]) if reported else {"in-service": "not reported yet"}
    there = account(
        images={NEW: Image(tags=image_tags(**SCHEMAS[schema]))}, volumes=volumes, parameters=parameters if last else {}
    )
    ((level, line),) = run(there, preview=True).log
    assert level == "INFO"
    return line


@pytest.mark.parametrize(
    ("schema", "last", "line"),
    [
        ("3.17.0", None, f"New data volume: {NEW} (MLflow 3.17.0, image v3.17.0) creates schema dc11669786a5 on it."),
        (
            "3.17.2",
            "3.17.0",
            f"Same schema dc11669786a5, nothing to migrate: {VOLUME} was last on {OLD} (MLflow 3.17.0, image v3.17.0), "
            f"now {NEW} (MLflow 3.17.2, image v3.17.2).",
        ),
        (
            "3.18.0",
            "3.16.0",
            f"Upgrade over 5 migrations, schema b7e2c1a4d9f3 → f4a9b2c7d1e6: {VOLUME} was last on {OLD} (MLflow "
            f"3.16.0, image v3.16.0), now {NEW} (MLflow 3.18.0, image v3.18.0).",
        ),
        ("3.18.0", "3.17.0", "Upgrade over 1 migration, schema dc11669786a5 → f4a9b2c7d1e6:"),
        ("3.16.0", "3.18.0", "Rollback over 5 migrations, schema f4a9b2c7d1e6 → b7e2c1a4d9f3:"),
        ("3.17.0", "3.18.0", "Rollback over 1 migration, schema f4a9b2c7d1e6 → dc11669786a5:"),
    ],
)
def test_preview_prints_the_effect_on_the_data_in_one_line(schema: str, last: str | None, line: str) -> None:
    assert on(schema, last, reported=last or "").startswith(line)


def test_an_unchanged_image_is_named_once() -> None:
    assert on("3.17.0", "3.17.0", NEW, "3.17.0") == (
        f"Same image as before, {NEW} (MLflow 3.17.0, image v3.17.0), and the same schema dc11669786a5."
    )


UNREPORTED = "no machine reported that its boot finished"


@pytest.mark.parametrize(
    ("schema", "meant_for", "reported", "line"),
    [
        pytest.param(
            "3.18.0",
            "3.18.0",
            "3.16.0",
            f"Upgrade over 5 migrations, schema b7e2c1a4d9f3 → f4a9b2c7d1e6: {VOLUME} was last on MLflow 3.16.0, image "
            f"v3.16.0, now {NEW} (MLflow 3.18.0, image v3.18.0). The last `up` was for {OLD} (MLflow 3.18.0, image "
            f"v3.18.0): {UNREPORTED}.",
            id="the same again after an interrupted upgrade",
        ),
        pytest.param(
            "3.16.0",
            "3.18.0",
            "3.16.0",
            f"Same image as last reported, {NEW} (MLflow 3.16.0, image v3.16.0), and the same schema b7e2c1a4d9f3. The "
            f"last `up` was for {OLD} (MLflow 3.18.0, image v3.18.0): {UNREPORTED}.",
            id="back after a failed upgrade",
        ),
        pytest.param(
            "3.18.0",
            "3.18.0",
            "",
            f"Same image as at the last `up`, with schema f4a9b2c7d1e6: {VOLUME} was last assigned to {OLD} (MLflow "
            f"3.18.0, image v3.18.0), {UNREPORTED}.",
            id="no report yet",
        ),
        pytest.param(
            "3.18.0",
            "3.16.0",
            "",
            f"Upgrade over 5 migrations, schema b7e2c1a4d9f3 → f4a9b2c7d1e6: {VOLUME} was last assigned to {OLD} "
            f"(MLflow 3.16.0, image v3.16.0), {UNREPORTED}; now {NEW} (MLflow 3.18.0, image v3.18.0).",
            id="upgrade without a report",
        ),
    ],
)
def test_preview_states_only_reported_schemas(schema: str, meant_for: str, reported: str, line: str) -> None:
    """Pulumi writes the volume's tags before the boot. If the boot fails, the data can still have the old schema."""
    assert on(schema, meant_for, reported=reported) == line


@pytest.mark.parametrize("stale", [report("vol-0000000000000000f", **SCHEMAS["3.16.0"]), report(**SCHEMAS["3.16.0"])])
def test_a_report_of_another_volume_or_from_before_an_image_that_reports_nothing_is_not_used(
    stale: dict[str, str],
) -> None:
    volumes = data_volume(**SCHEMAS["3.17.0"], launch_revision="3")
    there = account(images={NEW: Image(tags=image_tags(**SCHEMAS["3.18.0"]))}, volumes=volumes, parameters=stale)
    ((_, line),) = run(there).log
    assert line == (
        f"Upgrade over 1 migration, schema dc11669786a5 → f4a9b2c7d1e6: {VOLUME} was last assigned to {OLD} (MLflow "
        "3.17.0, image v3.17.0), whose machines do not report whether their boot finished; now "
        f"{NEW} (MLflow 3.18.0, image v3.18.0)."
    )


def test_the_cluster_on_the_volume_is_of_the_reported_major() -> None:
    there = account(volumes=data_volume(image_version="later"), parameters=report(postgresql_major="17"))
    assert f"the data volume {VOLUME} holds a cluster of PostgreSQL 17" in run(there).stated[0]


def test_a_volume_without_a_record_is_said_to_have_none() -> None:
    bare = {VOLUME: Volume({"mlflow-ami:project": "mlflow-ami", "mlflow-ami:stack": "dev", "mlflow-ami:role": "data"})}
    ((_, line),) = run(account(volumes=bare)).log
    assert line.startswith(f"Data volume {VOLUME} has no record of an image: the boot of {NEW} ")


def test_recorded_tags_are_read_by_the_next_run() -> None:
    """Pulumi writes the volume's tags when it updates the volume, before it creates the instance."""
    images = {
        OLD: Image(tags=image_tags(**SCHEMAS["3.16.0"])),
        NEW: Image(tags=image_tags(**SCHEMAS["3.18.0"])),
    }
    volumes: dict[str, Volume] = {}
    parameters: dict[str, str] = {}
    lines = []
    for pinned in (OLD, NEW, OLD):
        found = run(account(images=images, volumes=volumes, parameters=parameters), amiId=pinned)
        parameters = report(**SCHEMAS["3.16.0" if pinned == OLD else "3.18.0"])
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


@pytest.mark.parametrize(("before", "said"), [("x86_64", True), ("arm64", False), ("", False)])
def test_change_of_the_architecture_of_an_existing_data_volume_is_named(before: str, said: bool) -> None:
    there = account(
        images={NEW: Image(tags=image_tags(architecture="arm64"), architecture="arm64")},
        volumes=data_volume(OLD, architecture=before),
    )
    found = run(there, instanceType="t4g.small")
    line = found.log[0][1]
    assert ("The architecture changes from x86_64 to arm64, which was never tried" in line) is said
    assert found.one("ebs.Volume").inputs["tags"]["mlflow-ami:architecture"] == "arm64"


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


NIGHTS = tuple(f"dumps/202611{day:02}T013300Z-nightly-f4a9b2c7d1e6.dump" for day in range(1, 31))
STANZA = "pgbackrest/backup/pg15-7-20261101T000000Z"
LABELS = ("20261101-010000F", "20261101-010000F_20261102-010000D", "20261108-010000F")
KEPT = (*NIGHTS, f"{STANZA}/backup.info", *(f"{STANZA}/{label}/backup.manifest" for label in LABELS))
THERE = f"base backups {', '.join(LABELS)} and dumps {', '.join(NIGHTS[-3:])} (the newest 3 of 30)"


def backed_up(objects: tuple[str, ...] = KEPT, **changes: Any) -> Account:
    return account(volumes=data_volume(**changes), objects=objects)


@pytest.mark.parametrize(
    ("value", "objects", "sentence"),
    [
        ("lost.dump", KEPT, f"there is no dump dumps/lost.dump in the backups bucket; available: {THERE}"),
        (
            "20200101-000000F",
            KEPT,
            f"there is no base backup 20200101-000000F in the backups bucket; available: {THERE}",
        ),
        ("2026-11-01T00:30:00Z", KEPT, f"no base backup was made before 2026-11-01T00:30:00Z; available: {THERE}"),
        ("2999-01-01T00:00:00Z", KEPT, "2999-01-01T00:00:00Z is in the future"),
        ("latest", (), "the backups bucket holds no backup"),
        ("2026-11-02T00:00:00Z", NIGHTS, "no base backup was made before 2026-11-02T00:00:00Z; available: dumps"),
    ],
)
@pytest.mark.parametrize("preview", [True, False])
def test_a_backup_that_is_not_in_the_bucket_is_refused_before_the_machine_is_replaced(
    value: str, objects: tuple[str, ...], sentence: str, preview: bool
) -> None:
    refused = run(backed_up(objects), preview=preview, restoreFrom=value)
    assert refused.refusal.startswith(f"restoreFrom: {sentence}")
    assert refused.refusal.endswith("; nothing was changed.")
    assert refused.of_type("ec2.Instance") == [] and refused.of_type("ebs.Volume") == []
    for name in (*NIGHTS, *LABELS):
        assert len(re.findall(rf"{name}(?![_.\w])", refused.refusal)) <= 1
    assert len(refused.refusal) < 400


@pytest.mark.parametrize(
    "value", ["latest", NIGHTS[0], NIGHTS[4].removeprefix("dumps/"), *LABELS, "2026-11-08T01:00:01+00:00"]
)
def test_a_backup_that_is_in_the_bucket_is_restored(value: str) -> None:
    found = run(backed_up(), restoreFrom=value)
    assert found.refusal == ""
    assert found.one("ebs.Volume").inputs["tags"]["mlflow-ami:restore-from"] == value
    assert json.dumps(value) in found.one("ec2.Instance").inputs["userData"]


def test_a_value_that_was_restored_before_may_have_expired() -> None:
    there = account(volumes={VOLUME: Volume({**data_volume()[VOLUME].tags, "mlflow-ami:restore-from": "lost.dump"})})
    assert run(there, restoreFrom="lost.dump").refusal == ""
    assert "there is no dump dumps/other.dump" in run(there, restoreFrom="other.dump").refusal


def test_a_new_stack_has_nothing_to_restore() -> None:
    assert run(preview=True, restoreFrom="latest").stated == [
        "restoreFrom: latest cannot be restored, because this stack is new and its backups bucket is empty: "
        "remove it with `pulumi config rm restoreFrom`."
    ]


def test_a_lost_volume_is_restored_onto_a_new_one() -> None:
    there = account(objects=KEPT, parameters={"credentials": "x"})
    assert run(there, restoreFrom="latest", state="complete").refusal == ""


def test_reason_is_printed_for_a_bucket_that_cannot_be_listed() -> None:
    there = account(volumes=data_volume(), broken={"getObjects": "AccessDenied: not\nallowed"})
    refused = run(there, restoreFrom="latest").refusal
    assert refused.startswith("restoreFrom: the backups bucket mlflow-backups-1a2b3c4 could not be listed: ")
    assert "AccessDenied: not allowed" in refused


def test_another_postgresql_major_is_taken_with_a_dump_to_restore() -> None:
    moved = run(backed_up(postgresql_major="17"), restoreFrom="latest")
    assert moved.refusal == ""


def test_preview_describes_the_restore() -> None:
    (said,) = [line for _, line in run(backed_up(), restoreFrom="latest").log if line.startswith("Restore of latest")]
    assert "the current database is kept on the data volume" in said
    assert not [line for _, line in run().log if line.startswith("Restore")]
