"""The stack's settings: the Pulumi configuration, read once into one frozen dataclass.

Names, types, defaults and descriptions come from Pulumi.yaml. This module does not call AWS; `preflight` does.
"""

from __future__ import annotations

import difflib
import functools
import ipaddress
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pulumi
import pulumi.runtime.config
import yaml

from contract import alarms, launch, restore_request

PROJECT = Path(__file__).with_name("Pulumi.yaml")

ADMIN = "admin"
ANYWHERE = "0.0.0.0/0"
RESERVED = ("facts", "images")
"""Names that no stack can have, because scripts/images.py uses them below /mlflow-ami/ in Systems Manager."""
RETENTION_DAYS = (
    *(0, 1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653),
)
"""Values of `logRetentionDays`: 0, and the values that PutRetentionPolicy of CloudWatch Logs accepts."""
RULES_PER_GROUP = 60
"""Default quota of inbound rules in a security group (Amazon VPC quotas)."""


@dataclass(frozen=True)
class Settings:
    """The stack's settings. A setting without a value is "", as in the launch document."""

    project: str
    stack: str
    region: str
    ami_id: str
    """The ID of the image; empty if the setting `channel` selects the image."""
    channel: str
    allowed_cidrs: tuple[str, ...]
    instance_type: str
    data_volume_gib: int
    root_volume_gib: int
    availability_zone: str
    domain_name: str
    tls: str
    """The key web.tls of the launch document: private, acme or off."""
    acme_email: str
    acme_directory: str
    hosted_zone_id: str
    admin_password: str = field(repr=False)
    """Secret: wrap it in pulumi.Output.secret before passing it to a resource."""
    ssh_cidrs: tuple[str, ...]
    postgres_cidrs: tuple[str, ...]
    """Networks from which clients may read the database. PostgreSQL listens on the network only if the tuple is not
    empty."""
    key_name: str
    artifact_transfer: str
    job_execution: bool
    deleted_retention_days: int
    """Days after which items that users deleted in MLflow are permanently removed; 0: never."""
    backup_retention_days: int
    alarms: tuple[str, ...]
    """Names in `contract.alarms`."""
    alarm_topic_arn: str
    dashboard: bool
    log_retention_days: int
    """Days for which the log group keeps a line; 0: the stack has no log group."""
    restore_from: str
    """The backup to restore at the next boot. The machine restores each value only once."""
    backups_endpoint: str
    backups_authority: str
    s3_endpoint: str
    ssm_endpoint: str
    sts_endpoint: str
    monitoring_endpoint: str
    logs_endpoint: str

    @property
    def title(self) -> str:
        """The stack's name in the AWS console."""
        return f"mlflow-{self.stack}"

    @property
    def scheme(self) -> str:
        return "http" if self.tls == "off" else "https"

    @property
    def doors(self) -> list[tuple[str, int, tuple[str, ...]]]:
        """The inbound rules: (name, port, networks). With TLS, port 80 only redirects to port 443. With tls acme, port
        80 is open to everybody, because the certificate authority does not publish the addresses from which it
        connects."""
        encrypted = [("https", 443, self.allowed_cidrs)] if self.tls != "off" else []
        plain = ("http", 80, (ANYWHERE,) if self.tls == "acme" else self.allowed_cidrs)
        return [plain, *encrypted, ("ssh", 22, self.ssh_cidrs), ("postgresql", 5432, self.postgres_cidrs)]

    @property
    def log_group(self) -> str:
        """The log group's name; "" if the stack has no log group."""
        return f"/mlflow-ami/{self.stack}" if self.log_retention_days else ""

    def parameter(self, name: str) -> str:
        """Full name of one of the stack's parameters in Systems Manager."""
        return f"/mlflow-ami/{self.stack}/{name}"


@functools.cache
def schema() -> Mapping[str, Mapping[str, Any]]:
    """The settings that Pulumi.yaml declares: name → type, default, description."""
    return dict(yaml.safe_load(PROJECT.read_text())["config"])


