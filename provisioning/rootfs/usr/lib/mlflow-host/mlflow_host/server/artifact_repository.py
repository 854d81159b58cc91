"""MLflow's artifact repository in two buckets: one for logged models, one for other artifacts.

MLflow finds these classes through `mlflow_host.server.mlflow_entry_points`, by the scheme of the artifacts destination:

- mlflow-host://<artifacts bucket>/<models bucket>[/prefix]: clients get presigned URLs.
- mlflow-host-proxied://<artifacts bucket>/<models bucket>[/prefix]: all bytes pass through the server.

An object has the same key as in MLflow's own repository, and the key determines the bucket (`is_of_model`). An object
that is missing in its bucket is read from the other bucket. Therefore artifacts remain readable if they were written
without this plug-in or moved by hand. A deletion deletes the object from both buckets.

Objects are stored without a Content-Encoding, and presigned URLs request the encoding "identity" (`client`). MLflow's
repository up to 3.17 stores the encoding "gzip" if a name ends in .gz, so HTTP clients decompress the file.

All methods raise MlflowException. For errors of S3, all methods raise the subclass `StoreError` (`store_errors`).
"""

from __future__ import annotations

import asyncio
import json
import math
import mimetypes
import os
import posixpath
import shutil
import tempfile
import unicodedata
import urllib.parse
from collections.abc import AsyncIterable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import mlflow.store.artifact.artifact_repo as mlflow_repositories
import mlflow.store.artifact.s3_artifact_repo as mlflow_s3
from botocore.exceptions import ClientError
from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_EXHAUSTED
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories
from werkzeug.http import dump_options_header

from mlflow_host.contract.artifact_key import is_of_model
from mlflow_host.server.store_errors import explained, is_missing

Result = TypeVar("Result")
Repository = Any  # a OneBucketRepository, whose base class has no type annotations


def mixin(name: str) -> Any:
    """Return MLflow's class `name`, or an empty class `name` if the installed MLflow does not have the class."""
    return getattr(mlflow_repositories, name, None) or type(name, (), {})


# MultipartDownloadMixin exists since MLflow 3.11, PresignedUploadMixin since 3.12, and StreamUploadMixin since 3.15.
MultipartUploadMixin: Any = mixin("MultipartUploadMixin")
MultipartDownloadMixin: Any = mixin("MultipartDownloadMixin")
PresignedUploadMixin: Any = mixin("PresignedUploadMixin")
StreamUploadMixin: Any = mixin("StreamUploadMixin")
UPLOADS_ARE_STREAMED = hasattr(mlflow_repositories, "StreamUploadMixin")
"""True if the installed MLflow streams uploads itself."""

PART_BYTES = 6 * 2**20
"""Size of the first parts of a streamed upload. S3 requires parts of at least 5 MiB."""

PARTS_IN_FLIGHT = 2

PARTS_OF_A_SIZE = 1000
"""The part size doubles after every PARTS_OF_A_SIZE parts, because S3 allows only 10,000 parts per file."""

STREAMS = 6
"""Maximum number of concurrently streamed uploads per process, each with at most PARTS_IN_FLIGHT + 1 parts in memory.
Further uploads are written to disk first, so that slow clients do not use much memory or block other clients."""

SMALL_BYTES = 16 * 2**20
"""A file of more than this number of bytes is downloaded from S3 by several parallel requests."""

RESERVE_SHARE, RESERVE_BYTES = 0.1, 2 * 2**30
"""Temporary files must leave the smaller of these two amounts free on the data volume, as space for PostgreSQL."""

_listers = ThreadPoolExecutor(8, "two-bucket-list")


class InsufficientStorage(MlflowException):
    """A file does not fit on the server's disk. MLflow returns this exception's status and message to the client."""

    def get_http_status_code(self) -> int:
        return 507


class OneBucketRepository(mlflow_s3.S3ArtifactRepository):
    """MLflow's repository for one S3 bucket, with the S3 client of this module."""

    def _get_s3_client(self) -> Any:
        return client()


def serve_s3_locations() -> None:
    """Make MLflow use this module's S3 client for s3:// locations too."""
    registered: dict[str, Any] = get_registered_artifact_repositories()
    registered["s3"] = OneBucketRepository


