"""Copy artifacts from the source's locations into the artifacts bucket and the models bucket, in parallel.

A second run does not copy an object again if the object in the bucket has the same size and is not older than the
source's file."""

from __future__ import annotations

import posixpath
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from botocore.exceptions import BotoCoreError, ClientError

from mlflow_host.contract.adoption import AdoptionError
from mlflow_host.contract.artifact_key import is_of_model
from scripts.adopting.target import Api, Target
from scripts.adopting.verdict import pages

COPIES = 16
"""Maximum number of objects that are copied at the same time."""
ROOT = "mlflow-artifacts:/"
DENIED = {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "NoSuchBucket", "NoSuchKey", "InvalidRequest"}


@dataclass(frozen=True)
class File:
    """One file of the source: its location, and its key in the bucket. `bytes` is the size, or -1 if unknown.
    `modified` is a time in seconds since 1970, or 0 if unknown."""

    source: str
    key: str
    bytes: int
    modified: float


@dataclass
class Reader:
    """The access to the source's artifacts. `base` replaces mlflow-artifacts:/ in locations: the address of the old
    server's artifact store (s3://…, a folder or the old server's URL), or "" if the address is unknown. `s3` is a
    client for the source's buckets. `server` is an API client for the old server."""

    folder: Path
    base: str = ""
    s3: Any = None
    same_store: bool = True
    """Whether the source's and the stack's buckets are in one object store, so that the store itself can copy the
    objects."""
    server: Api | None = None
    remote: bool = False
    """Whether the source is a tracking server. In this case, files in folders on the server's machine are read through
    the server's API."""
    traces: frozenset[str] = frozenset()
    """The IDs of the traces whose spans are in a file, if the source is a tracking server."""


@dataclass
class Outcome:
    copied: int = 0
    there: int = 0
    bytes: int = 0
    files: int = 0
    empty: list[str] = field(default_factory=list)
    """Logged models and model versions without a file at their location in the source."""
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def resolve(place: str, reader: Reader) -> str:
    """The address of a location: s3://…, a folder, or http(s)://… for the old server."""
    where = urlsplit(place)
    if where.scheme == "mlflow-artifacts":
        path = unquote(where.path).lstrip("/")
        if not reader.base:
            raise AdoptionError(
                f"{place} is in the old server's artifact store: name that store with --artifacts (s3://bucket/prefix, "
                "a folder, or the old server's URL), or use --leave-artifacts"
            )
        return f"{reader.base.rstrip('/')}/{path}"
    if where.scheme in ("http", "https"):
        found = re.match(r"(.*?)/(?:ajax-)?api/2\.0/mlflow-artifacts/artifacts/?(.*)", place)
        if not found or not reader.server:
            raise AdoptionError(f"{place} is on a server: name the old server's URL or its store with --artifacts")
        return f"{reader.server.url}/{found[2]}"
    if where.scheme == "s3":
        return place
    if where.scheme == "file":
        return unquote(where.path)
    return str(reader.folder / place)


def files_of(place: dict[str, Any], reader: Reader) -> Iterator[File]:
    """The files of one location. Raises AdoptionError, OSError or botocore's errors."""
    address, key = resolve(place["source"], reader), place["target"].removeprefix(ROOT)
    where = urlsplit(address)
    if reader.remote and urlsplit(place["source"]).scheme in ("", "file"):
        assert reader.server
        if place["kind"] == "trace" and place["key"] not in reader.traces:
            return
        yield from _files_of_object(reader.server, place["kind"], place["key"], key)
    elif where.scheme == "s3":
        prefix = where.path.lstrip("/").rstrip("/") + "/"
        pages = reader.s3.get_paginator("list_objects_v2").paginate(Bucket=where.netloc, Prefix=prefix)
        for page in pages:
            for found in page.get("Contents", ()):
                rest = found["Key"][len(prefix) :]
                if rest and not rest.endswith("/"):
                    source = f"s3://{where.netloc}/{found['Key']}"
                    yield File(source, f"{key}/{rest}", found["Size"], found["LastModified"].timestamp())
    elif where.scheme in ("http", "https"):
        assert reader.server
        yield from _files_of_server(reader.server, address.removeprefix(reader.server.url).strip("/"), key)
    else:
        folder = Path(address)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                status = path.stat()
                rest = path.relative_to(folder).as_posix()
                yield File(str(path), f"{key}/{rest}", status.st_size, status.st_mtime)


