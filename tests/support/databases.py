"""Connect to a database of the local cloud from inside its network namespace, as a machine of its VPC would."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import psycopg2

from scripts.local_cloud import LocalCloud, namespaces, object_store_ca


def described(cloud: LocalCloud, identifier: str) -> dict[str, Any]:
    found: dict[str, Any] = cloud.client("rds").describe_db_instances(DBInstanceIdentifier=identifier)["DBInstances"][0]
    return found


def running(cloud: LocalCloud, identifier: str) -> dict[str, Any]:
    """Return the database's private address, port, name in DNS, and the ID of its server's process."""
    found: dict[str, Any] = next(each for each in cloud.status()["databases"] if each["id"] == identifier)
    return found


def master(cloud: LocalCloud, identifier: str) -> dict[str, str]:
    """Return the user and the password from the secret that RDS manages."""
    secret = described(cloud, identifier)["MasterUserSecret"]["SecretArn"]
    text = cloud.client("secretsmanager").get_secret_value(SecretId=secret)["SecretString"]
    found: dict[str, str] = json.loads(text)
    return {"user": found["username"], "password": found["password"]}


@contextlib.contextmanager
def connected(cloud: LocalCloud, identifier: str, database: str = "postgres", **options: Any) -> Iterator[Any]:
    """Log in with TLS that verifies the endpoint's name, and yield a cursor. Each statement is a transaction."""
    here = running(cloud, identifier)
    verified = {"sslmode": "verify-full", "sslrootcert": str(object_store_ca.authority_file(cloud.places))}
    target = {"host": here["name"], "hostaddr": here["address"], "port": here["port"], "dbname": database}
    namespace = namespaces.of_process(here["pid"])
    try:
        with namespaces.inside(namespace):
            connection = psycopg2.connect(**{**target, **verified, **options})
    finally:
        os.close(namespace)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()
