"""Each setting is declared once, and preview reports all mistakes in the settings together."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import Any

import pulumi
import pulumi_aws as aws
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pulumi.runtime import configure, mocks

import settings
from tests.stack.program import ADDRESS, CONFIG, INFRA, Account, data_volume, run

PROJECT = yaml.safe_load((INFRA / "Pulumi.yaml").read_text())
ARRAY = {"type": "array", "items": {"type": "string"}}
REQUIRED = {"amiId", "allowedCidrs"}


def test_every_setting_has_a_type_a_default_of_it_and_a_description() -> None:
    kinds = {"string": str, "integer": int, "boolean": bool, "array": list}
    for name, entry in PROJECT["config"].items():
        assert set(entry) <= {"type", "items", "default", "description"}, name
        assert type(entry["default"]) is kinds[entry["type"]], name
        assert entry["description"].strip().endswith("."), name
        assert entry["type"] != "array" or entry["items"] == {"type": "string"}, name


def test_settings_are_those_that_pulumi_yaml_declares() -> None:
    declared = {re.sub(r"([A-Z])", r"_\1", name).lower() for name in PROJECT["config"]}
    assert {field.name for field in fields(settings.Settings)} - {"project", "stack", "region"} == declared


def test_only_image_and_allowed_networks_are_required() -> None:
    refused = run(amiId=None, allowedCidrs=None)
    assert {sentence.split()[0] for sentence in refused.stated} == REQUIRED
    assert "There are 2 mistakes; nothing was changed" in refused.refusal
    assert "scripts/bake.py" in refused.refusal
    assert "pulumi config set --path 'allowedCidrs[0]' 203.0.113.7/32" in refused.refusal


def test_an_empty_list_of_networks_is_none() -> None:
    assert run(allowedCidrs="[]").stated[0].startswith("allowedCidrs is missing")


BACKED_UP = Account(
    volumes=data_volume(),
    objects=(
        "dumps/20261122T013300Z-nightly-f4a9b2c7d1e6.dump",
        "pgbackrest/backup/pg15-7-20261101T000000Z/20261122-013005F/backup.manifest",
        "pgbackrest/backup/pg15-7-20261101T000000Z/20261122-013005F_20261123-010000D/backup.manifest",
    ),
)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"amiId": "ami-123"}, "amiId: 'ami-123' is not the ID of an image (ami-…)."),
        ({"amiId": "ami-0000000000000002b\n"}, None),
        ({"allowedCidrs": '["203.0.113.7"]'}, "no prefix length: write 203.0.113.7/32 for this one address."),
        (
            {"allowedCidrs": '["203.0.113.7/24"]'},
            "has host bits set: write 203.0.113.0/24 or 203.0.113.7/32.",
        ),
        (
            {"allowedCidrs": '["my office"]'},
            "has 'my office', which is not a network in CIDR notation such as 203.0.113.0/24.",
        ),
        ({"allowedCidrs": '["203.0.113.0/33"]'}, "which is not a network in CIDR notation"),
        ({"allowedCidrs": '["2001:db8::/32"]'}, "which is IPv6: the server has an IPv4 address only."),
        ({"allowedCidrs": "[1, 2]"}, "allowedCidrs: '[1, 2]' must be a list of strings."),
        ({"allowedCidrs": '{"a": "b"}'}, "must be a list of strings."),
        ({"allowedCidrs": "203.0.113.0/24, 198.51.100.0/24"}, None),
        ({"sshCidrs": '["10.0.0.1/8"]', "keyName": "ours"}, "sshCidrs: '[\"10.0.0.1/8\"]' has '10.0.0.1/8'"),
        ({"sshCidrs": '["10.0.0.0/8"]'}, "sshCidrs is set but keyName is not"),
        ({"postgresCidrs": '["10.0.0.0/8"]', "tls": "off"}, "postgresCidrs is set but tls is off"),
        ({"postgresCidrs": '["10.0.0.1/8"]'}, "has host bits set"),
        ({"instanceType": "small"}, "instanceType: 'small' is not an instance type such as t3.small."),
        ({"dataVolumeGib": "twenty"}, "dataVolumeGib: 'twenty' must be a whole number."),
        ({"dataVolumeGib": "0"}, "dataVolumeGib: '0' must be from 1 to 16384 GiB."),
        ({"dataVolumeGib": "16385"}, "must be from 1 to 16384 GiB."),
        ({"dataVolumeGib": "16384"}, None),
        ({"rootVolumeGib": "3"}, "rootVolumeGib: '3' must be from 4 to 16384 GiB."),
        ({"deletedRetentionDays": "3651"}, "deletedRetentionDays: '3651' must be from 0 to 3650 days."),
        ({"deletedRetentionDays": "0"}, None),
        (
            {"logRetentionDays": "10"},
            "logRetentionDays: '10' is not a retention period of CloudWatch Logs: the nearest period is 7.",
        ),
        (
            {"logRetentionDays": "-5"},
            "logRetentionDays: '-5' is not a retention period of CloudWatch Logs: the nearest period is 0.",
        ),
        ({"logRetentionDays": "ever"}, "logRetentionDays: 'ever' must be a whole number."),
        ({"logRetentionDays": "30"}, None),
        ({"dashboard": "yes"}, "dashboard: 'yes' must be true or false."),
        ({"alarmTopicArn": "ops"}, "alarmTopicArn: 'ops' is not the ARN of an SNS topic."),
        (
            {"alarmTopicArn": "arn:aws:sns:us-east-1:123456789012:ops"},
            "alarmTopicArn is in region us-east-1, not in eu-central-1",
        ),
        ({"backupRetentionDays": "0"}, "backupRetentionDays: '0' must be from 1 to 3650 days."),
        ({"backupRetentionDays": "3651"}, "must be from 1 to 3650 days."),
        ({"availabilityZone": "Frankfurt"}, "availabilityZone: 'Frankfurt' is not a zone such as eu-central-1a."),
        ({"availabilityZone": "us-east-1a"}, "availabilityZone: 'us-east-1a' is not in the region eu-central-1."),
        ({"domainName": "MLflow.example.com"}, "is not a domain name in lower case such as mlflow.example.com."),
        ({"domainName": "mlflow"}, "is not a domain name in lower case"),
        ({"domainName": "52.1.2.3"}, "is not a domain name in lower case"),
        ({"domainName": "https://mlflow.example.com"}, "is not a domain name in lower case"),
        ({"hostedZoneId": "example.com", "domainName": "mlflow.example.com"}, "is not the ID of a hosted zone (Z…)."),
        ({"hostedZoneId": "Z0123"}, "hostedZoneId is set but domainName is not"),
        ({"keyName": " "}, None),
        ({"keyName": "clé"}, "is not the name of a key pair."),
        ({"artifactTransfer": "fast"}, "artifactTransfer: 'fast' must be direct or proxied."),
        ({"tls": "on"}, "tls: 'on' must be private, acme or off."),
        ({"tls": "acme"}, "tls is acme but domainName is not set: name the domain to certify"),
        ({"tls": "acme", "domainName": "mlflow.example.com"}, None),
        ({"acmeEmail": "nobody"}, "acmeEmail: 'nobody' is not an e-mail address."),
        (
            {"acmeEmail": "ops@example.com"},
            "acmeEmail is set but tls is private: set tls to acme, or remove acmeEmail.",
        ),
        (
            {"tls": "acme", "domainName": "mlflow.example.com", "acmeDirectory": "http://a"},
            "acmeDirectory: 'http://a' is not the https:// address of an ACME directory.",
        ),
        ({"acmeDirectory": "https://a/directory"}, "acmeDirectory is set but tls is private: set tls to acme"),
        ({"jobExecution": "yes"}, "jobExecution: 'yes' must be true or false."),
        ({"jobExecution": "True"}, None),
        (
            {"s3Endpoint": "minio:9000"},
            "s3Endpoint: 'minio:9000' must be an http:// or https:// address without a path.",
        ),
        (
            {"s3Endpoint": "http://minio:9000"},
            "backupsEndpoint must be an https:// address where s3Endpoint is http://",
        ),
        ({"backupsEndpoint": "http://minio:9000"}, "backupsEndpoint must be an https:// address"),
        ({"backupsEndpoint": "minio"}, "backupsEndpoint: 'minio' must be an http:// or https:// address"),
        ({"backupsAuthority": "/etc/ca.pem"}, "backupsAuthority: '/etc/ca.pem' must be certificates in PEM"),
        ({"restoreFrom": "yesterday"}, "restoreFrom: 'yesterday' must be latest, a point in time such as"),
        ({"restoreFrom": "2026-11-22T14:15:00Z"}, None),
        ({"restoreFrom": "20261122-013005F_20261123-010000D"}, None),
        ({"restoreFrom": "s3://bucket/dumps/20261122T013300Z-nightly-f4a9b2c7d1e6.dump"}, None),
        ({"ssmEndpoint": "https://vpce.example.com/x"}, "ssmEndpoint: 'https://vpce.example.com/x' must be an http://"),
        ({"instancetype": "t3.small"}, "instancetype is not a setting of this stack: did you mean instanceType?"),
        ({"zzz": "1"}, "zzz is not a setting of this stack: remove it with `pulumi config rm zzz`."),
        ({"aws_region": None}, "The region is missing: `pulumi config set aws:region`"),
        ({"aws_region": "Frankfurt"}, "aws:region: 'Frankfurt' is not a region such as eu-central-1."),
        ({"adminPassword": "correct horse"}, "adminPassword is stored in clear"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_value_and_the_remedy(
    config: dict[str, Any], sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_REGION", raising=False)
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    refused = run(BACKED_UP if sentence is None and "restoreFrom" in config else None, **config)
    if sentence is None:
        assert refused.refusal == ""
        return
    assert [stated for stated in refused.stated if sentence in stated], refused.refusal
    assert all("\n" not in stated and stated.endswith((".", "?")) for stated in refused.stated)


def test_all_mistakes_come_together_and_before_anything_is_made() -> None:
    refused = run(
        Account(images={}),
        preview=True,
        allowedCidrs='["nowhere"]',
        dataVolumeGib="-1",
        instanceType="p9.tiny",
        keyName="lost",
        artifactTransfer="fast",
    )
    subjects = {stated.split(":")[0] for stated in refused.stated}
    assert subjects == {"amiId", "allowedCidrs", "dataVolumeGib", "instanceType", "keyName", "artifactTransfer"}
    assert [each.type for each in refused.registered] == ["pulumi:providers:aws"]


def test_one_mistake_is_not_called_several() -> None:
    assert run(dataVolumeGib="0").refusal.startswith("There is a mistake in the settings; nothing was changed:\n")


@pytest.mark.parametrize("password", ["short", "with spaces in it", "not-just-ascii-é", "x" * 129])
def test_a_bad_password_is_refused_without_showing_it(password: str) -> None:
    refused = run(secrets={"adminPassword": password})
    assert refused.stated == ["adminPassword must be 12 to 128 visible ASCII characters without spaces."]
    assert password not in refused.refusal


def test_a_stack_name_the_machine_would_refuse_is_refused() -> None:
    assert "The stack's name" in run(stack_name="x" * 51).stated[0]


def test_the_region_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    account = Account(zones=("eu-west-1a", "eu-west-1b"), offered={"t3.small": ("eu-west-1a",)})
    assert run(account, aws_region=None).one("ec2.VpcEndpoint").inputs["serviceName"] == "com.amazonaws.eu-west-1.s3"


def test_more_networks_than_a_security_group_holds_are_refused() -> None:
    many = json.dumps([f"10.{n}.0.0/16" for n in range(31)])
    assert "make 62 inbound rules, more than the 60" in run(allowedCidrs=many).stated[0]
    assert run(allowedCidrs=json.dumps([f"10.{n}.0.0/16" for n in range(30)])).refusal == ""


def test_the_whole_world_is_allowed_only_with_a_warning() -> None:
    opened = run(allowedCidrs='["0.0.0.0/0"]')
    assert opened.refusal == ""
    assert [text for level, text in opened.log if level == "WARNING"] == [
        "allowedCidrs has 0.0.0.0/0: the login is open to the whole internet."
    ]
    assert not [text for level, text in run().log if level == "WARNING"]
    assert [text for level, text in run(tls="off").log if level == "WARNING"] == [
        "tls is off: passwords and data cross the network in clear."
    ]


def test_jobs_come_with_a_warning_of_what_they_reach() -> None:
    [warning] = [text for level, text in run(jobExecution="true").log if level == "WARNING"]
    assert warning.startswith("jobExecution is on: a job has the rights of MLflow itself, whoever starts it.")
    assert PROJECT["config"]["jobExecution"]["description"].endswith("only for writers who trust each other.")


def test_a_network_named_twice_is_one_rule() -> None:
    found = run(allowedCidrs='["203.0.113.7/32", "203.0.113.7/32"]')
    assert len(found.of_type("vpc.SecurityGroupIngressRule")) == 2, "one for each port"


def test_retentions_of_logs_are_those_of_the_provider_and_in_the_description() -> None:
    """The provider's documentation of `retention_in_days` lists the values that CloudWatch Logs accepts."""
    text, _, _ = (aws.cloudwatch.LogGroupArgs.retention_in_days.__doc__ or "").partition(", and 0.")
    assert set(settings.RETENTION_DAYS) == {0, *map(int, re.findall(r"\d+", text))}
    described = {int(number) for number in re.findall(r"\d+", PROJECT["config"]["logRetentionDays"]["description"])}
    assert set(settings.RETENTION_DAYS) <= described


