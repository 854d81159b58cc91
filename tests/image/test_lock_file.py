"""The lock file has hashes, supports every Python version of an image, and is the same on every machine."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from scripts import lock

PROVISIONING = Path(__file__).resolve().parents[2] / "provisioning"
LOCKS = [PROVISIONING / "requirements.lock", PROVISIONING / "installer.lock"]
PYTHONS = {"debian 12": "3.11", "ubuntu 24.04": "3.12", "debian 13": "3.13"}


def entries(path: Path) -> dict[Requirement, list[str]]:
    """Return the entries of a lock file, each with its hashes."""
    found: dict[Requirement, list[str]] = {}
    hashes: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and line[0].isalnum():
            hashes = found[Requirement(line.removesuffix(" \\"))] = []
        elif match := re.fullmatch(r"    --hash=sha256:([0-9a-f]{64})(?: \\)?", line):
            hashes.append(match[1])
        else:
            assert not line or line.lstrip().startswith("#"), f"{path.name}: {line}"
    return found


def for_python(path: Path, version: str) -> dict[str, str]:
    """Return the package names and versions that an image with this Python installs. Fails if a package is listed
    twice."""
    image = {"python_version": version, "python_full_version": f"{version}.0", "sys_platform": "linux"}
    environment = {**image, "implementation_name": "cpython"}  # `evaluate` adds the other variables
    chosen: dict[str, str] = {}
    for requirement in entries(path):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in chosen, f"{name} is named twice for Python {version}"
            chosen[name] = str(requirement.specifier).removeprefix("==")
    return chosen


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_package_is_pinned_by_version_and_hash(path: Path) -> None:
    found = entries(path)
    assert found
    for requirement, hashes in found.items():
        assert re.fullmatch(r"==[\w.+!]+", str(requirement.specifier)), requirement
        assert hashes, f"{requirement} has no hash"


def wheels(path: Path, python: str, machine: str) -> dict[NormalizedName, tuple[str, set[str]]]:
    """Return the wheels that uv chooses from a lock file on a machine with the C library of Debian 12: name → version
    and hashes. Fails if a package has no wheel for this machine."""
    command = [
        lock.find_uv(), "pip", "compile", "--no-config", "--quiet", "--no-deps", "--only-binary", ":all:",
        "--format", "pylock.toml", "--python-version", python, "--python-platform", f"{machine}-manylinux_2_36",
        str(path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {
        canonicalize_name(each["name"]): (each["version"], {wheel["hashes"]["sha256"] for wheel in each["wheels"]})
        for each in tomllib.loads(done.stdout)["packages"]
    }


def without_locked_wheel(path: Path, python: str, machine: str) -> list[str]:
    """Return the packages whose wheel, as chosen by uv, has no hash in the lock file."""
    locked = {(canonicalize_name(each.name), str(each.specifier)[2:]): set(hs) for each, hs in entries(path).items()}
    return [name for name, (its, found) in wheels(path, python, machine).items() if not found & locked[name, its]]


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", PYTHONS.values(), ids=PYTHONS.keys())
def test_every_package_has_a_locked_wheel_for_both_architectures(python: str, machine: str) -> None:
    for path in LOCKS:
        versions = {name: version for name, (version, _) in wheels(path, python, machine).items()}
        assert versions == for_python(path, python)
        assert without_locked_wheel(path, python, machine) == []


@pytest.mark.slow
def test_lock_file_with_the_wheel_of_one_architecture_only_is_found(tmp_path: Path) -> None:
    version, found = wheels(LOCKS[0], "3.11", "x86_64")[canonicalize_name("psycopg2-binary")]
    hashes = " \\\n    ".join(f"--hash=sha256:{each}" for each in sorted(found))
    path = tmp_path / "requirements.lock"
    path.write_text(f"psycopg2-binary=={version} \\\n    {hashes}\n")
    assert without_locked_wheel(path, "3.11", "x86_64") == []
    assert without_locked_wheel(path, "3.11", "aarch64") == ["psycopg2-binary"]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_lock_names_no_index_and_no_path(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"://|^--|(^|\s)/\w|\bfile:", text, re.MULTILINE), (
        "the lock file contains no address of an index"
    )


@pytest.mark.parametrize("python", PYTHONS.values(), ids=PYTHONS.keys())
def test_every_image_gets_all_required_packages(python: str) -> None:
    wanted = [
        Requirement(line.split("#")[0])
        for line in (PROVISIONING / "requirements.in").read_text(encoding="utf-8").splitlines()
        if line.split("#")[0].strip()
    ]
    chosen = for_python(PROVISIONING / "requirements.lock", python)
    assert {canonicalize_name(each.name) for each in wanted} <= chosen.keys()
    for each in wanted:
        assert each.specifier.contains(chosen[canonicalize_name(each.name)])
    companions = {name: chosen[name] for name in lock.COMPANIONS if name in chosen}
    assert companions in ({}, dict.fromkeys(lock.COMPANIONS, chosen["mlflow"]))


def test_excluded_packages_are_in_no_image() -> None:
    """During a bake, the server starts without the excluded packages, so the server does not need these packages."""
    text = (PROVISIONING / "requirements.exclude").read_text(encoding="utf-8")
    left_out = {canonicalize_name(line) for line in text.splitlines() if line and not line.startswith("#")}
    assert left_out
    for python in PYTHONS.values():
        assert not left_out & for_python(PROVISIONING / "requirements.lock", python).keys()


def test_sqlalchemy_speaks_to_postgresql_through_psycopg2() -> None:
    assert "psycopg2-binary" in for_python(PROVISIONING / "requirements.lock", "3.12")


def test_another_release_is_locked_without_touching_the_lock_file(tmp_path: Path) -> None:
    committed = (PROVISIONING / "requirements.lock").read_bytes()
    other = tmp_path / "requirements.lock"
    lock.resolve(PROVISIONING / "requirements.in", other, ("mlflow==3.12.0",))
    assert lock.locked_version(other, "mlflow") == "3.12.0"
    for python in PYTHONS.values():
        assert for_python(other, python)["mlflow-skinny"] == "3.12.0"
    assert (PROVISIONING / "requirements.lock").read_bytes() == committed


def test_release_that_does_not_exist_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        lock.LockError, match=r"requirements\.in cannot be resolved with mlflow==99\.1\.2: .*no version"
    ):
        lock.resolve(PROVISIONING / "requirements.in", tmp_path / "x.lock", ("mlflow==99.1.2",))
    assert not (tmp_path / "x.lock").exists()


LACKING = {
    "skinny": """
        error: No solution found when resolving dependencies
        cause: Because there is no version of mlflow-skinny==3.18.0 and
        mlflow>=3.18.0 depends on mlflow-skinny==3.18.0, we can conclude that mlflow>=3.18.0 cannot be used.
        And because you require mlflow==3.18.0, we can conclude that your requirements are unsatisfiable.""",
    "tracing": """
        Because only mlflow-tracing<=3.17.2 is available and mlflow==3.18.0 depends on mlflow-tracing==3.18.0, we can
        conclude that mlflow==3.18.0 cannot be used.""",
}
OTHER = {
    "no such release": """
        Because there is no version of mlflow==3.18.0 and you require mlflow==3.18.0, we can conclude that your
        requirements are unsatisfiable.""",
    "another package": """
        Because there is no version of numpy==99 and mlflow==3.18.0 depends on numpy==99, we can conclude that
        mlflow==3.18.0 cannot be used.""",
}


@pytest.mark.parametrize("said", LACKING.values(), ids=LACKING.keys())
def test_missing_companions_are_recognized(said: str) -> None:
    assert lock.lacking_companions(said, ("mlflow==3.18.0",)) == "3.18.0"


@pytest.mark.parametrize("said", OTHER.values(), ids=OTHER.keys())
def test_other_failures_of_the_resolution_are_not_taken_for_them(said: str) -> None:
    assert lock.lacking_companions(said, ("mlflow==3.18.0",)) is None


def test_release_is_locked_without_companions_that_the_index_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package index is real, but the test replaces uv's first result with uv's message about a release without
    companions (mlflow-skinny, mlflow-tracing)."""
    compile_lock, answers = lock.compile_lock, iter([LACKING["skinny"].replace("3.18.0", "3.17.2")])
    monkeypatch.setattr(lock, "compile_lock", lambda *given: next(answers, None) or compile_lock(*given))
    locked = tmp_path / "requirements.lock"
    lock.resolve(PROVISIONING / "requirements.in", locked, ("mlflow==3.17.2",))
    text = locked.read_text()
    assert re.search(r"# via .*-r mlflow-skinny-\d+\.\d+\.\d+\.in", text)
    for python in PYTHONS.values():
        chosen = for_python(locked, python)
        assert chosen["mlflow"] == "3.17.2"
        assert not {"mlflow-skinny", "mlflow-tracing"} & chosen.keys()
        assert {"fastapi", "uvicorn", "opentelemetry-sdk", "sqlparse"} <= chosen.keys()


def test_lock_file_without_mlflow_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text("boto3==1.0\n")
    with pytest.raises(lock.LockError, match="make lock"):
        lock.locked_version(tmp_path / "requirements.lock", "mlflow")
