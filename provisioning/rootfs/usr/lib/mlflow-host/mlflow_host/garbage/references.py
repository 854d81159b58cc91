"""What registered model versions stand on: runs, logged models and places in the buckets.

A version names its source in whatever way its client chose: `runs:/<run>/model`, `models:/m-<id>`,
`mlflow-artifacts:/<experiment>/…`, `s3://<bucket>/…`, an address of the server. So whatever looks like the ID of a run
or of a logged model in any of its texts counts, and so does every path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

_RUN = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_MODEL = re.compile(r"m-[0-9a-f]{32}(?![0-9a-f])")
_PROXY = re.compile(r".*/(?:ajax-)?api/2\.0/mlflow-artifacts/artifacts/")


@dataclass(frozen=True)
class Version:
    """A version that was not deleted itself; `texts` are all of its values that may name what it stands on."""

    name: str
    version: int
    texts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


@dataclass(frozen=True)
class References:
    """By ID or by path, the versions that stand on it."""

    runs: Mapping[str, str]
    models: Mapping[str, str]
    paths: Mapping[str, str]

    def of_path(self, path: str) -> str | None:
        """A version that stands on what is at `path`, below it, or around it."""
        return next((version for known, version in self.paths.items() if overlap(known, path)), None)


def references(versions: Iterable[Version], source_runs: Mapping[str, str | None]) -> References:
    """`source_runs` has the run of every logged model, None where it has none. A version of a run's model may mean any
    of the logged models of that run, and a version of a logged model comes from that model's run."""
    runs: dict[str, str] = {}
    models: dict[str, str] = {}
    paths: dict[str, str] = {}
    for version in versions:
        for text in version.texts:
            for model in _MODEL.findall(text):
                models.setdefault(model, str(version))
            for run in _RUN.findall(_MODEL.sub("", text)):
                runs.setdefault(run, str(version))
            if (path := path_of(text)) is not None:
                paths.setdefault(path, str(version))
    for model, name in tuple(models.items()):
        if run := source_runs.get(model):
            runs.setdefault(run, name)
    for model, run in source_runs.items():
        if run in runs:
            models.setdefault(model, runs[run])
    return References(runs, models, paths)


def path_of(text: str) -> str | None:
    """Where in a bucket an address points, whatever bucket or server it names; None for what is no address of files."""
    found = urlsplit(text)
    path = unquote(found.path)
    if found.scheme in ("http", "https"):
        proxied = _PROXY.match(path)
        return path[proxied.end() :].strip("/") if proxied else None
    return None if found.scheme in ("", "runs", "models") else path.strip("/")


def overlap(one: str, other: str) -> bool:
    """Whether one path is the other, or lies within it. The empty path is the whole bucket."""
    short, long = sorted((one.strip("/"), other.strip("/")), key=len)
    return not short or long == short or long.startswith(f"{short}/")
