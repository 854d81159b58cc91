"""mmdebstrap builds the source images of the local cloud, which replace Canonical's Ubuntu server image on AWS.

A base is a minimal server system with cloud-init, SSH and sudo. cloud-init's `default_user` sets the login user
`ubuntu`, so that a Packer template for Ubuntu works.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.local_cloud import object_store_ca
from scripts.local_cloud.file_systems import delete_tree
from scripts.local_cloud.layout import LocalCloudError, Places

PACKAGES = (
    *("apt-utils", "bash-completion", "ca-certificates", "cloud-guest-utils", "cloud-init", "cron", "curl", "dbus"),
    *("e2fsprogs", "gdisk", "gnupg", "iproute2", "iputils-ping", "kmod", "less", "libnss-myhostname", "libpam-systemd"),
    *(
        "locales",
        "logrotate",
        "lsb-release",
        "lsof",
        "nano",
        "netbase",
        "openssh-server",
        "openssl",
        "parted",
        "procps",
    ),
    *("psmisc", "python3", "rsync", "sudo", "systemd", "systemd-sysv", "tzdata", "udev", "unattended-upgrades", "wget"),
    "xz-utils",
)
"""The bake and the boot require these packages, which are part of a cloud server image."""


TELL_SECONDS = 20


@dataclass(frozen=True)
class Base:
    """A distribution release that can be a source image."""

    name: str
    suite: str
    components: str
    mirror: str
    keyring: str
    series: str
    """Start of the AMI's name. `ami_name` appends the revision `RECIPE`."""
    description: str
    architecture: str = "x86_64"

    @property
    def ami_name(self) -> str:
        return f"{self.series}-{RECIPE}"


BASES = {
    base.name: base
    for base in (
        Base(
            "debian12",
            "bookworm",
            "main",
            "http://deb.debian.org/debian",
            "/usr/share/keyrings/debian-archive-keyring.gpg",
            "debian/images/mmdebstrap/debian-bookworm-12-amd64-server",
            "Debian 12 (bookworm), made locally with mmdebstrap in place of Canonical's Ubuntu 24.04",
        ),
        Base(
            "debian12-arm64",
            "bookworm",
            "main",
            "http://deb.debian.org/debian",
            "/usr/share/keyrings/debian-archive-keyring.gpg",
            "debian/images/mmdebstrap/debian-bookworm-12-arm64-server",
            "Debian 12 (bookworm) for arm64, made locally with mmdebstrap and run by qemu-user",
            "arm64",
        ),
        Base(
            "debian13",
            "trixie",
            "main",
            "http://deb.debian.org/debian",
            "/usr/share/keyrings/debian-archive-keyring.gpg",
            "debian/images/mmdebstrap/debian-trixie-13-amd64-server",
            "Debian 13 (trixie), made locally with mmdebstrap in place of Canonical's Ubuntu 24.04",
        ),
        Base(
            "ubuntu24.04",
            "noble",
            "main,universe",
            "http://archive.ubuntu.com/ubuntu",
            "/usr/share/keyrings/ubuntu-archive-keyring.gpg",
            "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-amd64-server-mmdebstrap",
            "Ubuntu 24.04 (noble), made locally with mmdebstrap",
        ),
    )
}

UBUNTU_KEYRING = (
    "http://archive.ubuntu.com/ubuntu/pool/main/u/ubuntu-keyring/ubuntu-keyring_2023.11.28.1_all.deb",
    "36de43b15853ccae0028e9a767613770c704833f82586f28eb262f0311adb8a8",
)
"""URL and SHA-256 of the package with the signing keys of Ubuntu's archive. Debian does not include these keys. The
fingerprint of the newest key is F6EC B376 2474 EDA9 D21B  7022 8719 20D1 991B C93C."""

CLOUD_CONFIG = """\
# Use the EC2 instance metadata service as the only data source.
datasource_list: [Ec2]
datasource:
  Ec2:
    strict_id: false
    timeout: 10
    max_wait: 120
network: {config: disabled}
ssh_deletekeys: true
ssh_genkeytypes: [ed25519, ecdsa]
ssh_pwauth: false
disable_root: true
system_info:
  default_user:
    name: ubuntu
    lock_passwd: true
    gecos: Ubuntu
    groups: [adm, sudo]
    sudo: ["ALL=(ALL) NOPASSWD:ALL"]
    shell: /bin/bash
"""