class TwoBucketRepository(ArtifactRepository, StreamUploadMixin):  # type: ignore[misc]
    """The artifact repository in two buckets. The bytes of all transfers pass through the server."""

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        uri = urllib.parse.urlsplit(artifact_uri)
        models, _, prefix = uri.path.lstrip("/").partition("/")
        if not uri.netloc or not models:
            raise MlflowException.invalid_parameter_value(
                f"{artifact_uri} is not an artifacts destination: "
                f"write {uri.scheme}://<artifacts bucket>/<models bucket>"
            )
        self.prefix = prefix.rstrip("/")
        self.artifacts: Repository
        self.models: Repository
        self.artifacts, self.models = (
            OneBucketRepository(posixpath.join(f"s3://{bucket}", self.prefix)) for bucket in (uri.netloc, models)
        )

    def home_and_other(self, path: str | None) -> tuple[Repository, Repository]:
        """Return the repository of the bucket to which `path` belongs, and the repository of the other bucket."""
        key = posixpath.join(self.prefix, path or "")
        return (self.models, self.artifacts) if is_of_model(key) else (self.artifacts, self.models)

    # Methods for one file or one folder

    @explained()
    def log_artifact(self, local_file: str | Path, artifact_path: str | None = None) -> None:
        self._upload(local_file, posixpath.join(artifact_path or "", Path(local_file).name))

    def _upload(self, local_file: str | Path, path: str) -> None:
        home, _ = self.home_and_other(path)
        bucket, key = location(home, path)
        client().upload_file(str(local_file), bucket, key, ExtraArgs=metadata(key))

    def log_artifacts(self, local_dir: str | Path, artifact_path: str | None = None) -> None:
        for folder, _, names in os.walk(local_dir):
            below = Path(folder).relative_to(local_dir).as_posix()
            target = posixpath.normpath(posixpath.join(artifact_path or "", below))
            for name in names:
                self.log_artifact(Path(folder, name), None if target == "." else target)

    @explained()
    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        home, other = self.home_and_other(path)
        elsewhere = _listers.submit(other.list_artifacts, path)
        found = {(info.path, info.is_dir): info for info in home.list_artifacts(path)}
        for info in elsewhere.result():
            found.setdefault((info.path, info.is_dir), info)
        return sorted(found.values(), key=lambda info: str(info.path))

    @explained()
    def download_artifacts(self, artifact_path: str, dst_path: str | None = None) -> str:
        """Download a file or folder and return its local path.

        This method downloads single files itself, because MLflow's method returns 500 for every error of a download.
        """
        untyped: Any = super()
        if not artifact_path or self.list_artifacts(artifact_path):
            return str(untyped.download_artifacts(artifact_path, dst_path))
        folder = Path(dst_path or tempfile.mkdtemp()).absolute()
        local_path = str(untyped._create_download_destination(artifact_path, str(folder)))
        self._download_file(artifact_path, local_path)
        return local_path

    @explained()
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

    @explained()
    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        for repository in self.home_and_other(artifact_path):
            repository.delete_artifacts(artifact_path)

    # Streams

    @explained()
    def open(self, path: str) -> dict[str, Any]:
        """Return S3's GetObject response for the object, with an added field `Location`, which is (bucket, key)."""

        def read(bucket: str, key: str) -> dict[str, Any]:
            return {**client().get_object(Bucket=bucket, Key=key, **owner()), "Location": (bucket, key)}

        return self.of_file(path, read)

    @explained()
    def size(self, path: str) -> int:
        """Return the size of a file in bytes. Raises the same errors as `open`."""
        return self.of_file(path, size_of)

    def of_file(self, path: str, ask: Callable[[str, str], Result]) -> Result:
        """Return `ask(bucket, key)` for the bucket that has the file. Raises MlflowException for a folder."""
        try:
            return either(self.home_and_other(path), lambda one: ask(*location(one, path)), unless=is_missing)
        except ClientError as error:
            if is_missing(error) and self.list_artifacts(path):
                raise MlflowException.invalid_parameter_value(
                    f"Artifact path refers to a directory, not a file: '{path}'"
                ) from None
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
        with explained():
            if Streams.running < STREAMS:
                Streams.running += 1
                try:
                    await upload_stream(chunks, *location(home, path))
                finally:
                    Streams.running -= 1
            else:
                await self._spool(chunks, path)

    async def _spool(self, chunks: AsyncIterable[bytes], path: str) -> None:
        with tempfile.NamedTemporaryFile() as file:
            async for chunk in chunks:
                require_space(len(chunk), Path(file.name).parent, written=file.tell())
                await asyncio.to_thread(file.write, chunk)
            file.flush()
            await asyncio.to_thread(self._upload, file.name, path)


