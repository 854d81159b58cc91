"""Test all resources of the stack, their options, and the unchanged names of the resources with data."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from typing import Any

import pulumi_aws as aws
import pytest
import yaml

from mlflow_host.contract import alarms, launch
from tests.stack.program import NEW, VOLUME, Account, Image, Registration, Run, data_volume, image_tags, run

PINNED = {
    "urn:pulumi:dev::mlflow-ami::aws:s3/bucket:Bucket::mlflow-artifacts",
    "urn:pulumi:dev::mlflow-ami::aws:s3/bucket:Bucket::mlflow-models",
    "urn:pulumi:dev::mlflow-ami::aws:s3/bucket:Bucket::mlflow-backups",
    "urn:pulumi:dev::mlflow-ami::aws:ebs/volume:Volume::data",
    "urn:pulumi:dev::mlflow-ami::aws:ec2/eip:Eip::server",
    "urn:pulumi:dev::mlflow-ami::aws:ssm/parameter:Parameter::credentials",
    "urn:pulumi:dev::mlflow-ami::random:index/randomPassword:RandomPassword::kek-passphrase",
}
"""Resources with data or identity. Pulumi treats a changed URN as a deletion, so if you move a resource that has data
or identity, add an alias for its old URN."""


@pytest.fixture(scope="module")
def stack() -> Run:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run()
    assert found.refusal == ""
    assert [str(each.message) for each in caught if "deprecated" in str(each.message).lower()] == []
    return found


def test_resources_with_data_keep_their_urn_and_are_protected(stack: Run) -> None:
    assert {each.urn for each in stack.registered if each.request.protect} == PINNED


def test_only_the_instance_is_deleted_before_its_replacement(stack: Run) -> None:
    """The data volume can be attached to only one instance, so Pulumi deletes the old instance first."""
    first = {each.urn.split("::")[-2:][0] for each in stack.registered if each.request.deleteBeforeReplace}
    assert first == {"aws:ec2/instance:Instance", "aws:ec2/volumeAttachment:VolumeAttachment"}


def test_no_resource_hides_changes_but_the_parameters(stack: Run) -> None:
    """Users are changed in the credentials parameter itself, so `up` must not restore a removed user. The machine
    writes the authority's certificate to a parameter."""
    ignoring = {each.name: list(each.request.ignoreChanges) for each in stack.registered if each.request.ignoreChanges}
    written_once = ["value", "description", "tier", "keyId"]
    assert {name: names for name, names in ignoring.items() if not name.startswith("mlflow-")} == {
        "credentials": written_once,
        "admin-password": written_once,
        "certificate-authority": written_once,
        "in-service": written_once,
    }


PROPERTIES = {
    "aws:s3/bucketLifecycleConfiguration:BucketLifecycleConfiguration": "lifecycleRules",
    "aws:s3/bucketPolicy:BucketPolicy": "policy",
    "aws:s3/bucketServerSideEncryptionConfiguration:BucketServerSideEncryptionConfiguration": (
        "serverSideEncryptionConfiguration"
    ),
    "aws:s3/bucketVersioning:BucketVersioning": "versioning",
    # The resource type of a bucket has no properties for ownership controls and for public access blocks.
    "aws:s3/bucketOwnershipControls:BucketOwnershipControls": "",
    "aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock": "",
}


def test_refresh_does_not_undo_separate_bucket_settings(stack: Run) -> None:
    """pulumi/pulumi-aws#6244: if a bucket's settings are separate resources, a refresh reads the settings into the
    bucket's state, and the next `up` would remove the settings from the bucket."""
    arguments = inspect.signature(aws.s3.Bucket._internal_init).parameters
    for bucket in stack.of_type("s3.Bucket"):
        beside = {
            each.type for each in stack.registered if each.type.startswith("aws:s3/") and each.name == bucket.name
        }
        managed = {PROPERTIES[kind] for kind in beside - {bucket.type}} - {""}
        assert managed == set(bucket.request.ignoreChanges) - {"bucket"}
        assert len(managed) == 4
        for name in managed:
            assert name not in bucket.inputs
            assert re.sub("([A-Z])", r"_\1", name).lower() in arguments


def test_nothing_is_given_a_name_that_aws_must_not_have_twice(stack: Run) -> None:
    for kind, name in {"s3.Bucket": "bucket", "iam.Role": "name", "iam.InstanceProfile": "name"}.items():
        assert all(name not in each.inputs for each in stack.of_type(kind))
    assert "name" not in stack.one("ec2.SecurityGroup").inputs


