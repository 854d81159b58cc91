"""Our server returns artifacts with difficult names exactly as plain MLflow returns them from a local folder.

MLflow's client and HTTP requests upload, list and download a file of each name, and the artifact page shows the file.
The test compares three servers: our server with direct transfer, our server with proxied transfer, and plain MLflow.
The test compares status, MLflow's error code, content, and the headers of a download. The following responses differ:

| names | plain MLflow | ours | reason |
|---|---|---|---|
| a path of more than 1,024 bytes | 200; 500 beyond the system's 4,096 | 400 | S3 stores no longer keys |
| `..` between backslashes (`a\\..\\b`) | 200 | 400 | an object store may interpret it as a path outside the folder |
| `.artifact.uploading.…` | 400 | 200 | MLflow needs such names for uploads to a folder, not to S3 |
| other backslashes | 200 | not compared | SeaweedFS treats them as slashes, S3 does not: test_artifacts.py |
| errors | some in plain text or HTML | MLflow's JSON | compared by status |
| paths that MLflow's decoding cannot read (`http://[x`) | 500 | 400 | clients repeat a 500 for minutes |
"""

from __future__ import annotations

import gzip
import os
import posixpath
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from mlflow import MlflowClient

from mlflow_host.server import process as server_process
from mlflow_host.server.artifact_repository import PART_BYTES
from mlflow_host.server.environment import private_environment
from tests.support.hard_names import LONGEST_KEY, PATHS, content_of
from tests.support.services import (
    HOST_PACKAGE,
    ObjectStore,
    create_schema,
    on_loopback,
    process,
    server_processes,
    wait_until,
)

pytestmark = pytest.mark.service

DESTINATIONS = {"direct": "mlflow-host://artifacts/models", "proxied": "mlflow-host-proxied://artifacts/models"}
FILES = "/api/2.0/mlflow-artifacts/artifacts"
HEADERS = ("content-type", "content-disposition", "x-content-type-options", "content-encoding")


@pytest.fixture(scope="module", autouse=True)
def no_patience() -> Iterator[None]:
    """Configure MLflow's client to send no retries, and to treat files above 5 MiB as large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        patch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", str(5 * 2**20))
        patch.setenv("MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE", str(5 * 2**20))
        patch.setenv("MLFLOW_MULTIPART_DOWNLOAD_CHUNK_SIZE", str(5 * 2**20))
        yield


@pytest.fixture(scope="module")
def urls(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Yield the URL of our server for each kind of transfer, and the URL of plain MLflow with its artifacts in a
    folder."""
    with ExitStack() as stack:
        found = {}
        create_schema(f"sqlite:///{(empty := tmp_path_factory.mktemp('database') / 'mlflow.db')}")
        for name in (*DESTINATIONS, "plain"):
            folder = tmp_path_factory.mktemp(name)
            shutil.copy(empty, folder)
            public = {
                "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
                "MLFLOW_ARTIFACTS_DESTINATION": DESTINATIONS.get(name, str(folder / "artifacts")),
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "MLFLOW_SERVER_ALLOWED_HOSTS": "localhost,127.0.0.1:*",
            }
            if name == "plain":
                uds = folder / "socket"
                command = [sys.executable, "-m", "uvicorn", "--uds", str(uds), server_process.APPLICATION]
                variables = {"PYTHONPATH": str(HOST_PACKAGE), **public, **private_environment(public)}
                running = stack.enter_context(process(command, folder / "log", env={**os.environ, **variables}))
                wait_until(uds.exists, running, folder / "log")
            else:
                [ours] = stack.enter_context(server_processes(folder, {**public, **store.environment}))
                uds = ours.socket
            found[name] = stack.enter_context(on_loopback(uds))
        yield found


def outcome(act: Callable[[], Any]) -> Any:
    """Call MLflow's client, and return the result or the error."""
    try:
        return act()
    except requests.HTTPError as error:
        assert error.response is not None
        return error.response.status_code
    except mlflow.MlflowException as error:
        return error.error_code
    except OSError as error:
        return type(error).__name__


