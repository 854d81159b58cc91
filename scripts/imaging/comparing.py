"""Command `diff` of scripts/images.py: the changes of data, packages and settings from one image to another image."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mlflow_host.contract import launch
from scripts import audit
from scripts.imaging.ec2_images import Image
from scripts.imaging.list_and_show import used_mib

SETTINGS = Path(__file__).resolve().parents[2] / "infra" / "Pulumi.yaml"
COMPARED = ("mlflow-version", "postgresql-major", "os", "architecture", "python-version", "launch-revision")
SHOWN = 40
"""The maximum number of packages of one kind, and of vulnerabilities, that the text output lists."""

Facts = Mapping[str, Any]


def diff(a: Image, b: Image, a_facts: Facts | None, b_facts: Facts | None, database: str | None) -> dict[str, Any]:
    """The differences between two images, as the JSON document of `diff`. `a_facts` and `b_facts` come from the images'
    records; None means that the image has no record. If `database`, OSV's URL, is None, OSV is not queried."""
    old, new = a_facts or {}, b_facts or {}
    return {
        "from": about(a),
        "to": about(b),
        "changed": {name: [a.fact(name), b.fact(name)] for name in COMPARED if a.fact(name) != b.fact(name)},
        "same_architecture": a.architecture == b.architecture,
        "schema": schema(a, b, old, new),
        "packages": {
            kind: packages(old["packages"].get(kind, {}), new["packages"].get(kind, {})) for kind in ("deb", "python")
        }
        if old and new
        else None,
        "vulnerabilities": vulnerabilities(old, new, database),
        "launch": launch_keys(a, b),
        "fallbacks": {
            "gone": [each for each in a.fallbacks if each not in b.fallbacks],
            "new": [each for each in b.fallbacks if each not in a.fallbacks],
        },
        "used_mib": [used_mib(a), used_mib(b)],
        "unknown": [image.id for image, facts in ((a, a_facts), (b, b_facts)) if facts is None],
    }


def about(image: Image) -> dict[str, str]:
    names = (
        "image-version",
        "git-commit",
        "os",
        "architecture",
        "mlflow-version",
        "migration-head",
        "migration-count",
        "postgresql-major",
    )
    return {"id": image.id, "name": image.name} | {name.replace("-", "_"): image.fact(name) for name in names}


def schema(a: Image, b: Image, old: Facts, new: Facts) -> dict[str, Any]:
    """The changes of the database schema, and the data that a rollback to `a` would leave in the kept database."""
    heads = [a.fact("migration-head"), b.fact("migration-head")]
    known = "tables" in old and "tables" in new
    before, after = dict(old.get("tables", {})), dict(new.get("tables", {}))
    there = {each["revision"] for each in old.get("migrations", [])}
    then = {each["revision"] for each in new.get("migrations", [])}
    added, removed = columns(before, after), columns(after, before)
    return {
        "heads": heads,
        "direction": direction(a, b),
        "known": known,
        "migrations": {
            "applied": [each for each in new.get("migrations", []) if known and each["revision"] not in there],
            "taken_back": [each for each in old.get("migrations", []) if known and each["revision"] not in then],
        },
        "tables": {
            "added": sorted(after.keys() - before.keys()) if known else [],
            "removed": sorted(before.keys() - after.keys()) if known else [],
        },
        "columns": {"added": added if known else {}, "removed": removed if known else {}},
        "waiting_after_rollback": {
            "tables": sorted(after.keys() - before.keys()) if known else [],
            "columns": added if known else {},
            "values": columns(old.get("enumerations", {}), new.get("enumerations", {})),
        },
    }


def direction(a: Image, b: Image) -> str:
    """The kind of the change from `a` to `b`: "upgrade", "rollback" or "same"."""
    counts = [int(text) if (text := image.fact("migration-count")).isdigit() else 0 for image in (a, b)]
    if a.fact("migration-head") == b.fact("migration-head"):
        return "same"
    return "upgrade" if counts[1] > counts[0] else "rollback"