def test_everything_is_tagged_through_the_provider(stack: Run) -> None:
    provider = stack.registered[0]
    assert json.loads(provider.inputs["defaultTags"]) == {
        "tags": {"mlflow-ami:project": "mlflow-ami", "mlflow-ami:stack": "dev"}
    }
    assert provider.inputs["region"] == "eu-central-1"


def test_aws_settings_of_the_user_apply_to_the_provider() -> None:
    roles = [{"roleArn": "arn:aws:iam::123456789012:role/deploy", "durationSeconds": 900}]
    found = run(
        aws_profile="work",
        aws_assumeRoles=json.dumps(roles),
        aws_defaultTags='{"tags": {"team": "ml", "mlflow-ami:stack": "mine"}}',
        aws_skipMetadataApiCheck="true",
    )
    inputs = found.registered[0].inputs
    assert inputs["profile"] == "work"
    assert json.loads(inputs["assumeRoles"]) == roles
    assert json.loads(inputs["skipMetadataApiCheck"]) is True
    assert json.loads(inputs["defaultTags"])["tags"] == {
        "team": "ml",
        "mlflow-ami:project": "mlflow-ami",
        "mlflow-ami:stack": "dev",
    }


def test_network_has_two_public_subnets(stack: Run) -> None:
    vpc, table = stack.one("ec2.Vpc"), stack.one("ec2.RouteTable")
    subnets = stack.of_type("ec2.Subnet")
    assert {(each.inputs["availabilityZone"], each.inputs["cidrBlock"]) for each in subnets} == {
        ("eu-central-1a", "10.20.0.0/24"),
        ("eu-central-1b", "10.20.1.0/24"),
    }
    assert all(each.inputs["vpcId"] == "network-id" and each.inputs["mapPublicIpOnLaunch"] for each in subnets)
    assert {each.inputs["subnetId"] for each in stack.of_type("ec2.RouteTableAssociation")} == {
        "public-eu-central-1a-id",
        "public-eu-central-1b-id",
    }
    route = stack.one("ec2.Route").inputs
    assert (route["destinationCidrBlock"], route["gatewayId"]) == ("0.0.0.0/0", "network-id")
    endpoint = stack.one("ec2.VpcEndpoint").inputs
    assert endpoint["serviceName"] == "com.amazonaws.eu-central-1.s3"
    assert endpoint["vpcEndpointType"] == "Gateway"
    assert endpoint["routeTableIds"] == ["public-id"]
    assert table.inputs["vpcId"] == "network-id" and "routes" not in table.inputs
    assert vpc.inputs["cidrBlock"] == "10.20.0.0/16"


def rules(found: Run) -> set[tuple[str, int, int, str]]:
    return {
        (each.inputs["ipProtocol"], each.inputs["fromPort"], each.inputs["toPort"], each.inputs["cidrIpv4"])
        for each in found.of_type("vpc.SecurityGroupIngressRule")
    }


def test_only_the_allowed_networks_reach_the_server_and_only_the_web_ports(stack: Run) -> None:
    assert rules(stack) == {("tcp", 80, 80, "203.0.113.7/32"), ("tcp", 443, 443, "203.0.113.7/32")}
    group = stack.one("ec2.SecurityGroup").inputs
    assert "ingress" not in group and "egress" not in group
    (out,) = stack.of_type("vpc.SecurityGroupEgressRule")
    assert (out.inputs["ipProtocol"], out.inputs["cidrIpv4"]) == ("-1", "0.0.0.0/0")
    assert out.inputs["securityGroupId"] == "server-id"


def test_without_tls_only_port_80_is_open() -> None:
    assert rules(run(tls="off")) == {("tcp", 80, 80, "203.0.113.7/32")}


PARAMETERS = ["admin-password", "credentials", "in-service"]


def test_public_authority_can_reach_the_challenge_port_only() -> None:
    found = run(tls="acme", domainName="mlflow.example.com")
    assert rules(found) == {("tcp", 80, 80, "0.0.0.0/0"), ("tcp", 443, 443, "203.0.113.7/32")}
    assert sorted(each.name for each in found.of_type("ssm.Parameter")) == PARAMETERS


