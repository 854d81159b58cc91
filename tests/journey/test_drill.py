"""The main promise of this project: after two upgrades and two rollbacks between two baked images, with writes at every
stop, no data is lost."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from scripts.local_cloud import LocalCloud
from tests.support.servers import OLDER

from .conftest import Drill

pytestmark = pytest.mark.machine


def test_a_drill_from_3_12_and_back_twice_loses_nothing(
    cloud: LocalCloud, image: Mapping[str, Any], drill: Drill
) -> None:
    assert drill.process.wait() == 0, drill.story.read_text()
    found = json.loads(drill.result.read_text())
    newer = image["facts"]["mlflow_version"]
    stops = found["stops"]
    assert [stop["mlflow_version"] for stop in stops] == [OLDER, newer, OLDER, newer]
    assert found["lost"] == 0
    for stop in stops:
        assert (stop["missing"], stop["changed"], stop["losses"]) == (0, 0, [])
        assert stop["written"] > 20
    compared = [stop["compared"] for stop in stops]
    assert compared[0] == 0 and compared == sorted(compared) and compared[3] > 60
    # While the older release is in service, data that only the newer release can store is in a pending merge. At the
    # last stop, the drill compares this data again.
    assert [stop["waiting"] > 0 for stop in stops] == [False, False, True, False]
    assert [stop["database"].split(" from ")[0] for stop in stops[1:]] == ["upgrade", "carry back", "upgrade"]
    assert "merged back from kept databases" in stops[3]["database"]
    assert all(0 < stop["outage_seconds"] < 180 for stop in stops[1:])
    names = [tag["Value"] for tag in tags_of_machines(cloud) if tag["Key"] == "mlflow-ami:stack"]
    assert "drill" not in names


def tags_of_machines(cloud: LocalCloud) -> list[dict[str, str]]:
    """Return the tags of all machines that are not terminated."""
    described = cloud.client("ec2").describe_instances()["Reservations"]
    machines = [each for reservation in described for each in reservation["Instances"]]
    return [tag for each in machines if each["State"]["Name"] != "terminated" for tag in each.get("Tags", [])]
