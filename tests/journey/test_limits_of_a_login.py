"""Requests with which a reader or writer could harm the server or other users in earlier images. On a launched machine,
each request gets the right answer, and no request ends a process.

Other tests cover the machine's own roles (test_role.py), the sandbox and the socket of the login (test_sandbox.py), the
cloud's APIs (tests/local_cloud/test_signatures.py) and pages in the browser (tests/browser).
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from scripts.local_cloud import LocalCloud
from tests.support.servers import Server, on_machine

pytestmark = [pytest.mark.machine, pytest.mark.slow]

Login = tuple[str, str]
Ask = Callable[..., requests.Response]
API = "/api/2.0/mlflow/"
JSON = {"Content-Type": "application/json"}
CONDITIONS = " and ".join(f"metrics.m{number} > {number}" for number in range(200))
ORDERS = [f"metrics.m{number}" for number in range(300)]
UNITS = (
    "systemctl show --property=MainPID,NRestarts 'mlflow-server@*' mlflow-host-postgresql nginx; "
    "grep -hs oom_kill /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control; true"
)


@pytest.fixture(scope="module", autouse=True)
def no_process_ends(server: Server, cloud: LocalCloud) -> Iterator[None]:
    """Assert that no test of this module killed or restarted a process."""
    before = on_machine(cloud, server, "sh", "-c", UNITS)
    assert before.count("MainPID=") >= 3
    yield
    assert on_machine(cloud, server, "sh", "-c", UNITS) == before


@pytest.fixture
def reader(server: Server, logins: dict[str, Login]) -> Ask:
    return lambda path, method="GET", **options: server.ask(
        path, method, **({"auth": logins["reader"], "timeout": 60} | options)
    )


@pytest.fixture
def writer(server: Server, logins: dict[str, Login]) -> Ask:
    return lambda path, method="GET", **options: server.ask(
        path, method, **({"auth": logins["writer"], "timeout": 60} | options)
    )


# Artifact locations in the backups bucket or in the machine's file system


def places(server: Server) -> list[str]:
    backups, models = server.buckets["backups"], server.buckets["models"]
    return [
        f"s3://{backups}/dumps",
        f"mlflow-host://{backups}/{models}/dumps",
        f"mlflow-host-proxied://{backups}/{models}/dumps",
        f"mlflow-host://{server.buckets['artifacts']}/{backups}",
        "file:///run/mlflow/x",
        "file:///dev/shm/x",
        "file:///tmp/x",
        "/tmp/x",
    ]


def test_a_writer_stores_no_place_outside_of_the_stack_however_it_is_spelled(server: Server, writer: Ask) -> None:
    writer(API + "registered-models/create", "POST", json={"name": "outside"})
    answers = {}
    for place in places(server):
        for route, field in (("experiments/create", "artifact_location"), ("model-versions/create", "source")):
            camel = "artifactLocation" if field == "artifact_location" else field
            for body in ({field: place}, {camel: place}, json.dumps({field: place, "name": "outside"})):
                sent = {"name": "outside", **body} if isinstance(body, dict) else body
                answer = writer(API + route, "POST", json=sent)
                answers[str(sent)] = (answer.status_code, "is outside this server" in answer.text)
    assert {sent: said for sent, said in answers.items() if said != (400, True)} == {}


@pytest.fixture
def secret(server: Server, cloud: LocalCloud) -> Iterator[bytes]:
    """Put a dump into the backups bucket, and yield the dump's content."""
    s3, there = cloud.client("s3"), {"Bucket": server.buckets["backups"], "Key": "dumps/everybody.dump"}
    content = uuid.uuid4().hex.encode()
    s3.put_object(**there, Body=content)
    yield content
    s3.delete_object(**there)