def _files_of_server(server: Api, path: str, key: str) -> Iterator[File]:
    found = server.get("/api/2.0/mlflow-artifacts/artifacts", path=path).get("files", ())
    for each in found:
        name = posixpath.basename(each["path"])
        if each.get("is_dir"):
            yield from _files_of_server(server, f"{path}/{name}", f"{key}/{name}")
        else:
            source = f"{server.url}/api/2.0/mlflow-artifacts/artifacts/{quote(f'{path}/{name}')}"
            yield File(source, f"{key}/{name}", int(each.get("file_size") or 0), 0)


def _files_of_object(server: Api, kind: str, name: str, key: str) -> Iterator[File]:
    """The files of a run, a logged model or a trace, through the API that MLflow's own pages use."""
    if kind == "trace":
        # The API returns no size for this file, so every run of adopt.py copies the file again.
        source = f"{server.url}/ajax-api/2.0/mlflow/get-trace-artifact?request_id={quote(name)}"
        yield File(source, f"{key}/traces.json", -1, 0)
        return
    names: dict[str, str] = {}
    if kind == "run":
        listing, folder, names = "/api/2.0/mlflow/artifacts/list", "path", {"run_id": name}
        source = f"{server.url}/get-artifact?run_uuid={quote(name)}&path="
    elif kind == "logged model":
        model = f"api/2.0/mlflow/logged-models/{quote(name)}/artifacts"
        listing, folder = f"/{model}/directories", "artifact_directory_path"
        source = f"{server.url}/ajax-{model}/files?artifact_file_path="
    else:
        raise AdoptionError("is in a folder of the old server, which returns no files of model versions")
    folders = [""]
    while folders:
        query = {**names, **({folder: path} if (path := folders.pop()) else {})}
        for each in pages(server.get, listing, "files", **query):
            if each.get("is_dir"):
                folders.append(each["path"])
            else:
                size = int(each.get("file_size") or 0)
                yield File(source + quote(each["path"], safe=""), f"{key}/{each['path']}", size, 0)


def present(target: Target, keys: list[str]) -> dict[str, tuple[int, float]]:
    """The size and time of each object that exists in the two buckets. Only the top folders of `keys` are listed."""
    found: dict[str, tuple[int, float]] = {}
    folders = {key.split("/", 1)[0] + "/" for key in keys}
    for kind in ("artifacts", "models"):
        pages = target.s3.get_paginator("list_objects_v2")
        for folder in sorted(folders):
            for page in pages.paginate(Bucket=target.buckets[kind], Prefix=folder):
                for each in page.get("Contents", ()):
                    if (kind == "models") == is_of_model(each["Key"]):
                        found[each["Key"]] = (each["Size"], each["LastModified"].timestamp())
    return found


def plan(places: list[dict[str, Any]], reader: Reader, outcome: Outcome) -> list[File]:
    """All files of all locations, listed in parallel. For a location that cannot be listed, the report has a line."""
    lock = threading.Lock()
    found: list[File] = []

    def list_place(place: dict[str, Any]) -> None:
        try:
            files = list(files_of(place, reader))
        except (ClientError, BotoCoreError, OSError, AdoptionError) as error:
            with lock:
                outcome.failed.append(f"{place['kind']} {place['key']}: {place['source']}: {brief(error)}")
            return
        with lock:
            found.extend(files)
            if not files and place["kind"] in ("logged model", "model version"):
                outcome.empty.append(f"{place['kind']} {place['key']}: {place['source']} holds no file")

    with ThreadPoolExecutor(COPIES) as pool:
        for done in [pool.submit(list_place, place) for place in places]:
            done.result()
    return sorted(found, key=lambda file: file.key)