def test_there_is_a_parameter_for_the_authority_that_the_machine_writes(stack: Run) -> None:
    parameter = stack.one("ssm.Parameter", "certificate-authority")
    assert parameter.inputs["name"] == "/mlflow-ami/dev/certificate-authority"
    assert parameter.inputs["type"] == "String"
    assert "value" in parameter.request.ignoreChanges
    assert parameter.urn in stack.one("ec2.Instance").dependencies
    assert sorted(each.name for each in run(tls="off").of_type("ssm.Parameter")) == PARAMETERS


def test_ssh_only_from_the_networks_of_the_setting() -> None:
    found = run(
        Account(key_pairs=("ours",)),
        allowedCidrs='["203.0.113.0/24", "198.51.100.0/24"]',
        sshCidrs='["192.0.2.0/24"]',
        keyName="ours",
    )
    web = {("tcp", port, port, cidr) for port in (80, 443) for cidr in ("203.0.113.0/24", "198.51.100.0/24")}
    assert rules(found) == {*web, ("tcp", 22, 22, "192.0.2.0/24")}
    assert found.one("ec2.Instance").inputs["keyName"] == "ours"


def test_postgresql_only_from_the_networks_of_the_setting_and_with_its_own_password(stack: Run) -> None:
    found = run(postgresCidrs='["192.0.2.0/24"]')
    assert rules(found) - rules(stack) == {("tcp", 5432, 5432, "192.0.2.0/24")}
    parameter = found.one("ssm.Parameter", "postgres-reader")
    assert (parameter.inputs["type"], parameter.inputs["value"]) == ("SecureString", "generated-postgres-reader")
    assert parameter.secret == {"value"} and parameter.urn in found.one("ec2.Instance").dependencies
    assert found.outputs["postgresParameter"] == "/mlflow-ami/dev/postgres-reader"


@pytest.mark.parametrize("name", ["mlflow-artifacts", "mlflow-models", "mlflow-backups"])
def test_each_bucket_is_versioned_encrypted_private_and_tidied(stack: Run, name: str) -> None:
    def part(kind: str) -> dict[str, Any]:
        found = stack.one(f"s3.{kind}", name)
        assert found.inputs["bucket"] == f"{name}-1a2b3c4"
        return found.inputs

    assert "forceDestroy" not in stack.one("s3.Bucket", name).inputs
    assert part("BucketVersioning")["versioningConfiguration"] == {"status": "Enabled"}
    assert part("BucketServerSideEncryptionConfiguration")["rules"] == [
        {"applyServerSideEncryptionByDefault": {"sseAlgorithm": "AES256"}}
    ]
    block = part("BucketPublicAccessBlock")
    assert all(block[k] for k in ("blockPublicAcls", "blockPublicPolicy", "ignorePublicAcls", "restrictPublicBuckets"))
    assert part("BucketOwnershipControls")["rule"] == {"objectOwnership": "BucketOwnerEnforced"}
    old, unfinished = part("BucketLifecycleConfiguration")["rules"]
    assert old["noncurrentVersionExpiration"] == {"noncurrentDays": 30}
    assert old["expiration"] == {"expiredObjectDeleteMarker": True}, "current objects never expire"
    assert unfinished["abortIncompleteMultipartUpload"] == {"daysAfterInitiation": 7}
    assert all(rule["status"] == "Enabled" and rule["filter"] == {"prefix": ""} for rule in (old, unfinished))
    lifecycle, versioning = stack.one("s3.BucketLifecycleConfiguration", name), stack.one("s3.BucketVersioning", name)
    assert versioning.urn in lifecycle.dependencies


def test_old_versions_are_kept_for_the_days_of_the_setting() -> None:
    found = run(backupRetentionDays="90")
    kept = {
        each.inputs["rules"][0]["noncurrentVersionExpiration"]["noncurrentDays"]
        for each in found.of_type("s3.BucketLifecycleConfiguration")
    }
    assert kept == {90}


def test_alarm_watches_the_data_volumes_usage() -> None:
    topic = "arn:aws:sns:eu-central-1:123456789012:ops"
    alarm = alarms_of(run(alarmTopicArn=topic))["data-volume-full"]
    watched = {"namespace": "mlflow-ami/dev", "metricName": "DiskUsedPercent", "dimensions": {"VolumeId": VOLUME}}
    assert {name: alarm[name] for name in watched} == watched
    assert (alarm["comparisonOperator"], alarm["threshold"]) == ("GreaterThanOrEqualToThreshold", 90)
    assert alarm["alarmActions"] == alarm["okActions"] == [topic]
    assert alarms_of(run())["data-volume-full"]["alarmActions"] == []


