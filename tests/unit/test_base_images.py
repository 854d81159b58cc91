"""The build of a source image takes minutes, so it logs its progress."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
from pathlib import Path

import pytest

from scripts.local_cloud import base_images
from scripts.local_cloud.layout import LocalCloudError


def test_each_stage_is_logged(tmp_path: Path) -> None:
    told: list[str] = []
    script = "echo 'I: running apt-get update...'; echo noise; sleep 1; echo 'I: extracting archives...' >&2; exit 3"
    assert base_images._mmdebstrap(["sh", "-c", script], tmp_path / "log", told.append) == 3
    assert [line.split(" s  ")[1] for line in told] == ["running apt-get update", "extracting archives"]
    assert "noise" in (tmp_path / "log").read_text()


@pytest.mark.long
def test_progress_is_logged_every_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_images, "TELL_SECONDS", 0.3)
    told: list[str] = []
    assert base_images._mmdebstrap(["sleep", "2"], tmp_path / "log", told.append) == 0
    assert told and "still running" in told[0]


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Build a package that contains a keyring and replaces Ubuntu's keyring package."""
    keyring, control = tmp_path / "content/keys/test.gpg", tmp_path / "content/DEBIAN/control"
    for file, text in (
        (keyring, "the keys"),
        (control, "Package: keys\nVersion: 1\nArchitecture: all\nMaintainer: t <t@example.com>\nDescription: t\n"),
    ):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    package = tmp_path / "keyring.deb"
    subprocess.run(["dpkg-deb", "--build", str(tmp_path / "content"), str(package)], check=True, capture_output=True)
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    monkeypatch.setattr(base_images, "UBUNTU_KEYRING", (package.as_uri(), digest))
    return package


def ubuntu(keyring: str) -> base_images.Base:
    return base_images.Base("test", "noble", "main", "http://archive.ubuntu.com/ubuntu", keyring, "test", "")


def test_ubuntus_keys_are_downloaded_where_they_are_not_installed(archive: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert base_images.keyring_of(ubuntu("/keys/test.gpg"), scratch).read_text() == "the keys"
    installed = tmp_path / "installed.gpg"
    installed.touch()
    assert base_images.keyring_of(ubuntu(str(installed)), scratch) == installed
    debian = base_images.BASES["debian12"]
    assert base_images.keyring_of(debian, scratch) == Path(debian.keyring)


def test_changed_keyring_is_refused(archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(LocalCloudError, match=r"does not have the expected SHA-256"):
        base_images.keyring_of(ubuntu("/keys/test.gpg"), tmp_path)


def test_silent_archive_is_one_sentence_with_the_remedy(archive: Path, tmp_path: Path) -> None:
    archive.unlink()
    with pytest.raises(LocalCloudError, match=r"Ubuntu's archive does not answer .* use --base debian12"):
        base_images.keyring_of(ubuntu("/keys/test.gpg"), tmp_path)


ARM = base_images.BASES["debian12-arm64"]


def test_only_the_base_for_arm64_is_made_for_arm64(tmp_path: Path) -> None:
    for base in base_images.BASES.values():
        command = base_images._command(base, tmp_path / "keyring", tmp_path / "target")
        assert ("--architectures=arm64" in command) is (base is ARM)


@pytest.mark.parametrize(
    ("registered", "accepted"),
    [("enabled\nflags: POCF\n", True), ("enabled\nflags: POF\n", False), ("disabled\n", False), (None, False)],
)
def test_a_base_for_arm64_needs_the_emulator(
    registered: str | None, accepted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_images, "EMULATOR", tmp_path / "qemu-aarch64")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    if registered is not None:
        base_images.EMULATOR.write_text(registered)
    base_images.require_emulator(base_images.BASES["debian12"])
    with contextlib.nullcontext() if accepted else pytest.raises(LocalCloudError, match="apt-get install qemu-user"):
        base_images.require_emulator(ARM)


def test_units_start_without_what_qemu_cannot_do(tmp_path: Path) -> None:
    units = tmp_path / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    (units / "sysctl.service").write_text("[Service]\nLoadCredential=sysctl.extra\n")
    (units / "cron.service").write_text("[Service]\nExecStart=/usr/sbin/cron\n")
    (units / "reap.service").write_text("[Service]\nPrivateNetwork=true\n")
    (units / "procps.service").symlink_to("sysctl.service")
    base_images.prepare_for_qemu(tmp_path)
    changed = sorted(path.name for path in (tmp_path / "etc/systemd/system").iterdir())
    assert changed == ["reap.service.d", "sysctl.service.d"]
    assert "\nLoadCredential=\n" in (tmp_path / "etc/systemd/system/sysctl.service.d/qemu-user.conf").read_text()
