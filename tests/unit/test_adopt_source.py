"""Test how adopt.py names the old server, reads the login and the users, and starts the unit by Session Manager."""

from __future__ import annotations

import argparse
import http.server
import json
import sqlite3
import stat
import threading
from contextlib import closing
from pathlib import Path

import pytest

from mlflow_host.contract.adoption import AdoptionError
from scripts import adopt
from scripts.adopting import server, sources, target


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("mysql://u@host/mlflow_prod", "mlflow-prod"),
        ("postgresql://u@host/mlflow", "mlflow"),
        ("https://mlflow.example.com/team", "mlflow-example-com-team"),
        ("http://10.0.0.5:5000", "10-0-0-5-5000"),
    ],
)
def test_source_has_the_same_name_at_each_run(source: str, name: str) -> None:
    assert sources.default_name(source) == name


def test_password_in_the_url_of_a_server_is_refused_without_repeating_it() -> None:
    with pytest.raises(AdoptionError) as raised:
        adopt.old_server("https://ada:hunter2@mlflow.example.com")
    assert "MLFLOW_TRACKING_PASSWORD" in str(raised.value) and "hunter2" not in str(raised.value)


def test_password_of_a_database_is_not_printed() -> None:
    assert "hunter2" not in adopt.without_password("mysql://ada:hunter2@10.0.0.5/mlflow")


@pytest.mark.parametrize(
    ("variables", "header"),
    [
        ({"MLFLOW_TRACKING_TOKEN": "t0ken"}, {"Authorization": "Bearer t0ken"}),
        ({"MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": "pw"}, target.basic("ada", "pw")),
        ({}, {}),
    ],
)
def test_login_of_the_old_server_comes_from_the_variables_of_its_clients(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], header: dict[str, str]
) -> None:
    for name in ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert adopt.old_server("https://mlflow.example.com/").headers == header


def test_users_of_the_old_server_are_listed_as_commands(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / adopt.AUTH)) as opened:
        opened.execute("CREATE TABLE users (username TEXT, password_hash TEXT, is_admin BOOLEAN)")
        opened.executemany("INSERT INTO users VALUES (?, 'hash', ?)", [("bob", False), ("ada", True)])
        opened.commit()
    arguments = argparse.Namespace(users=None, source=str(tmp_path / "mlflow.db"))
    assert adopt.users_lines(arguments) == [
        "scripts/users.py add ada --role admin",
        "scripts/users.py add bob --role writer",
    ]


def test_unit_is_started_by_session_manager_as_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for `aws` and `session-manager-plugin` record their arguments."""
    seen = tmp_path / "seen"
    for name in ("aws", "session-manager-plugin"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nfor each in "$@"; do echo "$each" >>{seen}; done\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    target.start_by_session("aws ssm start-session --target i-1 --region eu-central-1")("old")
    said = seen.read_text().splitlines()
    assert said[:6] == ["ssm", "start-session", "--target", "i-1", "--region", "eu-central-1"]
    assert said[6:8] == ["--document-name", "AWS-StartNonInteractiveCommand"]
    command = "sudo systemctl start --no-block mlflow-host-adopt@old.service"
    assert said[8] == "--parameters" and json.loads(said[9]) == {"command": [command]}


def test_missing_session_manager_is_named_with_the_command_for_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AdoptionError, match="sudo systemctl start --no-block mlflow-host-adopt@old"):
        target.start_by_session("aws ssm start-session")("old")


class Pages(http.server.BaseHTTPRequestHandler):
    """A web server that is not MLflow."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, format: str, *arguments: object) -> None: ...


def test_url_of_another_server_or_of_none_is_refused_with_one_sentence() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        with pytest.raises(AdoptionError, match="is not an MLflow"):
            server.release_of(target.Api(url, {}))
        other.shutdown()
    with pytest.raises(AdoptionError, match="cannot be reached"):
        server.release_of(target.Api(url, {}))
