"""Find the runs, logged models and bucket paths that registered model versions use.

The source of a model version has different forms: `runs:/<run>/model`, `models:/m-<id>`,
`mlflow-artifacts:/<experiment>/…`, `s3://<bucket>/…`, or a URL of the server. Therefore every run ID, logged model ID
and path in any text of a model version counts as used.
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
    """A model version that is not deleted. `texts` are its values that can contain a run ID, a logged model ID or a
    path."""

    name: str
    version: int
    texts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


@dataclass(frozen=True)
class References:
    """For each used run ID, logged model ID and path: the name of one model version that uses it."""

    runs: Mapping[str, str]
    models: Mapping[str, str]
    paths: Mapping[str, str]

    def of_path(self, path: str) -> str | None:
        """A model version that uses `path`, a path below `path`, or a folder that contains `path`."""
        return next((version for known, version in self.paths.items() if overlap(known, path)), None)


def references(versions: Iterable[ModelVersion], source_runs: Mapping[str, str | None]) -> References:
    """Collect the references of all versions. `source_runs` maps the ID of a logged model to the ID of the run that
    created the model, or to None. A version that uses a run also uses all logged models of the run. A version that uses
    a logged model also uses the run that created the model."""
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
    """The path in a URI, relative to its bucket or server. None if the URI does not contain a path to files."""
    found = urlsplit(text)
    path = unquote(found.path)
    if found.scheme in ("http", "https"):
        proxied = _PROXY.match(path)
        return path[proxied.end() :].strip("/") if proxied else None
    return None if found.scheme in ("", "runs", "models") else path.strip("/")


def overlap(one: str, other: str) -> bool:
    """Whether two paths are equal, or one path contains the other path. The empty path is the whole bucket."""
    short, long = sorted((one.strip("/"), other.strip("/")), key=len)
    return not short or long == short or long.startswith(f"{short}/")
