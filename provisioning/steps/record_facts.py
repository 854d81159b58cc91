#!/opt/mlflow/bin/python
"""Bake step: write facts about this image, such as the versions of the packages, to /usr/share/mlflow-host/image.json.
The step also writes a bill of materials for vulnerability scanners (sbom.cdx.json, CycloneDX 1.5).

The environment contains the facts that cannot be read from the image: IMAGE_VERSION, GIT_COMMIT, GIT_DIRTY, SOURCE_AMI
and SOURCE_AMI_NAME. Images and stacks of other releases read the keys of image.json (format 1). Therefore a new key may
be added, but a key must never be renamed.
"""

import json
import os
import platform
import re
import subprocess
import sys
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from packaging.requirements import Requirement

from mlflow_host.bake import fallbacks, mlflow_migrations
from mlflow_host.bake.fallbacks import Fallback
from mlflow_host.contract import launch
from mlflow_host.schema import release_worker

DESTINATION = Path("/usr/share/mlflow-host/image.json")
BILL = DESTINATION.with_name("sbom.cdx.json")


def output(*command: str) -> str:
    """The stdout of a command. Raises CalledProcessError when it fails."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def installed(*fields: str) -> list[list[str]]:
    """The values of the given dpkg-query fields for each installed distribution package."""
    form = "\t".join(f"${{{field}}}" for field in ("db:Status-Abbrev", *fields)) + "\n"
    rows = [line.split("\t") for line in output("dpkg-query", "--show", "--showformat", form).splitlines()]
    return [values for status, *values in rows if status.strip() in ("ii", "hi")]


def deb_packages() -> dict[str, str]:
    """The name and version of each installed distribution package."""
    return {row[0]: row[1] for row in installed("Package", "Version")}


def deb_sources() -> dict[str, tuple[str, str]]:
    """The source package of each installed package, with its version. Security trackers list only source packages."""
    fields = ("Package", "source:Package", "source:Version")
    return {name: (source, version) for name, source, version in installed(*fields)}


def python_packages() -> dict[str, str]:
    """The name and version of each Python package in the server's environment, including mlflow-host."""
    found = metadata.distributions()
    return dict(sorted((re.sub(r"[-_.]+", "-", each.name).lower(), each.version) for each in found))


def operating_system() -> str:
    """The distribution, such as "debian 12" or "ubuntu 24.04"."""
    release = platform.freedesktop_os_release()
    return f"{release['ID']} {release.get('VERSION_ID', 'testing')}"


def architecture() -> str:
    """EC2's name for the machine's architecture: "x86_64" or "arm64". The kernel's name for arm64 is aarch64."""
    return {"aarch64": "arm64"}.get(platform.machine(), platform.machine())


def companions() -> list[Fallback]:
    """Some packages must have the same version as MLflow. If the package index did not have this version of a package,
    the package is not installed, and this function returns a fallback."""
    named = [Requirement(line) for line in metadata.requires("mlflow") or () if "extra ==" not in line]
    own = [each for each in named if str(each.specifier) == f"=={metadata.version('mlflow')}"]
    present = python_packages()
    lacking = [f"{each.name} {metadata.version('mlflow')}" for each in own if each.name not in present]
    what = f"{' and '.join(lacking)}: the package mlflow contains the same modules"
    why = "the index did not have them; the requirements of their newest release are installed (requirements.lock)"
    return [Fallback(what, why)] if lacking else []


def migrations() -> tuple[str, int]:
    """The head of MLflow's migrations, and the number of migrations.

    A newer release has all migrations of an older release, so images can be sorted by the number of migrations.
    Migrations on merged branches are counted too. If there is more than one head, images cannot be sorted by this
    number, and the bake fails.
    """
    chain = mlflow_migrations.directory()
    heads = chain.get_heads()
    if len(heads) != 1:
        raise SystemExit(
            f"record_facts: MLflow's migrations have {len(heads)} heads ({', '.join(heads)}); one is needed"
        )
    return heads[0], len(list(chain.walk_revisions()))


def tables(sql: str) -> dict[str, list[str]]:
    """The columns of each table in an SQL schema that pg_dump or pg_restore printed."""
    found = {}
    for name, body in re.findall(r"^CREATE TABLE (?:\w+\.)?(\S+) \(\n(.*?)^\)", sql, re.MULTILINE | re.DOTALL):
        lines = (re.match(r'    ("[^"]+"|\w+) ', line) for line in body.splitlines())
        found[name.strip('"')] = [line[1].strip('"') for line in lines if line and line[1] != "CONSTRAINT"]
    return dict(sorted(found.items()))


