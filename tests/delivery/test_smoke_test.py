"""Tests of the step `smoke` with the command line of deploy.yml. MLflow's server and client are real. moto provides
Systems Manager, and a stand-in replaces Pulumi."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.delivering import smoke_test
from scripts.delivering.commands import StepFailed
from tests.delivery.workflows import Runner, runner
from tests.support.moto_cloud import moto_cloud
from tests.support.services import free_port

pytestmark = pytest.mark.service
PARAMETER = "/mlflow-ami/prod/credentials"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run an MLflow server on SQLite, without a login."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, *stores], cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + 120
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert time.monotonic() < until and process.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)
            process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2):
            return True
    except OSError:
        return False


@pytest.fixture
def hosted(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """Create a runner with a stack `prod`. The stack's server is `server`."""
    import mlflow

    with moto_cloud() as cloud:
        for name, value in cloud.environment().items():
            monkeypatch.setenv(name, value)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            monkeypatch.setenv(name, "")  # the step smoke sets these variables; monkeypatch restores them
        monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH", raising=False)
        users = {"users": {"admin": {"password": "a password", "role": "admin"}}}
        cloud.client("ssm").put_parameter(Name=PARAMETER, Value=json.dumps(users), Type="SecureString")
        made = runner(tmp_path, monkeypatch)
        outputs = {"url": server, "credentialsParameter": PARAMETER}
        made.stand_in("pulumi", ("stack output", 0, json.dumps(outputs)), ("config", 0, "{}"))
        yield made
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


def test_smoke_test_passes_and_leaves_no_run(hosted: Runner, server: str) -> None:
    import mlflow

    hosted.take("deploy", "smoke", STACK="prod")
    hosted.take("deploy", "smoke", STACK="prod")
    assert hosted.summary.count(f"MLflow at {server} stored and returned a run, its metrics and an artifact") == 2
    client: Any = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name(smoke_test.EXPERIMENT)
    assert client.search_runs([experiment.experiment_id]) == []
    client.delete_experiment(experiment.experiment_id)
    hosted.take("deploy", "smoke", STACK="prod")


def test_lost_metric_fails_the_step(
    hosted: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    whole = MlflowClient.get_metric_history
    monkeypatch.setattr(MlflowClient, "get_metric_history", lambda *given: whole(*given)[1:])
    hosted.take("deploy", "smoke", status=1, STACK="prod")
    assert "::error::the metric history read back is [" in capsys.readouterr().out


def test_server_that_does_not_answer_is_named(hosted: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts import delivery

    outputs = {"url": "http://127.0.0.1:9", "credentialsParameter": PARAMETER}
    hosted.stand_in("pulumi", ("stack output", 0, json.dumps(outputs)), ("config", 0, "{}"))
    with pytest.raises(StepFailed, match=r"127\.0\.0\.1:9 does not answer: is this address in allowedCidrs"):
        smoke_test.smoke(delivery.parse(["smoke", "--stack", "prod", "--wait", "0"]))
