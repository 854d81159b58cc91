"""The artifact repository with two buckets behaves like MLflow's own S3 repository with one bucket."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import asyncio
import gzip
import json
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from botocore.exceptions import ClientError
from mlflow.exceptions import MlflowException

from mlflow_host.server import artifact_repository, store_errors
from mlflow_host.server.artifact_repository import (
    PART_BYTES,
    STREAMS,
    DirectTwoBucketRepository,
    InsufficientStorage,
    Streams,
    TwoBucketRepository,
)
from mlflow_host.server.store_errors import StoreError, explained
from tests.support.services import ObjectStore, free_port, object_store

pytestmark = pytest.mark.service

MODEL = "7/models/m-" + "0123456789abcdef" * 2 + "/artifacts"
RUN = "7/" + "fedcba9876543210" * 2 + "/artifacts"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("object-store")) as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        artifact_repository.client.cache_clear()
        yield running
        artifact_repository.client.cache_clear()


@pytest.fixture
def buckets(store: ObjectStore) -> dict[str, str]:
    """Create three empty buckets: two for the plug-in, and one for MLflow's own repository."""
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
    """Return a function that lists the keys of a bucket."""

    def keys(kind: str) -> list[str]:
        pages = store.client().get_paginator("list_objects_v2").paginate(Bucket=buckets[kind])
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    return keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Create the files of an experiment with one run and one logged model, and return their folder."""
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
    """Return the result or the error of a call, without values that depend on the bucket."""
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


@pytest.mark.parametrize("path", [f"{RUN}/absent", f"{MODEL}/absent"])
def test_missing_file_is_not_found(two: Any, path: str, tmp_path: Path) -> None:
    """For a missing file, MLflow's S3 repository returns a server error; its local repository returns "not found"."""
    calls: list[Callable[[], Any]] = [
        lambda: two.download_artifacts(path, str(tmp_path)),
        lambda: two.get_download_presigned_url(path),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=r"^No such artifact$") as refused:
            call()
        assert refused.value.get_http_status_code() == 404
        assert refused.value.error_code == "RESOURCE_DOES_NOT_EXIST"


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
def test_objects_in_the_other_bucket_are_read_and_deleted(
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
    """An upload can start on an image without the plug-in and end on an image with the plug-in."""
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
        raise ConnectionResetError("the client has disconnected")

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
            two.log_artifact_from_async_stream(slow(b"x"), f"{n}.bin", RUN)
            for n in range(artifact_repository.STREAMS + 2)
        ]
        await asyncio.gather(*uploads)

    asyncio.run(many())
    assert len(spooled) == 2
    assert len(keys("artifacts")) == artifact_repository.STREAMS + 2
    assert artifact_repository.Streams.running == 0


def test_parts_suffice_for_the_largest_object_of_s3() -> None:
    sizes = artifact_repository.part_sizes()
    assert sum(next(sizes) for _ in range(10_000)) > 5 * 2**40


def test_a_file_that_does_not_fit_is_refused_with_507(tmp_path: Path) -> None:
    artifact_repository.require_space(1, tmp_path)
    with pytest.raises(InsufficientStorage, match="do not fit into the server's temporary space") as refused:
        artifact_repository.require_space(2**60, tmp_path)
    assert refused.value.get_http_status_code() == 507
    assert refused.value.error_code == "RESOURCE_EXHAUSTED"


def test_refused_file_of_unknown_length_states_the_received_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_repository, "RESERVE_BYTES", 2**60)
    monkeypatch.setattr(artifact_repository, "RESERVE_SHARE", 1)
    with pytest.raises(InsufficientStorage, match=r"^18 MiB do not fit .* \(0 MiB left after 17\): "):
        artifact_repository.require_space(2**16, tmp_path, written=17 * 2**20)


