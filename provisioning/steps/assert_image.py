#!/usr/bin/env python3
"""Bake step: check the finished image. This is the last bake step, and it changes nothing.

Every check yields one sentence per fault. The script prints all faults, and the bake fails if there is a fault. The
script runs after clean.sh on the build machine, as root, with the distribution's Python. The disk of the build machine
becomes the image. If arguments name checks, the script runs only these checks.
"""

import json
import os
import pwd
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

SHARE = Path("/usr/share/mlflow-host")
BOOT_PACKAGE = Path("/usr/lib/mlflow-host")
ENVIRONMENT = Path("/opt/mlflow")
UNITS = Path("/usr/lib/systemd/system")

FACTS = {
    "format": int,
    "image_version": str,
    "git_commit": str,
    "git_dirty": bool,
    "source_ami": str,
    "source_ami_name": str,
    "architecture": str,
    "os": str,
    "mlflow_version": str,
    "migration_head": str,
    "migration_count": int,
    "postgresql_major": int,
    "launch_revision": int,
    "fallbacks": list,
    "python_version": str,
    "nginx_version": str,
    "packages": dict,
}
MUST_BE_OFF = ("apt-daily.timer", "apt-daily-upgrade.timer", "unattended-upgrades.service", "certbot.timer")
HELD = ("postgresql", "nginx", "python3", "pgbackrest", "certbot")
CREDENTIALS = (".aws", ".pgpass", ".netrc", ".git-credentials", ".docker", ".pypirc", ".config/pip", ".config/uv")
HISTORIES = (".bash_history", ".python_history", ".psql_history", ".lesshst", ".wget-hsts", ".viminfo")


def output(*command: str) -> str:
    """The stdout of a command. The exit status is ignored."""
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def files_below(*roots: Path) -> Iterator[Path]:
    """All files and symbolic links in the folders `roots` and below. The search does not follow links."""
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                yield Path(folder, name)


def homes() -> list[Path]:
    """The existing home directories of all users, including service users."""
    found = {Path(user.pw_dir) for user in pwd.getpwall()}
    return sorted(home for home in found - {Path("/"), Path("/bin")} if home.is_dir())


# ── The image contains nothing that belongs to a single machine ─────────────────────────────────────────────────────


def no_cluster() -> Iterator[str]:
    """The image contains no PostgreSQL cluster. A cluster in the image would start at boot, or block the boot. The
    cluster of a machine is on its data volume."""
    for folder in (Path("/var/lib/postgresql"), Path("/etc/postgresql"), Path("/srv/mlflow")):
        for version_file in (p for p in files_below(folder) if p.name in ("PG_VERSION", "postgresql.conf")):
            yield f"a PostgreSQL cluster is baked in: {version_file}"


def no_identity() -> Iterator[str]:
    """Each machine creates its own host keys, machine ID and random seeds."""
    for key in sorted(Path("/etc/ssh").glob("ssh_host_*")):
        yield f"an SSH host key is baked in: {key}"
    machine_id = Path("/etc/machine-id")
    if not machine_id.is_file() or machine_id.stat().st_size:
        yield "/etc/machine-id must exist and be empty, so that each machine gets its own"
    dbus_id = Path("/var/lib/dbus/machine-id")
    if dbus_id.exists() and not dbus_id.is_symlink():
        yield f"{dbus_id} contains a machine ID of its own"
    for seed in (Path("/var/lib/systemd/random-seed"), Path("/var/lib/systemd/credential.secret")):
        if seed.exists():
            yield f"every machine of this image would share {seed}"
    if Path("/var/lib/cloud/instance").exists() or any(Path("/var/lib/cloud").glob("instances/*")):
        yield "/var/lib/cloud has cloud-init's state of the builder, so a launched machine would not be configured"


def no_access() -> Iterator[str]:
    """No SSH key or password of the build machine gives access to a machine that starts from the image."""
    for home in homes():
        for keys in (home / ".ssh").glob("*"):
            yield f"SSH access or keys are baked in: {keys}"
    for line in Path("/etc/shadow").read_text(encoding="utf-8").splitlines():
        user, password = line.split(":")[:2]
        if not password.startswith(("!", "*")):
            yield f"user {user} has a password{' that is empty' if not password else ''}"


