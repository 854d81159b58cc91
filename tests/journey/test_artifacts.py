"""Large files are uploaded and downloaded unchanged. Each kind of file has its own bucket."""

# mypy: disable-error-code="no-untyped-call"

import gzip
import hashlib
import json
import subprocess
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.uri import validate_path_is_safe

from scripts.local_cloud import LocalCloud
from tests.support.hard_names import LONGEST_KEY, PATHS, content_of
from tests.support.servers import Server

pytestmark = pytest.mark.machine

MEBIBYTE = 1024 * 1024


def write_noise(path: Path, mebibytes: int) -> str:
    """Fill `path` with bytes that cannot be compressed, and return their SHA-256."""
    block = hashlib.shake_256(b"mlflow-ami").digest(MEBIBYTE)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for number in range(mebibytes):
            piece = number.to_bytes(8, "big") + block[8:]
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


@pytest.mark.parametrize(
    "mebibytes",
    [
        pytest.param(300, id="through-the-server"),
        pytest.param(520, id="multipart"),  # clients with direct access to S3 upload 500 MiB or more in parts
    ],
)
def test_big_file_is_returned_unchanged(server: Server, client: MlflowClient, tmp_path: Path, mebibytes: int) -> None:
    sent = write_noise(tmp_path / "weights.bin", mebibytes)
    run = client.create_run(client.create_experiment(f"big-files-{mebibytes}"))
    client.log_artifact(run.info.run_id, str(tmp_path / "weights.bin"), "checkpoint")
    client.set_terminated(run.info.run_id)
    (tmp_path / "weights.bin").unlink()
    [listed] = client.list_artifacts(run.info.run_id, "checkpoint")
    assert (listed.path, listed.file_size) == ("checkpoint/weights.bin", mebibytes * MEBIBYTE)

    received = Path(client.download_artifacts(run.info.run_id, listed.path, dst_path=str(tmp_path)))
    digest = hashlib.sha256()
    with received.open("rb") as file:
        while piece := file.read(MEBIBYTE):
            digest.update(piece)
    assert digest.hexdigest() == sent


def test_models_and_artifacts_have_a_bucket_each(
    server: Server, cloud: LocalCloud, example_runs: Mapping[str, str]
) -> None:
    def keys(bucket: str) -> list[str]:
        pages = cloud.client("s3").get_paginator("list_objects_v2").paginate(Bucket=server.buckets[bucket])
        return [each["Key"] for page in pages for each in page.get("Contents", [])]

    models, artifacts = keys("models"), keys("artifacts")
    assert any(key.endswith("/MLmodel") for key in models)
    assert not any("/models/m-" in f"/{key}" for key in artifacts)
    assert any(key.endswith("/confusion_matrix.png") for key in artifacts)


FILES = "/api/2.0/mlflow-artifacts/artifacts"


def stored_as(path: str) -> str | None:
    """Return the name under which MLflow stores a file uploaded to this path; None if MLflow refuses the path."""
    try:
        return None if "\n" in path else str(validate_path_is_safe(path))
    except MlflowException:
        return None


