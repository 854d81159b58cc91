"""Logins, and information that must not be visible without a login."""

import json
import re
import time
from typing import Any

import pytest
from mlflow import MlflowClient

from scripts.local_cloud import LocalCloud
from tests.support.servers import Server, script

pytestmark = pytest.mark.machine

SEARCH = "/api/2.0/mlflow/experiments/search"


@pytest.mark.parametrize(
    "path", ["/", "/version", "/health", "/api/2.0/mlflow/experiments/get?experiment_id=0", "/graphql", "/metrics"]
)
@pytest.mark.parametrize("login", [None, ("admin", "wrong"), ("nobody", "wrong")])
def test_no_path_answers_without_the_password(server: Server, path: str, login: tuple[str, str] | None) -> None:
    answer = server.ask(path, auth=login)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")


def test_refused_login_names_the_source_of_the_password(server: Server) -> None:
    parameter = json.loads(script("rehearse.py", "status", "--json").stdout)["credentials_parameter"]
    page = server.ask("/", headers={"Accept": "text/html"})
    assert (page.status_code, page.headers["Content-Type"]) == (401, "text/html")
    assert f"<code>{parameter}</code>" in page.text
    told = server.ask(SEARCH, "POST").json()
    assert told["error_code"] == "UNAUTHENTICATED" and parameter in told["message"]


@pytest.mark.parametrize("prefix", ["/api/2.0/mlflow//experiments/search", "/api//2.0/mlflow/experiments/search"])
def test_redirect_keeps_scheme_host_and_port_and_so_the_login(server: Server, prefix: str) -> None:
    answer = server.ask(prefix, "POST", auth=server.login, json={"max_results": 1})
    assert answer.status_code == 308
    assert answer.headers["Location"] == server.url + SEARCH
    host = server.url.removeprefix("https://")
    elsewhere = server.ask(prefix, "POST", auth=server.login, json={}, headers={"Host": f"{host}:8443"})
    assert elsewhere.headers["Location"] == f"{server.url}:8443{SEARCH}"
    followed = server.ask(prefix, "POST", auth=server.login, json={"max_results": 1}, allow_redirects=True)
    assert followed.status_code == 200 and len(followed.json()["experiments"]) == 1


def test_password_lets_in(server: Server) -> None:
    answer = server.ask("/version", auth=server.login)
    assert (answer.status_code, answer.text) == (200, server.mlflow_version)


@pytest.mark.parametrize("host", ["evil.example", "localhost", "169.254.169.254", "127.0.0.1:8080"])
def test_host_that_is_not_ours_is_refused(server: Server, host: str) -> None:
    answer = server.ask("/", auth=server.login, headers={"Host": host})
    assert 400 <= answer.status_code < 500
    assert answer.status_code != 401, "the login was right; only the host must be refused"


def test_page_of_another_site_cannot_write(server: Server, client: MlflowClient) -> None:
    """A logged-in browser also sends the password with requests that a page of another site makes. The Origin header of
    such a request names the other site."""
    answer = server.ask(
        "/api/2.0/mlflow/experiments/create",
        "POST",
        auth=server.login,
        json={"name": "from-another-site"},
        headers={"Origin": "https://evil.example"},
    )
    assert answer.status_code == 403
    assert client.get_experiment_by_name("from-another-site") is None


def test_own_page_can_write(server: Server, client: MlflowClient) -> None:
    answer = server.ask(SEARCH, "POST", auth=server.login, json={"max_results": 1}, headers={"Origin": server.url})
    assert answer.status_code == 200


def test_healthz_reports_whether_the_database_answers(server: Server, cloud: LocalCloud) -> None:
    assert_healthz_becomes(server, 200)
    machine(cloud, server, "systemctl", "stop", "mlflow-host-watchdog")  # the watchdog would restart PostgreSQL
    machine(cloud, server, "systemctl", "kill", "--signal=SIGSTOP", "mlflow-host-postgresql")
    try:
        assert_healthz_becomes(server, 503)
    finally:
        machine(cloud, server, "systemctl", "kill", "--signal=SIGCONT", "mlflow-host-postgresql")
        machine(cloud, server, "systemctl", "start", "mlflow-host-watchdog")
    assert_healthz_becomes(server, 200)


def assert_healthz_becomes(server: Server, status: int) -> None:
    deadline = time.monotonic() + 60
    while (answer := server.ask("/healthz", timeout=60)).status_code != status:
        assert time.monotonic() < deadline, f"/healthz answers {answer.status_code}, not {status}, for 60 s"
        time.sleep(0.5)


def test_mlflow_cannot_reach_the_instance_role_s_secret(server: Server, cloud: LocalCloud) -> None:
    """MLflow opens paths and URIs that users send, so MLflow must not be able to read the password file."""
    found = cloud.exec(
        server.instance_id,
        ["runuser", "-u", "mlflow", "--", "sh", "-c", "cat /run/mlflow-host/mlflow.env /run/mlflow-host/nginx/*"],
    )
    assert server.password not in str(found.stdout)
    assert not re.search(r"KEK_PASSPHRASE=\S", str(found.stdout))


def machine(cloud: LocalCloud, server: Server, *command: str, status: int = 0) -> str:
    done: Any = cloud.exec(server.instance_id, list(command))
    out, err = (each if isinstance(each, str) else each.decode(errors="replace") for each in (done.stdout, done.stderr))
    assert done.returncode == status, f"{' '.join(command)} ended with {done.returncode}: {out}{err}"
    return out
