"""The real program of infra/, applied to moto's EC2, S3, IAM and SSM: every call of every resource type it uses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from local_cloud import hosted_zones
from moto.route53 import models
from moto.server import ThreadedMotoServer
from rehearsal import program, stack
from rehearsal.engine import Engine
from rehearsal.kinds import Aws
from rehearsal.lookups import LOOKUPS
from rehearsal.resources import KINDS
from rehearsal.state import State
from rehearsal.values import reveal

REGION = "eu-central-1"
FACTS = {
    "format": "1",
    "git-commit": "0" * 40,
    "source-ami": "ami-0123456789abcdef0",
    "mlflow-version": "3.17.2",
    "migration-head": "dc11669786a5",
    "migration-count": "67",
    "postgresql-major": "15",
}


@pytest.fixture(scope="module")
def aws() -> Iterator[Aws]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    made: dict[str, Any] = {}

    def client(service: str) -> Any:
        if service not in made:
            made[service] = boto3.client(  # type: ignore[call-overload]
                service,
                endpoint_url=f"http://{host}:{port}",
                region_name=REGION,
                aws_access_key_id="test",
                aws_secret_access_key="test",
            )
        return made[service]

    yield Aws(client, REGION)
    server.stop()


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
    program.run(
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


def test_launch_again_upgrade_resize_and_destroy(aws: Aws) -> None:
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

    # What was declared is what is there.
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
    secret = aws.client("ssm").get_parameter(Name=outputs["credentialsParameter"], WithDecryption=True)
    password = json.loads(secret["Parameter"]["Value"])["users"]["admin"]["password"]
    assert len(password) >= 12
    assert password not in repr(state) and password not in repr(made.outputs)

    # Again, and nothing happens.
    assert done(up(aws, state, first)) == []

    # Another image replaces the machine and nothing that holds data.
    upgrade = done(up(aws, state, second))
    assert upgrade.index("delete VolumeAttachment") < upgrade.index("delete Instance")
    assert upgrade.index("delete EipAssociation") < upgrade.index("delete Instance")
    assert upgrade.index("delete Instance") < upgrade.index("replace Instance")
    assert upgrade.index("replace Instance") < upgrade.index("replace VolumeAttachment")
    assert {each for each in upgrade if each.startswith(("delete", "replace"))} == {
        f"{verb} {kind}"
        for verb in ("delete", "replace")
        for kind in ("Instance", "VolumeAttachment", "EipAssociation")
    }
    after = reveal(state.outputs)
    assert after["instanceId"] != outputs["instanceId"]
    for kept in ("dataVolumeId", "buckets", "publicIp", "url", "credentialsParameter"):
        assert after[kept] == outputs[kept]
    [volume] = ec2.describe_volumes(VolumeIds=[after["dataVolumeId"]])["Volumes"]
    assert [each["InstanceId"] for each in volume["Attachments"]] == [after["instanceId"]]

    # Another size changes the machine in place; a larger volume grows.
    resized = done(up(aws, state, second, instanceType="t3.large", dataVolumeGib="30"))
    assert sorted(resized) == ["update Instance", "update Volume"]
    [machine] = ec2.describe_instances(InstanceIds=[after["instanceId"]])["Reservations"][0]["Instances"]
    assert (machine["InstanceType"], machine["State"]["Name"]) == ("t3.large", "running")

    # A machine that somebody terminated is launched again.
    ec2.terminate_instances(InstanceIds=[after["instanceId"]])
    again = done(up(aws, state, second, instanceType="t3.large", dataVolumeGib="30"))
    assert again[:2] == ["create Instance", "create VolumeAttachment"]
    [address] = ec2.describe_addresses(PublicIps=[outputs["publicIp"]])["Addresses"]
    assert address["InstanceId"] == reveal(state.outputs)["instanceId"]

    for each in state.resources:
        each.protect = False
        each.inputs["forceDestroy"] = True
    Engine(KINDS, aws, state, save=lambda now: None).delete(list(state.resources))
    assert state.resources == []
    assert aws.client("s3").list_buckets()["Buckets"] == []
    assert [each for each in ec2.describe_vpcs()["Vpcs"] if not each["IsDefault"]] == []
    states = [each["State"]["Name"] for r in ec2.describe_instances()["Reservations"] for each in r["Instances"]]
    assert set(states) == {"terminated"}


def test_mistakes_come_out_together_in_the_programs_words(aws: Aws) -> None:
    state = State()
    with pytest.raises(program.ProgramError) as refused:
        up(aws, state, "ami-00000000000000000", allowedCidrs='["everybody"]', instanceType="m7g.large", dry_run=True)
    text = str(refused.value)
    for part in ("everybody", "ami-00000000000000000"):
        assert part in text
    assert state.resources == []


def test_the_address_of_a_domain_is_written_to_its_zone_and_goes_with_the_stack(
    aws: Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "create_route53_zone_id", models.create_route53_zone_id)  # to be had back
    hosted_zones.install()
    state, route53 = State(), aws.client("route53")
    ami = image(aws, "20261124T101500Z")
    zone = route53.create_hosted_zone(Name="example.com", CallerReference="test")["HostedZone"]["Id"].split("/")[-1]
    domain = {"domainName": "mlflow.example.com", "hostedZoneId": zone}

    def addresses() -> dict[str, list[str]]:
        found = route53.list_resource_record_sets(HostedZoneId=zone)["ResourceRecordSets"]
        return {each["Name"]: [r["Value"] for r in each["ResourceRecords"]] for each in found if each["Type"] == "A"}

    outputs = reveal(up(aws, state, ami, **domain).outputs)
    assert outputs["url"] == "https://mlflow.example.com"
    assert addresses() == {"mlflow.example.com.": [outputs["publicIp"]]}
    assert done(up(aws, state, ami, **domain)) == []
    assert "delete Record" in done(up(aws, state, ami, domainName="mlflow.example.com"))
    assert addresses() == {}