def columns(before: Mapping[str, list[str]], after: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The columns that are only in `after`, for the tables that are in both schemas. The function can also compare the
    values of enumerations; then the keys are columns and not tables."""
    more = {table: [each for each in after[table] if each not in before[table]] for table in after if table in before}
    return {table: names for table, names in sorted(more.items()) if names}


def packages(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    return {
        "added": {name: after[name] for name in sorted(after.keys() - before.keys())},
        "removed": {name: before[name] for name in sorted(before.keys() - after.keys())},
        "changed": {
            name: [before[name], after[name]]
            for name in sorted(before.keys() & after.keys())
            if before[name] != after[name]
        },
    }


def vulnerabilities(old: Facts, new: Facts, database: str | None) -> dict[str, Any]:
    """The known vulnerabilities that only one of the images has, from OSV. The result is {"unknown": reason} if OSV
    cannot be queried."""
    if database is None:
        return {"unknown": "they were not looked up (--no-vulnerabilities)"}
    if not old.get("packages") or not new.get("packages"):
        return {"unknown": "the packages of one image are not recorded"}
    try:
        sides = [installed(old), installed(new)]
        records = audit.look_up(sorted({*sides[0], *sides[1]}, key=lambda each: (each.ecosystem, each.name)), database)
    except audit.NotLookedUp as error:
        return {"unknown": str(error)}
    found = [
        {
            (finding.package, finding.vulnerability): finding
            for package in side
            for finding in audit.findings(package, records.get(package, []))
        }
        for side in sides
    ]
    before, after = found
    return {
        "gone": [dataclasses.asdict(before[key]) for key in sorted(before.keys() - after.keys())],
        "new": [dataclasses.asdict(after[key]) for key in sorted(after.keys() - before.keys())],
        "both": len(before.keys() & after.keys()),
    }


def installed(facts: Facts) -> set[audit.Package]:
    """The packages of an image with the names that OSV uses: for a distribution, the names of the source packages."""
    distribution, _, release = str(facts["os"]).partition(" ")
    ecosystem = audit.ecosystem(distribution, release)
    found = set()
    for name, version in facts["packages"]["deb"].items():
        source, source_version = facts.get("sources", {}).get(name, (name, version))
        found.add(audit.Package(source, source_version, ecosystem))
    python = facts["packages"]["python"].items()
    return found | {audit.Package(name, version, "PyPI") for name, version in python if name != audit.OURS}


def launch_keys(a: Image, b: Image) -> dict[str, Any]:
    """The keys of the launch document that only one of the two images reads, and the settings that write these keys."""
    revisions = [int(text) if (text := image.fact("launch-revision")).isdigit() else 1 for image in (a, b)]
    known = keys()
    added = [name for name, since in known.items() if revisions[0] < since <= revisions[1]]
    removed = [name for name, since in known.items() if revisions[1] < since <= revisions[0]]
    return {
        "revisions": revisions,
        "added": added,
        "removed": removed,
        "settings_gained": settings_of(added),
        "settings_ignored": settings_of(removed),
        "newer_than_this_checkout": max(revisions) > launch.REVISION,
    }


def keys() -> dict[str, int]:
    """A dict from each key of the launch document, as table.key, to the revision that added the key."""
    types = typing.get_type_hints(launch.LaunchDocument)
    return {
        f"{table.name}.{key.name}": int(key.metadata["since"])
        for table in dataclasses.fields(launch.LaunchDocument)
        if dataclasses.is_dataclass(types[table.name])
        for key in dataclasses.fields(types[table.name])
        if "since" in key.metadata
    }


def settings_of(names: Iterable[str]) -> list[str]:
    """The stack's settings that write these keys of the launch document. The name of a setting consists of the key, or
    of the table and the key."""
    declared = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))["config"]
    tried = [(camel(name.partition(".")[2]), camel(name.replace(".", "_"))) for name in names]
    return [next(each for each in pair if each in declared) for pair in tried if set(pair) & declared.keys()]


def camel(name: str) -> str:
    return re.sub(r"_(\w)", lambda match: match[1].upper(), name)


# Text


def describe(found: Mapping[str, Any]) -> str:
    """The JSON document of `diff` as readable text."""
    a, b = found["from"], found["to"]
    lines = [
        f"{a['id']} → {b['id']}",
        f"  MLflow       {a['mlflow_version']} → {b['mlflow_version']}",
        f"  PostgreSQL   {a['postgresql_major']} → {b['postgresql_major']}"
        + ("" if a["postgresql_major"] == b["postgresql_major"] else ", by dump and restore only"),
        f"  image        {a['image_version']} → {b['image_version']}",
    ]
    lines += [
        f"  {name:<11}  {old} → {new}"
        for name, (old, new) in found["changed"].items()
        if name not in ("mlflow-version", "postgresql-major")
    ]
    if not found["same_architecture"]:
        lines.append("  A stack that changes from one to the other, or rolls back, also needs another instanceType.")
    lines += [*schema_lines(found["schema"]), *package_lines(found["packages"])]
    lines += [*vulnerability_lines(found["vulnerabilities"]), *launch_lines(found["launch"])]
    lines += [f"  {word} without  {what}" for word in ("gone", "new") for what in found["fallbacks"][word]]
    sizes = [f"{each} MiB" if each else "unknown" for each in found["used_mib"]]
    lines.append(f"Size: {sizes[0]} → {sizes[1]}")
    for image in found["unknown"]:
        lines.append(f"{image} has no record of its packages and tables: it was baked before records existed.")
    return "\n".join(lines)


def schema_lines(schema: Mapping[str, Any]) -> list[str]:
    heads = schema["heads"]
    if schema["direction"] == "same":
        return [f"Schema: unchanged, {heads[0]}; no migration, and a rollback leaves no data in the kept database"]
    lines = [f"Schema: {schema['direction']} {heads[0]} → {heads[1]}"]
    if not schema["known"]:
        return [*lines, "  the changes of tables and columns are not recorded"]
    for word, verb in (("applied", "apply"), ("taken_back", "take back")):
        lines += [f"  {verb} {each['revision']}  {each['title']}" for each in schema["migrations"][word]]
    for word, sign in (("added", "+"), ("removed", "-")):
        lines += [f"  {sign} table {table}" for table in schema["tables"][word]]
        lines += [
            f"  {sign} column {table}.{name}" for table, names in schema["columns"][word].items() for name in names
        ]
    waiting = schema["waiting_after_rollback"]
    kept = [*waiting["tables"], *(f"{table}.{name}" for table, names in waiting["columns"].items() for name in names)]
    kept += [f"rows with {column} {', '.join(values)}" for column, values in waiting["values"].items()]
    lines.append(f"  A rollback leaves in the kept database: {', '.join(kept) or 'nothing'}")
    return lines


def package_lines(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["Packages: not recorded"]
    lines = []
    for kind, title in (("deb", "Distribution packages"), ("python", "Python packages")):
        each = found[kind]
        lines.append(
            f"{title}: {len(each['added'])} added, {len(each['removed'])} removed, {len(each['changed'])} changed"
        )
        rows = [f"  + {name} {version}" for name, version in each["added"].items()]
        rows += [f"  - {name} {version}" for name, version in each["removed"].items()]
        rows += [f"    {name} {old} → {new}" for name, (old, new) in each["changed"].items()]
        lines += cut(rows)
    return lines


def vulnerability_lines(found: Mapping[str, Any]) -> list[str]:
    if "unknown" in found:
        return [f"Known vulnerabilities: unknown, because {found['unknown']}"]
    head = f"Known vulnerabilities: {len(found['gone'])} gone, {len(found['new'])} new, {found['both']} in both"
    rows = [
        f"  {sign} {each['package']} {each['version']}  {each['vulnerability']}  {each['summary'][:80]}".rstrip()
        for word, sign in (("new", "+"), ("gone", "-"))
        for each in found[word]
    ]
    return [head, *cut(rows)]


def launch_lines(found: Mapping[str, Any]) -> list[str]:
    old, new = found["revisions"]
    if old == new:
        return []
    lines = [f"Launch document: revision {old} → {new}"]
    lines += [f"  + {name}" for name in found["added"]] + [f"  - {name}" for name in found["removed"]]
    if found["settings_gained"]:
        lines.append(f"  settings that take effect: {', '.join(found['settings_gained'])}")
    if found["settings_ignored"]:
        lines.append(f"  settings that are ignored: {', '.join(found['settings_ignored'])}")
    if found["newer_than_this_checkout"]:
        lines.append("  one image is newer than this checkout, so the list of its keys is incomplete")
    return lines


def cut(rows: list[str]) -> list[str]:
    more = len(rows) - SHOWN
    return rows if more <= 0 else [*rows[:SHOWN], f"  … and {more} more (--json has all)"]