def test_download_that_does_not_fit_is_refused_with_507(
    two: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk is too small for a download, plain MLflow returns an internal error."""
    two.log_artifacts(str(folder))
    monkeypatch.setattr(artifact_repository, "RESERVE_SHARE", 1)
    monkeypatch.setattr(artifact_repository, "RESERVE_BYTES", 2**60)
    with pytest.raises(InsufficientStorage):
        two.download_artifacts(f"{MODEL}/MLmodel", str(tmp_path))


# Compressed files, and S3's names

PACKED = ["table.csv.gz", "X.SVGZ", "a.tar.gz", "b.tgz", "c.csv.bz2", "d.xz", "e.Z", "f.html.br"]


@pytest.mark.parametrize("size", [10, PART_BYTES + 1])
@pytest.mark.parametrize(("path", "kind"), [(MODEL, "models"), (RUN, "artifacts")])
def test_no_upload_stores_a_content_encoding(
    two: Any, store: ObjectStore, buckets: dict[str, str], tmp_path: Path, path: str, kind: str, size: int
) -> None:
    from mlflow.entities.multipart_upload import MultipartUploadPart

    content = b"x" * size
    for name in PACKED:
        (tmp_path / name).write_bytes(content)
        two.log_artifact(tmp_path / name, f"{path}/file")
        asyncio.run(two.log_artifact_from_async_stream(in_chunks(content), name, f"{path}/stream"))
        asyncio.run(beyond_the_bound(two.log_artifact_from_async_stream(in_chunks(content), name, f"{path}/spooled")))
        created = two.create_multipart_upload(name, 1, f"{path}/parts")
        etag = requests.put(created.credentials[0].url, data=content, timeout=30).headers["ETag"]
        two.complete_multipart_upload(name, created.upload_id, [MultipartUploadPart(1, etag, "")], f"{path}/parts")
        upload = two.create_presigned_upload_url(f"{path}/presigned/{name}")
        requests.put(upload.presigned_url, headers=upload.headers, data=content, timeout=30).raise_for_status()
    client = store.client()
    keys = [found["Key"] for found in client.list_objects_v2(Bucket=buckets[kind], Prefix=path)["Contents"]]
    assert len(keys) == 5 * len(PACKED)
    assert [key for key in keys if "ContentEncoding" in client.head_object(Bucket=buckets[kind], Key=key)] == []
    assert all(client.get_object(Bucket=buckets[kind], Key=key)["Body"].read() == content for key in keys)


def test_encoding_that_mlflow_requests_is_not_stored(
    store: ObjectStore, buckets: dict[str, str], two: Any, tmp_path: Path
) -> None:
    """Since 3.18, MLflow's repository requests a Content-Encoding when it creates a multipart upload."""
    key = {"Bucket": buckets["artifacts"], "Key": "table.csv.gz"}
    artifact_repository.client().put_object(**key, Body=b"x", ContentEncoding="gzip")
    assert "ContentEncoding" not in store.client().head_object(**key)
    created = artifact_repository.client().create_multipart_upload(**key, ContentEncoding="gzip")
    part = {**key, "UploadId": created["UploadId"]}
    etag = store.client().upload_part(**part, PartNumber=1, Body=b"y")["ETag"]
    store.client().complete_multipart_upload(**part, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": etag}]})
    assert "ContentEncoding" not in store.client().head_object(**key)


@pytest.mark.parametrize(("path", "kind"), [(MODEL, "models"), (RUN, "artifacts")])
@pytest.mark.parametrize("content", [b"this is no gzip", gzip.compress(b"a,b\n" * 200_000)])
def test_an_object_that_was_stored_with_an_encoding_is_read_as_it_is(
    two: Any, store: ObjectStore, buckets: dict[str, str], tmp_path: Path, path: str, kind: str, content: bytes
) -> None:
    stored = {"Bucket": buckets[kind], "Key": f"{path}/table.csv.gz"}
    store.client().put_object(**stored, Body=content, ContentEncoding="gzip", ContentType="text/csv")
    url = two.get_download_presigned_url(f"{path}/table.csv.gz").url
    for headers in ({}, {"Accept-Encoding": "identity"}, {"Accept-Encoding": "gzip, deflate, br, zstd"}):
        assert requests.get(url, headers=headers, timeout=30).content == content
    assert requests.get(url, headers={"Range": "bytes=1-9"}, timeout=30).content == content[1:10]
    assert two.open(f"{path}/table.csv.gz")["Body"].read() == content
    assert Path(two.download_artifacts(f"{path}/table.csv.gz", str(tmp_path))).read_bytes() == content
    assert store.client().head_object(**stored)["ContentEncoding"] == "gzip"


def test_locations_in_s3_are_served_by_the_same_client(
    store: ObjectStore, buckets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An experiment may have a location such as s3://<artifacts bucket>/team."""
    from mlflow.store.artifact import artifact_repository_registry as registry

    untyped: Any = registry
    monkeypatch.setitem(untyped.get_registered_artifact_repositories(), "s3", None)
    artifact_repository.serve_s3_locations()
    location = untyped.get_artifact_repository(f"s3://{buckets['artifacts']}/team")
    (file := tmp_path / "table.csv.gz").write_bytes(content := b"this is no gzip")
    location.log_artifact(str(file))
    stored = {"Bucket": buckets["artifacts"], "Key": "team/table.csv.gz"}
    assert "ContentEncoding" not in store.client().head_object(**stored)
    store.client().put_object(**stored, Body=content, ContentEncoding="gzip")
    assert requests.get(location.get_download_presigned_url("table.csv.gz").url, timeout=30).content == content


@pytest.fixture
def literal() -> Iterator[Any]:
    """Yield a repository on moto. moto, like S3, does not treat a backslash as a slash; SeaweedFS does."""
    from tests.support.moto_server import moto_server

    try:
        with moto_server() as address, pytest.MonkeyPatch.context() as patch:
            store = ObjectStore(address)
            for variable, value in store.environment.items():
                patch.setenv(variable, value)
            artifact_repository.client.cache_clear()
            # The bucket names are random, because moto keeps its buckets until the process ends.
            names = [f"{kind}-{uuid.uuid4().hex[:12]}" for kind in ("artifacts", "models")]
            for bucket in names:
                region = {"LocationConstraint": "eu-central-1"}
                store.client().create_bucket(Bucket=bucket, CreateBucketConfiguration=region)
            yield DirectTwoBucketRepository("mlflow-host://{}/{}".format(*names))
    finally:
        artifact_repository.client.cache_clear()


def test_backslash_is_an_ordinary_character(literal: Any, tmp_path: Path) -> None:
    for name in ("a\\b.txt", "\\a.txt", "a.txt\\", "a\\", "C:\\x.txt", "\\\\host\\share"):
        path = f"{RUN}/{name}"
        asyncio.run(literal.log_artifact_from_async_stream(in_chunks(b"content"), name, RUN))
        assert [(info.path, info.file_size) for info in literal.list_artifacts(RUN)] == [(path, 7)]
        assert literal.open(path)["Body"].read() == b"content"
        assert requests.get(literal.get_download_presigned_url(path).url, timeout=30).content == b"content"
        assert Path(literal.download_artifacts(path, str(tmp_path))).read_bytes() == b"content"
        literal.delete_artifacts(path)
        assert literal.list_artifacts(RUN) == []


NAMES = (
    "a.txt",
    "a b.txt",
    'a"b.txt',
    "a\\b",
    "it's",
    "a;b=c",
    "%",
    "é.txt",
    "e\u0301.txt",
    "日本語",
    "日本語.txt",
    "🙂.png",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_download_is_named_as_mlflow_names_it(name: str) -> None:
    from mlflow.server import handlers

    mlflows: Any = handlers
    assert artifact_repository.content_disposition(name) == mlflows._content_disposition_attachment(name)


# Errors of S3

TOO_LONG = "/".join(["a" * 255] * 20)


async def beyond_the_bound(upload: Coroutine[Any, Any, None]) -> None:
    """Run `upload` while as many other uploads are in progress as the server allows."""
    Streams.running += STREAMS
    try:
        await upload
    finally:
        Streams.running -= STREAMS


def calls(two: Any, path: str, file: Path) -> dict[str, Callable[[], Any]]:
    """Every call that reaches S3."""
    folder, name = path.rsplit("/", 1)
    return {
        "log_artifact": lambda: two.log_artifact(file, path),
        "stream": lambda: asyncio.run(two.log_artifact_from_async_stream(in_chunks(b"x"), name, folder)),
        "stream in parts": lambda: asyncio.run(
            two.log_artifact_from_async_stream(in_chunks(b"x" * (PART_BYTES + 1)), name, folder)
        ),
        "spooled": lambda: asyncio.run(
            beyond_the_bound(two.log_artifact_from_async_stream(in_chunks(b"x"), name, folder))
        ),
        "create_multipart_upload": lambda: two.create_multipart_upload(name, 1, folder),
        "open": lambda: two.open(path),
        "size": lambda: two.size(path),
        "download": lambda: two.download_artifacts(path, str(file.parent)),
        "presigned": lambda: two.get_download_presigned_url(path),
        "list": lambda: two.list_artifacts(path),
        "delete": lambda: two.delete_artifacts(path),
    }


def refusals(two: Any, path: str, tmp_path: Path, *passing: str) -> dict[str, tuple[int, str]]:
    """Make every call to S3, and return status and message of each refusal. All calls outside `passing` must be
    refused."""
    (file := tmp_path / "file.txt").write_text("x")
    found = {}
    for name, call in calls(two, path, file).items():
        if name in passing:
            call()
            continue
        with pytest.raises(StoreError) as refused:
            call()
        found[name] = (refused.value.get_http_status_code(), refused.value.message)
    return found


def test_a_key_that_is_too_long_is_refused_with_400(two: Any, tmp_path: Path) -> None:
    found = refusals(two, f"{RUN}/{TOO_LONG}", tmp_path, "list", "delete")
    writes = ("log_artifact", "stream", "stream in parts", "spooled", "create_multipart_upload")
    sentence = (
        "S3 refuses this: Your key is too long (KeyTooLongError). "
        "S3 allows at most 1,024 bytes of folders and name: use shorter names or fewer folders."
    )
    assert {name: found[name] for name in writes} == dict.fromkeys(writes, (400, sentence))
    reads = ("open", "size", "presigned")
    assert {name: found[name] for name in reads} == dict.fromkeys(reads, (404, "No such artifact"))
    assert found["download"][0] in (400, 404)  # 400 if the path is too long for this machine's file system


def test_a_bucket_that_does_not_exist_is_named_as_the_reason(literal: Any, tmp_path: Path) -> None:
    """The test uses moto, because a write to SeaweedFS creates a missing bucket."""
    absent = DirectTwoBucketRepository("mlflow-host://absent-artifacts/absent-models")
    found = refusals(absent, f"{RUN}/file.txt", tmp_path)
    assert {status for status, _ in found.values()} == {404}
    assert {sentence for _, sentence in found.values()} == {
        "S3 refuses this: The specified bucket does not exist (NoSuchBucket). "
        "Ask the server's administrator to name buckets that exist."
    }


@pytest.mark.parametrize(("key", "code"), [("unknown", "InvalidAccessKeyId"), (None, "SignatureDoesNotMatch")])
def test_wrong_keys_of_the_server_do_not_return_401(
    buckets: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str | None, code: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    if key:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    artifact_repository.client.cache_clear()
    try:
        two = DirectTwoBucketRepository(f"mlflow-host://{buckets['artifacts']}/{buckets['models']}")
        found = refusals(two, f"{RUN}/file.txt", tmp_path)
    finally:
        artifact_repository.client.cache_clear()
    assert {status for status, _ in found.values()} == {403}
    assert all(f"({code}). Ask the server's administrator to give" in sentence for _, sentence in found.values())


def test_unreachable_store_returns_503(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    artifact_repository.client.cache_clear()
    try:
        two = DirectTwoBucketRepository("mlflow-host://artifacts/models")
        found = refusals(two, f"{RUN}/file.txt", tmp_path)
    finally:
        artifact_repository.client.cache_clear()
    assert {status for status, _ in found.values()} == {503}
    assert all(sentence.startswith("The server got no answer from S3: ") for _, sentence in found.values())
    assert all(sentence.endswith("Try again later.") for _, sentence in found.values())


def test_missing_multipart_upload_must_be_restarted(two: Any) -> None:
    from mlflow.entities.multipart_upload import MultipartUploadPart

    calls: list[Callable[[], Any]] = [
        lambda: two.abort_multipart_upload("x", "no-such-upload", RUN),
        lambda: two.complete_multipart_upload("x", "no-such-upload", [MultipartUploadPart(1, "e", "")], RUN),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=r"\(NoSuchUpload\)\. Start the upload again\.$") as refused:
            call()
        assert refused.value.get_http_status_code() == 404


def test_object_that_s3_did_not_delete_is_an_error(two: Any, buckets: dict[str, str]) -> None:
    """S3 returns status 200 for DeleteObjects even if it deleted nothing. The test uses a key that SeaweedFS refuses to
    delete."""
    with pytest.raises(ClientError, match="InvalidRequest"):
        artifact_repository.client().delete_objects(
            Bucket=buckets["artifacts"], Delete={"Objects": [{"Key": "a/..\\b"}]}
        )


def test_folder_is_not_served_as_a_file(two: Any, folder: Path) -> None:
    two.log_artifacts(str(folder))
    for call in (two.open, two.size, two.get_download_presigned_url):
        with pytest.raises(MlflowException, match=f"^Artifact path refers to a directory, not a file: '{RUN}'$") as no:
            call(RUN)
        assert no.value.get_http_status_code() == 400


def test_a_name_that_no_file_can_have_is_refused(two: Any, store: ObjectStore, buckets: dict[str, str]) -> None:
    with pytest.raises(StoreError, match="more than 255 bytes") as refused, explained():
        Path("/", "a" * 256).write_bytes(b"")
    assert refused.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    ("code", "s3s", "ours", "remedy"),
    [
        ("AccessDenied", 403, 403, store_errors.NO_ACCESS),
        ("AllAccessDisabled", 403, 403, store_errors.NO_ACCESS),
        ("InvalidToken", 400, 403, store_errors.NO_ACCESS),
        ("ExpiredToken", 400, 503, store_errors.LATER),
        ("NoSuchBucket", 404, 404, store_errors.NO_BUCKET),
        ("EntityTooLarge", 400, 400, store_errors.REMEDIES["EntityTooLarge"]),
        ("EntityTooSmall", 400, 400, ""),
        ("KeyTooLongError", 400, 400, store_errors.REMEDIES["KeyTooLongError"]),
        ("InvalidArgument", 400, 400, ""),
        ("MethodNotAllowed", 405, 405, ""),
        ("BucketAlreadyExists", 409, 409, ""),
        ("OperationAborted", 409, 503, store_errors.LATER),
        ("PreconditionFailed", 412, 412, ""),
        ("InvalidRange", 416, 416, ""),
        ("SlowDown", 503, 503, store_errors.LATER),
        ("SlowDown", 429, 503, store_errors.LATER),
        ("InternalError", 500, 503, store_errors.LATER),
        ("ServiceUnavailable", 503, 503, store_errors.LATER),
        ("502", 502, 503, store_errors.LATER),
        ("NotImplemented", 501, 501, ""),
        ("RequestTimeout", 400, 503, store_errors.LATER),
        ("RequestTimeTooSkewed", 403, 503, store_errors.REMEDIES["RequestTimeTooSkewed"]),
        ("PermanentRedirect", 301, 400, store_errors.OTHER_REGION),
        ("301", 301, 400, store_errors.OTHER_REGION),
        ("AuthorizationHeaderMalformed", 400, 400, store_errors.OTHER_REGION),
        ("TemporaryRedirect", 307, 503, store_errors.LATER),
        ("401", 401, 403, store_errors.NO_ACCESS),
        ("NoSuchKey", 404, 404, "No such artifact"),
        ("404", 404, 404, "No such artifact"),
    ],
)
def test_each_error_of_s3_has_a_status_and_a_sentence(code: str, s3s: int, ours: int, remedy: str) -> None:
    """MLflow's clients retry 408, 429, 500, 502, 503 and 504, so permanent errors of S3 must have other statuses."""
    answer: Any = {"Error": {"Code": code, "Message": "Why."}, "ResponseMetadata": {"HTTPStatusCode": s3s}}
    told = store_errors.explain(ClientError(answer, "PutObject"))
    assert told.get_http_status_code() == ours
    assert told.message.endswith(remedy)
    assert remedy == "No such artifact" or told.message == f"S3 refuses this: Why ({code}). {remedy}".strip()
    assert json.loads(told.serialize_as_json())["error_code"] != "INTERNAL_ERROR"


def unfinished_uploads(store: ObjectStore, buckets: dict[str, str]) -> list[str]:
    return [
        upload["Key"]
        for bucket in buckets.values()
        for upload in store.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    ]
