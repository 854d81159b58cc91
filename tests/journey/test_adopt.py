"""A booted server adopts another server's database and artifacts with its unit, and serves them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import pytest

from scripts.local_cloud import LocalCloud
from tests.adopt.test_adopt import fill
from tests.support.servers import client_of, launch_server, on_machine, own_stack, script

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