def document(stack: Run) -> launch.LaunchDocument:
    (file,) = yaml.safe_load(stack.one("ec2.Instance").inputs["userData"])["write_files"]
    return launch.parse(file["content"])


def alarms_of(stack: Run) -> dict[str, Any]:
    return {each.name: each.inputs for each in stack.of_type("cloudwatch.MetricAlarm")}


def test_every_alarm_of_the_setting_is_created_and_in_the_launch_document() -> None:
    found = alarms_of(run())
    assert set(found) == {*alarms.NAMES, alarms.STATUS_CHECK}
    assert document(run()).monitoring.alarms == alarms.NAMES
    down = found["server-down"]
    assert (down["treatMissingData"], down["period"] * down["evaluationPeriods"]) == ("breaching", 180)
    assert {each["treatMissingData"] for name, each in found.items() if name != "server-down"} == {"missing"}
    assert all("mlflow-dev" in each["alarmDescription"] for each in found.values())


def test_only_chosen_alarms_are_created_and_measured() -> None:
    chosen = run(alarms='["status-check", "server-down"]')
    assert set(alarms_of(chosen)) == {"server-down", "status-check"}
    assert document(chosen).monitoring.alarms == ("server-down",)
    none = run(alarms="[]")
    assert alarms_of(none) == {} and document(none).monitoring.alarms == ()


def test_log_group_is_there_before_the_machine_and_only_with_a_retention() -> None:
    found = run(logRetentionDays="30", stack_name="prod")
    group = found.one("cloudwatch.LogGroup")
    assert (group.inputs["name"], group.inputs["retentionInDays"]) == ("/mlflow-ami/prod", 30)
    assert group.urn in found.one("iam.RolePolicy", "server").dependencies
    assert found.one("iam.RolePolicy", "server").urn in found.one("ec2.Instance").dependencies
    assert run().of_type("cloudwatch.LogGroup") == []


def test_dashboard_has_the_plots_of_the_metrics_that_the_machine_then_sends() -> None:
    found = run(dashboard="true", alarms="[]", stack_name="prod.eu")
    dashboard = found.one("cloudwatch.Dashboard").inputs
    assert dashboard["dashboardName"] == "mlflow-prod_eu"
    shown = [each["properties"] for each in json.loads(dashboard["dashboardBody"])["widgets"]]
    assert {each["region"] for each in shown} == {"eu-central-1"}
    lines = [line for each in shown for line in each["metrics"]]
    assert {line[0] for line in lines} == {"mlflow-ami/prod.eu"}
    sent = document(found).monitoring
    assert {line[1] for line in lines} == alarms.metrics(sent.alarms, sent.dashboard)
    assert [line[2:] for line in lines if line[1] == alarms.DISK_USED] == [[alarms.VOLUME, VOLUME]]
    assert run().of_type("cloudwatch.Dashboard") == []


def test_machine_that_fails_its_status_check_is_rebooted() -> None:
    alarm = alarms_of(run())["status-check"]
    assert (alarm["namespace"], alarm["metricName"]) == ("AWS/EC2", "StatusCheckFailed_Instance")
    (reboot,) = alarm["alarmActions"]
    assert reboot == "arn:aws:automate:eu-central-1:ec2:reboot"


def test_older_image_gets_the_alarm_whose_metric_it_sends_and_the_preview_names_the_others() -> None:
    older = run(Account(images={NEW: Image(tags=image_tags(launch_revision="4"))}))
    assert set(alarms_of(older)) == {"data-volume-full", "status-check"}
    (told,) = [line for _, line in older.log if "metrics of these alarms" in line]
    assert (
        "server-down, backups-late, memory-full, server-errors, certificate-ends, unit-failed. The alarms are" in told
    )