def test_rows_with_another_place_are_opened_on_no_route(
    server: Server, cloud: LocalCloud, reader: Ask, writer: Ask, secret: bytes
) -> None:
    """An image without the check of artifact locations, or a restore, may have left rows with a forbidden location."""
    name = f"rows-{uuid.uuid4().hex[:8]}"
    experiment = writer(API + "experiments/create", "POST", json={"name": name}).json()["experiment_id"]
    made = writer(API + "runs/create", "POST", json={"experiment_id": experiment, "start_time": 1}).json()
    run = made["run"]["info"]["run_id"]
    writer(API + "registered-models/create", "POST", json={"name": name})
    for source in (f"s3://{server.buckets['models']}/x", f"models:/{name}/1"):
        told = writer(API + "model-versions/create", "POST", json={"name": name, "source": source})
        assert told.status_code == 200, told.text
    place = f"s3://{server.buckets['backups']}/dumps"
    change = (
        f"UPDATE runs SET artifact_uri = '{place}' WHERE run_uuid = '{run}';"
        f"UPDATE model_versions SET source = '{place}', storage_location = '{place}' "
        f"WHERE name = '{name}' AND version = 1"
    )
    on_machine(cloud, server, "runuser", "-u", "postgres", "--", "psql", "-qd", "mlflow", "-c", change)
    file = {"path": "everybody.dump"}
    asked = {
        "get-artifact": reader("/get-artifact", params=file | {"run_uuid": run}),
        "list": reader(API + "artifacts/list", params={"run_id": run}),
        "version": reader("/model-versions/get-artifact", params=file | {"name": name, "version": "1"}),
        "version of a version": reader("/model-versions/get-artifact", params=file | {"name": name, "version": "2"}),
        "presigned": reader(API + "artifacts/presigned-download-url", "POST", json={"run_id": run} | file),
        "presigned upload": writer(API + "artifacts/presigned-upload-url", "POST", json={"run_id": run} | file),
        "upload": writer(f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=planted", "POST", data=b"planted"),
    }
    found = {what: (answer.status_code, answer.text) for what, answer in asked.items()}
    assert [what for what, (_, text) in found.items() if secret.decode() in text or "X-Amz" in text] == []
    del found["version of a version"]  # this version's location is in the models bucket, where no such file exists
    assert {what: said for what, said in found.items() if not 400 <= said[0] < 500} == {}
    back = f"UPDATE runs SET artifact_uri = 'mlflow-artifacts:/x' WHERE run_uuid = '{run}'"
    on_machine(cloud, server, "runuser", "-u", "postgres", "--", "psql", "-qd", "mlflow", "-c", back)
    assert writer(API + "registered-models/delete", "DELETE", json={"name": name}).status_code == 200
    kept = cloud.client("s3").list_objects_v2(Bucket=server.buckets["backups"], Prefix="dumps/planted")
    assert kept["KeyCount"] == 0


def test_a_planted_dump_is_not_among_the_backups(server: Server, cloud: LocalCloud) -> None:
    s3, backups = cloud.client("s3"), server.buckets["backups"]
    name = "20991231T000000Z-nightly-0123456789ab.dump"
    named_like_ours = f"dumps/{name}"
    planted = [f"dumps/{uuid.uuid4().hex}/artifacts/{name}", f"dumps/x{name}", f"other/{name}", named_like_ours]
    try:
        for key in planted:
            s3.put_object(Bucket=backups, Key=key, Body=b"RESET ROLE")
        listed = on_machine(cloud, server, "mlflow-host-restore", "list")
        assert [line.split()[0] for line in listed.splitlines() if "2099" in line] == [named_like_ours], listed
        assert "no digest: restored only by its name" in listed
    finally:
        for key in planted:
            s3.delete_object(Bucket=backups, Key=key)


# Searches and bodies that slow down other users


GRAPHQL = "query q($input: MlflowSearchRunsInput) { mlflowSearchRuns(input: $input) { runs { info { runId } } } }"


@pytest.mark.parametrize(
    ("method", "route", "sent"),
    [
        ("POST", "runs/search", {"experiment_ids": ["0"], "filter": CONDITIONS}),
        ("POST", "runs/search", {"experiment_ids": ["0"], "order_by": ORDERS}),
        ("POST", "runs/search", {"experimentIds": ["0"], "orderBy": ORDERS}),
        ("POST", "runs/search", json.dumps({"experiment_ids": ["0"], "filter": CONDITIONS})),
        ("GET", "registered-models/search", {"filter": CONDITIONS}),
        ("POST", "logged-models/search", {"experiment_ids": ["0"], "filter": CONDITIONS}),
    ],
)
def test_a_search_that_would_crash_postgresql_is_refused(reader: Ask, method: str, route: str, sent: Any) -> None:
    answer = reader(API + route, method, json=sent)
    assert answer.status_code == 400 and "limit is" in answer.json()["message"]


@pytest.mark.parametrize("field", [{"filter": CONDITIONS}, {"orderBy": ORDERS}])
def test_a_search_by_graphql_is_bounded_too(reader: Ask, field: dict[str, Any]) -> None:
    sent = {"query": GRAPHQL, "variables": {"input": {"experimentIds": ["0"], **field}}}
    assert "limit is" in reader("/graphql", "POST", json=sent).json()["errors"][0]


def test_megabytes_of_comments_in_a_query_are_refused(reader: Ask) -> None:
    answer = reader("/graphql", "POST", json={"query": "#\n" * 4_000_000 + "{ test }"})
    assert answer.status_code == 413 and "send it in parts" in answer.json()["message"]


def test_a_statement_that_needs_too_much_memory_fails_alone(server: Server, cloud: LocalCloud) -> None:
    """Another session continues. The kernel would kill a backend before it kills the postmaster."""
    dear = "SELECT length(string_agg(repeat('x', 1000000), '')) FROM generate_series(1, 1000)"
    line = f"""
        cd /; psql() {{ runuser -u postgres -- psql -XAtd mlflow "$@"; }}
        psql -c 'SELECT pg_sleep(20), 1' & beside=$!
        psql -c "{dear}"; echo "ended with $?"
        wait $beside; echo "beside with $?"
        systemctl show --value --property OOMScoreAdjust mlflow-host-postgresql
    """
    done = cloud.exec(server.instance_id, ["sh", "-c", line], timeout=120)
    assert "out of memory" in done.stderr or "exceeds" in done.stderr, done.stdout + done.stderr
    assert "ended with 1" in done.stdout and "beside with 0" in done.stdout
    assert done.stdout.splitlines()[-1] == "-900"


def test_the_list_of_models_waits_for_nobody(server: Server, reader: Ask, writer: Ask) -> None:
    """In the past, this request fetched 97 catalogues from the internet and occupied all threads."""
    with ThreadPoolExecutor(24) as many:
        asked = [many.submit(reader, "/ajax-api/3.0/mlflow/gateway/supported-models") for _ in range(24)]
        begun = time.monotonic()
        assert server.ask("/healthz", timeout=10).status_code == 200
        assert writer(API + "experiments/get?experiment_id=0").status_code == 200
        seconds = time.monotonic() - begun
        answers = [each.result() for each in asked]
    assert {answer.status_code for answer in answers} == {200}
    assert len(answers[0].json()["models"]) > 100
    assert seconds < 10 and max(answer.elapsed.total_seconds() for answer in answers) < 60


@pytest.mark.parametrize("route", ["runs/search", "experiments/search", "registered-models/get-latest-versions"])
def test_60_mebibytes_of_json_are_refused(reader: Ask, route: str) -> None:
    answer = reader(API + route, "POST", data=b'{"a": [' + b"0," * (30 << 20) + b"0]}", headers=JSON)
    assert answer.status_code == 413, answer.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/2.0/mlflow-artifacts/mpu/create/1/x"),
        ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid=x&path=x"),
        ("PUT", "/ajax-api/2.0/mlflow/logged-models/m-1/artifacts/x"),
    ],
)
def test_a_body_that_nginx_does_not_buffer_is_bounded(writer: Ask, method: str, path: str) -> None:
    """One body has a known length, and the other body is sent in chunks. MLflow would read each body into memory."""
    for body in (bytes(100 << 20), (bytes(1 << 20) for _ in range(100))):
        # nginx responds before it has read the whole request, and may then close the connection.
        with contextlib.suppress(requests.ConnectionError):
            assert writer(path, method, data=body).status_code == 413


