#!/opt/mlflow/bin/python
"""Writes /usr/share/mlflow-host/image.json: what this image is, read back from what is installed in it. Beside it the
same packages as a bill of materials (sbom.cdx.json, CycloneDX 1.5), for programs that look for vulnerabilities.

Only what the image cannot know about itself comes from the environment: IMAGE_VERSION, GIT_COMMIT, GIT_DIRTY,
SOURCE_AMI and SOURCE_AMI_NAME. The keys are a contract with images and stacks of other ages (format 1): they are added
to, never renamed.
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

from alembic.config import Config
from alembic.script import ScriptDirectory
from mlflow_host import launch

DESTINATION = Path("/usr/share/mlflow-host/image.json")
BILL = DESTINATION.with_name("sbom.cdx.json")


def output(*command: str) -> str:
    """What a command says on stdout; CalledProcessError when it fails."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def installed(*fields: str) -> list[list[str]]:
    """Those fields of every installed distribution package, as dpkg-query names them."""
    form = "\t".join(f"${{{field}}}" for field in ("db:Status-Abbrev", *fields)) + "\n"
    rows = [line.split("\t") for line in output("dpkg-query", "--show", "--showformat", form).splitlines()]
    return [values for status, *values in rows if status.strip() in ("ii", "hi")]


def deb_packages() -> dict[str, str]:
    """Name and version of every installed distribution package."""
    return {row[0]: row[1] for row in installed("Package", "Version")}


def deb_sources() -> dict[str, tuple[str, str]]:
    """The source that each installed distribution package is built from, and its version; trackers know no other."""
    fields = ("Package", "source:Package", "source:Version")
    return {name: (source, version) for name, source, version in installed(*fields)}


def python_packages() -> dict[str, str]:
    """Name and version of every distribution in the server's environment, the boot package included."""
    found = metadata.distributions()
    return dict(sorted((re.sub(r"[-_.]+", "-", each.name).lower(), each.version) for each in found))


def operating_system() -> str:
    """As "debian 12" or "ubuntu 24.04"."""
    release = platform.freedesktop_os_release()
    return f"{release['ID']} {release.get('VERSION_ID', 'testing')}"


def migrations() -> tuple[str, int]:
    """Head of MLflow's chain of migrations, and how many there are up to it.

    The count orders two images only while the chain is one line, so a fork of it ends the bake.
    """
    location = metadata.distribution("mlflow").locate_file("mlflow/store/db_migrations")
    config = Config()
    config.set_main_option("script_location", str(location))
    chain = ScriptDirectory.from_config(config)
    head = chain.get_current_head()
    revisions = list(chain.walk_revisions())
    if head is None or any(isinstance(r.down_revision, tuple) or len(r.nextrev) > 1 for r in revisions):
        raise SystemExit("record_facts: MLflow's migrations have forked, so images cannot be ordered by their number")
    return head, len(revisions)


def postgresql_major(packages: dict[str, str]) -> int:
    """The one server version that is installed; two would leave open which of them runs the cluster."""
    majors = [int(m[1]) for name in packages if (m := re.fullmatch(r"postgresql-(\d+)", name))]
    if len(majors) != 1:
        raise SystemExit(f"record_facts: exactly one PostgreSQL server belongs in the image, found {majors or 'none'}")
    return majors[0]


def facts() -> dict[str, Any]:
    """Everything image.json says."""
    packages = deb_packages()
    head, count = migrations()
    nginx = subprocess.run(["nginx", "-v"], check=True, capture_output=True, text=True).stderr
    return {
        "format": 1,
        "image_version": os.environ["IMAGE_VERSION"],
        "git_commit": os.environ["GIT_COMMIT"],
        "git_dirty": os.environ["GIT_DIRTY"] != "false",
        "source_ami": os.environ["SOURCE_AMI"],
        "source_ami_name": os.environ["SOURCE_AMI_NAME"],
        "architecture": platform.machine(),
        "os": operating_system(),
        "mlflow_version": metadata.version("mlflow"),
        "migration_head": head,
        "migration_count": count,
        "postgresql_major": postgresql_major(packages),
        "launch_revision": launch.REVISION,
        "python_version": platform.python_version(),
        "nginx_version": nginx.strip().partition("/")[2].split(" ")[0],
        "packages": {"deb": packages, "python": python_packages()},
    }


def bill_of_materials(image: dict[str, Any], sources: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """The packages of image.json as CycloneDX has them, named by package URLs."""
    distribution, _, release = image["os"].partition(" ")

    def suffix(name: str, version: str) -> str:
        source, its = sources.get(name, (name, version))
        # As other makers of bills write it: the version only where it is another.
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