def test_data_volume_is_encrypted_and_protected(stack: Run) -> None:
    inputs = stack.one("ebs.Volume").inputs
    assert (inputs["type"], inputs["size"], inputs["encrypted"]) == ("gp3", 20, True)
    assert inputs["tags"] == {
        "Name": "mlflow-dev-data",
        "mlflow-ami:role": "data",
        "mlflow-ami:last-image": NEW,
        "mlflow-ami:image-version": "20261122T101500Z",
        "mlflow-ami:mlflow-version": "3.17.2",
        "mlflow-ami:migration-head": "dc11669786a5",
        "mlflow-ami:migration-count": "67",
        "mlflow-ami:postgresql-major": "15",
        "mlflow-ami:launch-revision": str(launch.REVISION),
        **{f"mlflow-ami:bucket-{name}": f"mlflow-{name}-1a2b3c4" for name in ("artifacts", "models", "backups")},
    }


def where(found: Run) -> tuple[str, str]:
    """Return the zone of the data volume and the subnet of the instance."""
    return found.one("ebs.Volume").inputs["availabilityZone"], found.one("ec2.Instance").inputs["subnetId"]


@pytest.mark.parametrize(
    ("there", "config", "zone"),
    [
        (Account(), {}, "eu-central-1a"),
        (Account(), {"availabilityZone": "eu-central-1c"}, "eu-central-1c"),
        (Account(), {"instanceType": "p5.huge"}, "eu-central-1b"),
        (Account(volumes=data_volume(zone="eu-central-1c")), {}, "eu-central-1c"),
        (Account(volumes=data_volume(), zones=("eu-central-1b", "eu-central-1c")), {}, "eu-central-1a"),
    ],
    ids=["first", "asked for", "that has the type", "of the volume", "of the volume, although AWS no longer lists it"],
)
def test_server_and_data_volume_are_in_one_zone_and_stay_there(
    there: Account, config: dict[str, Any], zone: str
) -> None:
    found = run(there, **config)
    assert found.refusal == ""
    assert where(found) == (zone, f"public-{zone}-id")
    zones = {each.inputs["availabilityZone"] for each in found.of_type("ec2.Subnet")}
    assert len(zones) == 2 and zone in zones


def test_a_zones_subnet_does_not_depend_on_other_zones() -> None:
    def block(zones: tuple[str, ...]) -> str:
        found = run(Account(volumes=data_volume(zone="eu-central-1b"), zones=zones))
        return str(found.one("ec2.Subnet", "public-eu-central-1b").inputs["cidrBlock"])

    assert block(("eu-central-1b", "eu-central-1c")) == block(("eu-central-1a", "eu-central-1b"))


def test_instance_has_imdsv2_and_the_stacks_user_data(stack: Run) -> None:
    inputs = stack.one("ec2.Instance").inputs
    assert inputs["ami"] == NEW
    assert inputs["instanceType"] == "t3.small"
    assert inputs["vpcSecurityGroupIds"] == ["server-id"]
    assert inputs["iamInstanceProfile"] == "server-profile-1a2b3c4"
    assert inputs["userDataReplaceOnChange"] is True
    assert inputs["metadataOptions"] == {
        "httpEndpoint": "enabled",
        "httpTokens": "required",
        "httpPutResponseHopLimit": 1,
        "instanceMetadataTags": "disabled",
    }
    assert inputs["rootBlockDevice"] == {
        "volumeType": "gp3",
        "volumeSize": 8,
        "encrypted": True,
        "deleteOnTermination": True,
    }
    assert "keyName" not in inputs


def test_root_volume_has_the_size_of_the_image_unless_set_larger() -> None:
    def size(image_gib: int, **config: str) -> Any:
        found = run(Account(images={NEW: Image(root_gib=image_gib)}), **config)  # type: ignore[arg-type]
        return found.one("ec2.Instance").inputs["rootBlockDevice"].get("volumeSize")

    assert (size(30), size(30, rootVolumeGib="30"), size(8, rootVolumeGib="30"), size(0)) == (30, 30, 30, None)


def needed_for(found: Run, resource: Registration) -> set[tuple[str, str]]:
    """Return type and name of all resources on which a resource depends directly or indirectly."""
    by_urn = {each.urn: each for each in found.registered}
    seen: set[str] = set()
    waiting = [resource.urn]
    while waiting:
        urn = waiting.pop()
        if urn not in seen:
            seen.add(urn)
            waiting += list(by_urn[urn].dependencies)
    return {(by_urn[urn].type.split(":")[-1], by_urn[urn].name) for urn in seen - {resource.urn}}