def test_a_reader_s_body_of_a_get_is_bounded(reader: Ask) -> None:
    assert reader("/get-artifact?run_uuid=x&path=x", data=bytes(100 << 20)).status_code == 413


@pytest.mark.parametrize("route", ["runs/search", "experiments/create", "runs/log-batch"])
def test_deep_nesting_is_a_bad_request(writer: Ask, route: str) -> None:
    answer = writer(API + route, "POST", data=b'{"a": ' + b"[" * 100_000, headers=JSON)
    assert answer.status_code == 400, answer.text


def test_traces_that_decompress_to_too_much_are_refused(writer: Ask) -> None:
    bomb = gzip.compress(bytes(200 << 20))
    headers = {"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip", "x-mlflow-experiment-id": "0"}
    assert writer("/v1/traces", "POST", data=bomb, headers=headers).status_code == 413


# The login, and responses that a page or client cannot use


def test_a_name_with_a_line_feed_is_a_wrong_login_and_no_line_of_the_journal(
    server: Server, cloud: LocalCloud, logins: dict[str, Login]
) -> None:
    name, password = logins["reader"]
    forged = f"forged-{uuid.uuid4().hex}"
    for user in (f"{name}\n", f"{name}\n2026/11/29 12:00:00 [crit] {forged}"):
        login = base64.b64encode(f"{user}:{password}".encode()).decode()
        assert server.ask("/version", headers={"Authorization": f"Basic {login}"}).status_code == 401
    journal = on_machine(cloud, server, "journalctl", "--no-pager", "--unit=nginx", "--since=-2min")
    assert forged not in journal


