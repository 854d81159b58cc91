"""Test the messages that a first-time user of `pulumi` gets for this program, with the real CLI and engine on moto.

The tests run in the order of this file as one user's session. The session is written to build/first-time-user.txt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.rehearsal import stack
from tests.support.marks import NEEDS_PULUMI
from tests.support.moto_cloud import MotoCloud, moto_cloud, register_image
from tests.support.pulumi_terminal import REPOSITORY, Terminal, open_terminal

pytestmark = [
    pytest.mark.tools,
    NEEDS_PULUMI,
]

NOISE = ("Traceback", "RunError", "grpc")


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MotoCloud]:
    with pytest.MonkeyPatch.context() as patch, moto_cloud() as found:
        patch.setenv("MLFLOW_AMI_LOCAL_CLOUD", str(tmp_path_factory.mktemp("cloud")))
        yield found


@pytest.fixture(scope="module")
def terminal(cloud: MotoCloud, tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    folder = tmp_path_factory.mktemp("user")
    found = open_terminal(cloud, folder, REPOSITORY / "build/first-time-user.txt")
    found.run("pulumi stack init dev")
    found.run(f"pulumi config set aws:region {cloud.region}")
    for name, value in stack.configuration(cloud, "", {})[0].items():  # type: ignore[arg-type]
        if name.endswith("Endpoint"):
            found.run(f"pulumi config set {name} {value}")
    return found


def quiet(said: str) -> None:
    """Require that the output contains no traceback and no internals of Pulumi's protocol."""
    for noise in NOISE:
        assert noise not in said, said


def test_stack_without_settings_lists_the_required_ones(terminal: Terminal) -> None:
    said = terminal.run("pulumi preview", status=None)
    assert "pulumi config set amiId" in said
    assert "pulumi config set --path 'allowedCidrs[0]'" in said
    quiet(said)


def test_all_mistakes_are_reported_at_once(terminal: Terminal) -> None:
    terminal.run("pulumi config set amiId ami-0123456789abcdef0")
    terminal.run("pulumi config set --path 'allowedCidrs[0]' everybody")
    terminal.run("pulumi config set --path 'sshCidrs[0]' 203.0.113.7")
    terminal.run("pulumi config set instancetype t3.medium")
    terminal.run("pulumi config set tls maybe")
    said = terminal.run("pulumi preview", status=None)
    for part in ("everybody", "instancetype", "instanceType", "maybe"):
        assert part in said
    quiet(said)
    for name in ("instancetype", "tls", "sshCidrs", "allowedCidrs"):
        terminal.run(f"pulumi config rm {name}")


@pytest.mark.parametrize(
    "command",
    [
        "pulumi config set allowedCidrs 203.0.113.7/32",
        "pulumi config set --path 'allowedCidrs[0]' 7",
        "pulumi config set dataVolumeGib much",
        "pulumi config set jobExecution perhaps",
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(terminal: Terminal, command: str) -> None:
    """At preview, the Pulumi CLI refuses a value that does not fit the schema in Pulumi.yaml."""
    [name] = re.findall(r"allowedCidrs|dataVolumeGib|jobExecution", command)
    terminal.run(command)
    said = terminal.run("pulumi preview", status=None)
    assert re.search(rf"{name}' must be of type '(array<string>|integer|boolean)'", said)
    quiet(said)
    terminal.run(f"pulumi config rm {name}")


def test_the_stack_is_launched_and_the_password_is_in_no_text(cloud: MotoCloud, terminal: Terminal) -> None:
    ami = register_image(cloud, "20261122T101500Z")
    terminal.run(f"pulumi config set amiId {ami}")
    terminal.run("pulumi config set --path 'allowedCidrs[0]' 203.0.113.7/32")
    terminal.run("pulumi config set --secret adminPassword", input="correct-horse-battery-7\n")
    planned = terminal.run("pulumi preview --diff")
    done = terminal.run("pulumi up --yes")
    assert re.search(r"\+ \d+ created", done)
    outputs = json.loads(terminal.run("pulumi stack output --json"))
    assert outputs["amiId"] == ami
    again = terminal.run("pulumi up --yes")
    assert re.search(r"\d+ unchanged", again) and "updated" not in again
    kept = terminal.run("pulumi stack export") + (terminal.folder / "Pulumi.dev.yaml").read_text()
    assert "correct-horse" not in planned + done + again + kept


def test_refresh_finds_nothing(terminal: Terminal) -> None:
    said = terminal.run("pulumi refresh --yes")
    assert re.search(r"\d+ unchanged", said) and "updated" not in said


def test_mistake_does_not_change_the_running_stack(terminal: Terminal) -> None:
    terminal.run("pulumi config set dataVolumeGib 1")
    said = terminal.run("pulumi up --yes", status=None)
    assert "dataVolumeGib" in said
    quiet(said)
    terminal.run("pulumi config rm dataVolumeGib")
    assert "updated" not in terminal.run("pulumi up --yes")


def test_a_lock_that_a_killed_run_left_is_named_and_cancelled(terminal: Terminal) -> None:
    """The CLI prints the remedy."""
    home = Path(terminal.environment["PULUMI_BACKEND_URL"].removeprefix("file://")) / ".pulumi"
    lock = home / "locks/organization" / stack.project() / "dev/0a1b2c3d.json"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps({"pid": 1, "username": "a", "hostname": "b", "timestamp": "2026-11-29T00:00:00Z"}))
    said = terminal.run("pulumi up --yes", status=None)
    assert "pulumi cancel" in said and "lock" in said
    terminal.run("pulumi cancel --yes")
    assert "updated" not in terminal.run("pulumi up --yes")


def test_an_exported_stack_is_imported_again(terminal: Terminal) -> None:
    terminal.run("pulumi stack export --file ../stack.json && pulumi stack import --file ../stack.json")
    assert "updated" not in terminal.run("pulumi up --yes")


def test_destroy_refuses_and_names_the_protected_resources(terminal: Terminal) -> None:
    said = terminal.run("pulumi destroy --yes", status=None)
    assert "protect" in said


def test_retire_stack_leaves_with_the_data_and_deletes_the_rest(cloud: MotoCloud, terminal: Terminal) -> None:
    buckets = json.loads(terminal.run("pulumi stack output --json"))["buckets"]
    s3 = cloud.client("s3")
    for bucket in buckets.values():
        s3.delete_bucket_policy(Bucket=bucket)  # moto ignores conditions, so a bucket policy would deny all requests
    s3.put_object(Bucket=buckets["backups"], Key="dumps/20261122T013300Z-nightly-dc11669786a5.dump", Body=b"dump")
    for text in (b"old", b"new"):
        s3.put_object(Bucket=buckets["artifacts"], Key="1/run/artifacts/model.txt", Body=text)
    retire = "../scripts/retire_stack.py --stack dev"
    shown = terminal.run(f"{retire} --keep leaving --dry-run")
    assert buckets["artifacts"] in shown and "1 older versions" in shown
    refused = terminal.run(f"{retire} --keep leaving", status=2, input="prod\n")
    assert "nothing was deleted" in refused
    terminal.run(f"{retire} --keep leaving", input="dev\n")
    kept = {str(each.relative_to(terminal.folder / "leaving")) for each in (terminal.folder / "leaving").rglob("*.*")}
    assert kept == {"backups/dumps/20261122T013300Z-nightly-dc11669786a5.dump", "artifacts/1/run/artifacts/model.txt"}
    assert s3.list_buckets()["Buckets"] == []
    assert cloud.client("ec2").describe_addresses()["Addresses"] == []
    terminal.run("pulumi stack rm --yes dev")