def read() -> tuple[Settings, list[str]]:
    """Return (the settings of the selected stack, the mistakes in these settings). Each mistake is one sentence.

    A setting with a mistake gets its default value, so that the code can also check the other settings.
    """
    project, stack = pulumi.get_project(), pulumi.get_stack()
    mistakes = _unknown(project) + _stack_name(stack)

    def take(name: str, check: Callable[[Any], str | None] = lambda value: None) -> Any:
        declared = schema()[name]
        given = pulumi.Config(project).get(name)
        if given is None:
            return _frozen(declared["default"])
        value = _CONVERSIONS[declared["type"]](given)
        wrong = check(value) if value is not None else f"must be {_KINDS[declared['type']]}"
        if value == _frozen(declared["default"]) or not wrong:
            return value
        shown = "the value given" if pulumi.runtime.config.is_config_secret(f"{project}:{name}") else repr(given)
        mistakes.append(f"{name}: {shown} {wrong}.")
        return _frozen(declared["default"])

    found = Settings(
        project=project,
        stack=stack,
        region=_region(mistakes),
        ami_id=take("amiId", _matches(r"ami-([0-9a-f]{8}|[0-9a-f]{17})", "is not the ID of an image (ami-…)")),
        channel=take(
            "channel", _matches(r"(?!ami-)[a-z][a-z0-9-]{0,39}", "is not the name of a channel such as staging")
        ),
        allowed_cidrs=take("allowedCidrs", _networks),
        instance_type=take(
            "instanceType", _matches(r"[a-z0-9-]+\.[a-z0-9-]+", "is not an instance type such as t3.small")
        ),
        data_volume_gib=take("dataVolumeGib", _between(1, 16384, "GiB")),
        root_volume_gib=take("rootVolumeGib", _between(4, 16384, "GiB")),
        availability_zone=take("availabilityZone", _matches(r"[a-z0-9-]+[a-z]", "is not a zone such as eu-central-1a")),
        domain_name=take("domainName", _domain),
        tls=take("tls", _matches("private|acme|off", "must be private, acme or off")),
        acme_email=take("acmeEmail", _matches(r"[^@\s]{1,64}@[^@\s]{1,255}", "is not an e-mail address")),
        acme_directory=take(
            "acmeDirectory", _matches(r"https://[!-~]{1,500}", "is not the https:// address of an ACME directory")
        ),
        hosted_zone_id=take("hostedZoneId", _matches(r"Z[A-Z0-9]{1,31}", "is not the ID of a hosted zone (Z…)")),
        admin_password=_password(project, mistakes),
        ssh_cidrs=take("sshCidrs", _networks),
        postgres_cidrs=take("postgresCidrs", _networks),
        key_name=take("keyName", _matches(r"[!-~]([ -~]{0,253}[!-~])?", "is not the name of a key pair")),
        artifact_transfer=take("artifactTransfer", _matches("direct|proxied", "must be direct or proxied")),
        job_execution=take("jobExecution"),
        deleted_retention_days=take("deletedRetentionDays", _between(0, 3650, "days")),
        alarms=take("alarms", _names_of_alarms),
        alarm_topic_arn=take(
            "alarmTopicArn",
            _matches(r"arn:aws[a-z-]*:sns:[a-z0-9-]+:\d{12}:[A-Za-z0-9_-]{1,256}", "is not the ARN of an SNS topic"),
        ),
        dashboard=take("dashboard"),
        log_retention_days=take("logRetentionDays", _days_of_logs),
        backup_retention_days=take("backupRetentionDays", _between(1, 3650, "days")),
        restore_from=take("restoreFrom", restore_request.wrong),
        backups_endpoint=take("backupsEndpoint", launch.endpoint_url),
        backups_authority=take("backupsAuthority", launch.certificates),
        s3_endpoint=take("s3Endpoint", launch.endpoint_url),
        ssm_endpoint=take("ssmEndpoint", launch.endpoint_url),
        sts_endpoint=take("stsEndpoint", launch.endpoint_url),
        monitoring_endpoint=take("monitoringEndpoint", launch.endpoint_url),
        logs_endpoint=take("logsEndpoint", launch.endpoint_url),
    )
    given = functools.partial(pulumi.Config(project).get, default="")
    if not given("amiId") and not given("channel"):
        mistakes.append(
            "amiId is missing: bake an image with scripts/bake.py and `pulumi config set amiId` to the ID it prints, "
            "or name a channel with `pulumi config set channel`."
        )
    if given("allowedCidrs") in ("", "[]"):
        mistakes.append(
            "allowedCidrs is missing: name the networks that may reach the server, for example your own address with "
            "`pulumi config set --path 'allowedCidrs[0]' 203.0.113.7/32`."
        )
    return found, mistakes + _contradictions(found)


