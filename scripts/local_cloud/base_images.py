"""Source images: what Canonical's Ubuntu server image is on AWS, made here with mmdebstrap.

A base is a minimal server system with cloud-init, SSH and sudo. Its login user is `ubuntu`, by cloud-init's own
`default_user`, so that a template written for Ubuntu finds it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from local_cloud.file_systems import delete_tree
from local_cloud.state import LocalCloudError, Places

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
"""What a cloud server image has that bake and boot may rely on."""


@dataclass(frozen=True)
class Base:
    """A distribution release that can be a source image."""

    name: str
    suite: str
    components: str
    mirror: str
    keyring: str
    ami_name: str
    description: str


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

CLOUD_CONFIG = """\
# The only place this machine finds out who it is: the EC2 instance metadata service.
datasource_list: [Ec2]
datasource:
  Ec2:
    strict_id: false
    timeout: 5
    max_wait: 30
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


def build(places: Places, base: Base, tell: Callable[[str], None]) -> Path:
    """Makes the base's file system, ready to become a layer, and returns its folder.

    Raises LocalCloudError with mmdebstrap's last words; nothing stays behind then.
    """
    if shutil.which("mmdebstrap") is None:
        raise LocalCloudError("mmdebstrap is not installed: apt-get install mmdebstrap")
    target = places.making / f"{base.name}-{uuid.uuid4().hex[:8]}"
    log_path = places.root / f"mmdebstrap-{base.name}.log"
    tell(f"making the {base.name} source image with mmdebstrap (about a minute; log in {log_path})")
    started = time.monotonic()
    try:
        with log_path.open("wb") as log:
            done = subprocess.run(_command(base, target), stdout=log, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            tail = " | ".join(log_path.read_text(errors="replace").splitlines()[-4:])
            raise LocalCloudError(f"mmdebstrap could not make {base.name}: {tail} (see {log_path})")
        finish(target)
        target.chmod(0o755)
    except BaseException:
        delete_tree(target)
        raise
    tell(f"made the {base.name} source image in {time.monotonic() - started:.0f} s")
    return target


def _command(base: Base, target: Path) -> list[str]:
    argv = ["mmdebstrap", "--variant=minbase", "--mode=root", f"--components={base.components}"]
    argv += [f"--keyring={base.keyring}", f"--include={','.join(PACKAGES)}"]
    argv += ['--aptopt=Apt::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"']
    argv += ['--aptopt=Acquire::Retries "3"']
    return [*argv, base.suite, str(target), *_sources(base)]


def _sources(base: Base) -> list[str]:
    """Lines of sources.list: the release with its updates and security fixes."""
    components = base.components.replace(",", " ")
    security = "http://security.ubuntu.com/ubuntu" if "ubuntu" in base.mirror else f"{base.mirror}-security"
    return [
        f"deb {base.mirror} {base.suite} {components}",
        f"deb {base.mirror} {base.suite}-updates {components}",
        f"deb {security} {base.suite}-security {components}",
    ]


def finish(root: Path) -> None:
    """What a cloud image's maker does after installing: no identity, cloud-init told where to look."""
    (root / "etc/cloud/cloud.cfg.d/90_ec2.cfg").write_text(CLOUD_CONFIG)
    # Debian 13's has udev told of network cards to come, and here no udev runs.
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


def choose(name: str) -> Base:
    """Raises LocalCloudError for a base that is not known."""
    if name not in BASES:
        raise LocalCloudError(f"no base named {name!r}: choose one of {', '.join(BASES)}")
    return BASES[name]


def tell_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
