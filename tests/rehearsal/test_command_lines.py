"""Test the output of rehearse.py and connect.py: error sentences, exit statuses, JSON on stdout, log on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest

from mlflow_host.contract.credentials import hashed
from scripts.imaging import channels, ec2_images
from scripts.rehearsal import advice, stack, state
from scripts.rehearsal.errors import Refused
from scripts.rehearsal.program_runner import ProgramError
from scripts.rehearsal.state import State
from scripts.rehearsal.status_document import PIECES, administrator, client_environment, outline
from scripts.rehearsal.wire import UNKNOWN, Secret
from tests.support.moto_server import moto_server

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


def test_status_without_a_stack_is_a_document() -> None:
    done = run("rehearse.py", "status", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["state"] == "none"
    assert not Path(os.environ["MLFLOW_AMI_LOCAL_CLOUD"], "cloud.json").exists()


def test_status_of_a_stopped_cloud_lists_the_stack() -> None:
    outputs = {"url": "http://127.10.0.2", "instanceId": "i-1", "mlflowVersion": "3.17.2", "username": "admin"}
    state.save(stack.state_path(), State(outputs=outputs, settings={"adminPassword": Secret("hush")}))
    done = run("rehearse.py", "status", "--json")
    found = json.loads(done.stdout)
    assert (found["state"], found["url"], found["password"]) == ("down", "http://127.10.0.2", None)
    assert found["settings"] == {"adminPassword": "(secret)"}
    assert "hush" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", [["ssh", "true"], ["logs"]])
def test_ssh_and_logs_without_a_machine_are_refused(command: list[str]) -> None:
    done = run("rehearse.py", *command)
    assert done.returncode == 2
    assert done.stderr == "rehearse: there is no machine: launch one with `rehearse.py up`\n"


def test_purge_asks_for_confirmation() -> None:
    done = run("rehearse.py", "down", "--purge")
    assert done.returncode == 2
    assert "images" in done.stderr and "--yes" in done.stderr


def test_down_is_idempotent() -> None:
    assert run("rehearse.py", "down").returncode == 0
    assert run("rehearse.py", "down").returncode == 0


def test_concurrent_rehearsal_is_refused() -> None:
    with stack.exclusive():
        done = run("rehearse.py", "down")
    assert done.returncode == 2
    assert "another rehearse.py is running" in done.stderr


def test_unreadable_state_is_one_error_sentence(state_dir: Path) -> None:
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
def test_invalid_assignment_names_the_correct_form(assignment: str, part: str) -> None:
    settings, [mistake] = stack.with_changes({}, [assignment], [])
    assert settings == {} and part in mistake


def test_settings_are_stored_changed_and_reset() -> None:
    settings, _ = stack.with_changes({}, ["instanceType=t3.large", "allowedCidrs=10.0.0.0/8, 192.0.2.1/32"], [])
    assert settings == {"instanceType": "t3.large", "allowedCidrs": '["10.0.0.0/8", "192.0.2.1/32"]'}
    assert stack.with_changes(settings, ["instanceType="], []) == ({"allowedCidrs": settings["allowedCidrs"]}, [])
    assert stack.with_changes(settings, [], []) == (settings, [])


def test_mistakes_of_command_line_and_program_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise ProgramError("There are 2 mistakes; nothing was changed:\n  - tls: 'x' must be off.\n  - y is unknown.")

    monkeypatch.setattr(stack, "preview", refuse)
    settings, mistakes = stack.with_changes({}, ["adminPassword=correct-horse", "tls=x", "y=1"], [])
    with pytest.raises(Refused) as refused:
        stack.refuse(None, None, "ami-1", settings, State(), mistakes)  # type: ignore[arg-type]
    head, *told = str(refused.value).splitlines()
    assert head == "There are 3 mistakes; nothing was changed:"
    assert ["--secret adminPassword" in told[0], *told[1:]] == [True, "  - tls: 'x' must be off.", "  - y is unknown."]


@pytest.mark.parametrize("stdin", ["<&-", "</dev/null"], ids=["closed", "empty"])
def test_missing_secret_is_one_error_sentence(stdin: str) -> None:
    command = f'"$0" "$1" up --secret adminPassword {stdin}'
    words = ["sh", "-c", command, sys.executable, str(SCRIPTS / "rehearse.py")]
    done = subprocess.run(words, capture_output=True, text=True, start_new_session=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(
        "rehearse: the value of --secret adminPassword is read from standard input, which is empty: give it one line\n"
    )
    assert "Traceback" not in done.stderr


def test_purging_with_standard_input_closed_deletes_nothing() -> None:
    words = ["sh", "-c", '"$0" "$1" down --purge <&-', sys.executable, str(SCRIPTS / "rehearse.py")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "nothing was deleted" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["status"], ["up"], ["down"]])
@pytest.mark.parametrize("name", ["bad name!", "../other", "x" * 51])
def test_invalid_stack_name_is_refused(name: str, command: list[str], state_dir: Path) -> None:
    done = run("rehearse.py", "--stack", name, *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert repr(name) in done.stderr and "Traceback" not in done.stderr
    assert not state_dir.exists()


def image(number: int, made: str) -> ec2_images.Image:
    tags = {ec2_images.OURS: made, "mlflow-ami:format": "1", "mlflow-ami:os": "debian 12"}
    return ec2_images.Image(f"ami-{number}", "", made, "available", tags, ())


@pytest.mark.parametrize(
    ("options", "pinned", "chosen"),
    [
        ({}, None, "ami-2"),
        ({}, "ami-1", "ami-1"),
        ({"newest": True}, "ami-1", "ami-2"),
        ({"base": "debian12"}, "ami-1", "ami-2"),
        ({"ami": "ami-3"}, "ami-1", "ami-3"),
    ],
)
def test_current_image_is_kept_unless_another_is_chosen(
    options: dict[str, object], pinned: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graviton = dataclasses.replace(image(4, "2026-04"), architecture="arm64")
    monkeypatch.setattr(ec2_images, "find", lambda ec2, tags=None: [graviton, image(2, "2026-02"), image(1, "2026-01")])
    arguments = argparse.Namespace(**{"ami": None, "newest": False, "base": None} | options)
    current = State(outputs={"amiId": pinned} if pinned else {})
    assert stack.image_to_run(lambda service: None, arguments, current, {}) == chosen


def test_channel_chooses_the_image_and_a_pinned_one_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "read", lambda ssm: {"staging": "ami-7"})
    monkeypatch.setattr(ec2_images, "find", lambda ec2, tags=None: [image(2, "2026-02")])
    cloud = SimpleNamespace(
        region="eu-central-1", endpoint="http://127.0.0.1:1", s3_endpoint="https://127.0.0.1:2", s3_authority=""
    )
    for ami, wanted, known in ((None, "ami-7", None), ("ami-2", "ami-2", "ami-2")):
        arguments, settings = argparse.Namespace(ami=ami, newest=False, base=None), {"channel": "staging"}
        assert stack.image_to_run(lambda service: None, arguments, State(), settings) == wanted
        config, _ = stack.configuration(cloud, wanted, settings)  # type: ignore[arg-type]
        assert config.get("mlflow-ami:amiId") == known
        assert config.get("mlflow-ami:channel") == (None if ami else "staging")
    with pytest.raises(Refused, match=r"no channel nightly: create it with scripts/images\.py promote"):
        stack.image_to_run(lambda service: None, argparse.Namespace(ami=None), State(), {"channel": "nightly"})


def test_deleted_image_is_not_replaced_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ec2_images, "find", lambda ec2, tags=None: [image(2, "2026-02")])
    arguments = argparse.Namespace(ami=None, newest=False, base=None)
    with pytest.raises(Refused, match=r"ami-1 is no longer in the local cloud: .* --ami, or --newest"):
        stack.image_to_run(lambda service: None, arguments, State(outputs={"amiId": "ami-1"}), {})


@pytest.mark.parametrize(
    ("pulumis", "ours"),
    [
        ("remove it with `pulumi config rm x`.", "remove it with `--set x=`."),
        ("`pulumi config set amiId` to the ID", "`--ami` to the ID"),
        ("`pulumi config set --secret adminPassword`, or", "`--secret adminPassword`, or"),
        ("`pulumi config set --path 'allowedCidrs[0]' 10.0.0.0/8`", "`--set allowedCidrs=10.0.0.0/8`"),
        ("`pulumi config set tls acme`", "`--set tls=acme`"),
        ("run `pulumi up` again", "run `rehearse.py up` again"),
    ],
)
def test_remedies_name_commands_of_rehearse_py(pulumis: str, ours: str) -> None:
    assert advice.for_rehearsal(pulumis) == ours


NOT_HERE = {
    "pulumi config set aws:region": "the local cloud gives the region",
    "pulumi login": "the rehearsal's state has one place",
    "pulumi stack rename name": "the rehearsal's state is not renamed",
}
"""Pulumi command without a counterpart in rehearse.py → the reason."""


def test_every_remedy_of_the_program_is_translated() -> None:
    for path in (SCRIPTS.parent / "infra").glob("*.py"):
        for command in re.findall(r"`(pulumi [^`\n]*)`", path.read_text()):
            filled = re.sub(r"\{[^}]*\}", "name", command)
            if filled not in NOT_HERE:
                assert "pulumi" not in advice.for_rehearsal(f"`{filled}`"), f"{path.name}: {command}"


def test_values_agree_with_pulumis_constants() -> None:
    from pulumi.runtime import rpc

    from scripts.rehearsal import wire

    assert rpc.UNKNOWN == UNKNOWN
    assert rpc._special_sig_key == wire.SIGNATURE
    assert rpc._special_secret_sig == wire.SECRET_SIGNATURE
    assert rpc._special_resource_sig == wire.RESOURCE_SIGNATURE


@pytest.mark.parametrize(
    ("users", "found"),
    [
        ({"admin": {"password": "p", "role": "admin"}}, ("admin", "p")),
        ({"admin": "p", "eve": "q"}, ("admin", "p")),
        ({"eve": {"password": "q", "role": "reader"}, "root": {"password": "p", "role": "admin"}}, ("root", "p")),
        ({"admin": {"password": hashed("secret"), "role": "admin"}}, ("admin", "secret")),
        ({"admin": {"password": hashed("rotated"), "role": "admin"}}, ("admin", None)),
        ({"admin": {"password": "$2y$05$abc", "role": "admin"}}, ("admin", None)),
    ],
)
def test_status_uses_the_first_administrator(users: dict[str, object], found: tuple[str, str | None]) -> None:
    """If the credentials parameter contains only the password's hash, the password parameter contains the password."""
    values = {"c": json.dumps({"format": 1, "kek_passphrase": "x", "users": users}), "p": "secret"}

    class Parameters:
        def get_parameter(self, Name: str, WithDecryption: bool) -> dict[str, dict[str, str]]:
            return {"Parameter": {"Value": values[Name]}}

    given = {"credentials_parameter": "c", "password_parameter": "p"}
    assert administrator(Parameters(), given) == found
    if found[1] == "secret":
        assert administrator(Parameters(), given | {"password_parameter": None}) == (found[0], None)


