"""If the state is lost, the program refuses to run under Pulumi's engine and prints commands that import the stack."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from scripts.rehearsal import pulumi_cli, stack
from scripts.rehearsal.errors import RehearsalError
from scripts.rehearsal.state import State
from scripts.rehearsal.wire import reveal
from tests.support.marks import NEEDS_PULUMI
from tests.support.moto_cloud import MotoCloud, moto_cloud, register_image

pytestmark = [
    pytest.mark.tools,
    pytest.mark.slow,
    NEEDS_PULUMI,
]

SETTINGS = {"allowedCidrs": '["203.0.113.0/24"]', "s3Endpoint": "https://s3.example.com"}
KEPT = ("dataVolumeId", "buckets", "publicIp", "url", "credentialsParameter")


def quiet(text: object) -> None:
    """Says nothing."""


def run(verb: str, cloud: MotoCloud, ami: str, current: State) -> pulumi_cli.Run:
    client = stack.clients(cloud)  # type: ignore[arg-type]
    made: pulumi_cli.Run = getattr(pulumi_cli, verb)(cloud, client, ami, SETTINGS, current, say=quiet, done=quiet)
    return made


def test_a_lost_state_is_refused_and_the_commands_bring_the_stack_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_AMI_LOCAL_CLOUD", str(tmp_path))
    with moto_cloud() as cloud:
        ami = register_image(cloud, "20261122T101500Z")
        launched = reveal(run("bring_about", cloud, ami, State()).outputs)
        secret = cloud.client("ssm").get_parameter(Name=launched["credentialsParameter"])["Parameter"]["Value"]
        known = pulumi_cli.environment(cloud)  # type: ignore[arg-type]
        pulumi_cli._quietly(["stack", "rm", "--force", "--yes", stack.name()], known)

        for verb in ("preview", "bring_about"):
            with pytest.raises(RehearsalError) as refused:
                run(verb, cloud, ami, State())
            said = str(refused.value)
            assert f"The data volume {launched['dataVolumeId']} belongs to the stack {stack.name()}" in said
            assert said.count("belongs to the stack") == 1, "printed once, although parameters exist too"
        ec2 = cloud.client("ec2")
        assert len(ec2.describe_volumes(Filters=[{"Name": "tag:mlflow-ami:role", "Values": ["data"]}])["Volumes"]) == 1

        for line in re.findall(r"^    (.*)$", said, re.M):
            program, *arguments = shlex.split(line)
            if program == "aws":
                instances = [each for each in arguments if each.startswith("i-")]
                if "terminate-instances" in arguments:
                    ec2.terminate_instances(InstanceIds=instances)
            else:
                yes = [] if "--yes" in arguments else ["--yes"]
                pulumi_cli._quietly([*arguments, *yes, "--stack", stack.name()], known)

        planned = run("preview", cloud, ami, State())
        kept = {"Volume", "Bucket", "Eip", "Parameter"}
        steps = {(each.operation, each.name) for each in planned.steps if each.type.split(":")[-1] in kept}
        assert {operation for operation, _ in steps} <= {"same", "update"}, steps
        again = reveal(run("bring_about", cloud, ami, State()).outputs)
        assert {name: again[name] for name in KEPT} == {name: launched[name] for name in KEPT}
        assert again["instanceId"] != launched["instanceId"]
        now = cloud.client("ssm").get_parameter(Name=launched["credentialsParameter"])["Parameter"]["Value"]
        assert now == secret, "no user has a new password"
        assert run("preview", cloud, ami, State()).idle
