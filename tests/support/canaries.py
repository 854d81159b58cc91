"""Collect the secrets of a launched server. A secret is long and random, so a text that contains the value of a secret
proves a leak."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from scripts.local_cloud import LocalCloud
from tests.support.servers import Server, script

PERSON = "leak.canary"


@contextmanager
def secrets_of(server: Server, cloud: LocalCloud) -> Iterator[dict[str, str]]:
    """Yield the values of the secrets by name. One secret is the password of a user who has logged in once and has
    failed to log in once."""
    parameter = json.loads(script("rehearse.py", "status", "--json").stdout)["credentials_parameter"]
    document = json.loads(cloud.client("ssm").get_parameter(Name=parameter, WithDecryption=True)["Parameter"]["Value"])
    password = script("users.py", "add", PERSON).stdout.strip()
    try:
        for login in ((PERSON, password), (server.username, server.password), (PERSON, "wrong")):
            server.ask("/version", auth=login)
        found = {
            "admin's password": server.password,
            "admin's login": base64.b64encode(f"{server.username}:{server.password}".encode()).decode(),
            "passphrase": document["kek_passphrase"],
            "person's password": password,
            "person's login": base64.b64encode(f"{PERSON}:{password}".encode()).decode(),
        }
        assert all(len(value) >= 20 for value in found.values())
        yield found
    finally:
        script("users.py", "remove", PERSON)


def names(secrets: Mapping[str, str], text: str) -> list[str]:
    return [name for name, value in secrets.items() if value in text]


def logged(cloud: LocalCloud, prefix: str = "/") -> list[dict[str, Any]]:
    """Return the events of all log groups whose names begin with `prefix`. Events of one stream are in order."""
    logs, found = cloud.client("logs"), []
    for group in logs.describe_log_groups(logGroupNamePrefix=prefix)["logGroups"]:
        pages = logs.get_paginator("filter_log_events").paginate(logGroupName=group["logGroupName"])
        found += [event for page in pages for event in page["events"]]
    return found