def copy(
    places: list[dict[str, Any]], reader: Reader, target: Target, say: Callable[[str], None], *, dry_run: bool = False
) -> Outcome:
    outcome, begun = Outcome(), time.monotonic()
    for place in places:
        resolve(place["source"], reader)  # raises AdoptionError if a location needs an option that was not given
    say(f"listing the artifacts of {len(places):,} locations")
    files = plan(places, reader, outcome)
    there = present(target, [file.key for file in files])
    missing = [file for file in files if not _same(file, there.get(file.key))]
    outcome.files, outcome.there = len(files), len(files) - len(missing)
    total = sum(max(file.bytes, 0) for file in missing)
    outcome.bytes = total
    say(f"{len(files):,} artifacts, {len(missing):,} to copy, {size(total)}")
    if dry_run:
        outcome.seconds = time.monotonic() - begun
        return outcome
    lock, said, done_bytes = threading.Lock(), [time.monotonic()], [0]
    started = time.monotonic()

    def put(file: File) -> None:
        try:
            _put(file, reader, target)
            problem = ""
        except (ClientError, BotoCoreError, OSError, AdoptionError) as error:
            problem = f"{file.source}: {brief(error)}"
        with lock:
            if problem:
                outcome.failed.append(problem)
            else:
                outcome.copied += 1
            done_bytes[0] += max(file.bytes, 0)
            now = time.monotonic()
            if now - said[0] >= 2:
                said[0] = now
                rate = done_bytes[0] / (now - started)
                left = (total - done_bytes[0]) / rate if rate else 0
                say(
                    f"{outcome.copied:,} of {len(missing):,} artifacts, {size(done_bytes[0])} of {size(total)}, "
                    f"{size(rate)}/s, {left:.0f} s left"
                )

    with ThreadPoolExecutor(COPIES) as pool:
        try:
            for done in [pool.submit(put, file) for file in missing]:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    outcome.seconds = time.monotonic() - begun
    say(f"{outcome.copied:,} artifacts copied in {outcome.seconds:.0f} s, {outcome.there:,} existed already")
    return outcome


def _same(file: File, found: tuple[int, float] | None) -> bool:
    return found is not None and found[0] == file.bytes and found[1] >= file.modified


def _put(file: File, reader: Reader, target: Target) -> None:
    bucket = target.buckets["models" if is_of_model(file.key) else "artifacts"]
    where = urlsplit(file.source)
    if where.scheme == "s3":
        source = {"Bucket": where.netloc, "Key": file.source.split("/", 3)[3]}
        if reader.same_store:
            try:
                target.s3.copy(source, bucket, file.key, SourceClient=reader.s3)
                return
            except ClientError as error:
                if error.response["Error"]["Code"] not in DENIED:
                    raise
        # The stack's credentials may not read the source's bucket, so the source's credentials read the object.
        body = reader.s3.get_object(**source)["Body"]
        with body:
            target.s3.upload_fileobj(body, bucket, file.key)
    elif where.scheme in ("http", "https"):
        assert reader.server
        with reader.server.download(file.source.removeprefix(reader.server.url)) as answer:
            target.s3.upload_fileobj(answer, bucket, file.key)
    else:
        target.s3.upload_file(file.source, bucket, file.key)


def brief(error: Exception) -> str:
    if isinstance(error, ClientError):
        return f"{error.response['Error'].get('Code', '')}: {error.response['Error'].get('Message', '')}"
    return str(error) or type(error).__name__


def size(number: float) -> str:
    """ "1.4 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
