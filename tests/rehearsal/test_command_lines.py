"""What rehearse.py and connect.py say: sentences and exit statuses, JSON on stdout and the story beside it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from rehearsal import stack, state
from rehearsal.errors import Refused
from rehearsal.state import State
from rehearsal.status import PIECES, client_environment, first_user, outline
from rehearsal.values import UNKNOWN, Secret

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cloud"
    monkeypatch.setenv("MLFLOW_AMI_LOCAL_CLOUD", str(folder))
    return folder


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )


def test_status_of_nothing_is_a_document_and_no_error() -> None:
    done = run("rehearse.py", "status", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["state"] == "none"
    assert not Path(os.environ["MLFLOW_AMI_LOCAL_CLOUD"], "cloud.json").exists()


def test_status_of_a_cloud_that_is_down_tells_what_was_there() -> None:
    outputs = {"url": "http://127.10.0.2", "instanceId": "i-1", "mlflowVersion": "3.17.2", "username": "admin"}
    state.save(stack.state_path(), State(outputs=outputs, settings={"adminPassword": Secret("hush")}))
    done = run("rehearse.py", "status", "--json")
    found = json.loads(done.stdout)
    assert (found["state"], found["url"], found["password"]) == ("down", "http://127.10.0.2", None)
    assert found["settings"] == {"adminPassword": "(secret)"}
    assert "hush" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", [["ssh", "true"], ["logs"]])
def test_without_a_machine_there_is_nothing_to_reach_into(command: list[str]) -> None:
    done = run("rehearse.py", *command)
    assert done.returncode == 2
    assert done.stderr == "rehearse: there is no machine: launch one with `rehearse.py up`\n"


def test_purging_asks_first() -> None:
    done = run("rehearse.py", "down", "--purge")
    assert done.returncode == 2
    assert "images" in done.stderr and "--yes" in done.stderr


def test_down_twice_is_no_error() -> None:
    assert run("rehearse.py", "down").returncode == 0
    assert run("rehearse.py", "down").returncode == 0


def test_a_second_rehearsal_at_the_same_time_is_refused() -> None:
    with stack.exclusive():
        done = run("rehearse.py", "down")
    assert done.returncode == 2
    assert "another rehearse.py is at work" in done.stderr


def test_an_unreadable_state_is_a_sentence(state_dir: Path) -> None:
    state_dir.mkdir()
    stack.state_path().write_text("nonsense")
    done = run("rehearse.py", "status")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "down --purge" in done.stderr


@pytest.mark.parametrize(
    ("assignment", "part"),
    [
        ("instanceType", "key=value"),
        ("=x", "key=value"),
        ("amiId=ami-1", "--ami"),
        ("adminPassword=correct-horse-battery", "--secret adminPassword"),
    ],
)
def test_assignments_that_are_none_say_how(assignment: str, part: str) -> None:
    with pytest.raises(Refused, match=part):
        stack.with_changes({}, [assignment], [])


def test_settings_are_remembered_changed_and_taken_back() -> None:
    settings = stack.with_changes({}, ["instanceType=t3.large", "allowedCidrs=10.0.0.0/8, 192.0.2.1/32"], [])
    assert settings == {"instanceType": "t3.large", "allowedCidrs": '["10.0.0.0/8", "192.0.2.1/32"]'}
    assert stack.with_changes(settings, ["instanceType="], []) == {"allowedCidrs": settings["allowedCidrs"]}
    assert stack.with_changes(settings, [], []) == settings


def test_values_agree_with_pulumis_constants() -> None:
    from pulumi.runtime import rpc
    from rehearsal import values

    assert rpc.UNKNOWN == UNKNOWN
    assert rpc._special_sig_key == values.SIGNATURE
    assert rpc._special_secret_sig == values.SECRET_SIGNATURE
    assert rpc._special_resource_sig == values.RESOURCE_SIGNATURE


@pytest.mark.parametrize(
    ("users", "found"),
    [
        ({"admin": {"password": "p", "role": "admin"}}, ("admin", "p")),
        ({"admin": "p", "eve": "q"}, ("admin", "p")),
        ({"eve": {"password": "q", "role": "reader"}, "root": {"password": "p", "role": "admin"}}, ("root", "p")),
        ({"admin": {"password": "{SSHA}abc", "role": "admin"}}, ("admin", None)),
        ({"admin": {"password": "$2y$05$abc", "role": "admin"}}, ("admin", None)),
    ],
)
def test_the_first_administrator_is_the_way_in(users: dict[str, object], found: tuple[str, str | None]) -> None:
    assert first_user(json.dumps({"format": 1, "kek_passphrase": "x", "users": users})) == found


def test_status_outline_has_every_key_the_readme_promises() -> None:
    promised = {"url", "username", "password", "instance_id", "ami_id", "mlflow_version", "state", "buckets"}
    assert promised <= outline(State()).keys()


def test_a_certificate_reaches_the_client() -> None:
    found = {"url": "https://x", "username": "u", "password": "p", "server_certificate": "/tmp/ca.pem"}
    assert client_environment(found)["MLFLOW_TRACKING_SERVER_CERT_PATH"] == "/tmp/ca.pem"


# connect.py

HARD = """pa'ss "word" $HOME `id` \\ !x"""


