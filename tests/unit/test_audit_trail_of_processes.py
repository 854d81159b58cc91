"""Without a machine, a request to the image's nginx, to a server process and to PostgreSQL results in an audit line."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.bake import reader_routes
from mlflow_host.monitor import audit, run
from mlflow_host.monitor.routes import Routes
from tests.support.services import ObjectStore, PostgreSQL, server_processes
from tests.unit.test_site import HOST, Site, running_site, stop

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed (scripts/prepare.sh installs it)"),
]

API = "/api/2.0/mlflow"


@pytest.fixture
def site(cluster: PostgreSQL, store: ObjectStore, tmp_path: Path) -> Iterator[Site]:
    """Yield nginx's site with two real server processes as its upstreams."""
    told = {
        "MLFLOW_BACKEND_STORE_URI": cluster.uri(),
        "MLFLOW_ARTIFACTS_DESTINATION": "mlflow-host://artifacts/models",
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"localhost,{HOST}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "TMPDIR": str(tmp_path),
        **store.environment,
    }
    with tempfile.TemporaryDirectory(prefix="mlflow-audit-") as name:
        Path(name).chmod(0o755)
        with running_site(Path(name)) as running:
            stop(running)
            running.upstreams.clear()
            sockets = Path(name) / "run/mlflow"
            with server_processes(sockets, told, 2) as started:
                for each in started:
                    each.socket.chmod(0o666)
                yield running


def ask(site: Site, method: str, path: str, body: Any = None, user: str = "will:writes") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
    login = base64.b64encode(user.encode()).decode()
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Host": HOST, "Authorization": f"Basic {login}", "Content-Type": "application/json"}
    connection.request(method, path, sent, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_each_write_has_one_line_with_its_items(site: Site, tmp_path: Path) -> None:
    stopping, spool = threading.Event(), audit.Spool(tmp_path)
    routes = Routes([(route.method, route.path) for route in reader_routes.installed_routes()])
    log = site.folder / "var/log/nginx/access.log"
    follower = threading.Thread(target=run.follow, args=(log, spool, routes, stopping))
    follower.start()
    experiment = json.loads(ask(site, "POST", f"{API}/experiments/create", {"name": "audited"})[1])["experiment_id"]
    created = ask(site, "POST", f"{API}/runs/create", {"experiment_id": experiment, "start_time": 1})
    made = json.loads(created[1])["run"]["info"]["run_id"]
    metric = {"run_id": made, "key": "password", "value": 0.5, "timestamp": 1}
    assert ask(site, "POST", f"{API}/runs/log-metric", metric)[0] == 200
    points = [{**metric, "step": step} for step in range(1000)]
    assert ask(site, "POST", f"{API}/runs/log-batch", {"run_id": made, "metrics": points})[0] == 200
    tag = {"run_id": made, "key": "note", "value": "hunter2"}
    assert ask(site, "POST", f"{API}/runs/set-tag", tag)[0] == 200
    artifact = f"/api/2.0/mlflow-artifacts/artifacts/{experiment}/{made}/artifacts/a%20b.txt"
    assert ask(site, "PUT", artifact, b"hunter2")[0] == 200
    assert ask(site, "POST", f"{API}/runs/log-metric", {**metric, "run_id": "absent"})[0] == 404
    assert ask(site, "POST", f"{API}/runs/delete", {"run_id": made}, user="rita:reads")[0] == 403
    assert ask(site, "POST", f"{API}/runs/search", {"experiment_ids": [experiment]})[0] == 200
    stopping.set()
    follower.join(60)
    (file,) = spool.waiting()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = [(line["route"].rpartition("mlflow/")[2], line["user"], line["status"], line["ids"]) for line in lines]
    assert found[:5] == [
        ("experiments/create", "will", 200, {"name": "audited", "experiment_id": experiment}),
        ("runs/create", "will", 200, {"experiment_id": experiment, "run_id": made, **found[1][3]}),
        ("runs/log-metric", "will", 200, {"run_id": made}),
        ("runs/log-batch", "will", 200, {"run_id": made}),
        ("runs/set-tag", "will", 200, {"run_id": made}),
    ]
    path = f"{experiment}/{made}/artifacts/a b.txt"
    assert found[5][1:] == ("will", 200, {"artifact_path": path})
    assert found[6:] == [
        ("runs/log-metric", "will", 404, {"run_id": "absent"}),
        ("runs/delete", "rita", 403, {}),
    ]
    assert "hunter2" not in log.read_text() + file.read_text()
    answered = {line.split('"')[1].rpartition("/")[2]: line.split('"')[-4] for line in log.read_text().splitlines()}
    assert answered["log-metric"] == "-" and answered["log-batch"] == answered["create"] == "direct"
    assert answered["set-tag"] == "-"