EMULATOR = Path("/proc/sys/fs/binfmt_misc/qemu-aarch64")
"""This file exists if the kernel runs arm64 programs with qemu-user."""

UNDER_QEMU = """\
# These settings fail under qemu-user: systemd needs a new mount namespace to set up credentials, and parts of netlink
# to set up the loopback device of a private network.
[Service]
PrivateNetwork=no
LoadCredential=
LoadCredentialEncrypted=
SetCredential=
SetCredentialEncrypted=
"""

AUTHORITY = "local-cloud/authority.crt"
TRUSTED = "/etc/ssl/certs/ca-certificates.crt"
TRUST = f"""\
# The system trusts the local cloud's certificate authority. botocore trusts this authority only with AWS_CA_BUNDLE.
[Manager]
DefaultEnvironment=AWS_CA_BUNDLE={TRUSTED}
"""

RECIPE = 2
"""Revision of the source images. The name of each source image contains the revision. Increase the revision when the
content of the source images changes."""


def build(places: Places, base: Base, tell: Callable[[str], None]) -> Path:
    """Build the base's file system in a folder that can become a layer, and return the folder.

    If mmdebstrap fails, the folder is removed and LocalCloudError contains the end of mmdebstrap's output.
    """
    if shutil.which("mmdebstrap") is None:
        raise LocalCloudError("mmdebstrap is not installed: apt-get install mmdebstrap")
    require_emulator(base)
    target = places.making / f"{base.name}-{uuid.uuid4().hex[:8]}"
    log_path = places.root / f"mmdebstrap-{base.name}.log"
    tell(f"making the {base.name} source image with mmdebstrap (some minutes; log in {log_path})")
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="mlflow-ami-keyring-") as scratch:
            status = _mmdebstrap(_command(base, keyring_of(base, Path(scratch)), target), log_path, tell)
        if status != 0:
            tail = " | ".join(log_path.read_text(errors="replace").splitlines()[-4:])
            raise LocalCloudError(f"mmdebstrap could not make {base.name}: {tail} (see {log_path})")
        finish(target)
        if base.architecture == "arm64":
            prepare_for_qemu(target)
        trust(target, object_store_ca.ensure(places).read_text())
        target.chmod(0o755)
    except BaseException:
        delete_tree(target)
        raise
    tell(f"made the {base.name} source image in {time.monotonic() - started:.0f} s")
    return target


def _mmdebstrap(command: list[str], log_path: Path, tell: Callable[[str], None]) -> int:
    """Run mmdebstrap and return its exit status. Prints each stage, and a line after 20 seconds without a new stage."""
    started = told = time.monotonic()
    with log_path.open("wb") as log, log_path.open(encoding="utf-8", errors="replace") as reader:
        running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                ended = running.poll() is not None
                now = time.monotonic()
                for stage in re.findall(r"(?m)^I: (.+?)(?:\.\.\.)?$", reader.read()):
                    tell(f"  {now - started:4.0f} s  {stage}")
                    told = now
                if ended:
                    return running.returncode
                if now - told > TELL_SECONDS:
                    tell(f"  {now - started:4.0f} s  still running")
                    told = now
                time.sleep(0.5)
        except BaseException:
            running.terminate()
            running.wait()
            raise


def keyring_of(base: Base, scratch: Path) -> Path:
    """Return the file with the signing keys of the base's package archive. If Ubuntu's keys are not installed on this
    host, the function downloads the keys to `scratch`. Raises LocalCloudError."""
    installed = Path(base.keyring)
    if installed.exists() or "ubuntu" not in base.mirror:
        return installed
    url, digest = UBUNTU_KEYRING
    package = scratch / "keyring.deb"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            package.write_bytes(response.read())
    except OSError as error:
        raise LocalCloudError(
            f"Ubuntu's archive does not answer ({error}): use --base debian12, or another network"
        ) from None
    if hashlib.sha256(package.read_bytes()).hexdigest() != digest:
        raise LocalCloudError(f"{url} does not have the expected SHA-256: install Ubuntu's keys as {installed}")
    subprocess.run(["dpkg-deb", "--extract", str(package), str(scratch)], check=True, capture_output=True)
    return scratch / base.keyring.lstrip("/")


