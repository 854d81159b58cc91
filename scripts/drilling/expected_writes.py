"""Compare the data that each stop of a drill wrote with the data that a later stop reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Sections = dict[str, dict[str, Any]]
"""The keys are the kinds of objects. Each value is a dict from an object's ID to MLflow's data about the object."""

Key = tuple[str, str]
"""The kind and the ID of an object, as a pair."""

LISTS_OF_LATEST = {"latest_version", "latest_versions"}
"""Fields of a registered model that repeat the data of its versions."""

UNKNOWN_TO_OLDER = {"links"}
"""Fields with a list that an older server stores, but returns empty. Servers return the links of spans from MLflow 3.13
on."""

NARROWEST = 5000
"""If another release returns at least this number of a text's characters, the text is not lost. An older release may
have a narrower column for the text. The kept database has the whole text, and the next stop with the release that wrote
the text must return the whole text."""


@dataclass(frozen=True)
class Touched:
    """Objects of earlier stops that a later stop of the drill changed or deleted on purpose."""

    changed: set[Key]
    deleted: set[Key]


@dataclass(frozen=True)
class Difference:
    """A difference. `problem` is "missing", "changed", or "back" if a deleted object exists again. `stop` is the number
    of the stop that wrote the object."""

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
    """The data of all stops. `written` has the release of each stop, and all data that was read after the stop's
    writes."""

    written: list[tuple[str, Sections]] = field(default_factory=list)
    changed: list[set[Key]] = field(default_factory=list)
    deleted: set[Key] = field(default_factory=set)

    def add(self, release: str, touched: Touched, read: Sections) -> set[Key]:
        """Add the changes of a stop, and the data that was read after the changes. Returns the new keys."""
        before = self._existing()
        self.changed.append(touched.changed)
        self.deleted |= touched.deleted
        self.written.append((release, read))
        return {(section, key) for section, entries in read.items() for key in entries} - before

    def compare(self, release: str, now: Sections) -> list[Difference]:
        """Compare the data of all earlier stops with `now`, the data that the server of this release returns. Only the
        kinds of objects that `release` supports are compared."""
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
        """The existing objects of earlier stops whose kinds the release supports. Supported kinds are keys of `now`."""
        return {key for key in self._existing() if key[0] in now}

    def unsupported(self, now: Sections) -> set[Key]:
        """The existing objects of earlier stops whose kinds the release does not support. Supported kinds are keys of
        `now`."""
        return {key for key in self._existing() if key[0] not in now}

    def _existing(self) -> set[Key]:
        read = {(section, name) for _, then in self.written for section, entries in then.items() for name in entries}
        return read - self.deleted


def differences(was: Any, found: Any, *, exact: bool, path: str = "") -> list[str]:
    """Describe each difference between two values in a sentence. If `exact` is false, three differences are ignored:
    fields that only one release has, empty lists named in UNKNOWN_TO_OLDER, and texts that one release has cut."""
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
    """The number of single values in nested lists and dicts."""
    if isinstance(answer, dict):
        return sum(map(leaves, answer.values()))
    return sum(map(leaves, answer)) if isinstance(answer, list) else 1
