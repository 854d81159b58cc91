"""The preview refuses an update to another PostgreSQL major, and nothing is changed. A dump and a restore move the
data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from scripts.local_cloud import LocalCloud
from tests.journey.test_backups import log, logged, shell
from tests.support.servers import client_of, launch_server, own_stack, script

pytestmark = [pytest.mark.machine, pytest.mark.slow]


@pytest.fixture(scope="module")
def newer(cloud: LocalCloud) -> Mapping[str, Any]:
    """Return an image of Debian 13, whose PostgreSQL major differs from that of Debian 12."""
    baked = script("bake.py", "--local", "--if-changed", "--base", "debian13", "--json")
    return dict(json.loads(baked.stdout))


@pytest.fixture(scope="module")
def older(cloud: LocalCloud) -> Mapping[str, Any]:
    return dict(json.loads(script("bake.py", "--local", "--if-changed", "--base", "debian12", "--json").stdout))


@pytest.fixture
def stack_of_our_own(cloud: LocalCloud) -> Iterator[None]:
    with own_stack(cloud, "major"):
        yield


def test_a_move_to_another_major(
    cloud: LocalCloud, older: Mapping[str, Any], newer: Mapping[str, Any], stack_of_our_own: None
) -> None:
    was, becomes = older["facts"]["postgresql_major"], newer["facts"]["postgresql_major"]
    assert was != becomes
    server = launch_server("--ami", older["ami_id"])
    with client_of(server) as client:
        log(client, "before-the-move")
        before = logged(client)

    refused = script("rehearse.py", "up", "--ami", newer["ami_id"], expect=2)
    assert f"holds a cluster of PostgreSQL {was}, which the image cannot read" in refused.stderr
    with client_of(server) as client:
        assert logged(client) == before
    dump = shell(cloud, server, "mlflow-host-dump").split()[-1]

    moved = launch_server("--ami", newer["ami_id"], "--set", f"restoreFrom={dump}")
    with client_of(moved) as client:
        assert logged(client) == before
        log(client, "after-the-move")
        after = logged(client)
    clusters = shell(cloud, moved, "ls /srv/mlflow/postgresql").split()
    assert str(becomes) in clusters and str(was) not in clusters
    assert [name for name in clusters if name.startswith(f"{was}.kept-")]

    # The older image refuses to serve the old cluster on the volume, because the old cluster lacks the later writes.
    refused = script("rehearse.py", "up", "--ami", older["ami_id"], "--set", "restoreFrom=", expect=2)
    assert f"holds a cluster of PostgreSQL {becomes}, which the image cannot read" in refused.stderr
    with client_of(launch_server("--ami", newer["ami_id"])) as client:
        assert logged(client) == after
