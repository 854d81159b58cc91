"""What MLflow's requests are read and its answers written with says the same as what it replaces."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import json_format
from mlflow.protos import service_pb2
from mlflow.protos.service_pb2 import LogBatch, Metric
from mlflow.utils import proto_json_utils
from mlflow_host import answers, received

from tests.schema import environments
from tests.services import HOST_PACKAGE
from tests.unit.compare_json import COMPARISONS


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_every_message_of_mlflow_is_read_and_written_as_by_protobuf_and_mlflow(comparison: str):
    COMPARISONS[comparison](random.Random(5))


@pytest.mark.slow
@pytest.mark.parametrize("version", environments.releases())
def test_so_it_is_in_other_releases(version: str):
    python = environments.environment(version)
    command = [str(python), "-W", "ignore", "-m", "tests.unit.compare_json"]
    folder = Path(__file__).parents[2]
    subprocess.run(command, check=True, cwd=folder, env={"PYTHONPATH": f"{folder}:{HOST_PACKAGE}"})


def test_unusual_options_are_left_to_protobuf_and_mlflow():
    metric = Metric(key="loss", value=0.5, timestamp=3, step=1)
    assert answers.message_to_dict(metric) == json_format.MessageToDict(metric)
    assert answers.message_to_dict(metric, True) == json_format.MessageToDict(metric, True)


def test_a_message_that_holds_something_is_not_filled_by_the_short_way():
    """ParseDict replaces lists, and the short way would add to them."""
    message = LogBatch(run_id="a", metrics=[Metric(key="a", value=1)])
    received.parse_dict({"metrics": [{"key": "b", "value": 2.0}]}, message, ignore_unknown_fields=True)
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
def test_what_mlflow_s_client_sends_is_read_the_short_way(sent):
    assert received.plain(json.loads(proto_json_utils.message_to_json(sent)), type(sent)) == sent


def test_an_installed_encoder_writes_no_line_breaks_and_the_same_values():
    code = """
import json
from mlflow_host import answers, received
value = {"b": [1, 2.5, None, {"µ": True}], "a": "x\\ny"}
usual = [{"indent": 2}, {"indent": 4, "sort_keys": True}, {"indent": 2, "separators": (" , ", ":")}]
before = [json.dumps(value, **options) for options in usual]
received.install()
answers.install()
after = [json.dumps(value, **options) for options in usual]
assert all("\\n" in text for text in before) and not any("\\n" in text for text in after), after
assert [json.loads(text) for text in before] == [json.loads(text) for text in after]
from mlflow.utils import proto_json_utils
assert proto_json_utils.MessageToDict is answers.message_to_dict
assert proto_json_utils.ParseDict is received.parse_dict
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(HOST_PACKAGE)})
