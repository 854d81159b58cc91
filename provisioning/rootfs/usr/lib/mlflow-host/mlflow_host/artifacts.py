"""Where MLflow's server keeps artifacts: logged models in one bucket, everything else in another.

MLflow finds these classes through `mlflow_host.destinations`, for destinations of the form

    mlflow-host://<artifacts bucket>/<models bucket>[/prefix]            clients are offered presigned addresses
    mlflow-host-proxied://<artifacts bucket>/<models bucket>[/prefix]    they are not: all bytes pass the server

An object has the same key in either bucket that MLflow's own repository would give it in one, and the key alone tells
its bucket (`is_of_model`). Reading looks into the other bucket where the right one has nothing, so artifacts that were
written before this plug-in, or moved by hand, stay readable; deleting deletes from both.
"""

from __future__ import annotations

import asyncio
import json
import math
import mimetypes
import os
import posixpath
import re
import shutil
import tempfile
import urllib.parse
from collections.abc import AsyncIterable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import mlflow.store.artifact.artifact_repo as mlflow_repositories
from botocore.exceptions import ClientError
from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_EXHAUSTED
from mlflow.store.artifact.artifact_repo import ArtifactRepository, MultipartDownloadMixin, MultipartUploadMixin
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

Result = TypeVar("Result")
Repository = Any  # an S3ArtifactRepository, which has no type annotations


class Absent:
    """Stands in for a mixin that the installed MLflow does not have yet."""


StreamUploadMixin: Any = getattr(mlflow_repositories, "StreamUploadMixin", Absent)  # since MLflow 3.15
UPLOADS_ARE_STREAMED = StreamUploadMixin is not Absent
"""Whether the installed MLflow hands uploads on as they come."""
PresignedUploadMixin: Any = getattr(mlflow_repositories, "PresignedUploadMixin", Absent)  # since MLflow 3.12

PART_BYTES = 6 * 2**20
"""Of a streamed upload's first parts; S3 takes no less than 5 MiB."""

PARTS_IN_FLIGHT = 2

PARTS_OF_A_SIZE = 1000
"""Parts double in size after so many, and again: S3 takes 10,000, which must suffice for any file."""

STREAMS = 6
"""Uploads that one process streams at once, each with at most PARTS_IN_FLIGHT + 1 parts in memory. Further ones are
spooled to disk, so that slow clients neither fill the memory nor hold up others."""

SMALL_BYTES = 16 * 2**20
"""Up to here a file is fetched in one request, above by several at once."""

RESERVE_SHARE, RESERVE_BYTES = 0.1, 2 * 2**30
"""What spooled files must leave free on their volume, which is PostgreSQL's too: the smaller of the two."""

_listers = ThreadPoolExecutor(8, "two-bucket-list")


def is_of_model(key: str) -> bool:
    """Whether a key belongs to a logged model: <experiment>/models/m-<32 hexadecimal digits>/…"""
    return re.search(r"(^|/)models/m-[0-9a-f]{32}(/|$)", key) is not None


class InsufficientStorage(MlflowException):
    """A file does not fit on the server's disk; MLflow answers with this status and the sentence."""

    def get_http_status_code(self) -> int:
        return 507


