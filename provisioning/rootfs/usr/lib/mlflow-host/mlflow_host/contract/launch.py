"""The launch document, format 1: the configuration of a machine, as user-data of the instance.

The stack renders the document, cloud-init writes it to `/etc/mlflow-host/launch.toml`, and the boot steps read it.
Older and newer images and stacks share the format, so tables and keys are added but never removed. A new key has a
default, and a revision in `since`. `launch_revision` in image.json and in the image's tags is the newest revision that
the image supports; the stack omits keys with a newer revision. The document contains no secret, only the name of the
parameter with the secret.

    document = launch.parse(text)      # raises LaunchError, which lists all mistakes
    known, left_out = launch.known_to(revision, raw)
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

from mlflow_host.contract import alarms as of_alarms

FORMAT = 1
REVISION = 6
"""The largest `since` of all keys. An image without `launch_revision` has the revision 1."""

Check = Callable[[Any], str | None]
"""A function that checks a value of the right type, and returns None or the value's problem ("must be …")."""


class LaunchError(ValueError):
    """The launch document is invalid. `problems` has one sentence per mistake, with key, value and allowed values."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("; ".join(problems))


def matches(pattern: str, wanted: str) -> Check:
    compiled = re.compile(pattern)
    return lambda value: None if compiled.fullmatch(value) else f"must be {wanted}"


def one_of(*choices: str) -> Check:
    return matches("|".join(map(re.escape, choices)), " or ".join(f'"{choice}"' for choice in choices))


def between(lowest: int, highest: int) -> Check:
    return lambda value: None if lowest <= value <= highest else f"must be from {lowest} to {highest}"


def every(check: Check) -> Check:
    """Apply `check` to each element of a list. The error quotes at most three invalid elements."""

    def check_all(values: tuple[Any, ...]) -> str | None:
        refused = [(value, wanted) for value in values if (wanted := check(value))]
        return "; ".join(f"{wanted}, unlike {_quote(value)}" for value, wanted in refused[:3]) or None

    return check_all


def host(value: str) -> str | None:
    try:
        ipaddress.ip_address(value)
        return None
    except ValueError:
        label = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
        named = re.fullmatch(rf"{label}(\.{label})*", value) and not re.fullmatch(r"[0-9.]+", value)
        return (
            None if named and len(value) <= 253 else "must be an IP address or a host name in lower case, without port"
        )


def hosts(values: tuple[str, ...]) -> str | None:
    if not values:
        return "must name at least one host: the first is the one in the server's URL"
    return "must not name a host twice" if len(set(values)) < len(values) else every(host)(values)


def network(value: str) -> str | None:
    try:
        ipaddress.ip_network(value)
        return None
    except ValueError:
        return 'must be a network in CIDR notation without host bits, such as "10.0.0.0/16"'


bucket_name = matches(
    r"(?!\d+\.\d+\.\d+\.\d+$)[a-z0-9](?:[a-z0-9-]|\.(?!\.)){1,61}[a-z0-9]",
    "an S3 bucket name (3 to 63 lower-case letters, digits, hyphens and dots)",
)
role_arn = matches(r"|arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]{1,512}", "the ARN of an IAM role")
parameter_name = matches(
    r"(/[A-Za-z0-9_.-]+)+(?<!.{1012})", 'the full name of an SSM parameter, starting with "/", at most 1011 characters'
)
endpoint_url = matches(
    r"https?://([A-Za-z0-9.-]+|\[[0-9a-f:]+\])(:\d{1,5})?/?", "an http:// or https:// address without a path"
)

certificates = matches(
    r"|\s*(-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]{1,8000}-----END CERTIFICATE-----\s*){1,4}",
    "certificates in PEM (-----BEGIN CERTIFICATE-----…)",
)


def key(check: Check | None = None, default: Any = MISSING, since: int = 1) -> Any:
    """A key of a table. A key without a default is required. `since` is the revision that added the key."""
    return field(default=default, metadata={"check": check, "since": since})


@dataclass(frozen=True)
class Stack:
    name: str = key(
        matches(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "1 to 100 letters, digits, dots, hyphens or underscores")
    )
    region: str = key(matches(r"[a-z]{2,4}(-[a-z]+)+-\d{1,2}", 'an AWS region such as "eu-central-1"'))


@dataclass(frozen=True)
class Buckets:
    artifacts: str = key(bucket_name)
    models: str = key(bucket_name)
    backups: str = key(bucket_name)


@dataclass(frozen=True)
class CredentialsParameter:
    parameter: str = key(parameter_name)
    """SSM SecureString with the users and the KEK passphrase (see `mlflow_host.contract.credentials`)."""


@dataclass(frozen=True)
class DataVolume:
    id: str = key(matches(r"vol-([0-9a-f]{8}|[0-9a-f]{17})", 'an EBS volume id such as "vol-0123456789abcdef0"'))
    report_parameter: str = key(lambda value: parameter_name(value) if value else None, "", since=4)
    """SSM parameter to which the machine reports the schema in service (see `mlflow_host.contract.in_service`)."""


@dataclass(frozen=True)
class Web:
    hostnames: tuple[str, ...] = key(hosts)
    """Allowed values of the Host header. The first value is the host in the server's URL."""
    tls: str = key(one_of("off", "private", "acme"), "off")
    """off: plain HTTP. private: a certificate of the stack's own authority. acme: a certificate of Let's Encrypt."""
    acme_email: str = key(matches(r"|[^@\s]+@[^@\s]+", "an e-mail address"), "")
    acme_directory: str = key(matches(r"|https://[!-~]{1,500}", "the https:// address of an ACME directory"), "")
    """Directory URL of the ACME authority. If the value is empty, certbot uses Let's Encrypt."""
    authority_parameter: str = key(lambda value: parameter_name(value) if value else None, "")
    """SSM parameter to which the machine writes the private authority's certificate. Clients need this certificate to
    verify the server."""


