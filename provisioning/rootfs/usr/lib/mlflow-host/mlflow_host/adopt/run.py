"""Unit `mlflow-host-adopt@NAME`: execute the request of scripts/adopt.py for the source NAME.

    prepare   load the source's rows into a separate database, migrate it to this image's schema, and resolve IDs, names
              and locations. The database in service does not change.
    load      dump the database in service, then merge the prepared rows into it in one transaction.
    report    store the final report of scripts/adopt.py in this machine's reports.

If the unit is killed at any moment, the database in service contains either none or all of the new rows. The formats
are in `contract.adoption`.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import psycopg2

from mlflow_host.adopt import artifact_locations, conflicts, merge, staging
from mlflow_host.contract import adoption
from mlflow_host.contract.adoption import ADOPTED_TAG, AdoptionError, Manifest, Request
from mlflow_host.machine import atomic_file, config
from mlflow_host.postgres import dump_file, flip, ownership, pgbackrest
from mlflow_host.postgres.catalog import head, read_catalog
from mlflow_host.postgres.cluster import (
    Cluster,
    connection,
    create_empty,
    databases,
    drop,
    in_service,
    major,
    rows,
    run,
)
from mlflow_host.schema import empty_database
from mlflow_host.schema.copying import CarryError, add_foreign_keys, drop_foreign_keys
from mlflow_host.schema.release import ImageSchema, Release, ReleaseError, of_this_image, release
from mlflow_host.schema.reporting import LeftBehind
from mlflow_host.schema.revisions import known_revisions
from mlflow_host.schema.verifying import check_row_counts, row_counts

HEARTBEAT_SECONDS = 10
SPACE = 4
"""The volume must have this number of free bytes for each byte of adopted rows: two for the prepared database, one for
the database in service, and one for the write-ahead log."""
SPARE = 256 << 20

ENCRYPTED = ("secrets", "webhooks")
"""Tables with values that only the old server's passphrase can decrypt. The adoption leaves out the rows of these
tables and all rows that refer to such a row, unless adopt.py encrypted the values with this server's passphrase."""


@dataclass(frozen=True)
class AdoptSettings:
    """The cluster, image, bucket and folders that an adoption uses. Tests use their own cluster and bucket."""

    cluster: Cluster
    image: ImageSchema
    bucket: dump_file.Bucket
    reports: Path
    blank: Path | None
    """Dump of an empty database of the image's schema. None, only in tests, means that MLflow creates the empty
    database."""
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))


def main() -> int:
    settings = from_machine()
    try:
        perform(settings, sys.argv[1])
    except AdoptionError as error:
        print(f"mlflow-host: {error}", file=sys.stderr)
        return 2
    return 0


def from_machine() -> AdoptSettings:
    cluster = in_service()
    bucket = pgbackrest.bucket(config.load().launch)
    return AdoptSettings(cluster, of_this_image(), bucket, config.DATA / "reports", empty_database.FILE)


def perform(settings: AdoptSettings, name: str) -> None:
    """Execute the request. The status file contains the progress, and at the end "done" or "failed". Raises
    AdoptionError."""
    store = Store(settings, name)
    request = adoption.parse_request(store.read("request.json"))
    with store.progress(request) as say:
        try:
            if request.action == "report":
                keep_report(settings, store)
                return
            with release(settings.cluster, settings.image) as mlflow:
                action = prepare if request.action == "prepare" else load
                action(settings, name, store, request, mlflow, say)
        except (CarryError, ReleaseError, dump_file.DumpError, psycopg2.Error, OSError) as error:
            sentence = " ".join(str(error).split())[:500]
            raise AdoptionError(f"{type(error).__name__}: {sentence}; the database in service is unchanged") from error


class Store:
    """The files of one adoption in the backups bucket."""

    def __init__(self, settings: AdoptSettings, name: str):
        self._client, self._bucket, self._name = dump_file.s3_client(settings.bucket), settings.bucket.name, name

    def read(self, file: str) -> bytes:
        key = adoption.key(self._name, file)
        try:
            return bytes(self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read())
        except self._client.exceptions.NoSuchKey:
            raise AdoptionError(f"the backups bucket has no {key}: run scripts/adopt.py, which writes it") from None

    def write(self, file: str, content: bytes) -> None:
        self._client.put_object(Bucket=self._bucket, Key=adoption.key(self._name, file), Body=content)

    @contextmanager
    def rows(self, table: str, digest: str) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile() as file:
            key = adoption.key(self._name, f"rows/{table}.gz")
            self._client.download_fileobj(self._bucket, key, file)
            if (found := dump_file.digest_of(file)) != digest:
                raise AdoptionError(f"{key} is not the file of the manifest (SHA-256 {found}): run adopt.py again")
            file.seek(0)
            yield file

    @contextmanager
    def progress(self, request: Request) -> Iterator[Callable[[str], None]]:
        """Write status.json at each message and every HEARTBEAT_SECONDS, so that adopt.py detects a stopped unit."""
        said, over = ["started"], threading.Event()

        def write(state: str) -> None:
            at = datetime.now(UTC).isoformat(timespec="seconds")
            status = {"request": request.id, "state": state, "message": said[0], "at": at}
            self.write("status.json", json.dumps(status).encode())

        def say(message: str) -> None:
            said[0] = message
            print(message, file=sys.stderr, flush=True)
            write("running")

        def beat() -> None:
            while not over.wait(HEARTBEAT_SECONDS):
                write("running")

        beating = threading.Thread(target=beat, daemon=True, name="heartbeat")
        beating.start()
        state = "failed"
        try:
            say("started")
            yield say
            state = "done"
        except AdoptionError as error:
            said[0] = str(error)
            raise
        except Exception as error:
            said[0] = f"the machine failed ({type(error).__name__}): the machine's journal contains the traceback"
            raise
        finally:
            over.set()
            beating.join()
            write(state)


