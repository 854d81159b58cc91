"""Write the source's rows into one compressed file per table, and write a manifest of these files."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from mlflow_host.contract import adoption
from mlflow_host.contract.adoption import Manifest, Table
from scripts.adopting.sources import Snapshot


class Counted:
    """A writable object that counts bytes and rows. Line ends inside a value are escaped, so each line is one row."""

    def __init__(self, sink: IO[bytes]):
        self._sink, self.bytes, self.rows = sink, 0, 0

    def write(self, data: bytes) -> int:
        self.bytes += len(data)
        self.rows += data.count(b"\n")
        return self._sink.write(data)


def write(snapshot: Snapshot, folder: Path) -> Manifest:
    tables: dict[str, Table] = {}
    removed: dict[str, int] = {}
    for name, columns in sorted(snapshot.columns.items()):
        path = folder / f"{name}.gz"
        with gzip.open(path, "wb", compresslevel=1) as packed:
            sink = Counted(packed)  # type: ignore[arg-type]
            found = snapshot.write_rows(name, sink)  # type: ignore[arg-type]
        removed |= {f"{name}.{column}": count for column, count in found.items()}
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        tables[name] = Table(tuple(columns), sink.rows, sink.bytes, digest)
    return Manifest(snapshot.head, tables, removed)


def upload(s3: Any, bucket: str, name: str, manifest: Manifest, folder: Path) -> None:
    """Upload the row files, and write the manifest last. Therefore the manifest never names a missing file."""

    def put(table: str) -> None:
        s3.upload_file(str(folder / f"{table}.gz"), bucket, adoption.key(name, f"rows/{table}.gz"))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(put, table) for table in manifest.tables]:
            done.result()
    s3.put_object(Bucket=bucket, Key=adoption.key(name, "manifest.json"), Body=adoption.dump(manifest))


def read(folder: Path, manifest: Manifest, table: str, columns: tuple[str, ...]) -> Iterator[tuple[str | None, ...]]:
    """The rows of a table, with the values of `columns`. A value is None if the source lacks the column. There are no
    rows if the source lacks the table."""
    if table not in manifest.tables:
        return
    held = manifest.tables[table].columns
    places = [held.index(column) if column in held else None for column in columns]
    with gzip.open(folder / f"{table}.gz", "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            fields = line.rstrip("\n").split("\t")
            yield tuple(None if place is None else adoption.unescape(fields[place]) for place in places)