@dataclass(frozen=True)
class Mlflow:
    job_execution: bool = key(default=False)
    artifact_transfer: str = key(one_of("direct", "proxied"), "direct")
    """direct: clients exchange large files with S3 by presigned URLs. proxied: all files pass through the server."""
    role: str = key(role_arn, "", since=4)
    """The IAM role that MLflow's processes assume. If the value is empty, these processes use the machine's role."""
    deleted_retention_days: int = key(between(0, 3650), 30, since=3)
    """Number of days in which deleted runs, models and experiments can be restored. 0 keeps deleted items forever."""


@dataclass(frozen=True)
class Database:
    """No code reads this table. The table remains, because older stacks may send it and unknown tables are refused."""

    location: str = key(one_of("local"), "local")


@dataclass(frozen=True)
class Postgres:
    """Read-only access to PostgreSQL over the network. If `cidrs` is empty, the access is off."""

    cidrs: tuple[str, ...] = key(every(network), ())
    parameter: str = key(lambda value: parameter_name(value) if value else None, "")


@dataclass(frozen=True)
class Backups:
    restore_from: str = key(matches(r"|\S[ -~]{0,198}\S|\S", 'a backup\'s name, a point in time or "latest"'), "")
    retention_days: int = key(between(1, 3650), 30)
    endpoint: str = key(lambda value: endpoint_url(value) if value else None, "", since=2)
    """S3 endpoint of the backups bucket. If the value is empty, the machine uses the value of endpoints.s3. If
    endpoints.s3 is also empty, the machine uses AWS's public endpoint."""
    authority: str = key(certificates, "", since=2)
    """PEM certificate of the authority that signed the endpoint's certificate. Empty for a public authority."""


