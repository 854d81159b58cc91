"""Apply the real program of infra/ to moto's EC2, S3, IAM and SSM. The tests make every API call of the resource types
that the program uses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moto.route53 import models

from mlflow_host.contract import alarms
from scripts.local_cloud import route53
from scripts.local_cloud.base_images import BASES
from scripts.rehearsal import program_runner, stack
from scripts.rehearsal.data_sources import LOOKUPS
from scripts.rehearsal.engine import Engine
from scripts.rehearsal.errors import ApplyError, Refused
from scripts.rehearsal.resource_types import Aws
from scripts.rehearsal.resources import KINDS
from scripts.rehearsal.state import State
from scripts.rehearsal.state import save as save_state
from scripts.rehearsal.wire import reveal
from tests.support.moto_cloud import FACTS, REGION, moto_cloud


@pytest.fixture(scope="module")
def aws() -> Iterator[Aws]:
    with moto_cloud() as cloud:
        yield Aws(cache(cloud.client), REGION)


def image(aws: Aws, version: str) -> str:
    ec2 = aws.client("ec2")
    disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 8}}
    ami = ec2.register_image(
        Name=f"mlflow-ami-{version}", Architecture="x86_64", RootDeviceName="/dev/sda1", BlockDeviceMappings=[disk]
    )["ImageId"]
    tags = {**FACTS, "image-version": version}
    ec2.create_tags(Resources=[ami], Tags=[{"Key": f"mlflow-ami:{key}", "Value": each} for key, each in tags.items()])
    return str(ami)


def up(aws: Aws, state: State, ami: str, *, dry_run: bool = False, **settings: str) -> Engine:
    engine = Engine(KINDS, aws, state, save=lambda now: None, dry_run=dry_run)
    engine.refresh()
    config = {"amiId": ami, "allowedCidrs": '["203.0.113.0/24"]', **settings}
    program_runner.run(
        stack.PROGRAM,
        engine,
        LOOKUPS,
        project=stack.project(),
        stack_name="moto",
        config={"aws:region": REGION, **{f"{stack.project()}:{key}": value for key, value in config.items()}},
        secret_keys=[],
        on_log=lambda text: None,
    )
    engine.finish()
    return engine


def done(engine: Engine) -> list[str]:
    return [f"{each.operation} {each.type.split(':')[-1]}" for each in engine.steps if each.operation != "same"]


def test_launch_again_upgrade_resize_and_destroy(aws: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State()
    first, second = image(aws, "20261122T101500Z"), image(aws, "20261123T101500Z")
    ec2 = aws.client("ec2")

    plan = up(aws, state, first, dry_run=True)
    assert state.resources == []
    made = up(aws, state, first)
    assert sorted(done(made)) == sorted(done(plan))
    outputs = reveal(made.outputs)
    assert outputs["amiId"] == first
    assert set(outputs["buckets"]) == {"artifacts", "models", "backups"}

    # The cloud contains the declared resources.
    instance = ec2.describe_instances(InstanceIds=[outputs["instanceId"]])["Reservations"][0]["Instances"][0]
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    assert {tag["Key"]: tag["Value"] for tag in instance["Tags"]}["mlflow-ami:stack"] == "moto"
    [volume] = ec2.describe_volumes(VolumeIds=[outputs["dataVolumeId"]])["Volumes"]
    assert volume["Attachments"][0]["InstanceId"] == outputs["instanceId"]
    [group] = ec2.describe_security_groups(GroupIds=[instance["SecurityGroups"][0]["GroupId"]])["SecurityGroups"]
    assert {each["CidrIp"] for rule in group["IpPermissions"] for each in rule["IpRanges"]} == {"203.0.113.0/24"}
    [address] = ec2.describe_addresses(PublicIps=[outputs["publicIp"]])["Addresses"]
    assert address["InstanceId"] == outputs["instanceId"]
    for bucket in outputs["buckets"].values():
        s3 = aws.client("s3")
        assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
        assert s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"]["BlockPublicPolicy"]
        assert s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
        policy = json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])
        assert [each["Sid"] for each in policy["Statement"]] == ["OnlyTls", "OnlyCurrentTls"]
    secret = aws.client("ssm").get_parameter(Name=outputs["credentialsParameter"], WithDecryption=True)
    password = json.loads(secret["Parameter"]["Value"])["users"]["admin"]["password"]
    assert len(password) >= 12
    assert password not in repr(state) and password not in repr(made.outputs)

    # A second `up` changes nothing.
    assert done(up(aws, state, first)) == []

    # With an empty state, `up` creates no second machine and no second resources with data.
    with pytest.raises(ApplyError) as refused:
        up(aws, State(), first, dry_run=True)
    said = str(refused.value)
    assert f"The data volume {outputs['dataVolumeId']} belongs to the stack moto" in said
    [address] = ec2.describe_addresses(PublicIps=[outputs["publicIp"]])["Addresses"]
    kept = [outputs["dataVolumeId"], *outputs["buckets"].values(), outputs["credentialsParameter"]]
    for id_ in (*kept, address["AllocationId"]):
        assert sum(line.endswith(f" {id_}") for line in said.splitlines()) == 1
    assert f"aws ec2 stop-instances --region {REGION} --instance-ids {outputs['instanceId']}" in said

    # The program looks up the backup in the bucket before it replaces the machine.
    with pytest.raises(program_runner.ProgramError, match="the backups bucket holds no backup"):
        up(aws, state, first, dry_run=True, restoreFrom="latest")
    bucket, key = outputs["buckets"]["backups"], "dumps/20261122T013300Z-nightly-f4a9b2c7d1e6.dump"
    stanza = "pgbackrest/backup/pg15-7-20261101T000000Z"
    s3 = aws.client("s3")
    policy = s3.get_bucket_policy(Bucket=bucket)["Policy"]
    s3.delete_bucket_policy(Bucket=bucket)  # moto ignores conditions, so a bucket policy would deny all requests
    for name in (key, f"{stanza}/backup.info", f"{stanza}/20261122-010000F/backup.manifest"):
        s3.put_object(Bucket=bucket, Key=name, Body=b"")
    for value in ("latest", key, "20261122-010000F", "2026-11-22T02:00:00Z"):
        assert "replace Instance" in done(up(aws, state, first, dry_run=True, restoreFrom=value))
    with pytest.raises(
        program_runner.ProgramError, match=f"available: base backups 20261122-010000F and dumps {key}; nothing was"
    ):
        up(aws, state, first, dry_run=True, restoreFrom="20200101-000000F")
    for name in (key, f"{stanza}/backup.info", f"{stanza}/20261122-010000F/backup.manifest"):
        [version] = s3.list_object_versions(Bucket=bucket, Prefix=name)["Versions"]
        s3.delete_object(Bucket=bucket, Key=name, VersionId=version["VersionId"])
    s3.put_bucket_policy(Bucket=bucket, Policy=policy)

    # A new image replaces the machine, but no resource with data.
    upgrade = done(up(aws, state, second))
    # The deletion of the volume attachment stops the machine. Until the machine stops, it keeps its address.
    assert upgrade.index("delete VolumeAttachment") < upgrade.index("delete EipAssociation")
    assert upgrade.index("delete EipAssociation") < upgrade.index("delete Instance")
    assert upgrade.index("delete Instance") < upgrade.index("replace Instance")
    assert upgrade.index("replace Instance") < upgrade.index("replace VolumeAttachment")
    assert {each for each in upgrade if each.startswith(("delete", "replace"))} == {
        f"{verb} {kind}"
        for verb in ("delete", "replace")
        for kind in ("Instance", "VolumeAttachment", "EipAssociation")
    } | {"replace Tag"}  # `up` tags the launched image, and the previous image keeps its tag
    after = reveal(state.outputs)
    assert after["instanceId"] != outputs["instanceId"]
    for output in ("dataVolumeId", "buckets", "publicIp", "url", "credentialsParameter"):
        assert after[output] == outputs[output]
    [volume] = ec2.describe_volumes(VolumeIds=[after["dataVolumeId"]])["Volumes"]
    assert [each["InstanceId"] for each in volume["Attachments"]] == [after["instanceId"]]

    # A new instance type and a larger volume are changed in place.
    resized = done(up(aws, state, second, instanceType="t3.large", dataVolumeGib="30"))
    assert sorted(resized) == ["update Instance", "update Volume"]
    [machine] = ec2.describe_instances(InstanceIds=[after["instanceId"]])["Reservations"][0]["Instances"]
    assert (machine["InstanceType"], machine["State"]["Name"]) == ("t3.large", "running")

    # If the machine was terminated by hand, `up` launches a new machine.
    ec2.terminate_instances(InstanceIds=[after["instanceId"]])
    again = done(up(aws, state, second, instanceType="t3.large", dataVolumeGib="30"))
    launched = [each for each in again if "Alarm" not in each]  # one alarm is changed too, because it names the machine
    assert launched[:3] == ["create Instance", "replace EipAssociation", "create VolumeAttachment"]
    [address] = ec2.describe_addresses(PublicIps=[outputs["publicIp"]])["Addresses"]
    assert address["InstanceId"] == reveal(state.outputs)["instanceId"]

    # `destroy` first prints the deletions that Pulumi and S3 would refuse.
    with pytest.raises(ApplyError, match="is protected"):
        Engine(KINDS, aws, state, save=lambda now: None).delete(list(state.resources))
    filled = outputs["buckets"]["models"]
    aws.client("s3").delete_bucket_policy(Bucket=filled)  # because of the bucket policy, moto would deny all requests
    aws.client("s3").put_object(Bucket=filled, Key="kept", Body=b"x")
    buckets = [each for each in state.resources if each.type == stack.BUCKET and each.id == filled]
    with pytest.raises(ApplyError, match="BucketNotEmpty"):
        lone = State(resources=[replace(each, protect=False) for each in buckets])
        Engine(KINDS, aws, lone, save=lambda now: None).delete(list(lone.resources))
    monkeypatch.setenv("MLFLOW_AMI_LOCAL_CLOUD", str(tmp_path))
    save_state(stack.state_path(), state)
    assert all(name in stack.refused_elsewhere()[0] for name in ("Bucket mlflow-backups", "Volume data", "Eip server"))
    lines: list[str] = []
    cloud: Any = SimpleNamespace(region=REGION)

    def archive(**_: Any) -> None:
        aws.client("s3").put_object(Bucket=outputs["buckets"]["backups"], Key="last-segment", Body=b"x")

    # PostgreSQL archives its last segment while the machine stops.
    aws.client("s3").delete_bucket_policy(Bucket=outputs["buckets"]["backups"])
    ec2.meta.events.register("before-call.ec2.TerminateInstances", archive)
    try:
        stack.destroy(cloud, aws.client, state, say=lines.append, done=lambda step: None)
    finally:  # later tests in this module use the same client and must not call `archive`
        ec2.meta.events.unregister("before-call.ec2.TerminateInstances", archive)
    assert "Pulumi refuses to delete protected resources" in lines[0] and "Volume data" in lines[0]
    assert lines[1].startswith(f"S3 refuses to delete {filled}, which contains objects")
    assert len(lines) == 2
    assert state.resources == []
    assert not stack.state_path().exists() and stack.refused_elsewhere() == []
    assert aws.client("s3").list_buckets()["Buckets"] == []
    assert [each for each in ec2.describe_vpcs()["Vpcs"] if not each["IsDefault"]] == []
    states = [each["State"]["Name"] for r in ec2.describe_instances()["Reservations"] for each in r["Instances"]]
    assert set(states) == {"terminated"}


def test_an_image_that_does_not_trust_the_local_s3_is_refused(aws: Aws) -> None:
    ec2, base = aws.client("ec2"), BASES["debian12"]
    for name, refused in ((base.series, True), (base.ami_name, False), ("somebody-elses", False)):
        source = ec2.register_image(Name=name)["ImageId"]
        ami = image(aws, f"of-{name}")
        stack.require_trust(aws.client, ami)  # no tag names the source image yet, so the AMI is accepted
        ec2.create_tags(Resources=[ami], Tags=[{"Key": stack.SOURCE, "Value": source}])
        if refused:
            with pytest.raises(Refused, match=r"bake it again with `scripts/bake\.py --local`"):
                stack.require_trust(aws.client, ami)
        else:
            stack.require_trust(aws.client, ami)


def test_all_mistakes_are_reported_with_the_programs_sentences(aws: Aws) -> None:
    state = State()
    with pytest.raises(program_runner.ProgramError) as refused:
        up(aws, state, "ami-00000000000000000", allowedCidrs='["everybody"]', instanceType="m7g.large", dry_run=True)
    text = str(refused.value)
    for part in ("everybody", "ami-00000000000000000"):
        assert part in text
    assert state.resources == []


def test_log_group_and_dashboard_follow_their_settings(aws: Aws) -> None:
    state, ami = State(), image(aws, "20261125T101500Z")
    logs, cloudwatch = aws.client("logs"), aws.client("cloudwatch")

    def groups() -> list[tuple[str, int]]:
        found = logs.describe_log_groups(logGroupNamePrefix="/mlflow-ami/")["logGroups"]
        return [(each["logGroupName"], each["retentionInDays"]) for each in found]

    settings: dict[str, Any] = {"logRetentionDays": "7", "dashboard": "true"}
    up(aws, state, ami, **settings)
    assert groups() == [("/mlflow-ami/moto", 7)]
    [group] = [each for each in state.resources if each.type.endswith(":LogGroup")]
    tags = logs.list_tags_for_resource(resourceArn=reveal(group.outputs)["arn"])["tags"]
    assert tags["mlflow-ami:stack"] == "moto"
    body = json.loads(cloudwatch.get_dashboard(DashboardName="mlflow-moto")["DashboardBody"])
    assert len(body["widgets"]) == len(alarms.PLOTS)
    assert done(up(aws, state, ami, **settings)) == []

    assert done(up(aws, state, ami, **{**settings, "logRetentionDays": "30"})) == ["update LogGroup"]
    assert groups() == [("/mlflow-ami/moto", 30)]

    # Both were deleted by hand.
    logs.delete_log_group(logGroupName="/mlflow-ami/moto")
    cloudwatch.delete_dashboards(DashboardNames=["mlflow-moto"])
    assert {"create LogGroup", "create Dashboard"} <= set(done(up(aws, state, ami, **settings)))
    assert groups() == [("/mlflow-ami/moto", 7)]

    off = done(up(aws, state, ami))
    assert {"delete LogGroup", "delete Dashboard"} <= set(off)
    assert groups() == [] and cloudwatch.list_dashboards()["DashboardEntries"] == []
    moto: Any = SimpleNamespace(region=REGION)
    stack.destroy(moto, aws.client, state, say=lambda line: None, done=lambda step: None)
    assert state.resources == []


def test_domain_record_is_created_and_deleted_with_the_stack(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    # monkeypatch restores `create_route53_zone_id` at the end, because route53.install() replaces this function.
    monkeypatch.setattr(models, "create_route53_zone_id", models.create_route53_zone_id)
    route53.install()
    state, client = State(), aws.client("route53")
    ami = image(aws, "20261124T101500Z")
    zone = client.create_hosted_zone(Name="example.com", CallerReference="test")["HostedZone"]["Id"].split("/")[-1]
    domain = {"domainName": "mlflow.example.com", "hostedZoneId": zone}

    def addresses() -> dict[str, list[str]]:
        found = client.list_resource_record_sets(HostedZoneId=zone)["ResourceRecordSets"]
        return {each["Name"]: [r["Value"] for r in each["ResourceRecords"]] for each in found if each["Type"] == "A"}

    outputs = reveal(up(aws, state, ami, **domain).outputs)
    assert outputs["url"] == "https://mlflow.example.com"
    assert addresses() == {"mlflow.example.com.": [outputs["publicIp"]]}
    assert done(up(aws, state, ami, **domain)) == []
    assert "delete Record" in done(up(aws, state, ami, domainName="mlflow.example.com"))
    assert addresses() == {}