def test_status_outline_has_every_key_the_readme_promises() -> None:
    promised = {"url", "username", "password", "instance_id", "ami_id", "mlflow_version", "state", "buckets"}
    assert promised <= outline(State()).keys()


def test_certificate_is_written_for_the_client() -> None:
    found = {"url": "https://x", "username": "u", "password": "p", "server_certificate": "/tmp/ca.pem"}
    assert client_environment(found)["MLFLOW_TRACKING_SERVER_CERT_PATH"] == "/tmp/ca.pem"


# connect.py

HARD = """pa'ss "word" $HOME `id` \\ !x"""


@pytest.fixture
def parameter_store() -> Iterator[str]:
    with moto_server() as address:
        yield address


@pytest.fixture
def pulumi(tmp_path: Path, parameter_store: str) -> dict[str, str]:
    """Return an environment with a stand-in for the Pulumi CLI. The password of the stack `prod` needs quoting."""
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


def test_connect_quotes_any_password_for_the_shell(pulumi: dict[str, str]) -> None:
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
def test_connect_names_the_missing_part(pulumi: dict[str, str], arguments: list[str], part: str) -> None:
    done = run("connect.py", *arguments, **pulumi)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"AWS_PROFILE": "nosuch"}, "nosuch"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}, "cannot be reached"),
    ],
)
def test_connect_explains_errors_of_aws(pulumi: dict[str, str], given: dict[str, str], part: str) -> None:
    done = run("connect.py", "--stack", "prod", **pulumi | given)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr and "Traceback" not in done.stderr


def test_connect_needs_no_package_of_the_local_cloud(pulumi: dict[str, str], tmp_path: Path) -> None:
    """`make prepare` installs only the packages for AWS, so the test makes the local cloud's packages unavailable."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('moto', 'cryptography', 'cloudpickle'):\n    sys.modules[name] = None\n"
    )
    done = run("connect.py", "--stack", "prod", PYTHONPATH=str(tmp_path), **pulumi)
    assert done.returncode == 0, done.stderr


def test_connect_without_pulumi_and_rehearsal_names_both(tmp_path: Path) -> None:
    done = run("connect.py", PATH=str(tmp_path))
    assert done.returncode == 2
    assert "rehearse.py up" in done.stderr and "Pulumi" in done.stderr