class TwoBucketRepository(ArtifactRepository, StreamUploadMixin):  # type: ignore[misc]
    """Artifacts in two buckets, moved by the server only."""

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        uri = urllib.parse.urlsplit(artifact_uri)
        models, _, prefix = uri.path.lstrip("/").partition("/")
        if not uri.netloc or not models:
            raise MlflowException.invalid_parameter_value(
                f"{artifact_uri} is no artifacts destination: write {uri.scheme}://<artifacts bucket>/<models bucket>"
            )
        self.prefix = prefix.rstrip("/")
        self.artifacts: Repository
        self.models: Repository
        self.artifacts, self.models = (
            S3ArtifactRepository(posixpath.join(f"s3://{bucket}", self.prefix)) for bucket in (uri.netloc, models)
        )

    def home_and_other(self, path: str | None) -> tuple[Repository, Repository]:
        """Where `path` (relative to the destination) belongs, and where it may be all the same."""
        key = posixpath.join(self.prefix, path or "")
        return (self.models, self.artifacts) if is_of_model(key) else (self.artifacts, self.models)

    # One file or folder at a time

    def log_artifact(self, local_file: str | Path, artifact_path: str | None = None) -> None:
        home, _ = self.home_and_other(posixpath.join(artifact_path or "", Path(local_file).name))
        home.log_artifact(str(local_file), artifact_path)

    def log_artifacts(self, local_dir: str | Path, artifact_path: str | None = None) -> None:
        for folder, _, names in os.walk(local_dir):
            below = Path(folder).relative_to(local_dir).as_posix()
            target = posixpath.normpath(posixpath.join(artifact_path or "", below))
            for name in names:
                self.log_artifact(Path(folder, name), None if target == "." else target)

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        home, other = self.home_and_other(path)
        elsewhere = _listers.submit(other.list_artifacts, path)
        found = {(info.path, info.is_dir): info for info in home.list_artifacts(path)}
        for info in elsewhere.result():
            found.setdefault((info.path, info.is_dir), info)
        return sorted(found.values(), key=lambda info: str(info.path))

    def download_artifacts(self, artifact_path: str, dst_path: str | None = None) -> str:
        """Raises InsufficientStorage beforehand for a file that does not fit: of what fails in `_download_file` MLflow
        keeps the text only, and answers 500."""
        if (size := self.size(artifact_path)) is not None:
            require_space(size, Path(dst_path or tempfile.gettempdir()))
        untyped: Any = super()
        return str(untyped.download_artifacts(artifact_path, dst_path))

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        response = self.open(remote_file_path)
        size = response["ContentLength"]
        with response["Body"] as body:
            require_space(size, Path(local_path).parent)
            if size <= SMALL_BYTES:
                with Path(local_path).open("wb") as file:
                    shutil.copyfileobj(body, file, 2**20)
                return
        bucket, key = response["Location"]
        client().download_file(bucket, key, local_path)

    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        for repository in self.home_and_other(artifact_path):
            repository.delete_artifacts(artifact_path)

    # Streams

    def open(self, path: str) -> dict[str, Any]:
        """An object's GetObject response, with `Location` = (bucket, key) added. Raises ClientError (NoSuchKey)."""

        def read(repository: Repository) -> dict[str, Any]:
            bucket, key = location(repository, path)
            return {**client().get_object(Bucket=bucket, Key=key, **owner()), "Location": (bucket, key)}

        return either(self.home_and_other(path), read, unless=is_missing_object)

    def size(self, path: str) -> int | None:
        """Of a file, in bytes; None for what is none."""

        def ask(repository: Repository) -> int:
            bucket, key = location(repository, path)
            return int(client().head_object(Bucket=bucket, Key=key, **owner())["ContentLength"])

        try:
            return either(self.home_and_other(path), ask, unless=is_missing_object) if path else None
        except ClientError as error:
            if is_missing_object(error):
                return None
            raise

    def log_artifact_from_stream(
        self, stream: BinaryIO, artifact_file_name: str, artifact_path: str | None = None
    ) -> None:
        async def chunks() -> AsyncIterable[bytes]:
            while chunk := await asyncio.to_thread(stream.read, 2**20):
                yield chunk

        asyncio.run(self.log_artifact_from_async_stream(chunks(), artifact_file_name, artifact_path))

    async def log_artifact_from_async_stream(
        self, chunks: AsyncIterable[bytes], artifact_file_name: str, artifact_path: str | None = None
    ) -> None:
        path = posixpath.join(artifact_path or "", posixpath.basename(artifact_file_name))
        home, _ = self.home_and_other(path)
        if Streams.running < STREAMS:
            Streams.running += 1
            try:
                await upload_stream(chunks, *location(home, path))
            finally:
                Streams.running -= 1
        else:
            await self._spool(chunks, path)

    async def _spool(self, chunks: AsyncIterable[bytes], path: str) -> None:
        folder, name = posixpath.split(path)
        with tempfile.TemporaryDirectory() as spool:
            local = Path(spool, name)
            with local.open("wb") as file:
                async for chunk in chunks:
                    require_space(len(chunk), local.parent, written=file.tell())
                    await asyncio.to_thread(file.write, chunk)
            await asyncio.to_thread(self.log_artifact, local, folder or None)


