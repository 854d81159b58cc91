"""Run README's commands for AWS with the real `pulumi`, from `stack init` to the deletion of the stack.

The images are baked by the current Packer and by Packer 1.6. bash runs the commands in a copy of infra/. The local
cloud replaces AWS, so the test adds settings with the endpoints of the local cloud. The output is written to
build/readme-walk.txt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest

from scripts.rehearsal import stack
from tests.support.marks import NEEDS_PULUMI
from tests.support.pulumi_terminal import Terminal, open_terminal
from tests.support.servers import REPOSITORY

if TYPE_CHECKING:
    from scripts.local_cloud import LocalCloud

pytestmark = [
    pytest.mark.machine,
    pytest.mark.slow,
    pytest.mark.tools,
    NEEDS_PULUMI,
]

STACK = "prod"


def commands(section: str, page: str = "README.md") -> list[str]:
    """Return the commands of the first console block below a heading of `page`, without comments."""
    text = (REPOSITORY / page).read_text().split(f"\n## {section}\n")[1]
    block = re.findall(r"```console\n(.*?)```", text, re.DOTALL)[0]
    return [line[2:].split(" #")[0].strip() for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def terminal(cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    return open_terminal(cloud, tmp_path_factory.mktemp("user"), REPOSITORY / "build/readme-walk.txt")


def test_from_stack_init_to_the_end(
    cloud: LocalCloud, images_by_packer: Mapping[str, Mapping[str, Any]], terminal: Terminal
) -> None:
    ami, other = (images_by_packer[packer]["ami_id"] for packer in ("current", "1.6"))
    [first] = [place for place, line in enumerate(commands(ON_AWS)) if line.startswith("pulumi stack init")]
    for line in commands(ON_AWS)[first:]:
        line = line.replace("eu-central-1", cloud.region).replace("203.0.113.7/32", "127.0.0.0/8")
        line = re.sub(r"ami-0123456789abcdef0", ami, line)
        if line.startswith("cd "):
            terminal.folder = (terminal.folder / line[3:]).resolve()
        elif line.startswith("eval "):
            connect = line
        elif line.startswith(".venv/bin/python "):
            terminal.run(f"{connect} && {line}")
        elif line == "pulumi up":
            given, _ = stack.configuration(cloud, ami, {})
            endpoints = [(name, value) for name, value in given.items() if name.endswith("Endpoint")]
            terminal.run(" && ".join(f"pulumi config set {name} {value}" for name, value in endpoints))
            assert re.search(r"\+ \d+ created", terminal.run("pulumi up --yes"))
            wait_for_server(cloud, terminal)
        else:
            terminal.run(line)
    terminal.folder = terminal.folder / "infra"
    for line in commands("Upgrade and roll back")[:2]:
        terminal.run(re.sub(r"ami-\w+", other, line) + (" --yes" if line.endswith("up") else ""))
    wait_for_server(cloud, terminal)
    terminal.run("pulumi stack output")
    terminal.run("pulumi refresh --yes")
    machine = json.loads(terminal.run("pulumi stack output --json"))["instanceId"]
    dumped = cloud.exec(machine, ["mlflow-host-dump"], timeout=300)
    assert dumped.returncode == 0, dumped.stdout + dumped.stderr
    refused = terminal.run("pulumi destroy --yes", status=None)
    assert "protect" in refused
    terminal.folder = terminal.folder.parent
    for line in commands("Leave", "infra/README.md"):
        answers = "" if "--dry-run" in line else " --yes"
        terminal.run(line + answers)
    assert list((terminal.folder / "leaving").rglob("*.dump"))
    left = cloud.client("ec2").describe_volumes(Filters=[{"Name": "tag:mlflow-ami:stack", "Values": [STACK]}])
    assert left["Volumes"] == []
    assert not [each for each in cloud.client("s3").list_buckets()["Buckets"] if "mlflow-" in each["Name"]]


ON_AWS = "On AWS, from nothing to the first run"


def wait_for_server(cloud: LocalCloud, terminal: Terminal) -> None:
    """Run a shell loop in the user's terminal until /healthz answers."""
    terminal.run(
        'url=$(pulumi stack output url); for try in $(seq 150); do curl -ksf "$url/healthz" && exit 0; sleep 2; done; '
        "exit 1"
    )
