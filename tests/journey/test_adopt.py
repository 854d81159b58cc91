"""The adoption unit of a booted server copies another server's database and artifacts, and MLflow then serves them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import pytest

from scripts.local_cloud import LocalCloud
from tests.adopt.test_adopt import fill
from tests.schema import environments
from tests.support.servers import client_of, launch_server, on_machine, own_stack, script
from tests.support.services import answers, free_port, object_store, postgresql, process, wait_until

pytestmark = [pytest.mark.machine, pytest.mark.slow]


def test_server_on_a_machine_adopts_a_sqlite_file(cloud: LocalCloud, image: Mapping[str, Any], tmp_path: Path) -> None:
    made = fill(Path(sys.executable), f"sqlite:///{tmp_path}/mlflow.db", f"file://{tmp_path}/artifacts")
    with own_stack(cloud, "adopting"):
        own = launch_server("--ami", image["ami_id"])
        looked = json.loads(script("adopt.py", str(tmp_path / "mlflow.db"), "--dry-run", "--json").stdout)
        assert looked["rows"]["runs"] == 6 and looked["refused"] == []
        report = json.loads(script("adopt.py", str(tmp_path / "mlflow.db"), "--json").stdout)
        assert report["lost"] == 0
        with client_of(own) as client:
            assert client.get_run(made["run"]).data.params["lr"] == "1e-3"
            place = client.get_run(made["run"]).info.artifact_uri
            assert mlflow.artifacts.load_text(f"{place}/notes.txt") == "written long ago"
        again = json.loads(script("adopt.py", str(tmp_path / "mlflow.db"), "--json").stdout)
        assert again["lost"] == 0
        reports = on_machine(cloud, own, "ls", "/srv/mlflow/reports").split()
        assert sum("-adoption-" in name for name in reports) == 2


def installed_by_hand(release: str) -> Path:
    """Return the interpreter of a virtual environment with this release of mlflow, boto3 and psycopg2-binary. The
    environment is created on first use."""
    folder = environments.folder() / f"mlflow-by-hand-{release}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        environments._uv("venv", "--quiet", "--python", f"{sys.version_info[0]}.{sys.version_info[1]}", str(folder))
        packages = (f"mlflow=={release}", "boto3", "psycopg2-binary", "setuptools<70")
        environments._uv("pip", "install", "--quiet", "--python", str(python), *packages)
        (folder / "complete").touch()
    return python


def test_server_that_a_tutorial_sets_up_is_adopted_with_one_command(
    cloud: LocalCloud, image: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is `mlflow server` 2.9 with a PostgreSQL password. The server's clients write artifacts to a bucket of
    another account."""
    python, port = installed_by_hand("2.9.2"), free_port()
    with postgresql(tmp_path / "postgresql") as cluster, object_store(tmp_path / "objects") as store:
        cluster.execute("CREATE USER mlflow WITH ENCRYPTED PASSWORD 'mlflow'")
        cluster.execute("CREATE DATABASE mlflow OWNER mlflow")
        store.client().create_bucket(Bucket="mlflow-tutorial")
        source = f"127.0.0.1:{cluster.port}/mlflow"
        command = [str(python.with_name("mlflow")), "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--backend-store-uri", f"postgresql://mlflow:mlflow@{source}"]
        command += ["--default-artifact-root", "s3://mlflow-tutorial"]
        with monkeypatch.context() as patch:
            for name, value in (store.environment | {"PATH": f"{python.parent}:/usr/bin:/bin"}).items():
                patch.setenv(name, value)
            with process(command, tmp_path / "server.log", cwd=tmp_path) as running:
                wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), running, tmp_path / "server.log")
                made = fill(python, f"http://127.0.0.1:{port}", "")
        with own_stack(cloud, "adopting"):
            own = launch_server("--ami", image["ami_id"])
            with monkeypatch.context() as patch:
                patch.setenv("PGPASSWORD", "mlflow")
                patch.setenv("AWS_ACCESS_KEY_ID", store.access_key)
                patch.setenv("AWS_SECRET_ACCESS_KEY", store.secret_key)
                adopted = script(
                    "adopt.py", f"postgresql://mlflow@{source}", "--source-endpoint", store.endpoint, "--json"
                )
            report = json.loads(adopted.stdout)
            assert report["lost"] == 0
            with client_of(own) as client:
                run = client.get_run(made["run"])
                assert run.data.params["lr"] == "1e-3" and len(client.get_metric_history(made["run"], "loss")) == 120
                assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/notes.txt") == "written long ago"
                [newest, *_] = client.search_model_versions("name = 'fraud'")
                assert mlflow.artifacts.load_text(f"{newest.source}/MLmodel") == "flavors: {}"
