"""Adoption: the files by which `scripts/adopt.py` and the machine communicate in the backups bucket.

    adoptions/NAME/manifest.json      the source's migration and tables             written by adopt.py
    adoptions/NAME/rows/TABLE.gz      the rows of one table                         written by adopt.py
    adoptions/NAME/request.json       the action for the machine                    written by adopt.py
    adoptions/NAME/status.json        which request, how far, why it failed         written by the machine
    adoptions/NAME/prepared.json.gz   IDs, names, locations, misfits      written by the machine
    adoptions/NAME/loaded.json        rows there, carried, missing, changed         written by the machine
    adoptions/NAME/report-….json      the verdict                                   written by adopt.py

NAME names the source. A file of rows has one line per row, in the text format of PostgreSQL's COPY, compressed by gzip.
Every value is text: numbers in decimal, bytes as \\x and hexadecimal digits, NULL as \\N.
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
"""Tag of an adopted experiment: "NAME:<experiment ID of the source>". A second adoption finds the experiment by it."""


class AdoptionError(Exception):
    """A file of an adoption cannot be used, or the adoption cannot continue; one sentence with the reason."""


@dataclass(frozen=True)
class Table:
    """One table of the source. `bytes` is the size of its rows, `sha256` the digest of the compressed file."""

    columns: tuple[str, ...]
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`head`: the source's migration. `removed`: by "table.column", number of values from which NUL characters or
    broken UTF-8 were removed, because PostgreSQL cannot store them."""

    head: str
    tables: Mapping[str, Table]
    removed: Mapping[str, int]
    format: int = FORMAT


@dataclass(frozen=True)
class Request:
    """`id` is new for each request. `dry_run`: the database in service does not change. `prefix` goes before the
    names of experiments and registered models. `leave_artifacts`: artifact locations stay as they are. `lossy`: carry
    rows with values that do not fit, shortened or left behind. `with_secrets`: secrets and webhooks are encrypted with
    this stack's passphrase."""

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
    """Key of a file in the backups bucket. Raises AdoptionError for a bad name."""
    if not NAME.fullmatch(name):
        raise AdoptionError(f"{name!r} does not name a source: use 1 to 40 of a-z, 0-9 and -")
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
            f"the request has {', '.join(sorted(unknown))}, which this image does not know: use the adopt.py of its "
            "release, or a newer image"
        )
    try:
        request = Request(**raw)
    except TypeError as error:
        raise AdoptionError(f"the request of the adoption is invalid ({error}): run adopt.py again") from None
    if request.action not in ACTIONS or request.on_clash not in ON_CLASH:
        raise AdoptionError(f"the request has {request.action!r} and {request.on_clash!r}, which this image lacks")
    return request


def _mapping(text: bytes, what: str) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except ValueError:
        raw = None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise AdoptionError(f"the {what} of the adoption is not of format {FORMAT}: run adopt.py again")
    return raw


_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_SPECIAL = re.compile(r"[\\\n\r\t]")


def escape(value: str | None) -> str:
    """One value for a line of a file of rows. NUL characters must have been removed."""
    if value is None:
        return "\\N"
    return _SPECIAL.sub(lambda found: _ESCAPES[found[0]], value)


_UNESCAPES = {"\\": "\\", "n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "v": "\v"}
_ESCAPED = re.compile(r"\\(x[0-9a-fA-F]{1,2}|[0-7]{1,3}|.)", re.DOTALL)


def unescape(field: str) -> str | None:
    """The value of a field in COPY's text format, which pg_dump also uses."""
    if field == "\\N":
        return None
    return _ESCAPED.sub(_unescaped, field) if "\\" in field else field


def _unescaped(found: re.Match[str]) -> str:
    text = found[1]
    if text[0] == "x" and len(text) > 1:
        return chr(int(text[1:], 16))
    return chr(int(text, 8)) if text.isdigit() else _UNESCAPES.get(text, text)