def test_instance_is_created_after_all_that_its_boot_needs(stack: Run) -> None:
    """A boot fails if one of the resources in the test's set is missing."""
    there = needed_for(stack, stack.one("ec2.Instance"))
    assert there >= {
        ("Route", "internet"),
        ("RouteTableAssociation", "public-eu-central-1a"),
        ("VpcEndpoint", "s3"),
        ("SecurityGroupIngressRule", "http-80-203.0.113.7/32"),
        ("SecurityGroupIngressRule", "https-443-203.0.113.7/32"),
        ("SecurityGroupEgressRule", "anywhere"),
        ("RolePolicy", "server"),
        ("RolePolicy", "mlflow"),
        ("Parameter", "credentials"),
        ("Parameter", "certificate-authority"),
        ("Volume", "data"),
        ("Eip", "server"),
        *((kind, name) for kind in BUCKET_PARTS for name in ("mlflow-artifacts", "mlflow-models", "mlflow-backups")),
    }


BUCKET_PARTS = (
    "Bucket",
    "BucketVersioning",
    "BucketServerSideEncryptionConfiguration",
    "BucketPublicAccessBlock",
    "BucketOwnershipControls",
    "BucketLifecycleConfiguration",
    "BucketPolicy",
)


def test_attachment_and_address_follow_the_instance(stack: Run) -> None:
    instance = stack.one("ec2.Instance")
    attachment, association = stack.one("ec2.VolumeAttachment"), stack.one("ec2.EipAssociation")
    assert attachment.inputs == {
        "instanceId": "i-0123456789abcdef0",
        "volumeId": VOLUME,
        "deviceName": "/dev/sdf",
        "stopInstanceBeforeDetaching": True,
    }
    assert association.inputs == {"instanceId": "i-0123456789abcdef0", "allocationId": "server-id"}
    assert instance.urn in attachment.dependencies & association.dependencies
    assert "instance" not in stack.one("ec2.Eip").inputs


def test_a_name_is_written_only_into_a_hosted_zone() -> None:
    assert run(domainName="mlflow.example.com").of_type("route53.Record") == []
    found = run(Account(hosted_zones={"Z0": "example.com."}), domainName="mlflow.example.com", hostedZoneId="Z0").one(
        "route53.Record"
    )
    assert found.inputs == {
        "zoneId": "Z0",
        "name": "mlflow.example.com",
        "type": "A",
        "ttl": 300,
        "records": ["52.1.2.3"],
    }


def test_nothing_of_the_stack_is_deprecated_in_the_provider(stack: Run) -> None:
    """The test compares the stack's types and arguments with the deprecations in the installed pulumi-aws."""
    for each in stack.registered:
        if not each.type.startswith("aws:"):
            continue
        module, _, name = each.type.removeprefix("aws:").partition("/")
        resource = getattr(getattr(aws, module), name.split(":")[1])
        assert not getattr(resource, "__deprecated__", None), each.type
        assert "warnings.warn" not in inspect.getsource(resource.__init__), each.type
        for argument in each.inputs:
            snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in argument)
            found = inspect.getattr_static(resource, snake, None)
            source = inspect.getsource(found.fget) if isinstance(found, property) and found.fget else ""
            assert "@_utilities.deprecated" not in source, f"{each.type}.{snake}"


def test_preview_of_a_new_stack_registers_the_same_resources_as_up(stack: Run) -> None:
    """In a first preview, IDs, addresses and names are unknown, and the program must complete without the unknown
    values."""
    previewed = run(preview=True)
    assert previewed.refusal == ""
    assert {each.urn for each in previewed.registered} == {each.urn for each in stack.registered}


def test_two_runs_with_the_same_settings_ask_for_the_same(stack: Run) -> None:
    again = run()
    assert {each.urn: each.inputs for each in again.registered} == {each.urn: each.inputs for each in stack.registered}


def test_another_image_changes_the_instance_and_the_record_and_nothing_else(stack: Run) -> None:
    other = "ami-0000000000000009d"
    image = Account().images[NEW]
    found = run(Account(images={other: image}, volumes=data_volume()), amiId=other)
    before = {each.urn: each.inputs for each in stack.registered}
    changed = {
        (each.name, key)
        for each in found.registered
        for key in each.inputs.keys() | before[each.urn].keys()
        if each.inputs.get(key) != before[each.urn].get(key)
    }
    assert changed == {("server", "ami"), ("data", "tags"), ("image", "resourceId")}
