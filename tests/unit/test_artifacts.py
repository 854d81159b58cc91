"""The artifact repository with two buckets does what MLflow's own S3 repository does with one."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow_host import artifacts
from mlflow_host.artifacts import PART_BYTES, DirectTwoBucketRepository, InsufficientStorage, TwoBucketRepository
from services import ObjectStore, object_store

MODEL = "7/models/m-" + "0123456789abcdef" * 2 + "/artifacts"
RUN = "7/" + "fedcba9876543210" * 2 + "/artifacts"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("object-store")) as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        artifacts.client.cache_clear()
        yield running
        artifacts.client.cache_clear()


@pytest.fixture
def buckets(store: ObjectStore) -> dict[str, str]:
    """Three empty buckets: the plug-in's two, and one for MLflow's own repository."""
    names = {kind: f"{kind}-{uuid.uuid4().hex[:12]}" for kind in ("artifacts", "models", "one")}
    for name in names.values():
        store.client().create_bucket(Bucket=name)
    return names


@pytest.fixture
def two(buckets: dict[str, str]) -> Any:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(f"mlflow-host://{buckets['artifacts']}/{buckets['models']}")


@pytest.fixture
def one(buckets: dict[str, str]) -> Any:
    from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

    return S3ArtifactRepository(f"s3://{buckets['one']}")


@pytest.fixture
def keys(store: ObjectStore, buckets: dict[str, str]) -> Callable[[str], list[str]]:
    """The keys in one of the buckets."""

    def keys(kind: str) -> list[str]:
        pages = store.client().get_paginator("list_objects_v2").paginate(Bucket=buckets[kind])
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    return keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What an experiment with one run and one logged model would upload."""
    for path in (f"{RUN}/plot.png", f"{RUN}/data/table.json", f"{MODEL}/MLmodel", f"{MODEL}/data/model.pkl"):
        (tmp_path / "files" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / path).write_bytes(path.encode() * 100)
    return tmp_path / "files"


def everything_below(repository: Any, path: str | None = None) -> set[tuple[str, bool, int | None]]:
    found = set()
    for info in repository.list_artifacts(path):
        found.add((info.path, info.is_dir, info.file_size))
        found |= everything_below(repository, info.path) if info.is_dir else set()
    return found


def outcome(act: Callable[[], Any]) -> Any:
    """What a call returns, or how it fails, without what differs by bucket."""
    try:
        return act()
    except Exception as error:
        return type(error).__name__, getattr(error, "error_code", None)


