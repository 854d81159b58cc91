"""No request to a server with default settings waits for a connection to an address outside the stack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from mlflow_host.bake.reader_routes import installed_routes
from mlflow_host.contract import launch, sizing
from mlflow_host.machine import config
from mlflow_host.server import environment
from tests.support.services import HOST_PACKAGE, PostgreSQL, free_port, on_loopback, server_processes

pytestmark = pytest.mark.service

Ask = Callable[..., requests.Response]

CUT_OFF = Path(__file__).with_name("cut_off")
PROVIDERS = ("openai", "anthropic", "gemini", "mistral", "bedrock", "nosuch", "")
DOCUMENT = """
format = 1
[stack]
name = "mlflow-dev"
region = "eu-central-1"
[buckets]
artifacts = "the-artifacts"
models = "the-models"
backups = "the-backups"
[credentials]
parameter = "/mlflow-ami/dev/credentials"
[data_volume]
id = "vol-0123456789abcdef0"
[web]
hostnames = ["localhost"]
tls = "off"
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the log file for attempts to reach other hosts."""
    return tmp_path_factory.mktemp("cut-off") / "log"


@pytest.fixture(scope="module")
def ask(cluster: PostgreSQL, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Yield a function that sends requests to a server with a default machine's environment and no internet access."""
    machine = config.host_config(launch.parse(DOCUMENT), sizing.size(sizing.MachineSize(memory_mb=2048, cores=2)))
    told = environment.environment(machine, "a passphrase") | cut_off(log)
    told |= {"MLFLOW_BACKEND_STORE_URI": cluster.uri(), "TMPDIR": str(log.parent)}
    # Both the metadata service and S3 belong to the stack. In this test no program listens at S3's address.
    told |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_MAX_ATTEMPTS": "1"}
    told |= dict.fromkeys(("AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"), f"http://127.0.0.1:{free_port()}")
    with (
        server_processes(tmp_path_factory.mktemp("server"), told) as (server,),
        on_loopback(server.socket) as url,
        requests.Session() as session,
    ):
        session.headers["host"] = "localhost"
        yield lambda method, path, **options: session.request(method, url + path, timeout=60, **options)


def cut_off(log: Path) -> dict[str, str]:
    no_proxy = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"), "")
    return no_proxy | {"PYTHONPATH": f"{CUT_OFF}:{HOST_PACKAGE}", "CUT_OFF_LOG": str(log)}


def test_trace_cost_needs_no_internet(ask: Ask, log: Path) -> None:
    for provider in PROVIDERS:
        begun = time.monotonic()
        headers = {"content-type": "application/x-protobuf", "x-mlflow-experiment-id": "0"}
        answer = ask("POST", "/v1/traces", data=trace(provider), headers=headers)
        assert answer.status_code == 200, answer.text
        assert asked(log) == [] and time.monotonic() - begun < 10
    found = ask("GET", "/api/2.0/mlflow/traces?experiment_ids=0&max_results=50")
    priced = [one for one in found.json()["traces"] if "cost" in json.dumps(one)]
    assert len(found.json()["traces"]) == len(PROVIDERS) and priced, "the prices inside MLflow are used"


def trace(provider: str) -> bytes:
    """Return the body of an OpenTelemetry exporter's request with one model call."""
    request = ExportTraceServiceRequest()
    span = request.resource_spans.add().scope_spans.add().spans.add()
    span.trace_id, span.span_id, span.name = os.urandom(16), os.urandom(8), "chat"
    span.start_time_unix_nano, span.end_time_unix_nano = time.time_ns() - 10**6, time.time_ns()
    texts: dict[str, Any] = {"gen_ai.request.model": "gpt-4o-mini", "gen_ai.operation.name": "chat"}
    for key, text in (
        texts | ({"gen_ai.provider.name": provider, "gen_ai.system": provider} if provider else {})
    ).items():
        attribute = span.attributes.add()
        attribute.key, attribute.value.string_value = key, text
    for key, number in (("gen_ai.usage.input_tokens", 12), ("gen_ai.usage.output_tokens", 34)):
        attribute = span.attributes.add()
        attribute.key, attribute.value.int_value = key, number
    sent: bytes = request.SerializeToString()
    return sent


def test_read_routes_need_no_internet(ask: Ask, log: Path) -> None:
    paths = [route.path for route in installed_routes() if route.method == "GET" and "<" not in route.path]
    assert "/ajax-api/3.0/mlflow/gateway/supported-models" in paths and len(paths) > 50
    queries = ["", *(f"?provider={provider}" for provider in PROVIDERS)]
    for path in paths:
        for query in queries if "gateway" in path else queries[:1]:
            begun = time.monotonic()
            assert ask("GET", path + query).status_code != 403
            assert asked(log) == [] and time.monotonic() - begun < 10, path + query


def test_models_of_the_catalogue_inside_mlflow_are_offered(ask: Ask) -> None:
    answer = ask("GET", "/ajax-api/3.0/mlflow/gateway/supported-models?provider=openai")
    assert "gpt-4o-mini" in answer.text


def test_plain_mlflow_uses_the_internet(tmp_path: Path) -> None:
    """The log contains a request of plain MLflow, so the tests above would detect a request of our server."""
    code = (
        "from mlflow.utils.providers import cost_per_token as c; c('gpt-4o-mini', 1, 1, custom_llm_provider='openai')"
    )
    log = tmp_path / "log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    subprocess.run([sys.executable, "-c", code], env=inherited | cut_off(log), capture_output=True)
    assert any("github.com" in line for line in asked(log))


def asked(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []
