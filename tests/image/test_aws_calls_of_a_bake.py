"""When Packer bakes on the local cloud, it makes only the AWS calls that the policy in the README allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from scripts.local_cloud import LocalCloud
from scripts.local_cloud.layout import Places, default_state_dir
from tests.stack.test_operator_policy import BAKE

pytestmark = pytest.mark.machine


def test_bake_makes_only_calls_that_the_policy_allows(cloud: LocalCloud, image: Mapping[str, Any]) -> None:
    calls = [line.split(" ", 1) for line in Places(default_state_dir()).calls.read_text().splitlines()]
    # Packer 1.6 sends only the name of its SDK, aws-sdk-go, as the user agent. No other program of this project uses
    # aws-sdk-go.
    packer = {action for program, action in calls if program in ("Packer", "aws-sdk-go")}
    if "ec2:CreateImage" not in packer:
        pytest.skip("the image of this cloud was baked before its calls were recorded")
    assert packer - {"sts:GetCallerIdentity"} <= BAKE