def as_sentences(mistakes: list[str]) -> str:
    """All mistakes in one message, with one line for each mistake."""
    head = "There is a mistake in the settings" if len(mistakes) == 1 else f"There are {len(mistakes)} mistakes"
    return "\n".join([f"{head}; nothing was changed:", *(f"  - {mistake}" for mistake in mistakes)])


def cautions(config: Settings) -> list[str]:
    """Warnings about settings that are allowed but risky."""
    found = []
    if ANYWHERE in config.allowed_cidrs:
        found.append(f"allowedCidrs has {ANYWHERE}: the login is open to the whole internet.")
    if ANYWHERE in config.postgres_cidrs:
        found.append(f"postgresCidrs has {ANYWHERE}: PostgreSQL is open to the whole internet.")
    if config.tls == "off":
        found.append("tls is off: passwords and data cross the network in clear.")
    if config.job_execution:
        found.append(
            "jobExecution is on: a job has the rights of MLflow itself, whoever starts it. Code in a job reaches all "
            "of MLflow's database, artifacts and provider keys, but no backup and no password: use it only where "
            "writers trust each other."
        )
    return found


def _unknown(project: str) -> list[str]:
    keys = pulumi.runtime.config.CONFIG.get() or pulumi.runtime.config.get_config_env()
    names = sorted(key.removeprefix(f"{project}:") for key in keys if key.startswith(f"{project}:"))
    mistakes = []
    for name in names:
        if name not in schema():
            meant = difflib.get_close_matches(name, schema(), n=1)
            remedy = f"did you mean {meant[0]}?" if meant else f"remove it with `pulumi config rm {name}`."
            mistakes.append(f"{name} is not a setting of this stack: {remedy}")
    return mistakes


def _stack_name(stack: str) -> list[str]:
    if stack in RESERVED:
        return [
            f"The stack's name {stack!r} is taken: /mlflow-ami/{stack}/ contains parameters of images. Choose another."
        ]
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,49}", stack):
        return []
    return [f"The stack's name {stack!r} must be 1 to 50 letters, digits, dots, hyphens or underscores."]


def _region(mistakes: list[str]) -> str:
    region = pulumi.Config("aws").get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        mistakes.append("The region is missing: `pulumi config set aws:region`, for example to eu-central-1.")
    elif not re.fullmatch(r"[a-z]{2,4}(-[a-z]+)+-\d{1,2}", region):
        mistakes.append(f"aws:region: {region!r} is not a region such as eu-central-1.")
        return ""
    return region or ""


def _password(project: str, mistakes: list[str]) -> str:
    given = pulumi.Config(project).get("adminPassword", default="")
    if not given:
        return ""
    if not pulumi.runtime.config.is_config_secret(f"{project}:adminPassword"):
        mistakes.append(
            "adminPassword is stored in clear: set another with `pulumi config set --secret adminPassword`, "
            "or remove it to have one generated."
        )
    if not re.fullmatch(r"[!-~]{12,128}", given):
        mistakes.append("adminPassword must be 12 to 128 visible ASCII characters without spaces.")
    return given