def download(answer: requests.Response) -> Any:
    """Return the headers and the content of a download, or the status of an error."""
    if answer.status_code != 200:
        return answer.status_code
    return *(answer.headers.get(name) for name in HEADERS), answer.content


def listing(answer: requests.Response) -> Any:
    return answer.json().get("files", []) if answer.status_code == 200 else answer.status_code


def seen_by_client(client: MlflowClient, run_id: str, path: str, number: int, folder: Path) -> dict[str, Any]:
    """Upload a file with MLflow's client to a new artifact folder, and return the results of all calls for the file."""
    file = folder / "up" / posixpath.basename(path)
    file.parent.mkdir(parents=True)
    file.write_bytes(content_of(path))
    below = posixpath.join(f"client-{number}", posixpath.dirname(path)).rstrip("/")
    (folder / "down").mkdir()

    def downloaded() -> Any:
        found = Path(client.download_artifacts(run_id, below, str(folder / "down")))
        return sorted((str(file.relative_to(found)), file.read_bytes()) for file in found.rglob("*") if file.is_file())

    return {
        "client's upload": outcome(lambda: client.log_artifact(run_id, str(file), below)),
        "client's list": outcome(
            lambda: sorted((info.path, info.is_dir, info.file_size) for info in client.list_artifacts(run_id, below))
        ),
        "client's download": outcome(downloaded),
    }


def seen_by_http(url: str, run_id: str, path: str, number: int) -> dict[str, Any]:
    """Upload a file by PUT like curl, open the file like the artifact page, and return the results."""
    root, below = f"0/{run_id}/artifacts", f"http-{number}"
    file = f"{url}{FILES}/{root}/{below}/{urllib.parse.quote(path)}"
    folder = posixpath.join(below, posixpath.dirname(path)).rstrip("/")
    page = {"run_id": run_id, "path": folder}
    shown = {"run_uuid": run_id, "path": f"{below}/{path}"}
    with requests.Session() as session:
        put = session.put(file, data=content_of(path))
        head = session.head(file)
        return {
            "upload": put.status_code,
            "download": download(session.get(file)),
            "head": head.status_code if head.status_code != 200 else [head.headers.get(name) for name in HEADERS[:3]],
            "list": listing(session.get(f"{url}{FILES}", params={"path": f"{root}/{folder}"})),
            "page's list": listing(session.get(f"{url}/ajax-api/2.0/mlflow/artifacts/list", params=page)),
            "page's file": download(session.get(f"{url}/get-artifact", params=shown)),
        }


