"""Test the launch document: valid documents, and the error sentence for each mistake."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_host.contract import launch

COMPLETE = """
format = 1

[stack]
name = "mlflow-dev"
region = "eu-central-1"

[buckets]
artifacts = "mlflow-dev-artifacts"
models = "mlflow-dev-models"
backups = "mlflow-dev-backups"

[credentials]
parameter = "/mlflow-ami/dev/credentials"

[data_volume]
id = "vol-0123456789abcdef0"

[web]
hostnames = ["mlflow.example.com", "52.1.2.3"]
tls = "acme"
acme_email = "ops@example.com"
acme_directory = "https://acme.example.com/directory"
authority_parameter = "/mlflow-ami/dev/authority"

[mlflow]
job_execution = true
artifact_transfer = "proxied"

[database]
location = "local"

[postgres]
cidrs = ["10.0.0.0/16", "2001:db8::/32"]
parameter = "/mlflow-ami/dev/postgres"

[backups]
restore_from = "2026-11-22 10:00:00+00:00"
retention_days = 7

[endpoints]
s3 = "http://127.0.0.1:9000"
ssm = "https://vpce-0123.ssm.eu-central-1.vpce.amazonaws.com"
logs = "https://logs.internal"
monitoring = "https://monitoring.internal"
"""

LEAST: dict[str, Any] = {
    "format": 1,
    "stack": {"name": "mlflow-dev", "region": "eu-central-1"},
    "buckets": {"artifacts": "a-bucket", "models": "m-bucket", "backups": "b-bucket"},
    "credentials": {"parameter": "/mlflow-ami/dev/credentials"},
    "data_volume": {"id": "vol-0123456789abcdef0"},
    "web": {"hostnames": ["52.1.2.3"]},
}


def with_value(table: str, key: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(LEAST)
    changed.setdefault(table, {})[key] = value
    return changed


def problems(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(launch.LaunchError) as refused:
        launch.from_mapping(raw)
    return refused.value.problems


def test_complete_document_is_read() -> None:
    document = launch.parse(COMPLETE)
    assert document.stack == launch.Stack("mlflow-dev", "eu-central-1")
    assert document.buckets.models == "mlflow-dev-models"
    assert document.web == launch.Web(
        ("mlflow.example.com", "52.1.2.3"),
        "acme",
        "ops@example.com",
        "https://acme.example.com/directory",
        "/mlflow-ami/dev/authority",
    )
    assert document.mlflow == launch.Mlflow(job_execution=True, artifact_transfer="proxied")
    assert document.postgres.cidrs == ("10.0.0.0/16", "2001:db8::/32")
    assert document.backups == launch.Backups("2026-11-22 10:00:00+00:00", 7)
    assert document.endpoints.s3 == "http://127.0.0.1:9000"


def test_omitted_keys_get_their_defaults() -> None:
    document = launch.from_mapping(LEAST)
    assert document.web.tls == "off"
    assert document.mlflow == launch.Mlflow(job_execution=False, artifact_transfer="direct")
    assert document.database.location == "local"
    assert document.backups == launch.Backups(restore_from="", retention_days=30)
    assert document.postgres == launch.Postgres(cidrs=(), parameter="")
    assert document.endpoints == launch.Endpoints(s3="", ssm="", logs="", monitoring="")


@pytest.mark.parametrize("document", [launch.parse(COMPLETE), launch.from_mapping(LEAST)])
def test_document_survives_to_mapping_and_from_mapping(document: launch.LaunchDocument) -> None:
    assert launch.from_mapping(launch.to_mapping(document)) == document


REFUSED = [
    ("stack", "name", "", '"": it must be 1 to 100 letters, digits, dots, hyphens or underscores'),
    ("stack", "region", "Frankfurt", '"Frankfurt": it must be an AWS region such as "eu-central-1"'),
    ("buckets", "models", "Models", '"Models": it must be an S3 bucket name'),
    ("buckets", "models", "10.0.0.1", '"10.0.0.1": it must be an S3 bucket name'),
    ("buckets", "models", "a..b", '"a..b": it must be an S3 bucket name'),
    ("buckets", "models", "ab", '"ab": it must be an S3 bucket name'),
    ("buckets", "models", "b" * 64, "it must be an S3 bucket name"),
    ("credentials", "parameter", "dev", '"dev": it must be the full name of an SSM parameter, starting with "/"'),
    ("credentials", "parameter", "/" + "a" * 1011, "at most 1011 characters"),
    ("data_volume", "report_parameter", "in-service", '"in-service": it must be the full name of an SSM parameter'),
    ("data_volume", "id", "vol-1", '"vol-1": it must be an EBS volume id such as "vol-0123456789abcdef0"'),
    ("data_volume", "report_parameter", "x", '"x": it must be the full name of an SSM parameter'),
    ("web", "hostnames", [], "[]: it must name at least one host"),
    ("web", "hostnames", ["a.b", "a.b"], "it must not name a host twice"),
    (
        "web",
        "hostnames",
        ["a.b:80"],
        'it must be an IP address or a host name in lower case, without port, unlike "a.b',
    ),
    ("web", "hostnames", ["999.1.1.1"], 'unlike "999.1.1.1"'),
    ("web", "hostnames", ["a b;"], 'unlike "a b;"'),
    ("web", "hostnames", "a.b", '"a.b": it must be a list of strings'),
    ("web", "tls", "on", '"on": it must be "off" or "private" or "acme"'),
    ("web", "acme_email", "ops", '"ops": it must be an e-mail address'),
    ("web", "acme_directory", "http://a", '"http://a": it must be the https:// address of an ACME directory'),
    ("web", "authority_parameter", "x", '"x": it must be the full name of an SSM parameter'),
    ("mlflow", "job_execution", "no", '"no": it must be true or false'),
    ("monitoring", "alarms", ["disk"], '["disk"]: it must be "server-down" or "data-volume-full" or'),
    ("monitoring", "dashboard", "yes", '"yes": it must be true or false'),
    ("monitoring", "log_group", "/a group", '"/a group": it must be the name of a CloudWatch log group'),
    ("mlflow", "deleted_retention_days", -1, "-1: it must be from 0 to 3650"),
    ("mlflow", "role", "server", '"server": it must be the ARN of an IAM role'),
    ("mlflow", "artifact_transfer", "magic", '"magic": it must be "direct" or "proxied"'),
    ("database", "location", "moon", '"moon": it must be "local"'),
    (
        "postgres",
        "cidrs",
        ["10.0.0.1/8"],
        'it must be a network in CIDR notation without host bits, such as "10.0.0.0/16"',
    ),
    ("postgres", "parameter", "x y", '"x y": it must be the full name of an SSM parameter'),
    ("backups", "retention_days", 0, "0: it must be from 1 to 3650"),
    ("backups", "retention_days", True, "true: it must be a whole number"),
    ("backups", "retention_days", 1.5, "1.5: it must be a whole number"),
    ("backups", "restore_from", "a\nb", 'it must be a backup\'s name, a point in time or "latest"'),
    ("backups", "endpoint", "store", '"store": it must be an http:// or https:// address without a path'),
    ("backups", "authority", "/etc/ca.pem", '"/etc/ca.pem": it must be certificates in PEM'),
    ("endpoints", "s3", "s3.local", '"s3.local": it must be an http:// or https:// address without a path'),
    ("endpoints", "ssm", "https://a/b", '"https://a/b": it must be an http:// or https:// address without a path'),
    ("endpoints", "logs", 3, "3: it must be a string"),
    ("endpoints", "sts", "sts.local", '"sts.local": it must be an http:// or https:// address without a path'),
]


@pytest.mark.parametrize(("table", "key", "value", "sentence"), REFUSED)
def test_refusal_names_key_value_and_remedy(table: str, key: str, value: Any, sentence: str) -> None:
    (problem,) = problems(with_value(table, key, value))
    assert problem.startswith(f"{table}.{key} is ")
    assert sentence in problem
    assert "\n" not in problem


def test_every_key_can_be_refused() -> None:
    """The table REFUSED is complete: every key has a check that can fail."""
    keys = {
        (table, key)
        for table, keys in launch.to_mapping(launch.parse(COMPLETE)).items()
        if table != "format"
        for key in keys
    }
    assert {(table, key) for table, key, _, _ in REFUSED} | {("buckets", "artifacts"), ("buckets", "backups"),
                                                              ("endpoints", "monitoring")} == keys  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({}, "format is missing: the first line must be `format = 1`"),
        ({"format": 2}, "format is 2: this release reads format 1; use a stack and an image of the same format"),
        ({"format": True}, "format is true: this release reads format 1; use a stack and an image of the same format"),
        (
            with_value("web", "port", 80),
            "web.port is not a key of the launch document: "
            "remove it (known: hostnames, tls, acme_email, acme_directory, authority_parameter)",
        ),
        ({**LEAST, "stack": "x"}, 'stack is "x": it must be a table, [stack]'),
        (
            with_value("web", "tls", "acme"),
            'web.tls is "acme" but the first of web.hostnames is "52.1.2.3": '
            'name a public domain first, or set web.tls to "private"',
        ),
        (
            with_value("postgres", "cidrs", ["10.0.0.0/16"]),
            "postgres.cidrs is set but postgres.parameter is not: name the parameter with its password",
        ),
        (
            {**LEAST, "postgres": {"cidrs": ["10.0.0.0/16"], "parameter": "/reader"}},
            'postgres.cidrs is set but web.tls is "off": clients verify PostgreSQL with the stack\'s authority, so '
            'set web.tls to "private"',
        ),
        (
            with_value("buckets", "models", "a-bucket"),
            'buckets must have three different names, not "a-bucket", "a-bucket", "b-bucket"',
        ),
    ],
)
def test_structural_and_combined_mistakes_have_their_sentence(raw: dict[str, Any], sentence: str) -> None:
    assert problems(raw) == [sentence]


def test_unknown_table_is_refused_by_name() -> None:
    (problem,) = problems({**LEAST, "proxy": {}})
    assert problem.startswith("proxy is not a table of the launch document: remove it (known: stack, buckets, ")


def test_invalid_toml_is_refused() -> None:
    with pytest.raises(launch.LaunchError, match=r"the launch document is not TOML: .*line 1"):
        launch.parse("format = = 1")


def test_all_mistakes_are_reported_together() -> None:
    raw = with_value("stack", "region", "x") | {"zoo": {}, "web": {"hostnames": [], "tls": "on"}}
    del raw["buckets"]["backups"]
    assert [problem.split()[0] for problem in problems(raw)] == [
        "buckets.backups", "stack.region", "web.hostnames", "web.tls", "zoo"]  # fmt: skip


toml_values = st.recursive(
    st.text(max_size=20) | st.integers() | st.booleans() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
known_tables = list(LEAST.keys() - {"format"})


@pytest.mark.long
@given(st.sampled_from(known_tables), st.data())
def test_any_value_of_any_key_is_accepted_or_refused_in_one_line(table: str, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(list(LEAST[table])) | st.text(max_size=10))
    try:
        launch.from_mapping(with_value(table, key, data.draw(toml_values)))
    except launch.LaunchError as error:
        assert error.problems
        assert all(problem.isprintable() and len(problem) < 600 for problem in error.problems)


@given(st.dictionaries(st.sampled_from([*known_tables, "x"]), toml_values).map(lambda raw: {**LEAST, **raw}))
def test_any_table_is_accepted_or_refused(raw: dict[str, Any]) -> None:
    try:
        assert launch.from_mapping(raw).format == 1
    except launch.LaunchError as error:
        assert error.problems


@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(launch.LaunchError):
        launch.parse(text)


def test_launch_module_imports_with_the_standard_library_alone() -> None:
    """The Pulumi program imports the launch module without the image's packages."""
    folder = Path(launch.__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import mlflow_host.contract.launch; print(len(sys.path))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_revision_is_the_newest_of_all_keys_and_later_keys_have_defaults() -> None:
    tables = typing.get_type_hints(launch.LaunchDocument)
    keys = [key for name, table in tables.items() if name != "format" for key in dataclasses.fields(table)]
    assert max(key.metadata["since"] for key in keys) == launch.REVISION
    assert all(key.metadata["since"] == 1 for key in keys if key.default is dataclasses.MISSING)


def test_known_to_omits_newer_keys_and_lists_those_with_a_value() -> None:
    raw: dict[str, Any] = {
        "format": 1,
        "backups": {"retention_days": 7, "endpoint": "https://10.0.0.1", "authority": ""},
        "mlflow": {"job_execution": True},
    }
    known, left_out = launch.known_to(1, raw)
    assert known == {"format": 1, "backups": {"retention_days": 7}, "mlflow": {"job_execution": True}}
    assert left_out == ["backups.endpoint"]
    raw["backups"].pop("authority")
    assert launch.known_to(launch.REVISION, raw) == (raw, [])


def test_required_key_is_sent_even_when_empty() -> None:
    raw = {"web": {"hostnames": [], "acme_email": ""}, "endpoints": {"s3": ""}}
    assert launch.known_to(launch.REVISION, raw) == ({"web": {"hostnames": []}}, [])
