#!/usr/bin/env python3
"""Lists the packages of a baked image that have known vulnerabilities, and in which version each is fixed.

  audit.py                               the image that was baked here last
  audit.py build/bake/…/sbom.cdx.json    another one's bill of materials
  audit.py --fixed                       only what baking anew can mend

Asked is OSV (https://osv.dev), which holds Debian's and Ubuntu's security trackers and PyPI's advisories; it is told
names and versions of packages, and nothing else. What Debian calls unimportant is left out.

Exit status: 0 nothing is known, 1 something is, 2 it could not be looked up, said in a sentence.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BUILDS = Path(__file__).resolve().parent.parent / "build" / "bake"
DATABASE = "https://api.osv.dev"
QUERIES = 1000
"""As many as one request may hold."""
AT_ONCE = 8
SECONDS = 30
OURS = "mlflow-host"
"""The boot package, which no index has; one of that name would be a stranger's."""


class NotLookedUp(Exception):
    """Whether anything is known about the image could not be found out; says why in a sentence."""


@dataclass(frozen=True)
class Package:
    """A package as the database knows it: a distribution's by its source."""

    name: str
    version: str
    ecosystem: str


@dataclass(frozen=True)
class Finding:
    package: str
    version: str
    vulnerability: str
    fixed_in: list[str]
    summary: str


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    try:
        bill = arguments.bill or newest_bill()
        packages = read_bill(bill)
        found = [
            finding
            for package, records in look_up(packages, arguments.database.rstrip("/")).items()
            for finding in findings(package, records)
            if finding.fixed_in or not arguments.fixed
        ]
    except NotLookedUp as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if arguments.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
    else:
        show(found)
    concerned = len({each.package for each in found})
    print(f"audit: {concerned} of {len(packages)} packages have {len(found)} known vulnerabilities", file=sys.stderr)
    return 1 if found else 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="audit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bill", nargs="?", type=Path, help="a bill of materials; default: the newest in build/bake")
    parser.add_argument("--fixed", action="store_true", help="only vulnerabilities that a newer version has not")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--database", default=DATABASE, metavar="URL", help="a mirror of OSV's API")
    return parser.parse_args(argv)


# The image


def newest_bill() -> Path:
    bills = sorted(BUILDS.glob("*/sbom.cdx.json"), key=lambda path: path.stat().st_mtime)
    if not bills:
        raise NotLookedUp(f"no image was baked here yet, so {BUILDS} has no bill of materials: name one")
    return bills[-1]


