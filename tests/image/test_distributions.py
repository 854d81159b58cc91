"""Debian 12, Ubuntu 24.04 and Debian 13 contain the packages and paths that the bake steps need. The package versions
of Ubuntu are between the versions of Debian 12 and Debian 13, so tests on both Debian releases are evidence for Ubuntu.

The tests marked slow read the indices of the distributions' archives. An index lists package names and versions, or the
paths of all files.
"""

from __future__ import annotations

import functools
import lzma
import os
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from scripts.local_cloud.base_images import BASES
from tests.image.test_lock_file import PYTHONS

STEP = Path(__file__).parents[2] / "provisioning" / "steps" / "install_packages.sh"
VERSIONS = {
    "debian12": {"postgresql": "15", "python3": "3.11", "nginx": "1.22", "systemd": "252"},
    "ubuntu24.04": {"postgresql": "16", "python3": "3.12", "nginx": "1.24", "systemd": "255"},
    "debian13": {"postgresql": "17", "python3": "3.13", "nginx": "1.26", "systemd": "257"},
}
"""The versions on which the cluster, the lock file's markers, nginx's directives and the units' directives depend."""
ARCHITECTURES = [(base, "amd64") for base in VERSIONS] + [("debian12", "arm64"), ("debian13", "arm64")]
"""Ubuntu's packages for arm64 are on a separate host. base_images.py uses only the host of the packages for amd64."""
PATHS = (
    r"etc/nginx/mime\.types", "usr/sbin/nginx", r"usr/lib/postgresql/{postgresql}/bin/(postgres|initdb|pg_restore)",
    "usr/bin/(pg_lsclusters|psql)", "usr/bin/pgbackrest", "usr/bin/certbot", "(usr/)?sbin/nft", "usr/bin/zstd",
    "usr/sbin/logrotate", "usr/bin/openssl", r"(usr/)?lib/systemd/system/(nginx|postgresql|apt-daily)\.service",
    r"(usr/)?lib/systemd/system/(certbot|apt-daily|apt-daily-upgrade)\.timer", r"usr/bin/python{python3}",
)  # fmt: skip
"""Regular expressions for paths that the bake steps and the shipped files contain. Each matches a whole path."""


def named_packages() -> list[str]:
    """Return the names of the packages that install_packages.sh installs."""
    found = re.search(r"^packages=\(\n(.*?)^\)", STEP.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found
    return found[1].split()


def test_lock_file_serves_the_python_of_each_distribution() -> None:
    assert sorted(PYTHONS.values()) == sorted(each["python3"] for each in VERSIONS.values())
    assert {name.replace(" ", "") for name in PYTHONS} == VERSIONS.keys() == {each.partition("-")[0] for each in BASES}


@functools.cache
def index(base: str, architecture: str) -> dict[str, str]:
    """Return the package versions in the archive of a distribution, by package name."""
    found: dict[str, str] = {}
    for component in BASES[base].components.split(","):
        address = f"{BASES[base].mirror}/dists/{BASES[base].suite}/{component}/binary-{architecture}/Packages.xz"
        with urllib.request.urlopen(address, timeout=60) as answer:
            text = lzma.decompress(answer.read()).decode()
        found |= dict(re.findall(r"^Package: (\S+)\n(?:.+\n)*?Version: (\S+)$", text, re.MULTILINE))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("base", "architecture"), ARCHITECTURES)
def test_every_named_package_is_in_the_archive(base: str, architecture: str) -> None:
    assert len(named_packages()) > 5
    assert [name for name in named_packages() if name not in index(base, architecture)] == []


@pytest.mark.slow
@pytest.mark.parametrize(("base", "architecture"), ARCHITECTURES)
def test_distributions_have_the_expected_versions(base: str, architecture: str) -> None:
    found = index(base, architecture)
    for name, version in VERSIONS[base].items():
        assert re.match(rf"(\d+:)?{re.escape(version)}(?!\d)", found[name]), f"{name} is {found[name]}"