@dataclass(frozen=True)
class Monitoring:
    alarms: tuple[str, ...] = key(every(one_of(*of_alarms.NAMES)), of_alarms.OF_OLDER_IMAGES, since=of_alarms.SINCE)
    """The stack's alarms (see `mlflow_host.contract.alarms`). The machine sends the alarms' metrics to CloudWatch."""
    dashboard: bool = key(default=False, since=6)
    """Whether the stack has a dashboard. If true, the machine sends the dashboard's metrics to CloudWatch."""
    log_group: str = key(matches(r"[\w./#-]{0,512}", "the name of a CloudWatch log group"), "", since=6)
    """The log group to which the machine sends its journal. If the value is empty, the journal is not sent."""


@dataclass(frozen=True)
class Endpoints:
    """Endpoints that replace AWS's public endpoints, for example VPC endpoints. An empty value replaces nothing."""

    s3: str = key(lambda value: endpoint_url(value) if value else None, "")
    ssm: str = key(lambda value: endpoint_url(value) if value else None, "")
    logs: str = key(lambda value: endpoint_url(value) if value else None, "")
    sts: str = key(lambda value: endpoint_url(value) if value else None, "", since=4)
    monitoring: str = key(lambda value: endpoint_url(value) if value else None, "")


@dataclass(frozen=True)
class LaunchDocument:
    stack: Stack
    buckets: Buckets
    credentials: CredentialsParameter
    data_volume: DataVolume
    web: Web
    mlflow: Mlflow = Mlflow()
    database: Database = Database()
    postgres: Postgres = Postgres()
    backups: Backups = Backups()
    monitoring: Monitoring = Monitoring()
    endpoints: Endpoints = Endpoints()
    format: int = FORMAT


def parse(text: str) -> LaunchDocument:
    """Parse a document from TOML. Raises LaunchError with every problem."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise LaunchError([f"the launch document is not TOML: {error}"]) from None
    return from_mapping(raw)


def from_mapping(raw: Mapping[str, Any]) -> LaunchDocument:
    """Read a document from a mapping in the form that `to_mapping` returns. Raises LaunchError with every problem."""
    if "format" not in raw:
        raise LaunchError([f"format is missing: the first line must be `format = {FORMAT}`"])
    if type(raw["format"]) is not int or raw["format"] != FORMAT:
        unknown = f"format is {_quote(raw['format'])}: this release reads format {FORMAT}"
        raise LaunchError([f"{unknown}; use a stack and an image of the same format"])
    problems: list[str] = []
    tables = {name: table for name, table in _types_of(LaunchDocument).items() if name != "format"}
    for name in raw.keys() - tables.keys() - {"format"}:
        problems.append(f"{_bare(name)} is not a table of the launch document: remove it (known: {', '.join(tables)})")
    optional = {f.name for f in dataclasses.fields(LaunchDocument) if f.default is not MISSING}
    read = {
        name: _read_table(name, table, raw.get(name, {}), problems)
        for name, table in tables.items()
        if name in raw or name not in optional
    }
    if not problems:
        document = LaunchDocument(**read)
        problems = _contradictions(document)
    if problems:
        raise LaunchError(sorted(problems))
    return document


def known_to(revision: int, raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the part of the mapping `raw` that an image of `revision` accepts, and the names of omitted settings. The
    part lacks keys of newer revisions, and empty keys whose default is also empty. The names include a key of a newer
    revision (for example "backups.endpoint") only if its value is not the default."""
    known: dict[str, Any] = {}
    left_out: list[str] = []
    tables = _types_of(LaunchDocument)
    for name, table in raw.items():
        if not isinstance(table, Mapping):
            known[name] = table
            continue
        keys = {each.name: each for each in dataclasses.fields(tables[name])}
        said = {
            each: value for each, value in table.items() if value not in ("", []) or not _is_default(value, keys[each])
        }
        newer = [each for each in said if keys[each].metadata["since"] > revision]
        left_out += [f"{name}.{each}" for each in newer if not _is_default(said[each], keys[each])]
        if read := {each: value for each, value in said.items() if each not in newer}:
            known[name] = read
    return known, left_out