def _contradictions(found: Settings) -> list[str]:
    mistakes = []
    if found.ami_id and found.channel:
        mistakes.append(
            f"amiId and channel are both set: remove one, with `pulumi config rm channel` to pin {found.ami_id}, or "
            f"with `pulumi config rm amiId` to follow {found.channel}."
        )
    if found.hosted_zone_id and not found.domain_name:
        mistakes.append("hostedZoneId is set but domainName is not: set domainName too, or remove hostedZoneId.")
    if found.ssh_cidrs and not found.key_name:
        mistakes.append("sshCidrs is set but keyName is not: nobody could log in. Set a key pair, or remove sshCidrs.")
    if (found.backups_endpoint or found.s3_endpoint).startswith("http://"):
        mistakes.append(
            "backupsEndpoint must be an https:// address where s3Endpoint is http://: pgBackRest, which archives the "
            "write-ahead log, supports HTTPS only."
        )
    elif found.backups_authority and not (found.backups_endpoint or found.s3_endpoint):
        mistakes.append("backupsAuthority is set but backupsEndpoint is not: set the endpoint that it certifies.")
    if found.tls == "acme" and not found.domain_name:
        mistakes.append("tls is acme but domainName is not set: name the domain to certify, or set tls to private.")
    if found.acme_email and found.tls != "acme":
        mistakes.append(f"acmeEmail is set but tls is {found.tls}: set tls to acme, or remove acmeEmail.")
    if found.acme_directory and found.tls != "acme":
        mistakes.append(f"acmeDirectory is set but tls is {found.tls}: set tls to acme, or remove acmeDirectory.")
    if found.postgres_cidrs and found.tls != "private":
        mistakes.append(
            f"postgresCidrs is set but tls is {found.tls}: PostgreSQL's certificate comes from the stack's "
            "private authority, so set tls to private, or remove postgresCidrs."
        )
    topic_region = found.alarm_topic_arn.split(":")[3] if found.alarm_topic_arn else ""
    if topic_region and found.region and topic_region != found.region:
        mistakes.append(
            f"alarmTopicArn is in region {topic_region}, not in {found.region}: an alarm can only "
            "use a topic in its own region."
        )
    rules = sum(len(networks) for _, _, networks in found.doors)
    if rules > RULES_PER_GROUP:
        mistakes.append(
            f"allowedCidrs, sshCidrs and postgresCidrs make {rules} inbound rules, more than the {RULES_PER_GROUP} "
            "rules of a security group: combine adjacent networks."
        )
    if found.availability_zone and found.region and not found.availability_zone.startswith(found.region):
        mistakes.append(f"availabilityZone: {found.availability_zone!r} is not in the region {found.region}.")
    return mistakes


def _matches(pattern: str, wrong: str) -> Callable[[str], str | None]:
    return lambda value: None if re.fullmatch(pattern, value) else wrong


def _between(lowest: int, highest: int, unit: str) -> Callable[[int], str | None]:
    return lambda value: None if lowest <= value <= highest else f"must be from {lowest} to {highest} {unit}"


def _domain(value: str) -> str | None:
    if launch.host(value) is None and launch.host_is_public_name(value):
        return None
    return "is not a domain name in lower case such as mlflow.example.com"


def _days_of_logs(value: int) -> str | None:
    if value in RETENTION_DAYS:
        return None
    near = min(RETENTION_DAYS, key=lambda each: abs(each - value))
    return f"is not a retention period of CloudWatch Logs: the nearest period is {near}"


def _names_of_alarms(values: tuple[str, ...]) -> str | None:
    known = (*alarms.NAMES, alarms.STATUS_CHECK)
    if wrong := [value for value in values if value not in known]:
        return f"has {wrong[0]!r}, which is not an alarm; the alarms are {', '.join(known)}"
    return "names an alarm twice" if len(set(values)) < len(values) else None


def _networks(values: tuple[str, ...]) -> str | None:
    return "; ".join(wrong for value in values if (wrong := _network(value))) or None


def _network(value: str) -> str | None:
    try:
        found = ipaddress.ip_interface(value)
    except ValueError:
        return f"has {value!r}, which is not a network in CIDR notation such as 203.0.113.0/24"
    if found.version == 6:
        return f"has {value!r}, which is IPv6: the server has an IPv4 address only"
    if "/" not in value:
        return f"has {value!r}, which has no prefix length: write {value}/32 for this one address"
    if str(found.network) != value:
        return f"has {value!r}, which has host bits set: write {found.network} or {found.ip}/32"
    return None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else None


def _boolean(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text.lower())


def _list(text: str) -> tuple[str, ...] | None:
    """The names in a JSON list (Pulumi's format), or in text that separates names by commas. None for other JSON.
    Duplicates are dropped."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        values = [part.strip() for part in text.split(",")]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return None
    return tuple(dict.fromkeys(values))


_CONVERSIONS: dict[str, Callable[[str], Any]] = {
    "string": str.strip,
    "integer": _integer,
    "boolean": _boolean,
    "array": _list,
}
_KINDS = {"integer": "a whole number", "boolean": "true or false", "array": "a list of strings"}