def read_bill(path: Path) -> list[Package]:
    """The packages in a bill of ours. Raises NotLookedUp."""
    try:
        components = json.loads(path.read_text(encoding="utf-8"))["components"]
        packages = {package_of(each["purl"]) for each in components if each["name"] != OURS}
    except OSError as error:
        raise NotLookedUp(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise NotLookedUp(f"{path} is not a bill of materials of an image of ours") from None
    return sorted(packages, key=lambda package: (package.ecosystem, package.name))


def package_of(url: str) -> Package:
    """What a package URL names. Raises ValueError for one of another kind than our bills hold."""
    found = re.fullmatch(r"pkg:(?:pypi|deb/(debian|ubuntu))/([^@?]+)@([^?]+)(?:\?(.*))?", url)
    if not found:
        raise ValueError(url)
    distribution, name, version = found[1], urllib.parse.unquote(found[2]), urllib.parse.unquote(found[3])
    if distribution is None:
        return Package(name, version, "PyPI")
    qualifiers = dict(urllib.parse.parse_qsl((found[4] or "").replace("+", "%2B")))
    release = qualifiers.get("distro", "").partition("-")[2]
    source, _, source_version = qualifiers.get("upstream", name).partition("@")
    # Every second year's first release of Ubuntu.
    long_term = ":LTS" if distribution == "ubuntu" and re.fullmatch(r"\d[02468]\.04", release) else ""
    return Package(source, source_version or version, f"{distribution.title()}:{release}{long_term}")


# The database


def look_up(packages: list[Package], database: str) -> dict[Package, list[dict[str, Any]]]:
    """What is known about each package, as OSV's records. Raises NotLookedUp."""
    known: dict[Package, list[str]] = {}
    waiting: list[tuple[Package, dict[str, Any]]] = [(package, query(package)) for package in packages]
    while waiting:
        asked, waiting = waiting[:QUERIES], waiting[QUERIES:]
        results = ask(f"{database}/v1/querybatch", {"queries": [wanted for _, wanted in asked]}).get("results", [])
        if len(results) != len(asked):
            raise NotLookedUp(f"nothing was looked up, for {database} does not answer as OSV does")
        for (package, wanted), result in zip(asked, results, strict=True):
            known.setdefault(package, []).extend(each["id"] for each in result.get("vulns", []))
            if page := result.get("next_page_token"):
                waiting.append((package, {**wanted, "page_token": page}))
    names = sorted({name for found in known.values() for name in found})
    with ThreadPoolExecutor(AT_ONCE) as pool:
        urls = (f"{database}/v1/vulns/{urllib.parse.quote(name)}" for name in names)
        records = dict(zip(names, pool.map(ask, urls), strict=True))
    return {package: [records[name] for name in found] for package, found in known.items() if found}


def query(package: Package) -> dict[str, Any]:
    return {"package": {"name": package.name, "ecosystem": package.ecosystem}, "version": package.version}


def ask(url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One request. Raises NotLookedUp."""
    content = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return dict(json.load(answer))
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        where = urllib.parse.urlsplit(url).netloc
        raise NotLookedUp(f"nothing was looked up, for {where} cannot be asked from here ({reason})") from None
    except (ValueError, TypeError):
        raise NotLookedUp(f"nothing was looked up, for {url} does not answer as OSV does") from None


# What it means


def findings(package: Package, records: Iterable[dict[str, Any]]) -> list[Finding]:
    """A finding for each vulnerability of a package, also where several advisories tell of it."""
    told: set[str] = set()
    found = []
    # An advisory for several vulnerabilities adds nothing where each has a record of its own.
    for record in sorted(records, key=lambda record: (len(names_of(record)), record["id"])):
        names = names_of(record)
        if record.get("withdrawn") or unimportant(package, record) or names <= told:
            continue
        told |= names
        summary = record.get("summary") or record.get("details") or ""
        text = " ".join(summary.split())
        name = ", ".join(sorted(names))
        found.append(Finding(package.name, package.version, name, fixed_in(package, record), text[:200]))
    return found


def names_of(record: Mapping[str, Any]) -> set[str]:
    """The CVEs that a record is about; its own name where it is about none."""
    names = [record["id"], *record.get("aliases", []), *record.get("upstream", [])]
    return {name for name in names if name.startswith("CVE-")} or {record["id"]}


def affected(package: Package, record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of a record that are about this package."""
    wanted = {"name": package.name, "ecosystem": package.ecosystem}
    return [each for each in record.get("affected", []) if wanted.items() <= each.get("package", {}).items()]


def unimportant(package: Package, record: Mapping[str, Any]) -> bool:
    parts = affected(package, record)
    return bool(parts) and all(each.get("ecosystem_specific", {}).get("urgency") == "unimportant" for each in parts)


def fixed_in(package: Package, record: Mapping[str, Any]) -> list[str]:
    """The versions that end each range of affected ones."""
    ranges = [each for part in affected(package, record) for each in part.get("ranges", []) if each["type"] != "GIT"]
    return [event["fixed"] for each in ranges for event in each["events"] if "fixed" in event]


def show(found: list[Finding]) -> None:
    rows = [(f"{each.package} {each.version}", each.vulnerability, ", ".join(each.fixed_in) or "-") for each in found]
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    for row, each in zip(rows, found, strict=True):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + f"  {each.summary}")


if __name__ == "__main__":
    sys.exit(main())