@pytest.mark.parametrize("seconds", [3601, 86_400, 604_800])
def test_a_presigned_address_holds_for_an_hour_at_most(writer: Ask, seconds: int) -> None:
    made = writer(API + "runs/create", "POST", json={"experiment_id": "0", "start_time": 1}).json()
    body = {"run_id": made["run"]["info"]["run_id"], "path": "x", "expiration": seconds}
    for sent in (body, json.dumps(body)):
        answer = writer(API + "artifacts/presigned-upload-url", "POST", json=sent)
        assert answer.status_code == 400 and f"expiration is {seconds} seconds" in answer.json()["message"]


@pytest.mark.parametrize("path", ["/", "/static-files/favicon.ico", "/version", "/healthz", "/no-such-page"])
def test_every_answer_says_who_may_frame_it_and_what_it_loads(reader: Ask, path: str) -> None:
    headers = reader(path).headers
    assert headers["X-Frame-Options"] == "SAMEORIGIN"
    assert "default-src 'self'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/get-artifact?run_uuid=x&path=..%5cx", None),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts/..%5cx", None),
        ("GET", "/api/2.0/mlflow/metrics/get-history?run_id=x&metric_key=%00", None),
        ("POST", "/api/2.0/mlflow/runs/search", {"page_token": base64.b64encode(b'{"offset": 1e999}').decode()}),
        ("POST", "/graphql", {}),
        ("GET", "/graphql?query={__typename}", None),
    ],
)
def test_what_nobody_can_answer_is_a_bad_request(reader: Ask, method: str, path: str, body: Any) -> None:
    answer = reader(path, method, **({"json": {"experiment_ids": ["0"], **body}} if body is not None else {}))
    assert answer.status_code == 400, answer.text