def test_names_that_are_hard_to_write_pass_the_proxy(server: Server, client: MlflowClient) -> None:
    """The test uses the longest paths and every fourth path of tests/unit/test_artifact_names.py. The unit test
    compares all paths with plain MLflow."""
    run_id = client.create_run("0").info.run_id
    root = f"0/{run_id}/artifacts"

    def ask(method: str, path: str, **options: object) -> tuple[int, Mapping[str, str], bytes]:
        answer = server.ask(path, method, auth=server.login, timeout=60, **options)
        return answer.status_code, answer.headers, answer.content

    wrong: list[tuple[str, str, object, object]] = []
    for number, path in enumerate([*PATHS[::4], *PATHS[-12:]]):
        if any(len(name.encode()) > 240 for name in path.split("/")):
            continue  # SeaweedFS cannot delete the versions of a longer name, so `destroy` would fail
        folder, content = f"{number}/{path}".rpartition("/")[0], content_of(path)
        file = f"{FILES}/{root}/{number}/{urllib.parse.quote(path)}"
        status, _, said = ask("PUT", file, data=content)
        name = stored_as(f"{number}/{path}")
        if name is None or len(f"{root}/{name}".encode()) > LONGEST_KEY:
            if status != (404 if "\n" in path else 400):
                wrong.append((path, "upload", status, said))
            continue
        got, head = ask("GET", file, headers={"Accept-Encoding": "gzip"}), ask("HEAD", file)
        page = "/get-artifact?" + urllib.parse.urlencode({"run_uuid": run_id, "path": f"{number}/{path}"})
        # MLflow's client changes some names, and returns an empty list for a folder that contains only a file of the
        # same name. Therefore the test lists folders without MLflow's client.
        inside = "?" + urllib.parse.urlencode({"path": f"{root}/{folder}"})
        listed = [each["path"] for each in json.loads(ask("GET", f"{FILES}{inside}")[2]).get("files", [])]
        for what, seen, expected in (
            ("upload", status, 200),
            ("download", (got[0], got[2]), (200, content)),
            ("page", ask("GET", page)[::2], (200, content)),
            (
                "head",
                [head[1].get(h) for h in ("Content-Disposition", "Content-Type")],
                [got[1].get(h) for h in ("Content-Disposition", "Content-Type")],
            ),
            ("list", listed, [name.rpartition("/")[2]]),
        ):
            if seen != expected:
                wrong.append((path, what, seen, expected))
    assert wrong == []


def test_compressed_files_are_returned_unchanged(
    server: Server, client: MlflowClient, cloud: LocalCloud, tmp_path: Path
) -> None:
    """Earlier images stored files with a Content-Encoding. Such files keep the header and are returned unchanged."""
    table = gzip.compress(b"a,b\n" * 200_000, mtime=0)
    contents = {"table.csv.gz": table, "no.tar.gz": b"this is no gzip", "big.nii.gz": table * 24_000, "empty.tgz": b""}
    run_id = client.create_run("0").info.run_id
    root = f"0/{run_id}/artifacts"
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        client.log_artifact(run_id, str(tmp_path / name), "logged")
        earlier = {"Bucket": server.buckets["artifacts"], "Key": f"{root}/earlier/{name}"}
        cloud.client("s3").put_object(**earlier, Body=content, ContentEncoding="gzip")
    for folder in ("logged", "earlier"):
        (tmp_path / "down").mkdir(exist_ok=True)
        received = Path(client.download_artifacts(run_id, folder, str(tmp_path / "down")))
        assert {path.name: path.read_bytes() for path in received.iterdir()} == contents
        for name, content in contents.items():
            into = tmp_path / f"curl-{folder}-{name}"
            into.mkdir()
            login = f'user = "{":".join(server.login)}"'
            trusted = ["--cacert", server.server_certificate] if server.server_certificate else []
            address = f"{server.url}{FILES}/{root}/{folder}/{name}"
            options = ["-sSf", "--compressed", "--remote-name", "--remote-header-name"]
            command = ["curl", *options, *trusted, "--config", "-", address]
            subprocess.run(command, cwd=into, input=login, text=True, check=True)
            assert {path.name: path.read_bytes() for path in into.iterdir()} == {name: content}
            page = f"/get-artifact?run_uuid={run_id}&path={folder}%2F{name}"
            shown = server.ask(page, auth=server.login, timeout=60, headers={"Accept-Encoding": "gzip"})
            assert (shown.status_code, shown.content) == (200, content)
    encodings = {
        folder: cloud.client("s3")
        .head_object(Bucket=server.buckets["artifacts"], Key=f"{root}/{folder}/table.csv.gz")
        .get("ContentEncoding")
        for folder in ("logged", "earlier")
    }
    assert encodings == {"logged": None, "earlier": "gzip"}


@pytest.mark.parametrize("path", ["..%5ca", "http:%2f%2f%5bx", "/".join(["a" * 255] * 20)])
def test_paths_that_cannot_be_stored_are_refused_with_a_sentence(server: Server, path: str) -> None:
    refused = server.ask(f"{FILES}/{path}", "PUT", auth=server.login, data=b"x", timeout=60)
    assert refused.status_code == 400
    assert refused.json()["error_code"] == "INVALID_PARAMETER_VALUE"
    assert len(refused.json()["message"]) > 30