def test_defaults_are_those_of_pulumi_yaml() -> None:
    found = run()
    assert found.one("ec2.Instance").inputs["instanceType"] == PROJECT["config"]["instanceType"]["default"]
    assert found.one("ebs.Volume").inputs["size"] == PROJECT["config"]["dataVolumeGib"]["default"]
    assert found.outputs["url"] == f"https://{ADDRESS}"


TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", "[]", "null", "true", "-1", "1e9", '[""]', "[[]]", "{}", '"x"', "[null]", "9" * 400, "\x00"]),
    st.lists(st.text(max_size=20), max_size=3).map(json.dumps),
)


@hypothesis_settings(max_examples=100)
@given(
    st.dictionaries(st.sampled_from(sorted(PROJECT["config"])), TEXT, max_size=6), st.text(max_size=60), st.booleans()
)
def test_any_configuration_gives_settings_or_error_sentences(
    values: dict[str, str], stack_name: str, hidden: bool
) -> None:
    configure(mocks.MockSettings(project="mlflow-ami", stack=stack_name))  # type: ignore[no-untyped-call]
    config = {**CONFIG, **{f"mlflow-ami:{name}": value for name, value in values.items()}}
    pulumi.runtime.set_all_config(config, ["mlflow-ami:adminPassword"] if hidden else [])
    found, mistakes = settings.read()
    assert all(mistake.endswith((".", "?")) for mistake in mistakes)
    assert isinstance(found.data_volume_gib, int)
    assert all(isinstance(cidr, str) for cidr in found.allowed_cidrs)
    password = values.get("adminPassword", "")
    others = [stack_name, *(value for name, value in values.items() if name != "adminPassword")]
    if len(password) > 20 and not any(password in value for value in others):
        assert password not in settings.as_sentences(mistakes)


def test_readme_lists_the_settings() -> None:
    rows = []
    for name, entry in PROJECT["config"].items():
        default = "**required**" if name in REQUIRED else _shown(entry["default"])
        rows.append(f"| `{name}` | {default} | {entry['description'].strip().removeprefix('Required. ')} |")
    readme = (INFRA / "README.md").read_text().splitlines()
    start = readme.index("| setting | default | meaning |") + 2
    assert readme[start : start + len(rows) + 1] == [*rows, ""]


def _shown(default: Any) -> str:
    return "" if default in ("", []) else f"`{json.dumps(default).strip(chr(34))}`"
