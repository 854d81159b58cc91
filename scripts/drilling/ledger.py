"""What every stop of a journey wrote, and what of it a later stop no longer reads, or reads otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Sections = dict[str, dict[str, Any]]
"""Kind of thing → id → what MLflow answers about it."""

Key = tuple[str, str]
"""Kind of thing and its id."""

LISTS_OF_LATEST = {"latest_version", "latest_versions"}
"""What a registered model repeats of its versions."""

NARROWEST = 5000
"""An older release may show a text cut to the width of its column; from this width on that is no loss, as the whole
text waits in the kept database and must be back at the next stop of the release that wrote it."""


@dataclass(frozen=True)
class Touched:
    """What a stop changed or deleted, on purpose, of what earlier stops wrote."""

    changed: set[Key]
    deleted: set[Key]


@dataclass(frozen=True)
class Finding:
    """`problem` is "missing", "back" (though it was deleted) or "changed"; `stop` is the stop that had written it."""

    problem: str
    key: Key
    stop: int
    what: str = ""

    def __str__(self) -> str:
        of = f"{' '.join(self.key)} of stop {self.stop}"
        return {
            "missing": f"{of} is missing",
            "back": f"{of} was deleted and is back",
            "changed": f"{of}: {self.what}",
        }[self.problem]


@dataclass
class Ledger:
    """`written` is what was read right after each stop's writing, with the release that read it."""

    written: list[tuple[str, Sections]] = field(default_factory=list)
    changed: list[set[Key]] = field(default_factory=list)
    deleted: set[Key] = field(default_factory=set)

    def enter(self, release: str, touched: Touched, read: Sections) -> set[Key]:
        """Note what a stop did and what is there after it; answers with the keys that are new."""
        before = self._standing()
        self.changed.append(touched.changed)
        self.deleted |= touched.deleted
        self.written.append((release, read))
        return {(section, key) for section, entries in read.items() for key in entries} - before

    def compare(self, release: str, now: Sections) -> list[Finding]:
        """Everything that any earlier stop read against what `release` reads now, of the kinds that it knows."""
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
                            found.append(Finding("back", key, number))
                    elif name not in now[section]:
                        found.append(Finding("missing", key, number))
                    elif key not in changed_since:
                        told = differences(was, now[section][name], exact=version == release)
                        found += [Finding("changed", key, number, what) for what in told]
        return found

    def known(self, now: Sections) -> set[Key]:
        """What earlier stops wrote, and did not delete, of the kinds that `now` has."""
        return {key for key in self._standing() if key[0] in now}

    def waiting(self, now: Sections) -> set[Key]:
        """What earlier stops wrote and the release that reads `now` has no place for."""
        return {key for key in self._standing() if key[0] not in now}

    def _standing(self) -> set[Key]:
        read = {(section, name) for _, then in self.written for section, entries in then.items() for name in entries}
        return read - self.deleted


def differences(was: Any, found: Any, *, exact: bool, path: str = "") -> list[str]:
    """Where two answers differ; unless `exact`, fields that only one release has and cut texts do not count."""
    if isinstance(was, dict) and isinstance(found, dict):
        only = sorted((set(was) ^ set(found)) - LISTS_OF_LATEST) if exact else []
        told = [f"{path}/{key} is only {'before' if key in was else 'now'}" for key in only]
        for key in sorted((set(was) & set(found)) - LISTS_OF_LATEST):
            told += differences(was[key], found[key], exact=exact, path=f"{path}/{key}")
        return told
    if isinstance(was, list) and isinstance(found, list) and len(was) == len(found):
        return [
            told
            for place, (one, other) in enumerate(zip(was, found, strict=True))
            for told in differences(one, other, exact=exact, path=f"{path}[{place}]")
        ]
    if not exact and isinstance(was, str) and isinstance(found, str):
        cut = min(len(was), len(found))
        if cut >= NARROWEST:
            was, found = was[:cut], found[:cut]
    return [] if was == found else [f"{path} was {str(was)[:120]!r} and is {str(found)[:120]!r}"]


def leaves(answer: Any) -> int:
    """How many single values an answer is made of."""
    if isinstance(answer, dict):
        return sum(map(leaves, answer.values()))
    return sum(map(leaves, answer)) if isinstance(answer, list) else 1