# Prepare


def prepare(
    settings: AdoptSettings, name: str, store: Store, request: Request, mlflow: Release, say: Callable[[str], None]
) -> None:
    begun = time.monotonic()
    manifest = adoption.parse_manifest(store.read("manifest.json"))
    check(settings, manifest)
    cluster, work = settings.cluster, merge.work_database(name)
    say(f"creating an empty database at the source's migration {manifest.head}")
    create_empty(cluster, work)
    mlflow.create(work, manifest.head)
    with connection(cluster, work) as opened:
        catalog = read_catalog(opened)
        if missing := {"experiments", "runs"} - manifest.tables.keys():
            raise AdoptionError(f"the source has no table {sorted(missing)[0]}: it is not an MLflow database")
        say("loading the source's rows")
        staging.stage(opened, manifest, lambda table: store.rows(table, manifest.tables[table].sha256))
        settled = settle(settings, name, store, request, opened)
        conflicts.apply(opened, manifest, catalog, settled)
        say("fitting the rows to MLflow's schema")
        drop_foreign_keys(opened, catalog)
        left = staging.fill(opened, catalog, manifest)
        conflicts.delete_skipped(opened, settled)
        skipped = staging.remove_orphans(opened, catalog, "left out with an experiment or model")
        encrypted = [] if request.with_secrets else leave_encrypted(opened, catalog)
        add_foreign_keys(opened, catalog)
        run(opened, f"DROP SCHEMA {staging.SCHEMA} CASCADE")
        before = row_counts(opened)
    say(f"migrating them to {settings.image.head}")
    mlflow.upgrade(work, settings.image.head)
    with connection(cluster, work) as opened:
        catalog = read_catalog(opened)
        notes = check_row_counts(before, row_counts(opened))
        say("finding the artifacts")
        places, others = artifact_locations.find(opened, catalog)
        if not request.leave_artifacts:
            artifact_locations.rewrite(opened, catalog, places)
        finish_experiments(settings, opened, name, settled)
        counts = row_counts(opened)
    left += [
        LeftBehind(each, None, number, "removed", "NUL or broken UTF-8") for each, number in manifest.removed.items()
    ]
    refused = refusals(settled, left, request)
    prepared = {
        "request": request.id,
        "refused": refused,
        "dry_run": request.dry_run,
        "experiments": settled.experiments,
        "names": settled.names,
        "models": settled.models,
        "clashes": settled.clashes,
        "default_is_ours": settled.default_is_ours,
        "left": [asdict(entry) for entry in left],
        "skipped": [asdict(entry) for entry in skipped],
        "encrypted": [asdict(entry) for entry in encrypted],
        "notes": notes,
        "places": [] if request.leave_artifacts else [asdict(place) for place in places],
        "left_places": sorted({root_of(p.source) for p in places}) if request.leave_artifacts else others,
        "counts": counts,
        "seconds": round(time.monotonic() - begun, 1),
        "from_head": manifest.head,
        "to_head": settings.image.head,
    }
    store.write("prepared.json.gz", gzip.compress(json.dumps(prepared).encode()))
    if request.dry_run or refused:
        drop(cluster, work)
    say("prepared")


def check(settings: AdoptSettings, manifest: Manifest) -> None:
    """Raise AdoptionError if this image cannot read the source's rows, or if the database has too little space."""
    image = settings.image
    if manifest.head not in known_revisions(image.python):
        raise AdoptionError(
            f"the source is at migration {manifest.head}, which MLflow {image.mlflow_version} of this image does not "
            "have: first upgrade to an image with the source's release of MLflow or a newer release"
        )
    with connection(settings.cluster, settings.cluster.database) as opened:
        if head(opened) != image.head:
            raise AdoptionError("the server's database is not at its image's schema: wait until the boot has ended")
    usage = flip.disk_space(settings.cluster)
    needed = SPACE * sum(table.bytes for table in manifest.tables.values()) + SPARE
    if usage and usage[0] < needed:
        storage, setting = settings.cluster.storage
        raise AdoptionError(
            f"{storage} has {usage[0] / 2**30:.1f} GiB free, but the adoption needs {needed / 2**30:.1f} GiB: make it "
            f"larger (the setting {setting})"
        )


