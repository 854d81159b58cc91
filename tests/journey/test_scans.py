"""Check the findings of two well-known scanners on a default server: testssl for HTTPS, Lynis for the machine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
from pathlib import Path

import pytest

from scripts.local_cloud import LocalCloud
from tests.support.servers import BUILD, Server

pytestmark = [pytest.mark.machine, pytest.mark.slow]

OF_A_PRIVATE_AUTHORITY = {"cert_chain_of_trust", "cert_revocation"}
"""testssl reports that no client trusts the stack's own authority by default, and that the authority publishes no
revocation list."""

LEAST_INDEX = 75
LYNIS = ("usr/share/lynis", "usr/sbin/lynis", "etc/lynis")


def test_testssl_finds_nothing_but_the_private_authority(server: Server, tmp_path: Path) -> None:
    if not shutil.which("testssl"):
        pytest.fail("testssl is not installed: run make prepare-test", pytrace=False)
    found, said = tmp_path / "testssl.json", BUILD / "testssl.txt"
    said.parent.mkdir(exist_ok=True)
    command = ["testssl", "--quiet", "--color", "0", "--warnings", "off", "--jsonfile", str(found)]
    done = subprocess.run(
        [*command, urllib.parse.urlsplit(server.url).netloc + ":443"], capture_output=True, text=True, timeout=600
    )
    said.write_text(done.stdout)
    findings = json.loads(found.read_text())
    # These findings about protocols and a header prove that testssl completed its scan.
    assert {"TLS1_2", "TLS1_3", "cipher_order", "heartbleed", "X-Frame-Options"} <= {each["id"] for each in findings}
    bad = {each["id"]: each["finding"] for each in findings if each["severity"] in ("MEDIUM", "HIGH", "CRITICAL")}
    assert {name: finding for name, finding in bad.items() if name not in OF_A_PRIVATE_AUTHORITY} == {}
    assert set(bad) == OF_A_PRIVATE_AUTHORITY, "testssl does not know the private authority"


def test_lynis_finds_the_machine_hardened(server: Server, cloud: LocalCloud) -> None:
    """The image contains no scanner, so Lynis runs from a folder that the test deletes."""
    if not Path("/usr/share/lynis").exists():
        pytest.fail("lynis is not installed: run make prepare-test", pytrace=False)
    packed = f"tar -C / -cz {' '.join(LYNIS)} | base64 --wrap=0"
    tree = subprocess.run(["sh", "-c", packed], capture_output=True, text=True, check=True).stdout
    scan = """
        set -e
        cd "$(mktemp -d -p /run lynis.XXXXXX)"
        trap 'rm -rf "$PWD"' EXIT
        base64 -d | tar -xz
        mv usr/share/lynis there
        cp -r etc/lynis/default.prf etc/lynis/plugins usr/sbin/lynis there
        here=$PWD
        cd there
        bash lynis audit system --quick --no-colors --profile "$PWD/default.prf" \\
          --logfile "$here/log" --report-file "$here/report" </dev/null >"$here/said" 2>&1
        cat "$here/report"
    """
    done = cloud.exec(server.instance_id, ["sh", "-c", scan], input=tree, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (BUILD / "lynis-report.txt").write_text(done.stdout)
    report = dict(re.findall(r"^(\w+)=(.*)$", done.stdout, re.MULTILINE))
    assert int(report["lynis_tests_done"]) > 150
    assert re.findall(r"^warning\[\]=(.*)$", done.stdout, re.MULTILINE) == []
    assert int(report["hardening_index"]) >= LEAST_INDEX
