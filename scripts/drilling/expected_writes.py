"""The data that each stop of a journey wrote, and the differences to the data that a later stop reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Sections = dict[str, dict[str, Any]]
"""Kind of object → ID → MLflow's data about it."""

Key = tuple[str, str]
"""(kind of object, ID)."""

LISTS_OF_LATEST = {"latest_version", "latest_versions"}
"""Fields of a registered model that repeat its versions."""

UNKNOWN_TO_OLDER = {"links"}
"""Lists that a server returns empty if it does not know them, although it keeps them: the links of a span, which
servers return since 3.13."""

NARROWEST = 5000
"""An older release may return a text cut to the width of its column. From this width on, that is not a loss: the kept
database has the whole text, and the next stop of the release that wrote it must return it."""


@dataclass(frozen=True)
class Touched:
    """Objects that earlier stops of the drill wrote and a later one changed or deleted on purpose."""

    changed: set[Key]
    deleted: set[Key]


@dataclass(frozen=True)
class Difference:
    """A difference. `problem`: "missing", "back" (it was deleted) or "changed"; `stop`: the stop that wrote it."""

    problem: str
    key: Key
    stop: int
    what: str = ""

    def __str__(self) -> str:
        of = f"{' '.join(self.key)} of stop {self.stop}"
        return {
            "missing": f"{of} is missing",
            "back": f"{of} was deleted and exists again",
            "changed": f"{of}: {self.what}",
        }[self.problem]


@dataclass
class ExpectedWrites:
    """`written`: for each stop, its release and the data read right after it wrote."""

    written: list[tuple[str, Sections]] = field(default_factory=list)
    changed: list[set[Key]] = field(default_factory=list)
    deleted: set[Key] = field(default_factory=set)

    def add(self, release: str, touched: Touched, read: Sections) -> set[Key]:
        """Add a stop's changes and the data after it. Returns the new keys."""
        before = self._existing()
        self.changed.append(touched.changed)
        self.deleted |= touched.deleted
        self.written.append((release, read))
        return {(section, key) for section, entries in read.items() for key in entries} - before

    def compare(self, release: str, now: Sections) -> list[Difference]:
        """Compare the data of all earlier stops with what `release` reads now, for the kinds that it supports."""
        found = []
        for number, (version, then) in enumerate(self.written):
            changed_since = set().union(*self.changed[number + 1 :])
            for section, entries in then.items():
                if section not in now:
                    continue
                for name, was in entries.items():
                    key = (section, name)
                    if key in self.deleted:
                        if name in now[section]:
                            found.append(Difference("back", key, number))
                    elif name not in now[section]:
                        found.append(Difference("missing", key, number))
                    elif key not in changed_since:
                        texts = differences(was, now[section][name], exact=version == release)
                        found += [Difference("changed", key, number, text) for text in texts]
        return found

    def supported(self, now: Sections) -> set[Key]:
        """Objects of earlier stops, not deleted, of the kinds in `now`."""
        return {key for key in self._existing() if key[0] in now}

    def unsupported(self, now: Sections) -> set[Key]:
        """Objects of earlier stops, not deleted, of kinds that the release that read `now` does not support."""
        return {key for key in self._existing() if key[0] not in now}

    def _existing(self) -> set[Key]:
        read = {(section, name) for _, then in self.written for section, entries in then.items() for name in entries}
        return read - self.deleted


def differences(was: Any, found: Any, *, exact: bool, path: str = "") -> list[str]:
    """Sentences about the differences of two values. Unless `exact`, fields that only one release has, lists that
    one does not know, and shortened texts do not count as differences."""
    if isinstance(was, dict) and isinstance(found, dict):
        only = sorted((set(was) ^ set(found)) - LISTS_OF_LATEST) if exact else []
        texts = [f"{path}/{key} exists only {'before' if key in was else 'now'}" for key in only]
        for key in sorted((set(was) & set(found)) - LISTS_OF_LATEST):
            if not exact and key in UNKNOWN_TO_OLDER and not (was[key] and found[key]):
                continue
            texts += differences(was[key], found[key], exact=exact, path=f"{path}/{key}")
        return texts
    if isinstance(was, list) and isinstance(found, list) and len(was) == len(found):
        return [
            text
            for place, (one, other) in enumerate(zip(was, found, strict=True))
            for text in differences(one, other, exact=exact, path=f"{path}[{place}]")
        ]
    if not exact and isinstance(was, str) and isinstance(found, str):
        cut = min(len(was), len(found))
        if cut >= NARROWEST:
            was, found = was[:cut], found[:cut]
    return [] if was == found else [f"{path} was {str(was)[:120]!r} and is {str(found)[:120]!r}"]


def leaves(answer: Any) -> int:
    """Number of single values in nested data."""
    if isinstance(answer, dict):
        return sum(map(leaves, answer.values()))
    return sum(map(leaves, answer)) if isinstance(answer, list) else 1
