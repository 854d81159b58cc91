"""retire_stack.py prints what it will delete, downloads the data and empties the buckets. In the tests, a stand-in
replaces the Pulumi CLI."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import aws_session, retire_stack
from tests.support.moto_cloud import MotoCloud, moto_cloud

PURPOSES = ("artifacts", "models", "backups")


@pytest.fixture(scope="module")
def cloud() -> Iterator[MotoCloud]:
    with moto_cloud() as found:
        yield found


@pytest.fixture
def s3(cloud: MotoCloud) -> Any:
    """Create three buckets with object versions, a delete marker and an unfinished upload, and return the client."""
    client = cloud.client("s3")
    for purpose in PURPOSES:
        client.create_bucket(Bucket=purpose, CreateBucketConfiguration={"LocationConstraint": cloud.region})
        client.put_bucket_versioning(Bucket=purpose, VersioningConfiguration={"Status": "Enabled"})
    for text in ("old", "newer"):
        client.put_object(Bucket="artifacts", Key="1/model.txt", Body=text.encode())
    client.put_object(Bucket="artifacts", Key="1/gone.txt", Body=b"gone")
    client.delete_object(Bucket="artifacts", Key="1/gone.txt")
    client.put_object(Bucket="models", Key="m-1/weights", Body=b"w" * 10)
    client.create_multipart_upload(Bucket="models", Key="m-1/unfinished")
    client.put_object(Bucket="backups", Key="dumps/20261122T101500Z-nightly-f4a9b2c7d1e6.dump", Body=b"older")
    client.put_object(Bucket="backups", Key="pgbackrest/archive", Body=b"wal")
    yield client
    for purpose in PURPOSES:
        retire_stack.empty(client, purpose)
        client.delete_bucket(Bucket=purpose)


def exported() -> dict[str, Any]:
    def resource(kind: str, name: str, id_: str, **outputs: Any) -> dict[str, Any]:
        return {
            "type": kind,
            "urn": f"urn:pulumi:dev::mlflow-ami::{kind}::{name}",
            "id": id_,
            "custom": True,
            "outputs": outputs,
        }

    return {
        "deployment": {
            "resources": [
                {
                    "type": "pulumi:pulumi:Stack",
                    "urn": "urn:pulumi:dev::mlflow-ami::pulumi:pulumi:Stack::mlflow-ami-dev",
                    "outputs": {"url": "https://192.0.2.1"},
                },
                *(resource("aws:s3/bucket:Bucket", f"mlflow-{purpose}", purpose) for purpose in PURPOSES),
                resource("aws:ebs/volume:Volume", "data", "vol-0123456789abcdef0", size=20),
                resource("aws:ssm/parameter:Parameter", "credentials", "/mlflow-ami/dev/credentials"),
                resource("aws:ec2/instance:Instance", "server", "i-0123456789abcdef0"),
            ]
        }
    }


def stand_in(done: list[str]) -> retire_stack.Pulumi:
    """Return a stand-in for the Pulumi CLI, which answers `stack export` and records all other commands in `done`."""

    def pulumi(*arguments: str) -> str:
        if arguments[:2] == ("stack", "export"):
            return json.dumps(exported())
        done.append(" ".join(arguments))
        return ""

    return pulumi


def test_plan_lists_resources_with_data_and_kept_ones(s3: Any, tmp_path: Path) -> None:
    found = retire_stack.read_stack(stand_in([]), "dev")
    lines = "\n".join(retire_stack.plan(s3, found, tmp_path))
    for part in (
        "6 resources",
        "bucket artifacts (artifacts): 1 objects, 0.0 MiB, and 2 older versions",
        "vol-0123456789abcdef0 with the database: 20 GiB",
        "parameter /mlflow-ami/dev/credentials",
        "dumps/20261122T101500Z-nightly-f4a9b2c7d1e6.dump",
        "images, snapshots and metrics",
    ):
        assert part in lines
    assert "--keep" in "\n".join(retire_stack.plan(s3, found, None))


def test_newest_dump_and_current_artifacts_are_downloaded_once(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="backups", Key="dumps/20261123T101500Z-manual-f4a9b2c7d1e6.dump", Body=b"newest dump")
    s3.put_object(Bucket="backups", Key="dumps/run/artifacts/20991231T000000Z-nightly-f4a9b2c7d1e6.dump", Body=b"x")
    buckets = {purpose: purpose for purpose in PURPOSES}
    retire_stack.download(s3, buckets, tmp_path)
    retire_stack.download(s3, buckets, tmp_path)
    kept = {str(each.relative_to(tmp_path)): each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    assert kept == {
        "artifacts/1/model.txt": b"newer",
        "models/m-1/weights": b"w" * 10,
        "backups/dumps/20261123T101500Z-manual-f4a9b2c7d1e6.dump": b"newest dump",
    }


def test_a_key_cannot_write_outside_the_folder(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="artifacts", Key="../../outside", Body=b"x")
    with pytest.raises(retire_stack.DeletionRefused, match="outside"):
        retire_stack.download(s3, {"artifacts": "artifacts"}, tmp_path / "a/b")
    assert not (tmp_path / "outside").exists()


def test_buckets_are_emptied_of_versions_markers_and_uploads_and_again(s3: Any) -> None:
    for purpose in PURPOSES:
        retire_stack.empty(s3, purpose)
        retire_stack.empty(s3, purpose)
        found = s3.list_object_versions(Bucket=purpose)
        assert not found.get("Versions") and not found.get("DeleteMarkers")
        assert not s3.list_multipart_uploads(Bucket=purpose).get("Uploads")
    retire_stack.empty(s3, "never-was-there")


def test_machine_is_deleted_first_and_protection_removed_last(
    s3: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    monkeypatch.setattr(retire_stack, "in_folder", lambda folder, environment: stand_in(done))
    monkeypatch.setattr(aws_session, "choose", lambda region: SimpleNamespace(client=lambda service: s3))
    monkeypatch.setattr("sys.argv", ["retire_stack.py", "--stack", "dev", "--yes"])
    assert retire_stack.main() == 0
    assert [each.split(" --stack")[0] for each in done] == [
        "destroy --yes --skip-preview",
        "state unprotect --all --yes",
        "destroy --yes --skip-preview",
    ]
    assert "--target urn:pulumi:dev::mlflow-ami::aws:ec2/instance:Instance::server --target-dependents" in done[0]
    assert not s3.list_object_versions(Bucket="backups").get("Versions")


@pytest.mark.parametrize("arguments", [["--dry-run"], []])
def test_nothing_is_deleted_unless_the_name_is_typed(
    s3: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    done: list[str] = []
    monkeypatch.setattr(retire_stack, "in_folder", lambda folder, environment: stand_in(done))
    monkeypatch.setattr(aws_session, "choose", lambda region: SimpleNamespace(client=lambda service: s3))
    monkeypatch.setattr("sys.argv", ["retire_stack.py", "--stack", "dev", *arguments])
    monkeypatch.setattr(retire_stack, "confirmed", lambda name: False)
    assert retire_stack.main() == (0 if arguments else 2)
    assert done == []
    assert s3.list_object_versions(Bucket="artifacts").get("Versions")


def test_a_stack_without_resources_is_refused_in_a_sentence() -> None:
    with pytest.raises(retire_stack.DeletionRefused, match="nothing to delete"):
        retire_stack.read_stack(lambda *arguments: '{"deployment": {}}', "dev")
