"""The files of an adoption (a move from another server), which `scripts/adopt.py` and the machine exchange in a bucket.

    adoptions/NAME/manifest.json      the source's migration and tables             written by adopt.py
    adoptions/NAME/rows/TABLE.gz      the rows of one table                         written by adopt.py
    adoptions/NAME/request.json       the action for the machine                    written by adopt.py
    adoptions/NAME/status.json        request ID, progress, error                   written by the machine
    adoptions/NAME/prepared.json.gz   IDs, names, locations, misfits                written by the machine
    adoptions/NAME/loaded.json        numbers of compared, missing, changed rows    written by the machine
    adoptions/NAME/report-….json      the verdict                                   written by adopt.py

NAME is the name of the source. A file of rows has one line per row, in the text format of PostgreSQL's COPY, and is
compressed with gzip. Every value is text: numbers are decimal, bytes are \\x and hexadecimal digits, NULL is \\N.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "adoptions/"
FORMAT = 1
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
TABLE = re.compile(r"[a-z_][a-z0-9_]{0,62}")
ACTIONS = ("prepare", "load", "report")
ON_CLASH = ("refuse", "skip", "rename")

ADOPTED_TAG = "mlflow-ami.adopted"
"""Tag of an adopted experiment: "NAME:<experiment ID of the source>". A later adoption searches for the tag."""


class AdoptionError(Exception):
    """A file of an adoption is invalid, or the adoption cannot continue. The message is one sentence."""


@dataclass(frozen=True)
class Table:
    """One table of the source. `bytes` is the size of the rows. `sha256` is the digest of the compressed file."""

    columns: tuple[str, ...]
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`head` is the newest migration of the source's database. adopt.py removes NUL characters and broken UTF-8 from
    values, because PostgreSQL cannot store them. `removed` maps "table.column" to the number of values that adopt.py
    has changed."""

    head: str
    tables: Mapping[str, Table]
    removed: Mapping[str, int]
    format: int = FORMAT


@dataclass(frozen=True)
class Request:
    """Each request has a new `id`. With `dry_run`, the database in service does not change. `prefix` is put before the
    names of experiments and registered models. With `leave_artifacts`, artifact locations do not change. With `lossy`,
    values that the target columns cannot store are shortened or left out. With `with_secrets`, the rows include secrets
    and webhooks, which adopt.py has encrypted with this stack's passphrase."""

    id: str
    action: str
    dry_run: bool = False
    prefix: str = ""
    on_clash: str = "refuse"
    leave_artifacts: bool = False
    lossy: bool = False
    with_secrets: bool = False
    format: int = FORMAT


def key(name: str, file: str) -> str:
    """Object key of an adoption's file in the backups bucket. Raises AdoptionError for an invalid name."""
    if not NAME.fullmatch(name):
        raise AdoptionError(f"{name!r} is not a valid source name: use 1 to 40 of the characters a-z, 0-9 and -")
    return f"{PREFIX}{name}/{file}"


def dump(document: Manifest | Request) -> bytes:
    return json.dumps(dataclasses.asdict(document)).encode()


def parse_manifest(text: bytes) -> Manifest:
    raw = _mapping(text, "manifest")
    try:
        tables = {
            str(name): Table(
                tuple(map(str, entry["columns"])), int(entry["rows"]), int(entry["bytes"]), str(entry["sha256"])
            )
            for name, entry in raw["tables"].items()
        }
        manifest = Manifest(str(raw["head"]), tables, {str(k): int(v) for k, v in raw["removed"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdoptionError(f"the manifest of the adoption is invalid ({error!r}): run adopt.py again") from None
    names = [*tables, *(column for table in tables.values() for column in table.columns)]
    if bad := [each for each in names if not TABLE.fullmatch(each)]:
        raise AdoptionError(f"the source has a table or column named {bad[0]!r}, which no release of MLflow has")
    if not re.fullmatch(r"[0-9a-f]{12}", manifest.head):
        raise AdoptionError(f"{manifest.head!r} is not a migration of MLflow")
    return manifest


def parse_request(text: bytes) -> Request:
    raw = _mapping(text, "request")
    known = {each.name for each in dataclasses.fields(Request)}
    if unknown := raw.keys() - known:
        raise AdoptionError(
            f"this image does not support {', '.join(sorted(unknown))} in a request: use the adopt.py of the image's "
            "release, or a newer image"
        )
    try:
        request = Request(**raw)
    except TypeError as error:
        raise AdoptionError(f"the request of the adoption is invalid ({error}): run adopt.py again") from None
    if request.action not in ACTIONS or request.on_clash not in ON_CLASH:
        raise AdoptionError(f"this image does not support action {request.action!r} with {request.on_clash!r}")
    return request


def _mapping(text: bytes, what: str) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except ValueError:
        raw = None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise AdoptionError(f"the {what} of the adoption does not have format {FORMAT}: run adopt.py again")
    return raw


_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_SPECIAL = re.compile(r"[\\\n\r\t]")


def escape(value: str | None) -> str:
    """Escape one value for a file of rows. The caller must remove NUL characters first."""
    if value is None:
        return "\\N"
    return _SPECIAL.sub(lambda found: _ESCAPES[found[0]], value)


_UNESCAPES = {"\\": "\\", "n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "v": "\v"}
_ESCAPED = re.compile(r"\\(x[0-9a-fA-F]{1,2}|[0-7]{1,3}|.)", re.DOTALL)


def unescape(field: str) -> str | None:
    """The value of one field in the text format of COPY. pg_dump uses this format, too."""
    if field == "\\N":
        return None
    return _ESCAPED.sub(_unescaped, field) if "\\" in field else field


def _unescaped(found: re.Match[str]) -> str:
    text = found[1]
    if text[0] == "x" and len(text) > 1:
        return chr(int(text[1:], 16))
    return chr(int(text, 8)) if text.isdigit() else _UNESCAPES.get(text, text)