@pytest.mark.slow
def test_ubuntus_versions_are_between_those_of_the_two_debians() -> None:
    """The test compares only the first two numbers of a version. The other numbers count fixes, and the distributions
    add fixes at different times."""
    indices = [index(base, "amd64") for base in VERSIONS]
    for name in {*named_packages(), *VERSIONS["debian12"], "cloud-init", "openssh-server", "sudo"}:
        found = [
            [int(each) for each in re.findall(r"\d+", of[name].partition(":")[2] or of[name])[:2]] for of in indices
        ]
        assert found == sorted(found), f"{name}: {[of[name] for of in indices]}"


@pytest.mark.slow
@pytest.mark.parametrize("base", VERSIONS)
def test_every_path_that_the_steps_name_is_in_the_archive(base: str, tmp_path: Path) -> None:
    dists = f"{BASES[base].mirror}/dists/{BASES[base].suite}"
    names = ["Contents-amd64.gz"] if "ubuntu" in base else ["main/Contents-amd64.gz", "main/Contents-all.gz"]
    patterns = [each.format(**VERSIONS[base]) for each in PATHS]
    found = ""
    for name in names:
        file, _ = urllib.request.urlretrieve(f"{dists}/{name}", tmp_path / name.replace("/", "-"))
        wanted = rf"^({'|'.join(patterns)})[[:space:]]"
        found += subprocess.run(["zgrep", "-aE", wanted, file], capture_output=True, text=True).stdout
    there = {line.split()[0] for line in found.splitlines()}
    missing = [each for each in patterns if len(matching(each, there)) < len(choices(each))]
    assert missing == [], sorted(there)


def matching(pattern: str, paths: set[str]) -> set[str]:
    return {path.removeprefix("usr/") for path in paths if re.fullmatch(pattern, path)}


def choices(pattern: str) -> list[str]:
    """Return the alternatives in a regular expression, for example postgres|initdb. The archive must contain a path for
    each alternative."""
    found = re.search(r"\((\w[^)]*\|[^)]*)\)", pattern)
    return found[1].split("|") if found else [pattern]


@pytest.mark.skipif(not shutil.which("apt-cache"), reason="apt-cache looks up the packages")
@pytest.mark.parametrize("absent", ["mlflow-ami-has-no-such-package", "mail-transport-agent"])
def test_missing_package_ends_the_bake_before_anything_is_installed(tmp_path: Path, absent: str) -> None:
    """`mail-transport-agent` is only a virtual package. Stand-ins replace apt-get and install, and record each call."""
    done, called = run_step(tmp_path, STEP.read_text(encoding="utf-8").replace("  certbot\n", f"  {absent}\n"))
    assert done.returncode == 1
    [sentence] = done.stderr.splitlines()
    assert re.match(rf"install_packages: cannot install {absent}: the archives of .+ have no such package", sentence)
    assert called == ["update"]


@pytest.mark.skipif(not shutil.which("apt-cache"), reason="apt-cache looks up the packages")
def test_complete_archive_is_no_reason_to_stop(tmp_path: Path) -> None:
    _, called = run_step(tmp_path, STEP.read_text(encoding="utf-8"))
    assert called == ["update", "install a file", "install"]


def run_step(tmp_path: Path, text: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the bake step with stand-ins for apt-get and install. Returns the result of the step and the calls of the
    stand-ins."""
    step, called = tmp_path / "install_packages.sh", tmp_path / "called"
    step.write_text(text)
    (tmp_path / "apt-get").write_text(f'#!/bin/sh\necho "$1" >>{called}\n')
    (tmp_path / "install").write_text(f"#!/bin/sh\necho install a file >>{called}\n")
    for stand_in in ("apt-get", "install"):
        (tmp_path / stand_in).chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(step)], env=variables, capture_output=True, text=True)
    return done, called.read_text().splitlines()
