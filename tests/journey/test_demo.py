"""After a second `make demo`, the server is up within a minute, and nothing is baked, launched or logged twice."""

import time
from collections.abc import Mapping

import pytest
from mlflow import MlflowClient

from tests.support.servers import Server, describe_server, script

pytestmark = pytest.mark.machine


def test_second_demo_is_up_within_a_minute(
    server: Server, base: str, example_runs: Mapping[str, str], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests' cloud belongs to root. If a user runs the tests with sudo, the demo would connect as that user.
    for name in ("SUDO_UID", "SUDO_GID", "SUDO_USER"):
        monkeypatch.delenv(name, raising=False)

    def runs() -> int:
        return len(client.search_runs([each.experiment_id for each in client.search_experiments()], max_results=1000))

    before = runs()
    began = time.monotonic()
    shown = script("demo.py", "--base", base).stdout
    assert time.monotonic() - began < 60
    assert describe_server() == server
    assert runs() == before
    for wanted in (server.url, server.username, server.password, server.mlflow_version, *example_runs.values()):
        assert wanted in shown