def no_secrets() -> Iterator[str]:
    """The image contains no credentials, private keys or shell histories."""
    for home in homes():
        for name in (*CREDENTIALS, *HISTORIES):
            if (home / name).exists():
                yield f"credentials or a history are baked in: {home / name}"
    for path in files_below(Path("/etc"), Path("/srv"), Path("/root"), Path("/home"), BOOT_PACKAGE, SHARE):
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 1_000_000:
            continue
        content = path.read_bytes()
        if re.search(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----", content):
            yield f"a private key is baked in: {path}"
        if re.search(rb"\bA(KIA|SIA)[A-Z2-7]{16}\b", content):
            yield f"an AWS access key id is baked in: {path}"
    for path in (Path("/etc/mlflow-host/launch.toml"), Path("/etc/pip.conf"), Path("/etc/uv/uv.toml")):
        if path.exists():
            yield f"{path} belongs to one machine or one network"


def no_leftovers() -> Iterator[str]:
    """The image contains no logs, caches or temporary files of the bake."""
    own_script = Path(__file__).resolve()
    for folder in (Path("/tmp"), Path("/var/tmp")):
        for path in sorted(folder.iterdir()):
            if path.resolve() != own_script and not path.name.startswith("systemd-private-"):
                yield f"left behind by the bake: {path}"
    if Path("/usr/sbin/policy-rc.d").exists():
        yield "/usr/sbin/policy-rc.d still keeps services from starting"
    for path in files_below(Path("/var/log")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size:
            yield f"a log of the builder is baked in: {path} ({path.stat().st_size} bytes)"
    for path in files_below(Path("/var/lib/apt/lists"), Path("/var/cache/apt/archives")):
        if path.name != "lock":
            yield f"apt's cache is not empty: {path}"
    for home in homes():
        if (home / ".cache").exists():
            yield f"a cache is baked in: {home / '.cache'}"


# ── The image contains everything that a machine needs ──────────────────────────────────────────────────────────────


def units_in_order() -> Iterator[str]:
    """mlflow-host.target is enabled, automatic updates are off, no unit failed during the bake, and all units are
    valid."""
    if (state := output("systemctl", "is-enabled", "mlflow-host.target")) != "enabled":
        yield f"mlflow-host.target is {state or 'absent'}, so MLflow would not start"
    for unit in MUST_BE_OFF:
        if (state := output("systemctl", "is-enabled", unit)) in ("enabled", "enabled-runtime", "static"):
            yield f"{unit} is {state}: it would change a running image"
    for line in output("systemctl", "--failed", "--plain", "--no-legend").splitlines():
        yield f"a unit failed during the bake: {line.split(' ')[0]}"
    shipped = sorted(str(path) for path in UNITS.glob("mlflow-*.*") if path.is_file())
    if not shipped:
        yield f"{UNITS} has no mlflow unit"
    else:
        command = ["systemd-analyze", "verify", "--recursive-errors=no", *shipped]
        verified = subprocess.run(command, check=False, capture_output=True, text=True)
        if verified.returncode:
            yield f"systemd rejects a unit of this project: {' / '.join(verified.stderr.strip().splitlines())}"


def packages_held() -> Iterator[str]:
    held = set(output("apt-mark", "showhold").splitlines())
    for package in HELD:
        if package not in held:
            yield f"package {package} is not installed and held"


def canonical(name: str) -> str:
    """The normalized name of a Python package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def ask_environment(program: str, *arguments: str) -> dict[str, str]:
    """Run a program with the server's Python. The program prints package names and versions as JSON pairs, and this
    function returns them as a dict."""
    pairs = json.loads(output(f"{ENVIRONMENT}/bin/python", "-B", "-c", program, *arguments) or "[]")
    return {canonical(name): version for name, version in pairs}


def installed_python_packages() -> dict[str, str]:
    """The name and version of each Python package in the server's environment."""
    return ask_environment(
        "import json; from importlib.metadata import distributions\n"
        "print(json.dumps([(found.name, found.version) for found in distributions()]))"
    )


def locked_python_packages() -> dict[str, str]:
    """The name and version of each package in requirements.lock that applies to this version of Python."""
    return ask_environment(
        "import json, sys; from packaging.requirements import Requirement\n"
        "named = [Requirement(line.split(' \\\\')[0]) for line in open(sys.argv[1]) if line[0].isalnum()]\n"
        "print(json.dumps([(r.name, str(r.specifier)[2:]) for r in named if r.marker is None or r.marker.evaluate()]))",
        str(SHARE / "requirements.lock"),
    )


def environment_as_locked() -> Iterator[str]:
    """The server's environment has the packages of the lock file and is byte-compiled. The server can be imported."""
    locked, installed = locked_python_packages(), installed_python_packages()
    if not locked:
        yield f"{SHARE / 'requirements.lock'} names no package"
    if installed.pop("mlflow-host", None) is None:
        yield f"the boot package in {BOOT_PACKAGE} is not found by {ENVIRONMENT}/bin/python"
    for name in sorted(locked.keys() | installed.keys()):
        if locked.get(name) != installed.get(name):
            wanted, found = locked.get(name, "no such package"), installed.get(name, "none")
            yield f"Python package {name}: the lock file names {wanted}, installed is {found}"
    program = "import mlflow.server.fastapi_app, mlflow_host, psycopg2, boto3"
    tried = subprocess.run(
        [f"{ENVIRONMENT}/bin/python", "-P", "-B", "-c", program],
        check=False, capture_output=True, text=True, cwd="/", env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )  # fmt: skip
    if tried.returncode:
        yield f"the server cannot be imported: {(tried.stderr.strip().splitlines() or ['no message'])[-1]}"
    for source in files_below(*ENVIRONMENT.glob("lib/python3*/site-packages/mlflow"), BOOT_PACKAGE):
        if source.suffix == ".py" and not any((source.parent / "__pycache__").glob(f"{source.stem}.cpython-*.pyc")):
            yield f"not byte-compiled: {source}"


def owned_by_root() -> Iterator[str]:
    """Only root can change the files that root or the server runs."""
    for path in files_below(ENVIRONMENT, BOOT_PACKAGE, SHARE):
        status = path.lstat()
        if status.st_uid or status.st_gid:
            yield f"not owned by root: {path}"
        elif not stat.S_ISLNK(status.st_mode) and status.st_mode & 0o022:
            yield f"writable by others than root: {path}"
        elif not stat.S_ISLNK(status.st_mode) and not status.st_mode & 0o004:
            yield f"not readable by the server's user: {path}"


def facts_true() -> Iterator[str]:
    """image.json is complete, and its versions are the installed versions."""
    try:
        facts = json.loads((SHARE / "image.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield f"{SHARE / 'image.json'} cannot be read: {error}"
        return
    for key, kind in FACTS.items():
        if not isinstance(facts.get(key), kind) or (facts[key] in ("", 0) and kind is not bool):
            yield f"image.json says {key} = {facts.get(key)!r}; expected a non-empty {kind.__name__}"
    if facts.get("format") != 1:
        yield f"image.json is of format {facts.get('format')!r}, not 1"
    if (installed := installed_python_packages().get("mlflow")) != facts.get("mlflow_version"):
        yield f"image.json says MLflow {facts.get('mlflow_version')}, installed is {installed}"
    server = Path(f"/usr/lib/postgresql/{facts.get('postgresql_major')}/bin/postgres")
    if not os.access(server, os.X_OK):
        yield f"image.json says PostgreSQL {facts.get('postgresql_major')}, but there is no {server}"


def blank_true() -> Iterator[str]:
    """blank.dump has the migration head that image.json names. First boots and rollbacks load blank.dump."""
    command = ("pg_restore", "--data-only", "--table=alembic_version", "--file=-", str(SHARE / "blank.dump"))
    dumped, wanted = output(*command), json.loads((SHARE / "image.json").read_text(encoding="utf-8"))["migration_head"]
    if wanted not in dumped.split():
        yield f"{SHARE / 'blank.dump'} is not an empty database at migration {wanted}"


CHECKS: tuple[Callable[[], Iterator[str]], ...] = (
    no_cluster,
    no_identity,
    no_access,
    no_secrets,
    no_leftovers,
    units_in_order,
    packages_held,
    environment_as_locked,
    owned_by_root,
    facts_true,
    blank_true,
)


def main(names: list[str]) -> int:
    chosen = [check for check in CHECKS if not names or check.__name__ in names]
    wrong = [(check.__name__, sentence) for check in chosen for sentence in check()]
    for name, sentence in wrong:
        print(f"assert_image: {name}: {sentence}", file=sys.stderr)
    print(f"assert_image: {len(chosen)} checks, {len(wrong)} found wrong")
    return 1 if wrong or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