def test_the_same_calls_have_the_same_outcome(one: Any, two: Any, folder: Path, tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {}
    for name, repository in (("one", one), ("two", two)):
        downloads = tmp_path / name
        downloads.mkdir()

        def contents(path: str, repository: Any = repository, downloads: Path = downloads) -> Any:
            local = Path(repository.download_artifacts(path, str(downloads)))
            files = [local] if local.is_file() else sorted(p for p in local.rglob("*") if p.is_file())
            return [(str(p.relative_to(downloads)), p.read_bytes()) for p in files]

        def listing(path: str | None, repository: Any = repository) -> Any:
            return [(info.path, info.is_dir, info.file_size) for info in repository.list_artifacts(path)]

        steps: list[Callable[[], Any]] = [
            lambda: listing(None),
            lambda: repository.log_artifacts(str(folder)),  # noqa: B023
            lambda: repository.log_artifact(str(folder / RUN / "plot.png"), RUN),  # noqa: B023
            lambda: repository.log_artifact(str(folder / MODEL / "MLmodel"), f"{MODEL}/copy"),  # noqa: B023
            lambda: repository.log_artifacts(str(folder / MODEL), f"{MODEL}/again"),  # noqa: B023
            lambda: everything_below(repository),  # noqa: B023
            *(lambda path=path: listing(path) for path in (None, "7", "7/models", MODEL, f"{MODEL}/", RUN, "8")),
            *(lambda path=path: listing(path) for path in (f"{RUN}/plot.png", f"{RUN}/plo", f"{MODEL}/MLmodel")),
            *(lambda path=path: contents(path) for path in (RUN, MODEL, "7", f"{RUN}/plot.png", f"{MODEL}/MLmodel")),
            *(lambda path=path: contents(path) for path in (f"{RUN}/absent", f"{MODEL}/absent")),
            lambda: repository.delete_artifacts(f"{MODEL}/again"),  # noqa: B023
            lambda: repository.delete_artifacts(f"{RUN}/plo"),  # noqa: B023
            lambda: repository.delete_artifacts(f"{RUN}/data/table.json"),  # noqa: B023
            lambda: everything_below(repository),  # noqa: B023
            lambda: repository.delete_artifacts("7"),  # noqa: B023
            lambda: everything_below(repository),  # noqa: B023
        ]
        seen[name] = [outcome(step) for step in steps]
    assert seen["two"] == seen["one"]
    assert any(isinstance(result, set) and len(result) > 10 for result in seen["two"])


def test_models_go_to_their_own_bucket(two: Any, folder: Path, keys: Callable[[str], list[str]]) -> None:
    two.log_artifacts(str(folder))
    assert sorted(keys("models")) == [f"{MODEL}/MLmodel", f"{MODEL}/data/model.pkl"]
    assert sorted(keys("artifacts")) == [f"{RUN}/data/table.json", f"{RUN}/plot.png"]


def test_a_destination_with_a_prefix_or_of_a_trace_is_relative_to_it(
    buckets: dict[str, str], folder: Path, keys: Callable[[str], list[str]]
) -> None:
    below = DirectTwoBucketRepository(f"mlflow-host://{buckets['artifacts']}/{buckets['models']}/team/{MODEL}/")
    below.log_artifact(folder / MODEL / "MLmodel")
    assert keys("models") == [f"team/{MODEL}/MLmodel"]
    assert [info.path for info in below.list_artifacts()] == ["MLmodel"]


@pytest.mark.parametrize("path", [f"{MODEL}/MLmodel", f"{RUN}/plot.png"])
def test_what_lies_in_the_other_bucket_is_read_and_deleted_all_the_same(
    two: Any, store: ObjectStore, buckets: dict[str, str], keys: Callable[[str], list[str]], path: str, tmp_path: Path
) -> None:
    wrong = "artifacts" if path.startswith(MODEL) else "models"
    store.client().put_object(Bucket=buckets[wrong], Key=path, Body=b"from before")
    assert [info.path for info in two.list_artifacts(path.rpartition("/")[0])] == [path]
    assert Path(two.download_artifacts(path, str(tmp_path))).read_bytes() == b"from before"
    assert requests.get(two.get_download_presigned_url(path).url, timeout=30).content == b"from before"
    two.delete_artifacts(path)
    assert keys(wrong) == []


@pytest.mark.parametrize(("path", "kind"), [(MODEL, "models"), (RUN, "artifacts")])
def test_multipart_uploads_and_presigned_addresses_work_in_both_buckets(
    two: Any, store: ObjectStore, buckets: dict[str, str], keys: Callable[[str], list[str]], path: str, kind: str
) -> None:
    from mlflow.entities.multipart_upload import MultipartUploadPart

    parts = [b"a" * 5 * 2**20, b"b" * 1000]
    created = two.create_multipart_upload("weights.bin", num_parts=2, artifact_path=path)
    etags = [
        MultipartUploadPart(
            credential.part_number, requests.put(credential.url, data=data, timeout=30).headers["ETag"], credential.url
        )
        for credential, data in zip(created.credentials, parts, strict=True)
    ]
    two.complete_multipart_upload("weights.bin", created.upload_id, etags, path)
    assert keys(kind) == [f"{path}/weights.bin"]

    presigned = two.get_download_presigned_url(f"{path}/weights.bin")
    assert presigned.file_size == sum(map(len, parts))
    assert requests.get(presigned.url, headers=presigned.headers, timeout=30).content == b"".join(parts)

    upload = two.create_presigned_upload_url(f"{path}/small.txt")
    requests.put(upload.presigned_url, headers=upload.headers, data=b"small", timeout=30).raise_for_status()
    assert f"{path}/small.txt" in keys(kind)

    aborted = two.create_multipart_upload("weights.bin", num_parts=1, artifact_path=path)
    two.abort_multipart_upload("weights.bin", aborted.upload_id, path)
    assert unfinished_uploads(store, buckets) == []


def test_an_upload_begun_in_the_other_bucket_can_be_finished(
    two: Any, one: Any, store: ObjectStore, buckets: dict[str, str], keys: Callable[[str], list[str]]
) -> None:
    """As when the image is swapped for one with the plug-in in the middle of an upload."""
    from mlflow.entities.multipart_upload import MultipartUploadPart
    from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

    before: Any = S3ArtifactRepository(f"s3://{buckets['artifacts']}")
    created = before.create_multipart_upload("weights.bin", 1, MODEL)
    etag = requests.put(created.credentials[0].url, data=b"weights", timeout=30).headers["ETag"]
    two.complete_multipart_upload("weights.bin", created.upload_id, [MultipartUploadPart(1, etag, "")], MODEL)
    assert keys("artifacts") == [f"{MODEL}/weights.bin"]


def test_proxied_transfer_offers_no_presigned_address() -> None:
    from mlflow.store.artifact.artifact_repo import MultipartDownloadMixin, MultipartUploadMixin
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    proxied = get_artifact_repository("mlflow-host-proxied://artifacts/models")
    direct = get_artifact_repository("mlflow-host://artifacts/models")
    assert isinstance(direct, MultipartUploadMixin) and isinstance(direct, MultipartDownloadMixin)
    assert not isinstance(proxied, MultipartUploadMixin) and not isinstance(proxied, MultipartDownloadMixin)


@pytest.mark.parametrize("uri", ["mlflow-host:///models", "mlflow-host://artifacts", "mlflow-host://artifacts/"])
def test_a_destination_without_both_buckets_is_refused(uri: str) -> None:
    with pytest.raises(Exception, match="<artifacts bucket>/<models bucket>"):
        TwoBucketRepository(uri)


async def in_chunks(content: bytes, size: int = 2**16) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


@pytest.mark.parametrize("size", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES + 5])
def test_a_streamed_upload_is_stored_whole(two: Any, store: ObjectStore, buckets: dict[str, str], size: int) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    asyncio.run(two.log_artifact_from_async_stream(in_chunks(content), "weights.json", MODEL))
    stored = store.client().get_object(Bucket=buckets["models"], Key=f"{MODEL}/weights.json")
    assert stored["Body"].read() == content
    assert stored["ContentType"] == "application/json"
    assert unfinished_uploads(store, buckets) == []


