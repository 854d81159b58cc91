"""Test the server process: its environment, its refusals, and the unchanged responses of MLflow."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.bake import check_release
from mlflow_host.contract import launch, sizing
from mlflow_host.machine import config
from mlflow_host.server.environment import environment, private_environment
from mlflow_host.server.mlflow_checks import optional
from mlflow_host.server.process import APPLICATION, CHECK_QUERY, Threads, with_clients_scheme
from tests.support.services import (
    HOST_PACKAGE,
    ObjectStore,
    family,
    on_loopback,
    process,
    server_processes,
    wait_until,
)

pytestmark = pytest.mark.service

DOCUMENT = """
format = 1
[stack]
name = "mlflow-dev"
region = "eu-central-1"
[buckets]
artifacts = "the-artifacts"
models = "the-models"
backups = "the-backups"
[credentials]
parameter = "/mlflow-ami/dev/credentials"
[data_volume]
id = "vol-0123456789abcdef0"
[web]
hostnames = ["mlflow.example.com", "52.1.2.3", "2001:db8::7"]
"""


def host_config(text: str = DOCUMENT) -> config.HostConfig:
    return config.host_config(launch.parse(text), sizing.size(sizing.MachineSize(memory_mb=2048, cores=2)))


# Environment variables of a machine's server processes


def test_environment_contains_the_machines_settings() -> None:
    told = environment(host_config(), "a passphrase")
    assert told["MLFLOW_BACKEND_STORE_URI"] == (
        "postgresql+psycopg2:///mlflow?host=/run/postgresql&options=-c%20statement_timeout%3D60s"
    )
    assert told["MLFLOW_ARTIFACTS_DESTINATION"] == "mlflow-host://the-artifacts/the-models"
    assert told["MLFLOW_CRYPTO_KEK_PASSPHRASE"] == "a passphrase"
    # Every image must derive the same key, because another image must decrypt the secrets that the key encrypts.
    assert told["MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"] == "H5cLYl4QxnRBy9sItGFej_tAEoYB3prCinG4_4DamEI="
    assert told["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert told["MLFLOW_SERVER_JOB_EXECUTION_ENGINE"] == "executor"
    assert told["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert told["AWS_DEFAULT_REGION"] == "eu-central-1"
    assert told["TMPDIR"] == "/srv/mlflow/tmp"
    assert not any(name.startswith("AWS_ENDPOINT") for name in told)


def test_hosts_and_origins_are_those_of_the_stack_and_no_others() -> None:
    told = environment(host_config(), "")
    assert told["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",") == [
        "mlflow.example.com",
        "52.1.2.3",
        "[2001:db8::7]",
        "mlflow.example.com:80",
        "52.1.2.3:80",
        "[2001:db8::7]:80",
        "localhost",
    ]
    assert told["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == (
        "http://mlflow.example.com,http://52.1.2.3,http://[2001:db8::7]"
    )


def test_with_tls_only_encrypted_pages_are_an_origin() -> None:
    told = environment(host_config(DOCUMENT + 'tls = "private"\n'), "")
    assert "mlflow.example.com:443" in told["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert all(origin.startswith("https://") for origin in told["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(","))


def test_proxied_transfer_and_an_endpoint_of_one_s_own() -> None:
    document = DOCUMENT + '[mlflow]\nartifact_transfer = "proxied"\n[endpoints]\ns3 = "http://s3.example.com:8333"\n'
    told = environment(host_config(document), "")
    assert told["MLFLOW_ARTIFACTS_DESTINATION"] == "mlflow-host-proxied://the-artifacts/the-models"
    assert told["MLFLOW_S3_ENDPOINT_URL"] == told["AWS_ENDPOINT_URL_S3"] == "http://s3.example.com:8333"


@pytest.mark.parametrize("total", range(4, 65))
def test_pools_have_a_connection_per_thread(total: int) -> None:
    threads = Threads.split(total)
    assert min(dataclasses.astuple(threads)) >= 1
    assert sum(dataclasses.astuple(threads)) <= max(total, 5)


# Checks of the bake


def test_the_check_names_each_difference_to_mlflow_server() -> None:
    ours = {"_MLFLOW_SGI_NAME": "uvicorn", "_MLFLOW_SERVER_BOOT_ID": "a", "_MLFLOW_SERVER_FILE_STORE": "x"}
    same = {**ours, "_MLFLOW_SERVER_BOOT_ID": "b"}
    assert check_release.compare_with_cli(["uvicorn", APPLICATION], same, ours) == []
    theirs = {"_MLFLOW_SGI_NAME": "hypercorn", "_MLFLOW_SERVER_NEW": "1", "MLFLOW_PUBLIC": "2"}
    assert check_release.compare_with_cli(["uvicorn", "mlflow.server.new:app"], theirs, ours) == [
        "it runs mlflow.server.new:app, not mlflow.server.fastapi_app:app",
        "it sets _MLFLOW_SERVER_NEW = '1'",
        "it does not set _MLFLOW_SERVER_FILE_STORE",
        "it sets _MLFLOW_SGI_NAME = 'hypercorn', not 'uvicorn'",
    ]


def test_variable_that_mlflow_server_sets_to_its_default_need_not_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import environment_variables

    declared: Any = environment_variables
    new = declared._BooleanEnvironmentVariable("_MLFLOW_NEW", False)
    monkeypatch.setattr(environment_variables, "_MLFLOW_NEW", new, raising=False)
    assert check_release.compare_with_cli(["uvicorn", APPLICATION], {"_MLFLOW_NEW": "false"}, {}) == []
    assert check_release.compare_with_cli(["uvicorn", APPLICATION], {"_MLFLOW_NEW": "true"}, {}) == [
        "it sets _MLFLOW_NEW = 'true'"
    ]


def test_release_that_starts_workers_in_another_way_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.server

    monkeypatch.delattr(mlflow.server, "_exec_cmd")
    (found,) = check_release.private_variables({})
    assert "_exec_cmd" in found.why and "settings" in found.what


@pytest.mark.parametrize(
    ("info", "what"),
    [
        ({}, []),  # a release without server-info, or whose server-info lacks both keys
        ({"multipart_uploads_enabled": True, "multipart_downloads_enabled": True}, []),
        (
            {"multipart_uploads_enabled": False, "multipart_downloads_enabled": False},
            ["direct uploads and downloads of artifacts: these transfers pass through the server"],
        ),
        (
            {"multipart_uploads_enabled": True, "multipart_downloads_enabled": False},
            ["direct downloads of artifacts: these transfers pass through the server"],
        ),
    ],
)
def test_direct_transfers_that_are_not_offered_are_reported(info: dict[str, Any], what: list[str]) -> None:
    assert [entry.what for entry in check_release.advertised(info)] == what


def test_server_offers_direct_transfers_only_if_the_stack_sets_them() -> None:
    names = {"MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD"}
    direct = environment(host_config(), "")
    assert {direct[name] for name in names} == {"true"}
    assert not names & environment(host_config(DOCUMENT + '[mlflow]\nartifact_transfer = "proxied"\n'), "").keys()


def test_feature_that_the_release_lacks_is_left_out_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    def make() -> str:
        raise ImportError("cannot import name '_router'")

    assert optional("the fast path: MLflow answers", make, "plain") == "plain"
    assert capsys.readouterr().err == (
        "mlflow-server: without the fast path: MLflow answers (ImportError: cannot import name '_router')\n"
    )
    with pytest.raises(ValueError, match="database"):  # an error that the MLflow release did not cause

        def fail() -> str:
            raise ValueError("the database does not answer")

        optional("the fast path", fail, "plain")


def test_check_retries_until_the_process_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a process binds its socket and before it listens, the kernel refuses connections."""
    code = """
import socket, sys, time
with socket.socket(socket.AF_UNIX) as server:
    server.bind(sys.argv[1])
    time.sleep(1)
    server.listen()
    for answer in (b'200 OK\\r\\n\\r\\n{"experiment_id": "0"}', b"404 Not Found\\r\\n\\r\\n"):
        connection = server.accept()[0]
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 " + answer)
        connection.close()
    time.sleep(60)
"""
    popen = subprocess.Popen
    uds = tmp_path / "socket"
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: popen([sys.executable, "-c", code, str(uds)]))
    seconds, memory, _, info = check_release.start_once(uds)
    assert seconds > 1 and memory > 1 and info == {}


