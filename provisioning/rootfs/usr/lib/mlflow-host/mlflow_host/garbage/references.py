"""The runs, logged models and bucket paths that registered model versions use.

Clients name a version's source in different ways: `runs:/<run>/model`, `models:/m-<id>`,
`mlflow-artifacts:/<experiment>/…`, `s3://<bucket>/…`, a URL of the server. Therefore every run ID, every logged model
ID and every path in any text of a version counts as used.
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
class ModelVersion:
    """A model version that is not deleted; `texts` are all its values that may name a run, a model or a path."""

    name: str
    version: int
    texts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


@dataclass(frozen=True)
class References:
    """A version that uses it, by run ID, by logged model ID and by path."""

    runs: Mapping[str, str]
    models: Mapping[str, str]
    paths: Mapping[str, str]

    def of_path(self, path: str) -> str | None:
        """A version that uses `path`, a path below it, or a folder that contains it."""
        return next((version for known, version in self.paths.items() if overlap(known, path)), None)


def references(versions: Iterable[ModelVersion], source_runs: Mapping[str, str | None]) -> References:
    """`source_runs`: run ID by logged model ID, None without a run. A version that uses a run also uses all logged
    models of that run; a version that uses a logged model also uses its run."""
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
    """The path in the bucket that a URI names, for any bucket or server; None for a URI that names no files."""
    found = urlsplit(text)
    path = unquote(found.path)
    if found.scheme in ("http", "https"):
        proxied = _PROXY.match(path)
        return path[proxied.end() :].strip("/") if proxied else None
    return None if found.scheme in ("", "runs", "models") else path.strip("/")


def overlap(one: str, other: str) -> bool:
    """Whether the paths are equal or one contains the other. The empty path is the whole bucket."""
    short, long = sorted((one.strip("/"), other.strip("/")), key=len)
    return not short or long == short or long.startswith(f"{short}/")
