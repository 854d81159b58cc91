"""Every guard is taken out once, in a copy of the repository, and the tests must notice.

What guards a running machine alone (the login in front of every route, the policies of the role, the canaries) is
taken out there by hand; this is for the guards that tests of a part hold.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("infra", "packer", "provisioning", "scripts", "tests", "pyproject.toml")

SITE = "provisioning/rootfs/usr/share/mlflow-host/templates/site.conf.j2"
HOST = "provisioning/rootfs/usr/lib/mlflow-host/mlflow_host"
UNITS = "provisioning/rootfs/usr/lib/systemd/system"
OF_SITE = "tests/unit/test_site.py::test_"

# What is taken out, where, the text, what stands there instead, the test that must fail.
GUARDS = [
    ("login", SITE, "    auth_request /mlflow-host-login;\n", "", OF_SITE + "nothing_without_the_password"),
    ("origin", SITE, "if ($foreign_origin) {", "if ($no_such) {", OF_SITE + "pages_of_other_origins_are_refused"),
    ("host", SITE, "listen {{ listen }};", "listen {{ listen }} default_server;", OF_SITE + "only_names_served"),
    ("role", SITE, "proxy_set_header X-May-Not $may_not;", "", OF_SITE + "reader_changes_nothing"),
    ("role of raw paths", SITE, "map $request_uri $only", "map $uri $only", OF_SITE + "reader"),
    ("limit by name", SITE, "limit_req zone=failures burst=10 nodelay;", "", OF_SITE + "guessing_is_slowed_down"),
    ("limit by address", SITE, "limit_req zone=strangers burst=100 nodelay;", "", OF_SITE + "guessing_through_many"),
    ("known to an address", SITE, 'set $stranger "";', "", OF_SITE + "guessing_through_many"),
    ("strangers by the short way", SITE, '"~[^:]::0:0$"', '"~::0:0$"', OF_SITE + "guessing_through_many"),
    ("role by the short way", SITE, '"~[^:]::0:0$"', '"~[^:]::"', OF_SITE + "who_has_logged_in_before"),
    ("failed by the short way", SITE, 'set $suspect "suspect";', "", OF_SITE + "guessing_at_who_has_logged_in"),
    ("failures noted", SITE, "suspects/$http_x_known_pair seen", "suspects/x seen", OF_SITE + "guessing_at_who_has"),
    ("names in paths", SITE, '"~^[A-Za-z0-9._@+-]+$" $remote_user', "~. $remote_user", OF_SITE + "no_name_makes"),
    ("forwarded", SITE, "X-Forwarded-For $remote_addr", "X-A $remote_addr", OF_SITE + "forwarded_headers"),
    ("password goes on", SITE, 'proxy_set_header Authorization "";', "", OF_SITE + "password_opens"),
    ("login spoken for", SITE, "X-Login-Key $login_key", "X-A 1", OF_SITE + "guessing_is_slowed_down"),
    ("body's size", "provisioning/rootfs/etc/nginx/nginx.conf", "size 200m", "size 0", OF_SITE + "body_that_no"),
    ("last admin", "scripts/users.py", 'entry["role"] == "admin" for', "True for", "tests/unit/test_users.py"),
    ("hash", "scripts/users.py", "credentials.hashed(password), ", "password, ", "tests/unit/test_users.py"),
    ("unknown key", f"{HOST}/launch.py", "for extra in ", "for extra in [] and ", "tests/unit/test_launch.py"),
    ("secret in a sentence", f"{HOST}/credentials.py", "{_shown(extra)}", "{fields}", "tests/unit/test_credentials.py"),
    ("unclassified route", f"{HOST}/routes.py", "if unclassified:", "if None:", "tests/unit/test_routes.py"),
    ("key's mode", f"{HOST}/certificates.py", "0o600", "0o644", "tests/unit/test_certificates.py"),
    ("sandbox", f"{UNITS}/mlflow-server@.service", "ProtectSystem=strict\n", "", "tests/unit/test_units.py"),
    ("versions of objects", "infra/access.py", '"s3:DeleteObject")', '"s3:DeleteObject*")', "tests/stack"),
    ("parameters", "infra/access.py", '"Resource": read', '"Resource": "*"', "tests/stack/test_permissions.py"),
    ("denial", "scripts/local_cloud/permissions.py", '== "Deny"):', "== 1):", "tests/local_cloud/test_permissions.py"),
    ("resource", "scripts/local_cloud/permissions.py", '("Resource", resource, False)', "",
     "tests/local_cloud/test_permissions.py"),
    ("token", "scripts/local_cloud/roles.py", "if not hmac.compare_digest(", "if bool(",
     "tests/local_cloud/test_permissions.py"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("file", "text", "instead", "test"), [g[1:] for g in GUARDS], ids=[g[0] for g in GUARDS])
def test_guard_that_is_missing_is_noticed(file: str, text: str, instead: str, test: str, tmp_path: Path) -> None:
    for part in PARTS:
        source, target = REPOSITORY / part, tmp_path / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    guarded = (tmp_path / file).read_text()
    assert text in guarded, f"{file} has no {text!r} any more: bring the list of guards up to date"
    (tmp_path / file).write_text(guarded.replace(text, instead))
    path, _, name = test.partition("::")
    chosen = ["-k", name] if name else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", path, *chosen],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, f"ended with {done.returncode}, where 1 is a test that fails:\n{done.stdout[-2000:]}"