def empty_database() -> str:
    """The SQL of this image's database schema, from the file blank.dump, which install_rootfs.sh wrote."""
    (program,) = Path("/usr/lib/postgresql").glob("*/bin/pg_restore")
    return output(str(program), "--schema-only", "--file=-", str(DESTINATION.with_name("blank.dump")))


def disk_used_mib() -> int:
    """The used space of the root file system in MiB. The image's snapshot has about this size."""
    space = os.statvfs("/")
    return (space.f_blocks - space.f_bfree) * space.f_frsize // 2**20


def postgresql_major(packages: dict[str, str]) -> int:
    """The major version of the installed PostgreSQL server. There must be exactly one."""
    majors = [int(m[1]) for name in packages if (m := re.fullmatch(r"postgresql-(\d+)", name))]
    if len(majors) != 1:
        raise SystemExit(f"record_facts: the image must have exactly one PostgreSQL server; found {majors or 'none'}")
    return majors[0]


def facts() -> dict[str, Any]:
    """The content of image.json."""
    packages = deb_packages()
    head, count = migrations()
    fallbacks.record("record_facts", companions())
    nginx = subprocess.run(["nginx", "-v"], check=True, capture_output=True, text=True).stderr
    return {
        "format": 1,
        "image_version": os.environ["IMAGE_VERSION"],
        "git_commit": os.environ["GIT_COMMIT"],
        "git_dirty": os.environ["GIT_DIRTY"] != "false",
        "source_ami": os.environ["SOURCE_AMI"],
        "source_ami_name": os.environ["SOURCE_AMI_NAME"],
        "architecture": architecture(),
        "os": operating_system(),
        "mlflow_version": metadata.version("mlflow"),
        "migration_head": head,
        "migration_count": count,
        "postgresql_major": postgresql_major(packages),
        "launch_revision": launch.REVISION,
        "fallbacks": fallbacks.recorded(),
        "python_version": platform.python_version(),
        "nginx_version": nginx.strip().partition("/")[2].split(" ")[0],
        "disk_used_mib": disk_used_mib(),
        "packages": {"deb": packages, "python": python_packages()},
        # The source package's name and version, if the package's own name or version is different. Security trackers
        # list vulnerabilities by source package.
        "sources": {
            name: [source, version]
            for name, (source, version) in deb_sources().items()
            if (source, version) != (name, packages.get(name))
        },
        "migrations": mlflow_migrations.titles(),
        "tables": tables(empty_database()),
        "enumerations": release_worker.enumerations(),
    }


def bill_of_materials(image: dict[str, Any], sources: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """The packages of image.json in CycloneDX format, with package URLs."""
    distribution, _, release = image["os"].partition(" ")

    def suffix(name: str, version: str) -> str:
        source, its = sources.get(name, (name, version))
        # By convention, the source version is given only if it differs from the package version.
        upstream = "" if (source, its) == (name, version) else "&upstream=" + quote(source)
        return f"?distro={distribution}-{release}{upstream}{'%40' + quote(its) if its != version else ''}"

    packages = [
        *((name, version, f"pkg:deb/{distribution}/{quote(name)}@{quote(version)}{suffix(name, version)}")
          for name, version in image["packages"]["deb"].items()),
        *((name, version, f"pkg:pypi/{quote(name)}@{quote(version)}")
          for name, version in image["packages"]["python"].items()),
    ]  # fmt: skip
    version, identity = image["image_version"], f"mlflow-ami:{image['image_version']}:{image['git_commit']}"
    described = {"type": "application", "bom-ref": "image", "name": "mlflow-ami", "version": version}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, identity)}",
        "version": 1,
        "metadata": {"component": described},
        "components": [
            {"type": "library", "bom-ref": url, "name": name, "version": version, "purl": url}
            for name, version, url in packages
        ],
    }


def main() -> int:
    DESTINATION.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    image = facts()
    for path, content in ((DESTINATION, image), (BILL, bill_of_materials(image, deb_sources()))):
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        path.chmod(0o644)
        print(f"record_facts: {path}, {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
