"""Our JSON parser returns the same results as protobuf's parser."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.message import Message
from mlflow.protos import service_pb2
from mlflow.protos.service_pb2 import LogBatch, Metric
from mlflow.utils import proto_json_utils

from mlflow_host.server import json_decode
from tests.schema import environments
from tests.support.services import HOST_PACKAGE
from tests.unit import compare_json


@pytest.mark.long
def test_every_message_of_mlflow_is_read_as_by_protobuf() -> None:
    compare_json.read(random.Random(5))


@pytest.mark.slow
@pytest.mark.parametrize("version", environments.releases())
def test_other_releases_pass_the_same_comparison(version: str) -> None:
    python = environments.environment(version)
    command = [str(python), "-W", "ignore", "-m", "tests.unit.compare_json"]
    folder = Path(__file__).parents[2]
    subprocess.run(command, check=True, cwd=folder, env={"PYTHONPATH": f"{folder}:{HOST_PACKAGE}"})


def test_non_empty_message_is_filled_by_protobuf() -> None:
    """protobuf's ParseDict replaces the lists of a message, but our fast parser would append to the lists. Therefore
    protobuf fills a message that is not empty."""
    message = LogBatch(run_id="a", metrics=[Metric(key="a", value=1)])
    json_decode.parse_dict({"metrics": [{"key": "b", "value": 2.0}]}, message, ignore_unknown_fields=True)
    assert message == LogBatch(run_id="a", metrics=[Metric(key="b", value=2)])


@pytest.mark.parametrize(
    "sent",
    [
        service_pb2.LogMetric(run_id="a", run_uuid="a", key="loss", value=0.5, timestamp=1_700_000_000_000, step=3),
        service_pb2.LogBatch(
            run_id="a",
            metrics=[Metric(key="loss", value=2, timestamp=3, step=0)],
            params=[service_pb2.Param(key="depth", value="3")],
            tags=[service_pb2.RunTag(key="mlflow.user", value="ada")],
        ),
        service_pb2.CreateRun(experiment_id="1", start_time=3, tags=[service_pb2.RunTag(key="k", value="")]),
        service_pb2.UpdateRun(run_id="a", status=service_pb2.FINISHED, end_time=3),
        service_pb2.SearchRuns(experiment_ids=["1"], run_view_type=service_pb2.ACTIVE_ONLY, max_results=100),
    ],
    ids=lambda sent: type(sent).__name__,
)
def test_requests_of_mlflows_client_use_the_fast_parser(sent: Message) -> None:
    assert json_decode.plain(json.loads(proto_json_utils.message_to_json(sent)), type(sent)) == sent


@pytest.mark.long
def test_mlflows_responses_have_no_line_breaks() -> None:
    code = """
import json
from mlflow_host.server import json_decode, mlflow_patches
mlflow_patches.apply(mlflow_patches.BEFORE_IMPORT)
from mlflow.protos.service_pb2 import Param, SearchRuns
from mlflow.utils import proto_json_utils
message = SearchRuns(experiment_ids=["1", "µ"], filter="x\\n\\"y", max_results=3)
before = proto_json_utils.message_to_json(message)
mlflow_patches.apply(each for each in mlflow_patches.AFTER_IMPORT if each.target.endswith("proto_json_utils:json"))
after = proto_json_utils.message_to_json(message)
assert "\\n" in before and "\\n" not in after, after
assert json.loads(before) == json.loads(after)
assert "\\n" in json.dumps({"a": 1}, indent=2), "json itself is unchanged"
assert proto_json_utils.json.loads is json.loads
assert proto_json_utils.ParseDict is json_decode.parse_dict
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(HOST_PACKAGE)})