class DirectTwoBucketRepository(
    TwoBucketRepository,
    MultipartUploadMixin,
    MultipartDownloadMixin,
    PresignedUploadMixin,  # type: ignore[misc]
):
    """The same, with addresses at which clients move large files to and from S3 by themselves.

    MLflow tells clients of that ability by what this class is derived from.
    """

    def create_multipart_upload(self, local_file: str, num_parts: int = 1, artifact_path: str | None = None) -> Any:
        home, _ = self.home_and_other(posixpath.join(artifact_path or "", Path(local_file).name))
        return home.create_multipart_upload(local_file, num_parts, artifact_path)

    def complete_multipart_upload(
        self, local_file: str, upload_id: str, parts: Any = None, artifact_path: str | None = None
    ) -> None:
        either(
            self.home_and_other(posixpath.join(artifact_path or "", Path(local_file).name)),
            lambda repository: repository.complete_multipart_upload(local_file, upload_id, parts, artifact_path),
            unless=is_missing_upload,
        )

    def abort_multipart_upload(self, local_file: str, upload_id: str, artifact_path: str | None = None) -> None:
        either(
            self.home_and_other(posixpath.join(artifact_path or "", Path(local_file).name)),
            lambda repository: repository.abort_multipart_upload(local_file, upload_id, artifact_path),
            unless=is_missing_upload,
        )

    def create_presigned_upload_url(self, artifact_path: str, expiration: int = 900) -> Any:
        home, _ = self.home_and_other(artifact_path)
        return home.create_presigned_upload_url(artifact_path, expiration)

    def get_download_presigned_url(self, artifact_path: str, expiration: int = 300) -> Any:
        return either(
            self.home_and_other(artifact_path),
            lambda repository: repository.get_download_presigned_url(artifact_path, expiration),
            unless=lambda error: isinstance(error, MlflowException),
        )


class Streams:
    """How many uploads are being streamed; counted on the event loop's thread alone."""

    running = 0


def either(
    repositories: tuple[Repository, Repository],
    act: Callable[[Repository], Result],
    *,
    unless: Callable[[Exception], bool],
) -> Result:
    """`act` on the first repository, or on the second where the first fails in the way `unless` recognizes.
    Where both fail, the first one's error is raised: that is where the thing belongs."""
    home, other = repositories
    try:
        return act(home)
    except Exception as error:
        if not unless(error):
            raise
        try:
            return act(other)
        except Exception:
            raise error from None


def is_missing_object(error: Exception) -> bool:
    return isinstance(error, ClientError) and error.response["Error"]["Code"] in ("NoSuchKey", "404")


def is_missing_upload(error: Exception) -> bool:
    return isinstance(error, ClientError) and error.response["Error"]["Code"] in ("NoSuchUpload", "404")


def location(repository: Repository, path: str) -> tuple[str, str]:
    """(bucket, key) of a path."""
    bucket, prefix = repository.parse_s3_compliant_uri(repository.artifact_uri)
    return bucket, posixpath.join(prefix, path)


def owner() -> dict[str, str]:
    """Has S3 refuse buckets that are not this account's, where MLflow is told to."""
    account = os.environ.get("MLFLOW_S3_EXPECTED_BUCKET_OWNER")
    return {"ExpectedBucketOwner": account} if account else {}


