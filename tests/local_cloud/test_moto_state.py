"""moto's records survive a restart. If the records of one service cannot be saved, all other records are saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

PRELUDE = """
import os, sys, threading
os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"
from pathlib import Path
from scripts.local_cloud import moto_state
from scripts.local_cloud.layout import Places
from moto.backends import get_backend
places = Places(Path(sys.argv[1]))
def backend(service, region="eu-central-1"):
    return get_backend(service)["123456789012"][region]
"""


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new Python process, like a restarted daemon, because moto's backends are global variables."""
    argv = [sys.executable, "-c", PRELUDE + script, str(folder)]
    return subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_services_the_stack_uses_are_read_back(tmp_path: Path) -> None:
    written = run(
        tmp_path,
        """
vpc = backend("ec2").create_vpc("10.1.0.0/16")
backend("ec2").create_key_pair("pair", "ed25519", {})
key = backend("kms").create_key(None, "ENCRYPT_DECRYPT", "SYMMETRIC_DEFAULT", "a key", {})
backend("ssm").put_parameter("/a", "", "secret", "SecureString", "", "", True, [], "text", None, None)
backend("iam", "aws").create_role("role", "{}", "/", None, "", [], "3600")
backend("cloudwatch").put_metric_alarm
backend("logs").create_log_group("group", {})
backend("secretsmanager"); backend("route53", "aws"); backend("sns"); backend("events")
moto_state.save(places)
assert moto_state.check(places)
""",
    )
    assert written.returncode == 0, written.stderr
    read = run(
        tmp_path,
        """
import json
assert moto_state.load(places)
print(json.dumps([
    [vpc.cidr_block for vpc in backend("ec2").vpcs.values()],
    list(backend("ec2").key_pairs),
    backend("ssm").get_parameter("/a").value != "",
    [role.name for role in backend("iam", "aws").roles.values()],
    len(backend("kms").keys),
    list(backend("logs").groups),
]))
""",
    )
    assert read.returncode == 0, read.stderr
    cidrs, pairs, parameter, roles, keys, groups = json.loads(read.stdout)
    assert "10.1.0.0/16" in cidrs
    assert (pairs, parameter, roles, groups) == (["pair"], True, ["role"], ["group"])
    assert keys >= 1


def test_service_that_cannot_be_written_or_read_is_left_out(tmp_path: Path) -> None:
    written = run(
        tmp_path,
        """
class Unreadable:
    def __reduce__(self): return (int, ("no number",))
backend("iam", "aws").create_role("role", "{}", "/", None, "", [], "3600")
backend("sns").lock = threading.Lock()
moto_state.save(places)
assert moto_state.check(places)
backend("events").broken = Unreadable()
moto_state.save(places)
assert not moto_state.check(places)
moto_state.save(places)
assert moto_state.check(places)
""",
    )
    assert written.returncode == 0, written.stderr
    assert "sns" in written.stderr and "events" in written.stderr
    read = run(tmp_path, 'moto_state.load(places); print([r.name for r in backend("iam", "aws").roles.values()])')
    assert read.stdout.strip() == "['role']", read.stderr


def test_records_from_before_the_package_moved_are_read(tmp_path: Path) -> None:
    """In old record files, `scripts.local_cloud.moto_state.save` has its former name `local_cloud.records.save`."""
    (tmp_path / "api.pickle").write_bytes(
        b"(dS'services'\n(dS'ec2'\n(dS'1'\n(dS'eu'\nclocal_cloud.records\nsave\nssss."
    )
    read = run(tmp_path, 'moto_state.load(places); print(get_backend("ec2")["1"]["eu"] is moto_state.save)')
    assert read.stdout.strip() == "True", read.stderr


def test_unreadable_records_end_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "api.pickle").write_bytes(b"nothing of ours")
    read = run(
        tmp_path,
        """
from scripts.local_cloud.layout import LocalCloudError
try: moto_state.load(places)
except LocalCloudError as error: print(error)
""",
    )
    assert "purge" in read.stdout and len(read.stdout.splitlines()) == 1


def test_cloud_is_imported_without_moto() -> None:
    """The daemon sets moto's environment variables before it imports moto, and its package is imported first."""
    code = "import sys, scripts.local_cloud; sys.exit('moto' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
