"""The metadata service answers a booting machine while another thread holds the API lock."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.local_cloud import base_images, inventory, running_machines
from scripts.local_cloud.imds_server import Metadata

SECONDS = 5


def described(instance: Any, roles: Any) -> Metadata:
    return Metadata(tree={"public-ipv4": instance.address}, identity_document={}, user_data=b"#cloud-config\n")


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a `RunningMachines` object whose cloud has one instance in its records but starts no process."""
    made: Any = object.__new__(running_machines.RunningMachines)
    made.api, made.facts, made.roles = threading.RLock(), {}, None
    made.record = SimpleNamespace(address="127.10.0.2")
    monkeypatch.setattr(inventory, "find", lambda instance_id: made.record)
    monkeypatch.setattr(running_machines, "describe", described)
    with made.api:
        made._renew_facts("i-1")
    return made


def test_metadata_is_answered_while_the_api_is_busy(cloud: Any) -> None:
    with ThreadPoolExecutor(1) as machine, cloud.api:
        found = machine.submit(cloud.metadata, "i-1").result(SECONDS)
    assert found.user_data == b"#cloud-config\n"


def test_metadata_follows_changes(cloud: Any) -> None:
    cloud.record.address = "127.10.0.3"
    cloud._renew_facts("i-1")
    assert cloud.metadata("i-1").tree == {"public-ipv4": "127.10.0.3"}
    cloud.record = None
    cloud._renew_facts("i-1")
    assert cloud.metadata("i-1") is None


def test_cloud_init_waits_for_its_metadata_as_long_as_by_default() -> None:
    assert "max_wait: 120\n" in base_images.CLOUD_CONFIG