class DirectTwoBucketRepository(
    TwoBucketRepository,
    MultipartUploadMixin,  # type: ignore[misc]
    MultipartDownloadMixin,  # type: ignore[misc]
    PresignedUploadMixin,  # type: ignore[misc]
):
    """The artifact repository in two buckets, with presigned URLs for large files.

    From the base classes, MLflow detects that a repository supports presigned URLs.
    """

    @explained()
    def create_multipart_upload(self, local_file: str, num_parts: int = 1, artifact_path: str | None = None) -> Any:
        home, _ = self.home_and_other(posixpath.join(artifact_path or "", Path(local_file).name))
        return home.create_multipart_upload(local_file, num_parts, artifact_path)

    @explained()
    def complete_multipart_upload(
        self, local_file: str, upload_id: str, parts: Any = None, artifact_path: str | None = None
    ) -> None:
        either(
            self.home_and_other(posixpath.join(artifact_path or "", Path(local_file).name)),
            lambda repository: repository.complete_multipart_upload(local_file, upload_id, parts, artifact_path),
            unless=is_missing_upload,
        )

    @explained()
    def abort_multipart_upload(self, local_file: str, upload_id: str, artifact_path: str | None = None) -> None:
        either(
            self.home_and_other(posixpath.join(artifact_path or "", Path(local_file).name)),
            lambda repository: repository.abort_multipart_upload(local_file, upload_id, artifact_path),
            unless=is_missing_upload,
        )

    @explained()
    def create_presigned_upload_url(self, artifact_path: str, expiration: int = 900) -> Any:
        home, _ = self.home_and_other(artifact_path)
        return home.create_presigned_upload_url(artifact_path, expiration)

    @explained()
    def get_download_presigned_url(self, artifact_path: str, expiration: int = 300) -> Any:
        """Replaces MLflow's method, which returns 500 and a message of one word for most errors of S3."""
        from mlflow.entities.presigned_download import PresignedDownloadUrlResponse

        def ask(bucket: str, key: str) -> Any:
            named = {"ResponseContentDisposition": content_disposition(posixpath.basename(key))}
            thing = {"Bucket": bucket, "Key": key, **named, **owner()}
            size = size_of(bucket, key)
            url = client().generate_presigned_url("get_object", Params=thing, ExpiresIn=expiration)
            return PresignedDownloadUrlResponse(url=url, headers={}, file_size=size)

        return self.of_file(artifact_path, ask)


class Streams:
    """`running` is the number of uploads that are being streamed. Only the event loop's thread changes this number."""

    running = 0


def either(
    repositories: tuple[Repository, Repository],
    act: Callable[[Repository], Result],
    *,
    unless: Callable[[Exception], bool],
) -> Result:
    """Call `act` with the first repository. If `act` fails and `unless(error)` is true, call `act` with the second
    repository. If both calls fail, raise the error of the first call."""
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


def is_missing_upload(error: Exception) -> bool:
    return isinstance(error, ClientError) and error.response["Error"]["Code"] in ("NoSuchUpload", "404")


def location(repository: Repository, path: str) -> tuple[str, str]:
    """Return the bucket and the key of a path."""
    bucket, prefix = repository.parse_s3_compliant_uri(repository.artifact_uri)
    return bucket, posixpath.join(prefix, path)


def owner() -> dict[str, str]:
    """Return S3's parameter ExpectedBucketOwner if MLflow's configuration has an owner, else no parameter."""
    account = os.environ.get("MLFLOW_S3_EXPECTED_BUCKET_OWNER")
    return {"ExpectedBucketOwner": account} if account else {}


