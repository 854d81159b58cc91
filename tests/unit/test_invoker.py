"""With sudo, the invoking user owns all files that the user needs, and root leaves no other file in the user's home."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import invoker
from scripts.local_cloud import LocalCloud, object_store_ca
from scripts.rehearsal import stack, state
from scripts.rehearsal.state import State
from scripts.rehearsal.status_document import keep_certificate
from tests.support.readme_commands import REPOSITORY

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be called through sudo")
PERSON = pwd.getpwnam("nobody")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the home of the user who runs sudo, and return the home."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    os.chown(folder, PERSON.pw_uid, PERSON.pw_gid)
    for parent in folder.parents:
        if parent.is_relative_to(Path("/tmp")) and parent != Path("/tmp"):
            parent.chmod(0o755)
    monkeypatch.setenv("SUDO_UID", str(PERSON.pw_uid))
    fields = list(PERSON)
    fields[5] = str(folder)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.struct_passwd(fields))
    for name in ("MLFLOW_AMI_LOCAL_CLOUD", "MLFLOW_AMI_REHEARSAL", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return folder


def can_read(path: Path) -> bool:
    read = "import sys; open(sys.argv[1]).read()"
    done = subprocess.run(
        ["/usr/bin/python3", "-c", read, str(path)],
        user=PERSON.pw_uid, group=PERSON.pw_gid, extra_groups=[], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode == 0


def test_state_and_certificate_belong_to_the_sudo_user(home: Path) -> None:
    state.save(stack.state_path(), State(outputs={"url": "https://127.10.0.2"}))
    keep_certificate(stack.certificate_path(), "BEGIN CERTIFICATE")
    assert stack.state_path() == home / ".local/state/mlflow-ami/local-cloud/rehearsal.json"
    assert can_read(stack.state_path()) and can_read(stack.state_path().with_suffix(".key"))
    assert can_read(stack.certificate_path())
    assert stack.certificate_path().parent != stack.state_path().parent
    assert stat.S_IMODE(stack.state_path().stat().st_mode) == 0o600


def test_other_files_of_the_cloud_belong_to_root(home: Path) -> None:
    folder = stack.state_path().parent
    invoker.make_private_folder(folder)
    (folder / "api.pickle").write_text("")
    (folder / "api.pickle").chmod(0o600)
    assert (folder.stat().st_uid, stat.S_IMODE(folder.stat().st_mode)) == (0, 0o710)
    assert not can_read(folder / "api.pickle")


def test_keys_and_authority_belong_to_the_sudo_user_and_the_private_key_to_root(home: Path) -> None:
    cloud = LocalCloud()
    cloud.places.make()
    cloud.places.allotment.write_text("{}")
    cloud.places.allotment.chmod(0o600)
    cloud._hand_over()
    assert can_read(cloud.places.allotment) and can_read(object_store_ca.authority_file(cloud.places))
    assert not can_read(object_store_ca.key_file(cloud.places))


def test_parent_folders_belong_to_the_sudo_user(home: Path) -> None:
    invoker.make_private_folder(stack.state_path().parent)
    for folder in (home / ".local", home / ".local/state", home / ".local/state/mlflow-ami"):
        assert folder.stat().st_uid == PERSON.pw_uid, folder


def test_private_folder_of_an_earlier_release_becomes_passable(home: Path) -> None:
    folder = stack.state_path().parent
    folder.mkdir(parents=True, mode=0o700)
    with stack.exclusive():
        assert stat.S_IMODE(folder.stat().st_mode) == 0o710


def test_existing_folder_of_the_user_is_unchanged(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "cloud"
    folder.mkdir(mode=0o750)
    os.chown(folder, PERSON.pw_uid, PERSON.pw_gid)
    invoker.make_private_folder(folder)
    assert (folder.stat().st_uid, stat.S_IMODE(folder.stat().st_mode)) == (PERSON.pw_uid, 0o750)


def test_program_runs_as_the_sudo_user(home: Path) -> None:
    show = "import os; print(os.getuid(), os.environ['HOME'], 'PYTHONPYCACHEPREFIX' in os.environ)"
    arguments = invoker.as_person({"PATH": "/usr/bin", "PYTHONPYCACHEPREFIX": "/root"})
    done = subprocess.run(["/usr/bin/python3", "-c", show], capture_output=True, text=True, check=True, **arguments)
    assert done.stdout.split() == [str(PERSON.pw_uid), str(home), "False"]


def test_without_sudo_no_owner_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUDO_UID", raising=False)
    invoker.make_private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    assert (tmp_path / "a").stat().st_uid == 0
    assert invoker.home() == Path.home()


def test_checkout_keeps_its_owner(tmp_path: Path) -> None:
    """root runs a script in a user's checkout. The user owns the .pyc files and the files that the script wrote."""
    checkout = tmp_path / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    (checkout / ".venv").symlink_to(sys.prefix)
    for name in ("enter_venv.py", "invoker.py"):
        (checkout / "scripts" / name).write_text((REPOSITORY / "scripts" / name).read_text())
    write = "from pathlib import Path\nfolder = Path(__file__).parents[1] / 'build'\nfolder.mkdir()\n"
    script = "import enter_venv\nimport os\nprint(os.environ['HOME'])\n" + write + "(folder / 'log').write_text('x')\n"
    (checkout / "scripts" / "probe.py").write_text(script)
    for path in [checkout, *checkout.rglob("*")]:
        os.chown(path, PERSON.pw_uid, PERSON.pw_gid, follow_symlinks=False)
    environment = {"PATH": "/usr/bin:/bin", "SUDO_UID": str(PERSON.pw_uid), "HOME": "/somewhere"}
    done = subprocess.run(
        ["/usr/bin/python3", str(checkout / "scripts" / "probe.py")],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == pwd.getpwuid(0).pw_dir
    assert (checkout / "build" / "log").exists()
    assert not [path for path in [checkout, *checkout.rglob("*")] if path.lstat().st_uid == 0]


def test_symlink_target_keeps_its_owner(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("x")
    (checkout / "soft").symlink_to(secret)
    (checkout / "hard").hardlink_to(secret)
    os.chown(checkout, PERSON.pw_uid, PERSON.pw_gid)
    invoker.give_back(checkout)
    assert secret.stat().st_uid == 0