def settle(settings: AdoptSettings, name: str, store: Store, request: Request, opened: Any) -> conflicts.Settlement:
    try:
        earlier = json.loads(gzip.decompress(store.read("prepared.json.gz")))
        reserved = {} if earlier["dry_run"] else {k: v for k, v in earlier["experiments"].items() if v is not None}
    except AdoptionError:
        reserved = {}
    with connection(settings.cluster, settings.cluster.database, autocommit=True) as live:
        there = conflicts.read_live(live, name)
        fresh = conflicts.fresh_ids(live, reserve=not request.dry_run)
        settled = conflicts.settle(opened, name, request, there, reserved, fresh)
        if not request.dry_run:
            conflicts.reserve_kept(live, settled)
    return settled


def leave_encrypted(opened: Any, catalog: Any) -> list[LeftBehind]:
    """Delete the rows with values that only the old server's passphrase can decrypt."""
    left = []
    for table in ENCRYPTED:
        if table in catalog.tables and (count := run(opened, f"DELETE FROM {table}")):
            left.append(LeftBehind(table, None, count, "left behind", "encrypted with the old server's passphrase"))
    if left:
        left += staging.remove_orphans(opened, catalog, "needs an encrypted row")
    return left


def finish_experiments(settings: AdoptSettings, opened: Any, name: str, settled: conflicts.Settlement) -> None:
    """Tag the adopted experiments. If the source's experiment 0 is merged into this server's experiment 0, give the
    source's experiment 0 the values of this server's experiment 0."""
    for old, new in settled.experiments.items():
        if new is None or (new == 0 and settled.default_is_ours):
            continue
        run(
            opened,
            "INSERT INTO experiment_tags (key, value, experiment_id) SELECT %s, %s, experiment_id FROM experiments "
            "WHERE experiment_id = %s",
            (ADOPTED_TAG, f"{name}:{old}", new),
        )
    if settled.default_is_ours:
        columns = ("name", "artifact_location", "lifecycle_stage", "creation_time", "last_update_time")
        with connection(settings.cluster, settings.cluster.database) as live:
            found = rows(live, f"SELECT {', '.join(columns)} FROM experiments WHERE experiment_id = 0")
        listed = ", ".join(f"{column} = %s" for column in columns)
        run(opened, f"UPDATE experiments SET {listed} WHERE experiment_id = 0", found[0])


def refusals(settled: conflicts.Settlement, left: list[LeftBehind], request: Request) -> list[str]:
    """The reasons why nothing is loaded, as sentences."""
    told = []
    if request.on_clash == "refuse" and settled.clashes:
        told.append(
            f"{len(settled.clashes)} names are in use on the server: add --prefix NAME/, or --on-clash skip or rename"
        )
    if left and not request.lossy:
        told.append(f"{sum(entry.count for entry in left)} values or rows cannot be stored: --lossy adopts the rest")
    return told


def root_of(uri: str) -> str:
    """The scheme and host of a location (`scheme://host`); for a path or a file: URI, its first folders."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}://{rest.split('/')[0]}" if separator and scheme != "file" else uri.rsplit("/", 3)[0]


# Load


def load(
    settings: AdoptSettings, name: str, store: Store, request: Request, mlflow: Release, say: Callable[[str], None]
) -> None:
    begun, cluster = time.monotonic(), settings.cluster
    if merge.work_database(name) not in databases(cluster):
        raise AdoptionError("the prepared rows were deleted by a boot of the machine: run adopt.py again")
    say("dumping the database in service")
    now = settings.now()
    with connection(cluster, cluster.database) as opened:
        owner, revision = ownership.read(opened, cluster.database), head(opened)
    metadata = dump_file.dump_metadata(revision, owner, major(cluster))
    key = dump_file.dump_key(now, "before-adoption", revision)
    address = dump_file.dump(cluster, cluster.database, settings.bucket, key, metadata)
    loaded = merge.load(cluster, name, settings.image, mlflow, settings.blank, say)
    with connection(cluster, cluster.database, autocommit=True) as opened:
        run(opened, "ANALYZE")
    at = now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    file = f"{at}-adoption-{name}.json"
    report = {
        "request": request.id,
        "file": file,
        "dump": address,
        "first": loaded.first,
        "inserted": loaded.inserted,
        "updated": loaded.updated,
        "gone": loaded.gone,
        "tables": {
            table: dict(zip(("compared", "missing", "changed"), n, strict=True)) for table, n in loaded.tables.items()
        },
        "seconds": round(time.monotonic() - begun, 1),
    }
    store.write("loaded.json", json.dumps(report).encode())
    settings.reports.mkdir(parents=True, exist_ok=True)
    atomic_file.write(settings.reports / file, json.dumps(report, indent=2) + "\n")
    say(f"loaded: {loaded.inserted} rows inserted, {loaded.updated} updated")


# Report


def keep_report(settings: AdoptSettings, store: Store) -> None:
    """Replace the report that `load` wrote with the report of adopt.py, which contains all facts of the replaced
    report."""
    file = json.loads(store.read("loaded.json"))["file"]
    atomic_file.write(settings.reports / file, store.read(f"report-{file}").decode())


if __name__ == "__main__":
    raise SystemExit(main())