def _command(base: Base, keyring: Path, target: Path) -> list[str]:
    argv = ["mmdebstrap", "--variant=minbase", "--mode=root", f"--components={base.components}"]
    if base.architecture == "arm64":
        argv.append("--architectures=arm64")
    argv += [f"--keyring={keyring}", f"--include={','.join(PACKAGES)}"]
    argv += ['--aptopt=Apt::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"']
    argv += ['--aptopt=Acquire::Retries "3"']
    return [*argv, base.suite, str(target), *_sources(base)]


def _sources(base: Base) -> list[str]:
    """Return the lines of sources.list: the release, its updates and its security fixes."""
    components = base.components.replace(",", " ")
    security = "http://security.ubuntu.com/ubuntu" if "ubuntu" in base.mirror else f"{base.mirror}-security"
    return [
        f"deb {base.mirror} {base.suite} {components}",
        f"deb {base.mirror} {base.suite}-updates {components}",
        f"deb {security} {base.suite}-security {components}",
    ]


def finish(root: Path) -> None:
    """Turn the installed system into an image: remove its machine ID and host keys, and configure cloud-init."""
    (root / "etc/cloud/cloud.cfg.d/90_ec2.cfg").write_text(CLOUD_CONFIG)
    # On Debian 13, the unit of cloud-init's module install_hotplug waits for udev, which does not run in machines.
    modules = root / "etc/cloud/cloud.cfg"
    modules.write_text(re.sub(r"(?m)^ *- install[-_]hotplug\n", "", modules.read_text()))
    (root / "etc/machine-id").write_text("")
    (root / "var/lib/dbus/machine-id").unlink(missing_ok=True)
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    (root / "etc/hostname").unlink(missing_ok=True)
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/fstab").write_text("")
    locale = root / "etc/default/locale"
    locale.write_text("LANG=C.UTF-8\n")
    for name in ("var/lib/apt/lists", "var/cache/apt"):
        for path in (root / name).rglob("*"):
            if path.is_file():
                path.unlink()


def require_emulator(base: Base) -> None:
    """Raise LocalCloudError if the base is for arm64 and this machine cannot run arm64 programs."""
    if base.architecture != "arm64":
        return
    flags = re.search(r"(?m)^flags: (\S*)", EMULATOR.read_text()) if EMULATOR.exists() else None
    if shutil.which("arch-test") is None or not flags or not {"C", "F"} <= set(flags[1]):
        raise LocalCloudError(
            "this machine does not run programs for arm64 in machines of the local cloud: apt-get install "
            "qemu-user-static arch-test, mount binfmt_misc, and register qemu-aarch64 with the flags C and F, as "
            "scripts/README.md shows"
        )


def prepare_for_qemu(root: Path) -> None:
    """Reset the settings in the distribution's systemd units that fail under qemu-user."""
    units = root / "usr/lib/systemd/system"
    for unit in units.glob("*.service"):
        if not unit.is_symlink() and re.search(r"(?m)^((Load|Set)Credential|PrivateNetwork=)", unit.read_text()):
            drop_in = root / f"etc/systemd/system/{unit.name}.d/qemu-user.conf"
            drop_in.parent.mkdir(parents=True, exist_ok=True)
            drop_in.write_text(UNDER_QEMU)


def trust(root: Path, certificate: str) -> None:
    """Make the image's system and botocore trust a certificate authority. Raises LocalCloudError."""
    shipped = root / "usr/share/ca-certificates" / AUTHORITY
    shipped.parent.mkdir(parents=True, exist_ok=True)
    shipped.write_text(certificate)
    with (root / "etc/ca-certificates.conf").open("a") as listed:
        listed.write(f"{AUTHORITY}\n")
    done = subprocess.run(["chroot", str(root), "update-ca-certificates"], capture_output=True, text=True)
    if done.returncode != 0:
        raise LocalCloudError(f"update-ca-certificates failed in the source image: {done.stderr.strip()[-300:]}")
    drop_in = root / "etc/systemd/system.conf.d/local-cloud.conf"
    drop_in.parent.mkdir(parents=True, exist_ok=True)
    drop_in.write_text(TRUST)
    with (root / "etc/environment").open("a") as environment:
        environment.write(f"AWS_CA_BUNDLE={TRUSTED}\n")


def choose(name: str) -> Base:
    """Return the base with this name. Raises LocalCloudError if the name is unknown."""
    if name not in BASES:
        raise LocalCloudError(f"no base named {name!r}: choose one of {', '.join(BASES)}")
    return BASES[name]


def tell_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
