"""The test runs the command lines of the workflows with the real Pulumi on the local cloud: two bakes, the deployment
to production, and the removal of the stack.

`make test-delivery` runs this test after tests/delivery. Each step is a `run:` of .github/workflows, which bash runs
with GitHub's files and variables. The local cloud replaces AWS. The output is written to build/delivery-walk.txt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from scripts.rehearsal import stack
from tests.delivery.workflows import line_of
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

STACK, CHANNEL, BEFORE = "production", "staging", "3.17.2"


@dataclass
class Job:
    """A workflow job on this machine: a terminal, and the files that the job's steps write."""

    terminal: Terminal
    files: Path

    def take(self, workflow: str, step: str, *more: str, status: int | None = 0, **variables: str) -> dict[str, str]:
        """Run the command line of a step like the workflow does, and return the step's outputs."""
        (self.files / "output").write_text("")
        line = " ".join([line_of(workflow, step).removeprefix("sudo -E "), *more])
        given = " ".join(f"{name}='{value}'" for name, value in variables.items())
        self.terminal.run(f"export {given}; {line}" if given else line, status=status)
        return dict(each.split("=", 1) for each in (self.files / "output").read_text().splitlines())

    def images(self, *arguments: str, status: int | None = 0) -> str:
        return self.terminal.run(f"scripts/images.py {' '.join(arguments)}", status=status)

    @property
    def summary(self) -> str:
        return (self.files / "summary").read_text()


@pytest.fixture
def job(cloud: LocalCloud, tmp_path: Path) -> Job:
    """Create a runner with its own checkout. The runner's account has no image of this project and no stack."""
    terminal = open_terminal(cloud, tmp_path, REPOSITORY / "build/delivery-walk.txt")
    github = {"GITHUB_ACTIONS": "true"}
    github |= {
        f"GITHUB_{name}": str(tmp_path / file) for name, file in (("OUTPUT", "output"), ("STEP_SUMMARY", "summary"))
    }
    terminal.environment = {**terminal.environment, **github}
    terminal.folder = terminal.folder.parent
    (tmp_path / "summary").write_text("")
    return Job(terminal, tmp_path)


def test_from_a_bake_to_a_retired_image(cloud: LocalCloud, job: Job) -> None:
    source: Any = {"SOURCE_AMI": cloud.source_ami(), "SOURCE_OWNER": "099720109477"}
    before = job.take("bake", "bake", f"--mlflow-version {BEFORE}", **source)["image"]
    job.take("bake", "promote", IMAGE=before, CHANNEL=CHANNEL, DRILL="")

    image = job.take("bake", "bake", **source)["image"]
    job.take("bake", "diff", IMAGE=image, CHANNEL=CHANNEL)
    assert f"{before} ({CHANNEL}) → {image}" in job.summary
    refused = job.take("bake", "promote", status=None, IMAGE=image, CHANNEL=CHANNEL, DRILL="")
    assert refused == {}
    drill = job.take("bake", "drill", IMAGE=image, CHANNEL=CHANNEL)["drill"]
    stops = json.loads((job.terminal.folder / drill).read_text())["stops"]
    assert [(each["missing"], each["changed"]) for each in stops] == [(0, 0)] * len(stops) and len(stops) > 2
    assert job.take("bake", "promote", IMAGE=image, CHANNEL=CHANNEL, DRILL=drill) == {"promoted": image}

    settings = [("aws:region", cloud.region), ("channel", CHANNEL)]
    given, _ = stack.configuration(cloud, image, {})
    settings += [(name, str(value)) for name, value in given.items() if name.endswith("Endpoint")]
    job.terminal.run(
        f"cd infra && pulumi stack init {STACK} && pulumi config set --path 'allowedCidrs[0]' 127.0.0.0/8 && "
        + " && ".join(f"pulumi config set {name} {value}" for name, value in settings)
    )
    job.take("deploy", "preview", STACK=STACK)
    assert job.take("deploy", "deploy", STACK=STACK) == {"previous": ""}
    job.take("deploy", "smoke", STACK=STACK)
    assert "stored and returned a run, its metrics and an artifact" in job.summary

    job.images("retire", image, status=2)
    job.images("retire", before, "--dry-run")
    job.images("retire", before)
    assert cloud.client("ec2").describe_images(ImageIds=[before])["Images"][0]["State"] == "disabled"
    job.images("retire", before, "--delete")
    assert cloud.client("ec2").describe_images(Filters=[{"Name": "image-id", "Values": [before]}])["Images"] == []

    job.terminal.run(f"scripts/retire_stack.py --stack {STACK} --yes")
    job.terminal.run(f"pulumi -C infra stack rm {STACK} --yes")
