"""Logins to PostgreSQL on another host: tokens of IAM authentication, and passwords for child processes."""

from __future__ import annotations

import hashlib
import re
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import botocore.session
import psycopg2
import pytest
import sqlalchemy
from cryptography import x509

from mlflow_host.machine import aws
from mlflow_host.postgres.cluster import Cluster, password_file
from mlflow_host.postgres.login import PasswordFile, TokenLogin
from mlflow_host.server import db_connections
from mlflow_host.server.environment import remote_store_uri

AUTHORITIES = Path(__file__).parents[2] / "provisioning/rootfs/usr/share/mlflow-host/rds-authorities.pem"
HOST, PORT, REGION = "mlflow.c1abcdefghij.eu-central-1.rds.amazonaws.com", 5432, "eu-central-1"


@pytest.mark.parametrize("role", ["mlflow_host", "jörg:/?&=+ "])
def test_token_is_the_one_botocore_makes(role: str) -> None:
    keys = aws.Keys("AKIAEXAMPLE", "a/secret+key", "session/token+==")
    session = botocore.session.Session()
    session.set_credentials(keys.access, keys.secret, keys.token)
    client: Any = session.create_client("rds", REGION)
    theirs = client.generate_db_auth_token(HOST, PORT, role, REGION)
    query = dict(parse_qsl(urlsplit(f"https://{theirs}").query))
    now = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    ours = aws.database_token(HOST, PORT, role, REGION, keys, now)
    assert ours.partition("?")[0] == theirs.partition("?")[0] == f"{HOST}:{PORT}/"
    assert dict(parse_qsl(urlsplit(f"https://{ours}").query)) == query
    assert query["X-Amz-Expires"] == "900" and query["DBUser"] == role


def test_each_connection_gets_a_token_and_credentials_are_read_again_before_they_expire() -> None:
    reads: list[datetime] = []

    def read(lifetime: timedelta) -> aws.Keys:
        reads.append(datetime.now(UTC))
        return aws.Keys(f"KEY{len(reads)}", "s", "t", (reads[-1] + lifetime).strftime("%Y-%m-%dT%H:%M:%SZ"))

    login = TokenLogin(HOST, PORT, REGION, lambda: read(timedelta(hours=6)))
    tokens = [login(role) for role in ("mlflow", "mlflow_host", "mlflow")]
    assert len(reads) == 1 and all("KEY1" in token for token in tokens) and tokens[0] != tokens[1]
    login = TokenLogin(HOST, PORT, REGION, lambda: read(timedelta(minutes=4)))
    assert ["KEY2" in login("mlflow"), "KEY3" in login("mlflow")] == [True, True]


def test_password_file_can_be_read_only_by_processes_that_inherit_it() -> None:
    passwords = iter([r"first:\one", "second"])
    file = PasswordFile(lambda: next(passwords))
    try:
        assert stat.S_IMODE(Path(file.path).stat().st_mode) == 0o600 and Path(file.path).is_file()

        def read(descriptors: tuple[int, ...]) -> str:
            return subprocess.run(["cat", file.path], pass_fds=descriptors, capture_output=True, text=True).stdout

        assert read(file.descriptors) == "*:*:*:*:first\\:\\\\one\n"
        assert read(()) == ""
        file.renew()
        assert read(file.descriptors) == "*:*:*:*:second\n"
    finally:
        file.close()


def test_authorities_of_amazon_rds_are_roots_of_regions() -> None:
    found: dict[str, set[str]] = {}
    for root in x509.load_pem_x509_certificates(AUTHORITIES.read_bytes()):
        root.verify_directly_issued_by(root)
        assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert root.not_valid_after_utc.year >= 2061
        (name,) = root.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        named = re.fullmatch(r"Amazon RDS ([a-z]+-[a-z]+-\d) Root CA (\w+) G1", str(name.value))
        assert named, name
        found.setdefault(named[1], set()).add(named[2])
    assert {"us-east-1", "eu-central-1", "ap-southeast-2", "sa-east-1"} <= found.keys() and len(found) == 32
    assert all(kinds == {"RSA2048", "RSA4096", "ECC384"} for kinds in found.values())
    # If you replace the file, compare its certificates with those that AWS publishes, and change the digest.
    digest = "2f0a21f85359734f7f191e3ac6130bc967ee709caacb3a8cd1da2a343f5ed59f"
    assert hashlib.sha256(AUTHORITIES.read_bytes()).hexdigest() == digest


def test_the_machines_own_cluster_needs_no_password_and_no_tls() -> None:
    cluster = Cluster()
    with password_file(cluster) as file:
        assert (file.path, file.descriptors) == ("", ())
    assert "ssl" not in cluster.uri("mlflow") + str(cluster.client_arguments("mlflow"))
    assert not {"password", "sslmode"} & cluster.parameters("mlflow").keys()


def test_arguments_and_uri_contain_no_password() -> None:
    cluster = Cluster(host=HOST, user="mlflow_host", authority=Path("/ca.pem"), password_of=lambda role: "the secret")
    with password_file(cluster) as file:
        told = [cluster.uri("mlflow", file.path), *cluster.client_arguments("mlflow", file.path)]
    assert not any("secret" in text for text in told)
    assert all("sslmode=verify-full" in text for text in (told[0], told[-1]))


def test_missing_aws_credentials_are_an_error_of_the_connection() -> None:
    def no_role(role: str) -> str:
        raise aws.NoRole("timed out")

    cluster = Cluster(host=HOST, authority=Path("/ca.pem"), password_of=no_role)
    with pytest.raises(psycopg2.OperationalError, match="no AWS credentials to log in with: timed out"):
        cluster.password()


def test_server_processes_sign_a_token_for_each_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """psycopg2.connect is replaced, because plain PostgreSQL cannot check tokens."""
    monkeypatch.setattr(db_connections, "CREDENTIALS", tmp_path / "credentials.json")
    asked: list[dict[str, object]] = []

    def connect(dsn: str = "", **parameters: object) -> None:
        asked.append(parameters)
        raise psycopg2.OperationalError("refused")

    uri = remote_store_uri(HOST, PORT, Path("/ca.pem"), token_region=REGION)
    monkeypatch.setattr(psycopg2, "connect", connect)
    engine = sqlalchemy.create_engine(uri)
    with pytest.raises(sqlalchemy.exc.OperationalError, match="no AWS credentials to log in with"):
        engine.connect()
    assert not asked
    keys = {
        "AccessKeyId": "AKIAEXAMPLE",
        "SecretAccessKey": "s",
        "SessionToken": "t",
        "Expiration": "2100-01-01T00:00:00Z",
    }
    (tmp_path / "credentials.json").write_text(str(keys).replace("'", '"'))
    with pytest.raises(sqlalchemy.exc.OperationalError, match="refused"):
        engine.connect()
    (parameters,) = asked
    assert str(parameters.pop("password")).startswith(f"{HOST}:{PORT}/?Action=connect&DBUser=mlflow&")
    assert (parameters["sslmode"], parameters["host"], parameters["user"]) == ("verify-full", HOST, "mlflow")
    assert not {"plugin", "token_region"} & parameters.keys() and "AKIAEXAMPLE" not in str(engine.url)
