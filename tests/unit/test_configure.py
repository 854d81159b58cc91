"""Test the boot steps `configure` and `ready`: contents and modes of files in /run, without secrets."""

from __future__ import annotations

import json
import os
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_host.boot import configure, ready
from mlflow_host.contract import launch, sizing
from mlflow_host.machine import config, nginx
from mlflow_host.machine.status import StepFailed

LAUNCH = """
format = 1
stack = { name = "dev", region = "eu-central-1" }
buckets = { artifacts = "aaa", models = "mmm", backups = "bbb" }
credentials = { parameter = "/x" }
data_volume = { id = "vol-01234567" }
web = { hostnames = ["NAME"] }
"""


def host(name: str = "127.0.0.1") -> config.HostConfig:
    return config.host_config(launch.parse(LAUNCH.replace("NAME", name)), sizing.size(sizing.MachineSize(2048, 2)))


@pytest.mark.parametrize(
    ("name", "tls", "url"),
    [
        ("52.1.2.3", "off", "http://52.1.2.3"),
        ("mlflow.example.com", "acme", "https://mlflow.example.com"),
        ("52.1.2.3", "private", "https://52.1.2.3"),
        ("2001:db8::1", "off", "http://[2001:db8::1]"),
    ],
)
def test_url_is_made_from_the_first_name(name: str, tls: str, url: str) -> None:
    text = LAUNCH.replace('hostnames = ["NAME"]', f'hostnames = ["{name}", "other.example.com"], tls = "{tls}"')
    assert config.host_config(launch.parse(text), sizing.size(sizing.MachineSize(2048, 2))).url == url


def test_configuration_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(config.dump(host()))
    assert config.load(file) == host()
    assert json.loads(file.read_text())["sizing"]["server_processes"] == 2


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is missing: cloud-init read no user-data"),
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"format = 2", "the launch document cannot be used: format is 2"),
    ],
)
def test_unusable_launch_document_fails_the_step(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "launch.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(StepFailed, match=sentence):
        config.launch_document(file)


@pytest.mark.parametrize(
    ("user_data", "cloud_init", "sentence"),
    [
        (
            None,
            None,
            "cloud-init read no user-data (its datasource: none), because the instance metadata service did not",
        ),
        (None, '{"v1": {"datasource": null}}', "cloud-init read no user-data (its datasource: none)"),
        (
            None,
            '{"v1": {"datasource": "DataSourceNone"}}',
            "cloud-init read no user-data (its datasource: DataSourceNone)",
        ),
        ("", '{"v1": {"datasource": "DataSourceEc2"}}', "the machine has no user-data: launch this image with the"),
        ("#cloud-config", None, "cloud-init read user-data, but wrote no launch document from it"),
    ],
)
def test_missing_launch_document_is_explained(
    user_data: str | None, cloud_init: str | None, sentence: str, tmp_path: Path
) -> None:
    for name, content in (("user-data", user_data), ("status", cloud_init)):
        if content is not None:
            (tmp_path / name).write_text(content)
    assert config.why_missing(tmp_path / "user-data", tmp_path / "status").startswith(sentence)


printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)


@settings(max_examples=25)
@given(st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,9}", fullmatch=True), printable, max_size=4))
def test_environment_file_gives_every_value_back(variables: dict[str, str]) -> None:
    """The test reads the file with bash, because bash and systemd have the same rules for double quotes."""
    text = configure.environment_file({f"X_{name}": value for name, value in variables.items()})
    script = text + "".join(f'printf "%s\\0" "$X_{name}"\n' for name in variables)
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, env={})
    assert done.stdout.split("\0")[:-1] == list(variables.values())


def test_value_that_would_break_the_environment_file_is_refused() -> None:
    with pytest.raises(StepFailed, match="SECOND would contain control characters"):
        configure.environment_file({"FIRST": "fine", "SECOND": "a\nINJECTED=1"})


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_file_is_replaced_whole_with_its_mode(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("old")
    file.chmod(0o666)
    old = os.umask(0)
    try:
        nginx.write_private(file, "new", mode=mode)
    finally:
        os.umask(old)
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


# ── Ready ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Answer(BaseHTTPRequestHandler):
    server: Upstream
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == ready.QUERY else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def address_string(self) -> str:
        return "socket"

    def log_message(self, *_: object) -> None:
        return


class Upstream(socketserver.ThreadingUnixStreamServer):
    status = 200


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Upstream]:
    server = Upstream(str(tmp_path / "server-1.sock"), Answer)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "answered"), [(200, True), (503, False), (500, False), (404, False)])
def test_ready_requires_a_successful_query(status: int, answered: bool, upstream: Upstream, tmp_path: Path) -> None:
    upstream.status = status
    assert ready.answers(tmp_path / "server-1.sock") is answered


def test_socket_without_listener_is_not_ready(tmp_path: Path) -> None:
    assert not ready.answers(tmp_path / "server-1.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "server-1.sock"))
    assert not ready.answers(tmp_path / "server-1.sock")


@pytest.mark.parametrize(
    ("shown", "failed"),
    [
        ("ActiveState=activating\nNRestarts=0\n", False),
        ("ActiveState=activating\nNRestarts=2\n", False),
        ("ActiveState=activating\nNRestarts=3\n", True),
        ("ActiveState=failed\nNRestarts=0\n", True),
        ("ActiveState=active\nNRestarts=0\n", False),
        ("", False),
    ],
)
def test_process_that_keeps_dying_has_failed(shown: str, failed: bool) -> None:
    assert ready.has_failed("mlflow-server@1.service", lambda *_: shown) is failed


@pytest.mark.long
def test_failed_process_ends_the_wait_with_its_last_log_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SERVER_SOCKETS", tmp_path)
    monkeypatch.setattr(ready, "has_failed", lambda unit: True)
    monkeypatch.setattr(ready, "last_words", lambda unit: f"{unit}: no such module")
    with pytest.raises(StepFailed, match=r"^MLflow process 1 does not start: mlflow-server@1.service: no such module$"):
        ready.wait_for(1, patience=10)


def test_process_without_response_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SERVER_SOCKETS", tmp_path)
    monkeypatch.setattr(ready, "last_words", lambda unit: "still importing")
    with pytest.raises(StepFailed, match=r"^MLflow process 1 has not answered within 0 s: still importing$"):
        ready.wait_for(1, patience=0.2)