def test_the_installed_mlflow_passes_the_check_and_lacks_nothing() -> None:
    environment = {**os.environ, "PYTHONPATH": str(HOST_PACKAGE)}
    program = "import json; from mlflow_host.bake import check_release; print(json.dumps(check_release.check()))"
    checked = subprocess.run([sys.executable, "-c", program], env=environment, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    result, fallbacks = json.loads(checked.stdout)
    assert result["application"] == APPLICATION
    assert fallbacks == []


# Refusals of a process


def run_server(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(HOST_PACKAGE), **variables}
    return subprocess.run(
        [sys.executable, "-m", "mlflow_host.server.process", *arguments],
        env=environment,
        text=True,
        capture_output=True,
    )


def settings(folder: Path) -> dict[str, str]:
    return {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_ARTIFACTS_DESTINATION": "mlflow-host://artifacts/models",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ALLOWED_HOSTS": "localhost,127.0.0.1:*",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "http://mlflow.example.com",
    }


def tables(database: Path) -> list[str]:
    with sqlite3.connect(database) as connection:
        return [row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")]


def test_an_empty_database_is_refused_and_stays_empty(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "mlflow.db").close()
    refused = run_server("--socket", str(tmp_path / "socket"), **settings(tmp_path))
    assert refused.returncode == 2
    assert "the database is at migration None, but MLflow" in refused.stderr
    assert "restart mlflow-host-database" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert tables(tmp_path / "mlflow.db") == []


def test_no_process_can_make_a_table() -> None:
    code = """
from mlflow_host.server import mlflow_checks
mlflow_checks.forbid_migrations()
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
SqlAlchemyStore("sqlite:///:memory:", "x:/")
"""
    environment = {**os.environ, "PYTHONPATH": str(HOST_PACKAGE)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert "Refusal: this process does not create tables" in ended.stderr


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({}, "MLFLOW_BACKEND_STORE_URI and MLFLOW_ARTIFACTS_DESTINATION not set"),
        ({"MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2:///mlflow?host=/nowhere"}, "the database does not answer"),
        ({"MLFLOW_ARTIFACTS_DESTINATION": "mlflow-hots://a/m"}, "artifacts cannot be stored at mlflow-hots://a/m"),
    ],
)
def test_unusable_database_is_one_error_sentence(
    database: Path, tmp_path: Path, variables: dict[str, str], sentence: str
) -> None:
    others = settings(database.parent) if variables else {}
    refused = run_server("--socket", str(tmp_path / "socket"), **{**others, **variables})
    assert refused.returncode == 2
    assert sentence in refused.stderr
    assert "Traceback" not in refused.stderr


# Responses of a process


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a database in which MLflow has created its tables."""
    from tests.support.services import create_schema

    folder = tmp_path_factory.mktemp("database")
    create_schema(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture(scope="module")
def ours(database: Path, store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start our server process, and yield its socket."""
    folder = tmp_path_factory.mktemp("ours")
    (folder / "tmp").mkdir()
    told = {**settings(database.parent), **store.environment, "TMPDIR": str(folder / "tmp")}
    with server_processes(folder, told) as (running,):
        yield running.socket


@pytest.fixture(scope="module")
def plain(database: Path, store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start the application of our server process with plain uvicorn, and yield the socket."""
    folder = tmp_path_factory.mktemp("plain")
    public = settings(database.parent)
    command = [sys.executable, "-m", "uvicorn", "--uds", str(folder / "socket"), APPLICATION]
    variables = {"PYTHONPATH": str(HOST_PACKAGE), **public, **private_environment(public), **store.environment}
    variables |= {"FORWARDED_ALLOW_IPS": "*"}  # trust the headers of a proxy on this machine
    with process(command, folder / "log", env={**os.environ, **variables}) as running:
        wait_until((folder / "socket").exists, running, folder / "log")
        yield folder / "socket"


def ask(
    uds: Path, method: str, path: str, headers: Mapping[str, str], body: bytes
) -> tuple[int, dict[str, str], bytes]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(120)
        connection.connect(str(uds))
        lines = {"Host": "localhost", "Connection": "close", "Content-Length": str(len(body)), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        connection.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        response = HTTPResponse(connection, method=method)
        response.begin()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, response.read()


API = "/api/2.0/mlflow"
SAME = [
    ("GET", f"{API}/experiments/get?experiment_id=0", {}, b""),
    ("GET", f"{API}/experiments/get?experiment_id=12345", {}, b""),
    ("GET", f"{API}/experiments/get-by-name?experiment_name=na%C3%AFve%20%2F%3F", {}, b""),
    ("POST", f"{API}/runs/search", {}, b'{"experiment_ids": ["0"], "filter": "metrics.a > 1"}'),
    ("POST", f"{API}/runs/search", {}, b'{"experiment_ids": ["0"], "filter": "nonsense"}'),
    ("POST", f"{API}/runs/search", {}, b"not json"),
    ("POST", f"{API}/runs/search", {"Content-Type": "text/plain"}, b"{}"),
    ("PUT", f"{API}/runs/search", {}, b"{}"),
    ("POST", f"{API}/experiments/search", {}, b'{"max_results": 5}'),
    ("HEAD", f"{API}/experiments/get?experiment_id=0", {}, b""),
    ("OPTIONS", f"{API}/runs/search", {}, b""),
    (
        "OPTIONS",
        f"{API}/runs/search",
        {"Origin": "http://mlflow.example.com", "Access-Control-Request-Method": "POST"},
        b"",
    ),
    ("POST", f"{API}/runs/search", {"Origin": "http://elsewhere.example.com"}, b'{"experiment_ids": ["0"]}'),
    ("POST", f"{API}/runs/search", {"Origin": "http://mlflow.example.com"}, b'{"experiment_ids": ["0"]}'),
    ("GET", f"{API}/experiments/get?experiment_id=0", {"Host": "elsewhere.example.com"}, b""),
    ("GET", "/ajax-api/2.0/mlflow/experiments/get?experiment_id=0", {}, b""),
    ("GET", f"{API}/logged-models/m-0", {}, b""),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts?path=", {}, b""),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts/../../etc/passwd", {}, b""),
    ("GET", "/api/3.0/mlflow/server-info", {}, b""),
    ("GET", "/health", {}, b""),
    ("GET", "/version", {}, b""),
    ("GET", "/", {}, b""),
    ("GET", "/static-files/absent.js", {}, b""),
    ("GET", "/nowhere", {}, b""),
    ("GET", f"{API}/na%C3%AFve", {}, b""),
    (
        "POST",
        "/graphql",
        {"Content-Type": "application/json"},
        b'{"query": "{ test(inputString: \\"x\\") { output } }"}',
    ),
    ("POST", "/v1/traces", {}, b""),
]
COMPARED_HEADERS = ("content-type", "content-length", "x-content-type-options", "x-frame-options", "location")
CORS_HEADERS = ("access-control-allow-origin", "access-control-allow-credentials")


@pytest.mark.parametrize(("method", "path", "headers", "body"), SAME)
def test_flask_shortcut_returns_the_same_responses(
    ours: Path, plain: Path, method: str, path: str, headers: dict[str, str], body: bytes
) -> None:
    status, found, content = ask(ours, method, path, headers, body)
    expected_status, expected, expected_content = ask(plain, method, path, headers, body)
    assert status == expected_status
    # mlflow_patches.py removes the line breaks of MLflow's JSON, but not those of FastAPI's, so compare the content.
    in_json = expected.get("content-type", "").startswith("application/json")
    if in_json and expected_content:
        content, expected_content = json.loads(content), json.loads(expected_content)
    assert content == expected_content
    # A response with status 403 has only the headers of the layer that refuses the host or the origin.
    if status != 403:
        compared = {*COMPARED_HEADERS, *CORS_HEADERS} - ({"content-length"} if in_json else set())
        assert {name: found.get(name) for name in compared} == {name: expected.get(name) for name in compared}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"{API}//runs/search"),
        ("GET", f"{API}//experiments/get?experiment_id=0&x=a%20b"),
        ("GET", "/ajax-api//2.0/mlflow/experiments/get?experiment_id=0"),
        ("GET", "/api/2.0//mlflow-artifacts/artifacts?path=a"),
    ],
)
def test_redirect_keeps_scheme_and_host(ours: Path, plain: Path, method: str, path: str) -> None:
    headers = {"Host": "127.0.0.1:5000", "X-Forwarded-Proto": "https", "Content-Type": "application/json"}
    status, found, _ = ask(ours, method, path, headers, b"{}")
    assert status == 308
    assert found["location"] == f"https://127.0.0.1:5000{path.replace('//', '/')}"
    assert found["location"] == ask(plain, method, path, headers, b"{}")[1]["location"]


def test_redirect_of_fastapi_keeps_scheme_and_host() -> None:
    from fastapi import FastAPI
    from starlette.testclient import TestClient

    application = FastAPI()
    application.add_api_route("/there/", lambda: "here")
    client = TestClient(with_clients_scheme(application), base_url="http://mlflow.example.com", follow_redirects=False)
    for scheme in ("https", "http"):
        answer = client.get("/there?x=1", headers={"X-Forwarded-Proto": scheme})
        assert (answer.status_code, answer.headers["location"]) == (307, f"{scheme}://mlflow.example.com/there/?x=1")
    assert client.get("/there", headers={"X-Forwarded-Proto": "gopher"}).headers["location"].startswith("http:")


def test_some_compared_requests_use_the_flask_shortcut(ours: Path, plain: Path) -> None:
    """FastAPI's CORS layer adds a header to each response, so a response without this header used the shortcut."""
    request = ("GET", f"{API}/experiments/get?experiment_id=0", {"Origin": "http://mlflow.example.com"}, b"")
    assert "access-control-expose-headers" in ask(plain, *request)[1]
    assert "access-control-expose-headers" not in ask(ours, *request)[1]


def test_long_answers_arrive_whole(ours: Path, plain: Path) -> None:
    """The largest file of the user interface is longer than one ASGI message."""
    import mlflow.server

    build = Path(mlflow.server.__file__).parent / "js/build"
    largest = max(build.rglob("*.js"), key=lambda path: path.stat().st_size)
    path = f"/static-files/{largest.relative_to(build)}"
    assert ask(ours, "GET", path, {}, b"")[2] == ask(plain, "GET", path, {}, b"")[2] == largest.read_bytes()


@pytest.mark.slow
def test_job_runner_starts_if_enabled_and_reaches_the_server(database: Path, tmp_path: Path) -> None:
    told = {**settings(database.parent), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "true"}
    with server_processes(tmp_path / "run", told) as (running,):
        (runner,) = [pid for pid in family(running.pid)[1:] if b"mlflow.server.jobs._job_runner" in of(pid, "cmdline")]
        variables = dict(pair.decode().split("=", 1) for pair in of(runner, "environ").split(b"\0") if pair)
        assert Path(variables["_MLFLOW_HUEY_STORAGE_PATH"]).is_dir()
        query = f"{variables['MLFLOW_TRACKING_URI']}{CHECK_QUERY}"
        with urllib.request.urlopen(query, timeout=60) as answer:
            assert json.load(answer)["experiment"]["experiment_id"] == "0"
    for _ in range(300):
        if b"_job_runner" not in of(runner, "cmdline"):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"the job runner (process {runner}) outlives its server")


def test_job_runner_does_not_start_by_default(database: Path, tmp_path: Path) -> None:
    with server_processes(tmp_path / "run", settings(database.parent)) as (running,):
        assert family(running.pid) == [running.pid]


def of(pid: int, file: str) -> bytes:
    """Return a file of a process in /proc, or an empty value if the process no longer exists."""
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""


# Artifacts through the server

FILE = "/api/2.0/mlflow-artifacts/artifacts/7/fedcba98/artifacts/na%C3%AFve%20plot.html"


def test_an_upload_and_its_download_are_the_same_streamed(ours: Path, plain: Path) -> None:
    content = os.urandom(5 * 2**20)
    assert ask(ours, "PUT", FILE, {}, content)[::2] == ask(plain, "PUT", FILE, {}, content)[::2]
    status, found, received = ask(ours, "GET", FILE, {}, b"")
    expected_status, expected, expected_content = ask(plain, "GET", FILE, {}, b"")
    assert status == expected_status == 200
    assert received == expected_content == content
    compared = ("content-type", "content-disposition", "x-content-type-options", "x-frame-options")
    assert {name: found.get(name) for name in compared} == {name: expected.get(name) for name in compared}
    assert (
        found["content-disposition"]
        == "attachment; filename=\"naive plot.html\"; filename*=UTF-8''na%C3%AFve%20plot.html"
    )
    assert found["content-length"] == str(len(content))


def test_head_answers_as_get_does_and_reads_nothing(ours: Path) -> None:
    assert ask(ours, "PUT", FILE, {}, b"<p>content</p>")[0] == 200
    artifacts = "/api/2.0/mlflow-artifacts/artifacts"
    for path in (FILE, f"{artifacts}/7/absent", f"{artifacts}/7", f"{artifacts}/7/", f"{artifacts}/{'a' * 1100}"):
        status, found, content = ask(ours, "HEAD", path, {}, b"")
        expected_status, expected, _ = ask(ours, "GET", path, {}, b"")
        assert (status, content) == (expected_status, b"")
        for headers in (found, expected):
            headers.pop("date")
        assert found == expected


def test_refused_uploads_return_mlflows_error(ours: Path, plain: Path) -> None:
    """For an upload to an invalid path, MLflow's own handler returns the error, so rules that a new release adds apply
    too."""
    for path in (FILE.rpartition("/")[0] + "/", FILE.replace("fedcba98", "..")):
        refused = ask(ours, "PUT", path, {}, b"content")
        assert refused[0] == 400
        assert refused[::2] == ask(plain, "PUT", path, {}, b"content")[::2]


def test_a_download_makes_no_copy_on_the_server(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """While a client has only the first bytes of a download, the server's temporary folder contains no file."""
    assert ask(ours, "PUT", FILE, {}, os.urandom(20 * 2**20))[0] == 200
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(ours))
        connection.sendall(f"GET {FILE} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        temporary = ours.parent / "tmp"
        assert temporary.is_dir()
        assert not [path for path in temporary.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/api/2.0/mlflow-artifacts/artifacts/absent/file.txt", {}, 404),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts/7/%2e%2e/%2e%2e/etc/passwd", {}, 400),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts/7/%252e%252e/x", {}, 400),
        ("GET", FILE, {"Host": "elsewhere.example.com"}, 403),
        ("PUT", FILE, {"Origin": "http://elsewhere.example.com"}, 403),
    ],
)
def test_unknown_or_forbidden_artifacts_are_refused(
    ours: Path, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    assert ask(ours, method, path, headers, b"")[0] == status


# Upload models with log_model to the object store, and download them with MLflow's own client


@pytest.fixture(scope="module")
def url(ours: Path) -> Iterator[str]:
    with on_loopback(ours) as url:
        yield url


def python_model() -> Any:
    import mlflow.pyfunc

    class Doubling(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
        def predict(self, context: Any, model_input: list[float]) -> list[float]:
            return [2 * value for value in model_input]

    return Doubling()


def test_a_model_is_logged_registered_and_loaded_back(
    url: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    mlflow.set_tracking_uri(url)
    with mlflow.start_run() as run:
        logged = mlflow.pyfunc.log_model(name="doubling", python_model=python_model())
        mlflow.log_text("hello", "notes/hello.txt")
    version = mlflow.register_model(logged.model_uri, "doubling")
    for uri in (
        f"models:/doubling/{version.version}",
        f"models:/{logged.model_id}",
        f"runs:/{run.info.run_id}/doubling",
    ):
        assert mlflow.pyfunc.load_model(uri).predict([1.0, 2.5]) == [2.0, 5.0]
    assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/notes/hello.txt") == "hello"

    def keys(bucket: str) -> list[str]:
        return [found["Key"] for found in store.client().list_objects_v2(Bucket=bucket).get("Contents", [])]

    assert any(key.endswith(f"models/{logged.model_id}/artifacts/MLmodel") for key in keys("models"))
    assert not any("MLmodel" in key for key in keys("artifacts"))
    assert [key for key in keys("artifacts") if run.info.run_id in key] == [
        f"0/{run.info.run_id}/artifacts/notes/hello.txt"
    ]


def test_large_files_move_between_client_and_store(
    url: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If a file is larger than a limit, the client requests only URLs from the server. The test sets the limit to 1
    MiB."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", str(2**20))
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE", str(5 * 2**20))
    mlflow.set_tracking_uri(url)
    content = os.urandom(12 * 2**20)
    (tmp_path / "weights.bin").write_bytes(content)
    with mlflow.start_run() as run:
        mlflow.log_artifact(str(tmp_path / "weights.bin"))
    key = f"0/{run.info.run_id}/artifacts/weights.bin"
    stored = store.client().get_object(Bucket="artifacts", Key=key)
    assert stored["ETag"].strip('"').endswith("-3")
    assert stored["Body"].read() == content
    downloaded = mlflow.artifacts.download_artifacts(
        f"runs:/{run.info.run_id}/weights.bin", dst_path=str(tmp_path / "d")
    )
    assert Path(downloaded).read_bytes() == content