def seen(url: str, folder: Path, paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Send the requests for each path to one server, and return the results by path."""
    client = MlflowClient(tracking_uri=url)
    run_id = client.create_run("0").info.run_id
    found = {}
    for number, path in enumerate(paths):
        by_client = seen_by_client(client, run_id, path, number, folder / str(number))
        found[path] = {**by_client, **seen_by_http(url, run_id, path, number)}
    return found


def is_too_long(path: str) -> bool:
    return len(f"0/{'0' * 32}/artifacts/client-000/{path}".encode()) > LONGEST_KEY


SPECIAL = [path for path in PATHS if is_too_long(path) or path.startswith(".artifact.uploading.")]
SOME = list(dict.fromkeys([*PATHS[::5], *SPECIAL]))
"""The names that `make test` compares, with direct transfer only. `make test-compare` compares all names, with direct
and with proxied transfer."""


@pytest.mark.parametrize(
    ("transfer", "paths"),
    [
        ("direct", SOME),
        pytest.param("direct", PATHS, marks=pytest.mark.slow),
        pytest.param("proxied", PATHS, marks=pytest.mark.slow),
    ],
    ids=["direct, some", "direct, all", "proxied, all"],
)
def test_names_that_are_hard_to_write_are_served_as_by_plain_mlflow(
    urls: dict[str, str], transfer: str, paths: list[str], tmp_path: Path
) -> None:
    assert len(PATHS) >= 200
    plain, ours = (seen(urls[name], tmp_path / name, paths) for name in ("plain", transfer))
    compared = [path for path in paths if path not in SPECIAL]
    different = {
        (path, step): (ours[path][step], expected)
        for path in compared
        for step, expected in plain[path].items()
        if ours[path][step] != expected
    }
    assert different == {}
    # Require successful downloads: if all requests failed, the comparison would prove nothing.
    downloads = {path: ours[path]["download"] for path in compared if isinstance(ours[path]["download"], tuple)}
    assert len(downloads) > 0.9 * len(compared)
    assert {path: found[-1] for path, found in downloads.items()} == {path: content_of(path) for path in downloads}
    for path in SPECIAL:
        if is_too_long(path):
            assert (ours[path]["client's upload"], ours[path]["upload"]) == (400, 400)
    assert ours[".artifact.uploading.x"]["download"][-1] == content_of(".artifact.uploading.x")


@pytest.mark.parametrize("path", ["..\\a.txt", "a\\..\\b.txt", "http://[x", "%" + "25" * 12 + "41"])
def test_paths_that_mlflow_cannot_read_are_refused_with_a_sentence(urls: dict[str, str], path: str) -> None:
    url, quoted = urls["direct"], urllib.parse.quote(path)
    run_id = MlflowClient(tracking_uri=url).create_run("0").info.run_id
    file = f"{url}{FILES}/{quoted}"
    answers = [
        *(requests.request(method, file, data=b"x") for method in ("GET", "PUT", "DELETE")),
        requests.get(f"{url}/api/2.0/mlflow-artifacts/presigned/{quoted}"),
        requests.get(f"{url}{FILES}", params={"path": path}),
        requests.get(f"{url}/get-artifact", params={"run_uuid": run_id, "path": path}),
        requests.get(f"{url}/ajax-api/2.0/mlflow/artifacts/list", params={"run_id": run_id, "path": path}),
    ]
    assert [answer.status_code for answer in answers] == [400] * len(answers)
    assert all(answer.json()["message"].startswith("Invalid path '") for answer in answers)
    assert requests.head(file).status_code == 400


def big(size: int) -> bytes:
    """Return `size` incompressible bytes that begin like a gzip file."""
    start = gzip.compress(b"a,b\n" * 200_000, mtime=0)
    return (start + os.urandom(max(0, size - len(start))))[:size]


@pytest.mark.parametrize("size", [0, 1, 817, PART_BYTES - 1, 2 * PART_BYTES + 5])
@pytest.mark.parametrize("transfer", DESTINATIONS)
def test_compressed_files_are_returned_unchanged(
    urls: dict[str, str], store: ObjectStore, transfer: str, size: int, tmp_path: Path
) -> None:
    """Files of a run and files of a model are in different buckets. MLflow's client or curl uploads each file. The
    client, curl and the artifact page download the file."""
    url, content = urls[transfer], big(size)
    client = MlflowClient(tracking_uri=url)
    run_id = client.create_run("0").info.run_id
    model = client.create_logged_model("0", name="packed")
    names = ("table.csv.gz", "big.nii.gz") if size < PART_BYTES else ("big.nii.gz",)
    for name in names:
        (file := tmp_path / name).write_bytes(content)
        client.log_artifact(run_id, str(file), "logged")
        for root in (f"0/{run_id}/artifacts/put", f"0/models/{model.model_id}/artifacts/put"):
            curl("--upload-file", str(file), f"{url}{FILES}/{root}/{name}", folder=tmp_path)
        client.log_model_artifact(model.model_id, str(file))
        expected = {
            "client, run": Path(client.download_artifacts(run_id, f"logged/{name}", folder(tmp_path))),
            "client, run, put": Path(client.download_artifacts(run_id, f"put/{name}", folder(tmp_path))),
            "client, model": Path(
                mlflow.artifacts.download_artifacts(
                    f"{model.artifact_location}/{name}", dst_path=folder(tmp_path), tracking_uri=url
                )
            ),
        }
        asked = {
            "run": f"{url}{FILES}/0/{run_id}/artifacts/logged/{name}",
            "model": f"{url}{FILES}/0/models/{model.model_id}/artifacts/{name}",
            "page of a run": f"{url}/get-artifact?path=logged%2F{name}&run_uuid={run_id}",
            "page of a model": f"{url}/ajax-api/2.0/mlflow/logged-models/{model.model_id}/artifacts/files"
            f"?artifact_file_path=put%2F{name}",
        }
        for what, address in asked.items():
            curl("--remote-name", "--remote-header-name", "--compressed", address, folder=(into := folder(tmp_path)))
            expected[what] = Path(into, name)
            assert [path.name for path in Path(into).iterdir()] == [name], what
        different = {what for what, path in expected.items() if path.read_bytes() != content}
        assert different == set(), name
    stored = {
        bucket: [
            (key["Key"], store.client().head_object(Bucket=bucket, Key=key["Key"]).get("ContentEncoding"))
            for key in store.client().list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
        ]
        for bucket, prefix in (("artifacts", f"0/{run_id}"), ("models", f"0/models/{model.model_id}"))
    }
    assert [len(keys) for keys in stored.values()] == [2 * len(names)] * 2
    assert {encoding for keys in stored.values() for _, encoding in keys} == {None}


@pytest.mark.parametrize("transfer", DESTINATIONS)
def test_a_model_with_a_packed_artifact_loads(urls: dict[str, str], transfer: str, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "table.csv.gz", "wt") as file:
        file.write("a,b\n" * 200_000)

    class Counting(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
        def load_context(self, context: Any) -> None:
            with gzip.open(context.artifacts["table"], "rt") as file:
                self.lines = len(file.readlines())

        def predict(self, context: Any, model_input: list[int]) -> list[int]:
            return [self.lines for _ in model_input]

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(urls[transfer])
    try:
        table = str(tmp_path / "table.csv.gz")
        logged = mlflow.pyfunc.log_model(name="counting", python_model=Counting(), artifacts={"table": table})
        assert mlflow.pyfunc.load_model(logged.model_uri).predict([1]) == [200_000]
    finally:
        mlflow.end_run()
        mlflow.set_tracking_uri(before)


@pytest.mark.parametrize("transfer", DESTINATIONS)
def test_objects_of_earlier_images_are_served_and_unchanged(
    urls: dict[str, str], store: ObjectStore, transfer: str, tmp_path: Path
) -> None:
    """Images up to November 2026 stored the encoding "gzip" for every file with a name that ends in .gz."""
    client = MlflowClient(tracking_uri=urls[transfer])
    run_id = client.create_run("0").info.run_id
    contents = {"table.csv.gz": big(817), "no.tar.gz": b"this is no gzip", "big.nii.gz": big(12 * 2**20)}
    for name, content in contents.items():
        key = f"0/{run_id}/artifacts/{name}"
        store.client().put_object(Bucket="artifacts", Key=key, Body=content, ContentEncoding="gzip")
    received = Path(client.download_artifacts(run_id, "", str(tmp_path)))
    assert {path.name: path.read_bytes() for path in received.iterdir()} == contents
    for name, content in contents.items():
        curl("--compressed", "-o", "x", f"{urls[transfer]}{FILES}/0/{run_id}/artifacts/{name}", folder=str(tmp_path))
        assert (tmp_path / "x").read_bytes() == content
        key = f"0/{run_id}/artifacts/{name}"
        assert store.client().head_object(Bucket="artifacts", Key=key)["ContentEncoding"] == "gzip"


def curl(*arguments: str, folder: str | Path) -> None:
    subprocess.run(["curl", "--silent", "--show-error", "--fail", *arguments], cwd=folder, check=True)


def folder(parent: Path) -> str:
    """A new folder."""
    made = parent / os.urandom(8).hex()
    made.mkdir()
    return str(made)