@pytest.fixture
def parameter_store() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def pulumi(tmp_path: Path, parameter_store: str) -> dict[str, str]:
    """An environment with a stand-in for the Pulumi CLI, whose stack `prod` is in a store with a hard password."""
    client = boto3.client(
        "ssm", endpoint_url=parameter_store, region_name="eu-west-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    document = {"format": 1, "users": {"admin": {"password": HARD, "role": "admin"}}}
    client.put_parameter(
        Name="/mlflow-ami/prod/credentials", Type="SecureString", Value=json.dumps(document), Overwrite=True
    )
    outputs = {"url": "http://192.0.2.1", "credentialsParameter": "/mlflow-ami/prod/credentials"}
    program = tmp_path / "bin" / "pulumi"
    program.parent.mkdir()
    program.write_text(
        f"""#!/bin/sh
        case "$*" in
            "stack output --json --stack prod") echo {shlex.quote(json.dumps(outputs))} ;;
            "stack output --json --stack empty") echo "{{}}" ;;
            "config --json --stack prod") echo '{{"aws:region": {{"value": "eu-west-1", "secret": false}}}}' ;;
            *) echo "error: no stack named 'other' found" >&2; exit 255 ;;
        esac
        """
    )
    program.chmod(0o755)
    return {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "AWS_ENDPOINT_URL": parameter_store,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }


def test_connect_prints_lines_a_shell_can_take_whatever_the_password(pulumi: dict[str, str]) -> None:
    done = run("connect.py", "--stack", "prod", **pulumi)
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(
        ["sh", "-c", 'eval "$1"; printf %s "$MLFLOW_TRACKING_URI|$MLFLOW_TRACKING_PASSWORD"', "sh", done.stdout],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == f"http://192.0.2.1|{HARD}"


def test_connect_prints_json_when_asked(pulumi: dict[str, str]) -> None:
    done = run("connect.py", "--stack", "prod", "--json", **pulumi)
    assert json.loads(done.stdout) == {
        "MLFLOW_TRACKING_URI": "http://192.0.2.1",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": HARD,
        **PIECES,
    }


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--stack", "empty"], "pulumi up"),
        (["--stack", "other"], "no stack named 'other' found"),
        (["--rehearsal"], "rehearse.py up"),
    ],
)
def test_connect_says_what_is_missing(pulumi: dict[str, str], arguments: list[str], part: str) -> None:
    done = run("connect.py", *arguments, **pulumi)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr and "Traceback" not in done.stderr


def test_connect_without_pulumi_and_rehearsal_names_both(tmp_path: Path) -> None:
    done = run("connect.py", PATH=str(tmp_path))
    assert done.returncode == 2
    assert "rehearse.py up" in done.stderr and "Pulumi" in done.stderr