@cache
def client() -> Any:
    """Return this process's S3 client, with MLflow's settings. boto3 renews the client's credentials automatically.

    The client stores no Content-Encoding, even if the caller passes one. The client's presigned URLs make S3 return the
    encoding "identity" for every object. If S3 deletes only some of the given objects, the client raises ClientError.
    """
    import boto3
    from botocore.config import Config

    style: Any = os.environ.get("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE", "auto")
    made = boto3.client(
        "s3",
        endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None,
        verify=False if os.environ.get("MLFLOW_S3_IGNORE_TLS", "").lower() in ("true", "1") else None,
        config=Config(signature_version="s3v4", s3={"addressing_style": style}, max_pool_connections=32),
    )
    for operation in ("PutObject", "CreateMultipartUpload"):
        made.meta.events.register(f"before-parameter-build.s3.{operation}", drop_encoding)
    made.meta.events.register("before-parameter-build.s3.GetObject", presign_identity)
    made.meta.events.register("after-call.s3.DeleteObjects", refuse_what_was_not_deleted)
    if hoist := getattr(mlflow_s3, "_hoist_expected_bucket_owner", None):  # like MLflow's own client
        made.meta.events.register("before-sign.s3.GetObject", hoist)
    return made


def drop_encoding(params: dict[str, Any], **_: object) -> None:
    params.pop("ContentEncoding", None)


def presign_identity(params: dict[str, Any], context: dict[str, Any], **_: object) -> None:
    if context.get("is_presign_request"):
        params["ResponseContentEncoding"] = "identity"


def refuse_what_was_not_deleted(parsed: dict[str, Any], **_: object) -> None:
    for error in parsed.get("Errors", ()):
        if error.get("Code") != "NoSuchKey":
            answer: Any = {**parsed, "Error": error}
            raise ClientError(answer, "DeleteObjects")


def size_of(bucket: str, key: str) -> int:
    """Return an object's size in bytes from a HEAD request. If HEAD fails, a GET request is sent to get S3's reason."""
    try:
        return int(client().head_object(Bucket=bucket, Key=key, **owner())["ContentLength"])
    except ClientError:
        client().get_object(Bucket=bucket, Key=key, **owner())["Body"].close()
        raise


def content_disposition(name: str) -> str:
    """Return the header Content-Disposition of a download, as in MLflow. A non-ASCII name is also in `filename*`."""
    if name.isascii():
        return dump_options_header("attachment", {"filename": name})
    in_ascii = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode() or "download"
    quoted = urllib.parse.quote(name, safe="!#$&+-.^_`|~")
    return dump_options_header("attachment", {"filename": in_ascii, "filename*": f"UTF-8''{quoted}"})


def metadata(key: str) -> dict[str, Any]:
    """Return a new object's metadata: no Content-Encoding, and no Content-Type for a compressed file (table.csv.gz)."""
    kind, encoding = mimetypes.guess_type(key)
    return {
        **({"ContentType": kind} if kind and not encoding else {}),
        **owner(),
        **json.loads(os.environ.get("MLFLOW_S3_UPLOAD_EXTRA_ARGS") or "{}"),
    }


async def upload_stream(chunks: AsyncIterable[bytes], bucket: str, key: str) -> None:
    """Upload a file in parts while its bytes arrive. If reading `chunks` fails, no object is stored."""
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
    """Raises InsufficientStorage if writing `size` more bytes would leave too little free space on the volume of
    `folder`. `written` is the number of bytes of the file that are already on the volume."""
    volume = shutil.disk_usage(folder)
    available = volume.free - min(int(volume.total * RESERVE_SHARE), RESERVE_BYTES)
    if size > available:
        raise InsufficientStorage(
            f"{math.ceil((written + size) / 2**20):,} MiB do not fit into the server's temporary space "
            f"({max(0, available) // 2**20:,} MiB left{f' after {written // 2**20:,}' if written else ''}): "
            "let clients move large files directly (artifactTransfer = direct), or enlarge the data volume",
            error_code=RESOURCE_EXHAUSTED,
        )