def test_a_binary_stream_is_stored_whole(two: Any, folder: Path, keys: Callable[[str], list[str]]) -> None:
    with (folder / RUN / "plot.png").open("rb") as stream:
        two.log_artifact_from_stream(stream, "ignored/plot.png", RUN)
    assert keys("artifacts") == [f"{RUN}/plot.png"]


@pytest.mark.parametrize("before_failure", [10, 2 * PART_BYTES + 10])
def test_a_stream_that_ends_early_leaves_nothing(
    two: Any, store: ObjectStore, buckets: dict[str, str], keys: Callable[[str], list[str]], before_failure: int
) -> None:
    async def broken() -> AsyncIterator[bytes]:
        async for chunk in in_chunks(b"x" * before_failure):
            yield chunk
        raise ConnectionResetError("the client is gone")

    with pytest.raises(ConnectionResetError):
        asyncio.run(two.log_artifact_from_async_stream(broken(), "weights.bin", MODEL))
    assert keys("models") == []
    assert unfinished_uploads(store, buckets) == []


def test_streams_beyond_the_bound_are_spooled_and_arrive(
    two: Any, keys: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spooled: list[str] = []
    spool = TwoBucketRepository._spool

    async def watched(self: Any, chunks: Any, path: str) -> None:
        spooled.append(path)
        await spool(self, chunks, path)

    monkeypatch.setattr(TwoBucketRepository, "_spool", watched)

    async def slow(content: bytes) -> AsyncIterator[bytes]:
        await asyncio.sleep(0.2)
        yield content

    async def many() -> None:
        uploads = [
            two.log_artifact_from_async_stream(slow(b"x"), f"{n}.bin", RUN) for n in range(artifacts.STREAMS + 2)
        ]
        await asyncio.gather(*uploads)

    asyncio.run(many())
    assert len(spooled) == 2
    assert len(keys("artifacts")) == artifacts.STREAMS + 2
    assert artifacts.Streams.running == 0


def test_parts_suffice_for_the_largest_object_of_s3() -> None:
    sizes = artifacts.part_sizes()
    assert sum(next(sizes) for _ in range(10_000)) > 5 * 2**40


def test_a_file_that_does_not_fit_is_refused_with_507(tmp_path: Path) -> None:
    artifacts.require_space(1, tmp_path)
    with pytest.raises(InsufficientStorage, match="do not fit into the server's temporary space") as refused:
        artifacts.require_space(2**60, tmp_path)
    assert refused.value.get_http_status_code() == 507
    assert refused.value.error_code == "RESOURCE_EXHAUSTED"


def test_of_a_file_of_unknown_length_it_is_said_how_much_of_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "RESERVE_BYTES", 2**60)
    monkeypatch.setattr(artifacts, "RESERVE_SHARE", 1)
    with pytest.raises(InsufficientStorage, match=r"^18 MiB do not fit .* \(0 MiB left after 17\): "):
        artifacts.require_space(2**16, tmp_path, written=17 * 2**20)


def test_a_download_that_does_not_fit_is_refused_as_such(
    two: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow itself would make an internal error of it."""
    two.log_artifacts(str(folder))
    monkeypatch.setattr(artifacts, "RESERVE_SHARE", 1)
    monkeypatch.setattr(artifacts, "RESERVE_BYTES", 2**60)
    with pytest.raises(InsufficientStorage):
        two.download_artifacts(f"{MODEL}/MLmodel", str(tmp_path))


def unfinished_uploads(store: ObjectStore, buckets: dict[str, str]) -> list[str]:
    return [
        upload["Key"]
        for bucket in buckets.values()
        for upload in store.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    ]