@cache
def client() -> Any:
    """One S3 client for the process, with MLflow's own settings; it renews the instance role's keys by itself."""
    import boto3
    from botocore.config import Config

    style: Any = os.environ.get("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE", "auto")
    return boto3.client(
        "s3",
        endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None,
        verify=False if os.environ.get("MLFLOW_S3_IGNORE_TLS", "").lower() in ("true", "1") else None,
        config=Config(signature_version="s3v4", s3={"addressing_style": style}, max_pool_connections=32),
    )


def metadata(key: str) -> dict[str, Any]:
    """What MLflow's own repository stores with an object of this name."""
    kind, encoding = mimetypes.guess_type(key)
    return {
        **({"ContentType": kind} if kind else {}),
        **({"ContentEncoding": encoding} if encoding else {}),
        **owner(),
        **json.loads(os.environ.get("MLFLOW_S3_UPLOAD_EXTRA_ARGS") or "{}"),
    }


async def upload_stream(chunks: AsyncIterable[bytes], bucket: str, key: str) -> None:
    """Store what `chunks` yields, in parts as they come; nothing is stored when it ends early."""
    sizes = part_sizes()
    wanted, buffer = next(sizes), bytearray()
    upload: dict[str, Any] | None = None
    parts: list[asyncio.Task[dict[str, Any]]] = []
    try:
        async for chunk in chunks:
            buffer += chunk
            if len(buffer) < wanted:
                continue
            if upload is None:
                created = await asyncio.to_thread(
                    client().create_multipart_upload, Bucket=bucket, Key=key, **metadata(key)
                )
                upload = {"Bucket": bucket, "Key": key, "UploadId": created["UploadId"], **owner()}
            if len(parts) >= PARTS_IN_FLIGHT:
                await parts[-PARTS_IN_FLIGHT]
            parts.append(asyncio.create_task(_upload_part(upload, len(parts) + 1, buffer)))
            wanted, buffer = next(sizes), bytearray()
        if upload is None:
            await asyncio.to_thread(client().put_object, Bucket=bucket, Key=key, Body=bytes(buffer), **metadata(key))
            return
        if buffer:
            parts.append(asyncio.create_task(_upload_part(upload, len(parts) + 1, buffer)))
        done = await asyncio.gather(*parts)
        await asyncio.to_thread(client().complete_multipart_upload, **upload, MultipartUpload={"Parts": done})
    except BaseException:
        if upload:
            await asyncio.gather(*parts, return_exceptions=True)
            await asyncio.to_thread(client().abort_multipart_upload, **upload)
        raise


async def _upload_part(upload: dict[str, Any], number: int, body: bytearray) -> dict[str, Any]:
    answer = await asyncio.to_thread(client().upload_part, **upload, PartNumber=number, Body=body)
    return {"PartNumber": number, "ETag": answer["ETag"]}


def part_sizes() -> Iterator[int]:
    size = PART_BYTES
    while True:
        yield from (size for _ in range(PARTS_OF_A_SIZE))
        size *= 2


def require_space(size: int, folder: Path, *, written: int = 0) -> None:
    """Raises InsufficientStorage when `size` more bytes of a file would leave too little on the volume of `folder`;
    `written` of it are there."""
    volume = shutil.disk_usage(folder)
    available = volume.free - min(int(volume.total * RESERVE_SHARE), RESERVE_BYTES)
    if size > available:
        raise InsufficientStorage(
            f"{math.ceil((written + size) / 2**20):,} MiB do not fit into the server's temporary space "
            f"({max(0, available) // 2**20:,} MiB left{f' after {written // 2**20:,}' if written else ''}): "
            "let clients move large files directly (artifactTransfer = direct), or enlarge the data volume",
            error_code=RESOURCE_EXHAUSTED,
        )
