"""Large files go up and come down whole, and each kind lies in its own bucket."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from local_cloud import LocalCloud
from mlflow import MlflowClient
from servers import Server

pytestmark = pytest.mark.machine

MEBIBYTE = 1024 * 1024


def write_noise(path: Path, mebibytes: int) -> str:
    """Fill `path` with bytes that do not compress; returns their SHA-256."""
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
        pytest.param(520, id="multipart"),  # from 500 MiB a client uploads in parts, by presigned URL where it may
    ],
)
def test_big_file_comes_back_unchanged(server: Server, client: MlflowClient, tmp_path: Path, mebibytes: int) -> None:
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