def _is_default(value: Any, key: dataclasses.Field[Any]) -> bool:
    return bool((tuple(value) if isinstance(value, list) else value) == key.default)


def to_mapping(document: LaunchDocument) -> dict[str, Any]:
    """The document as a mapping for JSON and TOML, with lists in place of tuples."""
    return typing.cast(dict[str, Any], _listed(dataclasses.asdict(document)))


def _contradictions(document: LaunchDocument) -> list[str]:
    """Problems of combinations of keys."""
    problems = []
    if document.web.tls == "acme" and not host_is_public_name(document.web.hostnames[0]):
        problems.append(
            f'web.tls is "acme" but the first of web.hostnames is {_quote(document.web.hostnames[0])}: '
            'name a public domain first, or set web.tls to "private"'
        )
    if document.postgres.cidrs and not document.postgres.parameter:
        problems.append("postgres.cidrs is set but postgres.parameter is not: name the parameter with its password")
    elif document.postgres.cidrs and document.web.tls == "off":
        problems.append(
            'postgres.cidrs is set but web.tls is "off": clients verify PostgreSQL with the stack\'s authority, so '
            'set web.tls to "private"'
        )
    if document.backups.authority and not (document.backups.endpoint or document.endpoints.s3).startswith("https://"):
        problems.append("backups.authority is set but backups.endpoint is not an https:// address: set both or neither")
    buckets = dataclasses.astuple(document.buckets)
    if len(set(buckets)) < len(buckets):
        problems.append(f"buckets must have three different names, not {', '.join(map(_quote, buckets))}")
    return problems


def host_is_public_name(name: str) -> bool:
    """Whether a public authority can issue a certificate for `name`: a host name with a dot, and no IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." in name
    return False


def _read_table(name: str, table: Any, raw: Any, problems: list[str]) -> Any:
    if not isinstance(raw, dict):
        problems.append(f"{name} is {_quote(raw)}: it must be a table, [{name}]")
        return None
    types_of_keys, values = _types_of(table), {}
    for extra in raw.keys() - types_of_keys.keys():
        problems.append(
            f"{name}.{_bare(extra)} is not a key of the launch document: remove it (known: {', '.join(types_of_keys)})"
        )
    for f in dataclasses.fields(table):
        where = f"{name}.{f.name}"
        if f.name not in raw:
            if f.default is MISSING:
                problems.append(f"{where} is missing: it has no default")
            continue
        value = raw[f.name]
        wanted = _wrong_type(value, types_of_keys[f.name])
        if not wanted:
            value = tuple(value) if isinstance(value, list) else value
            check = f.metadata["check"]
            wanted = check(value) if check else None
        if wanted:
            problems.append(f"{where} is {_quote(raw[f.name])}: it {wanted}")
        values[f.name] = value
    return None if problems else table(**values)


def _wrong_type(value: Any, wanted: Any) -> str | None:
    if isinstance(wanted, types.GenericAlias):
        right = isinstance(value, list | tuple) and all(isinstance(element, str) for element in value)
        return None if right else "must be a list of strings"
    names = {str: "a string", int: "a whole number", bool: "true or false"}
    return None if type(value) is wanted else f"must be {names[wanted]}"


def _types_of(table: Any) -> dict[str, Any]:
    return typing.get_type_hints(table)


def _bare(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) else _quote(name)


def _quote(value: Any) -> str:
    """Write a value for an error message in the notation of TOML, with at most 120 characters."""
    shown = f'"{value}"' if isinstance(value, str) else str(_listed(value)).replace("'", '"')
    shown = {"True": "true", "False": "false"}.get(shown, shown)
    shown = "".join(character if character.isprintable() else "�" for character in shown)
    return shown if len(shown) <= 120 else f"{shown[:117]}…"


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _listed(inner) for name, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list | tuple) else value
