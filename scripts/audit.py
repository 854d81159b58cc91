#!/usr/bin/env python3
"""List the packages of a baked image that have known vulnerabilities, and the versions that fix them.

Examples:
  audit.py                               the newest image baked on this machine
  audit.py build/bake/…/sbom.cdx.json    another image's bill of materials
  audit.py --fixed                       only vulnerabilities that a new bake can fix.

The script queries OSV (https://osv.dev) with package names and versions. OSV contains Debian's and Ubuntu's security
trackers and PyPI's advisories. The script omits vulnerabilities that Debian classifies as unimportant.

Exit status 0: no known vulnerability; 1: known vulnerabilities; 2: the query failed, with one sentence on stderr.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - this import restarts the script with the packages of .venv

# isort: split
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
"""The maximum number of queries that OSV accepts in one request."""
AT_ONCE = 8
SECONDS = 30
OURS = "mlflow-host"
"""The name of this project's Python package in the image. OSV is not queried for this package, because the package is
in no package index. If an index has a package with this name, it is a different package."""


class NotLookedUp(Exception):
    """A query to OSV failed. The exception's text is one sentence with the reason."""


@dataclass(frozen=True)
class Package:
    """A package with the name that OSV uses. For a package of a distribution, OSV uses the source package's name."""

    name: str
    version: str
    ecosystem: str


@dataclass(frozen=True)
class Vulnerability:
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
    parser.add_argument("bill", nargs="?", type=Path, help="bill of materials (default: the newest in build/bake)")
    parser.add_argument("--fixed", action="store_true", help="only vulnerabilities that a newer version fixes")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--database", default=DATABASE, metavar="URL", help="base URL of OSV's API or a mirror")
    return parser.parse_args(argv)


# The image


def newest_bill() -> Path:
    bills = sorted(BUILDS.glob("*/sbom.cdx.json"), key=lambda path: path.stat().st_mtime)
    if not bills:
        raise NotLookedUp(f"{BUILDS} has no bill of materials, because no image was baked here yet: name a file")
    return bills[-1]


def read_bill(path: Path) -> list[Package]:
    """The packages in the bill of materials of an image. Raises NotLookedUp."""
    try:
        components = json.loads(path.read_text(encoding="utf-8"))["components"]
        packages = {package_of(each["purl"]) for each in components if each["name"] != OURS}
    except OSError as error:
        raise NotLookedUp(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise NotLookedUp(f"{path} is not a bill of materials of an image of this project") from None
    return sorted(packages, key=lambda package: (package.ecosystem, package.name))


def package_of(url: str) -> Package:
    """The package that a package URL names. Raises ValueError if the URL's type is not pypi or deb."""
    found = re.fullmatch(r"pkg:(?:pypi|deb/(debian|ubuntu))/([^@?]+)@([^?]+)(?:\?(.*))?", url)
    if not found:
        raise ValueError(url)
    distribution, name, version = found[1], urllib.parse.unquote(found[2]), urllib.parse.unquote(found[3])
    if distribution is None:
        return Package(name, version, "PyPI")
    qualifiers = dict(urllib.parse.parse_qsl((found[4] or "").replace("+", "%2B")))
    release = qualifiers.get("distro", "").partition("-")[2]
    source, _, source_version = qualifiers.get("upstream", name).partition("@")
    return Package(source, source_version or version, ecosystem(distribution, release))


def ecosystem(distribution: str, release: str) -> str:
    """OSV's name for a distribution, such as Debian:12 or Ubuntu:24.04:LTS."""
    # Ubuntu's LTS releases are the April releases in even years.
    long_term = ":LTS" if distribution == "ubuntu" and re.fullmatch(r"\d[02468]\.04", release) else ""
    return f"{distribution.title()}:{release}{long_term}"


# The database


def look_up(packages: list[Package], database: str) -> dict[Package, list[dict[str, Any]]]:
    """OSV's records by package. Raises NotLookedUp."""
    known: dict[Package, list[str]] = {}
    waiting: list[tuple[Package, dict[str, Any]]] = [(package, query(package)) for package in packages]
    while waiting:
        asked, waiting = waiting[:QUERIES], waiting[QUERIES:]
        results = ask(f"{database}/v1/querybatch", {"queries": [wanted for _, wanted in asked]}).get("results", [])
        if len(results) != len(asked):
            raise NotLookedUp(f"nothing was looked up: the response of {database} is not in OSV's format")
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
        raise NotLookedUp(f"nothing was looked up: {where} is unreachable ({reason})") from None
    except (ValueError, TypeError):
        raise NotLookedUp(f"nothing was looked up: the response of {url} is not in OSV's format") from None


# Evaluation


def findings(package: Package, records: Iterable[dict[str, Any]]) -> list[Vulnerability]:
    """One finding per vulnerability of a package, even if several advisories describe the same vulnerability."""
    seen: set[str] = set()
    found = []
    # Records with fewer CVEs come first. An advisory for several CVEs is skipped if each CVE has a record of its own.
    for record in sorted(records, key=lambda record: (len(names_of(record)), record["id"])):
        names = names_of(record)
        if record.get("withdrawn") or unimportant(package, record) or names <= seen:
            continue
        seen |= names
        summary = record.get("summary") or record.get("details") or ""
        text = " ".join(summary.split())
        name = ", ".join(sorted(names))
        found.append(Vulnerability(package.name, package.version, name, fixed_in(package, record), text[:200]))
    return found


def names_of(record: Mapping[str, Any]) -> set[str]:
    """The CVEs of a record, or the record's own ID if it has no CVE."""
    names = [record["id"], *record.get("aliases", []), *record.get("upstream", [])]
    return {name for name in names if name.startswith("CVE-")} or {record["id"]}


def affected(package: Package, record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of a record's list `affected` that are about this package."""
    wanted = {"name": package.name, "ecosystem": package.ecosystem}
    return [each for each in record.get("affected", []) if wanted.items() <= each.get("package", {}).items()]


def unimportant(package: Package, record: Mapping[str, Any]) -> bool:
    parts = affected(package, record)
    return bool(parts) and all(each.get("ecosystem_specific", {}).get("urgency") == "unimportant" for each in parts)


def fixed_in(package: Package, record: Mapping[str, Any]) -> list[str]:
    """For each range of affected versions, the first version that contains the fix."""
    ranges = [each for part in affected(package, record) for each in part.get("ranges", []) if each["type"] != "GIT"]
    return [event["fixed"] for each in ranges for event in each["events"] if "fixed" in event]


def show(found: list[Vulnerability]) -> None:
    rows = [(f"{each.package} {each.version}", each.vulnerability, ", ".join(each.fixed_in) or "-") for each in found]
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    for row, each in zip(rows, found, strict=True):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + f"  {each.summary}")


if __name__ == "__main__":
    sys.exit(main())
