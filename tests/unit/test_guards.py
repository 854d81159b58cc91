"""Each security check is removed in turn, in a copy of the repository, and a test must fail.

Checks that only a running machine has (the login on every route, the role's policies, the canaries) are not listed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("infra", "packer", "provisioning", "scripts", "tests", "pyproject.toml")

SITE = "provisioning/rootfs/usr/share/mlflow-host/templates/site.conf.j2"
LIMITS = "provisioning/rootfs/usr/share/mlflow-host/templates/login_limits.conf.j2"
HOST = "provisioning/rootfs/usr/lib/mlflow-host/mlflow_host"
UNITS = "provisioning/rootfs/usr/lib/systemd/system"
CONTRACT = f"{HOST}/contract"
OF_SITE = "tests/unit/test_site.py::test_"
OF_LIMITS = "tests/unit/test_request_limits.py::"
OF_SIGNATURES = "tests/local_cloud/test_signatures.py::"
NGINX = "provisioning/rootfs/etc/nginx"
CLOUD = "scripts/local_cloud"

# An entry consists of name, file, removed text, replacement, and the test that must fail.
GUARDS = [
    ("login", SITE, "    auth_request /mlflow-host-login;\n", "", OF_SITE + "every_route_needs"),
    ("origin", SITE, "if ($foreign_origin) {", "if ($no_such) {", OF_SITE + "pages_of_other_origins_are_refused"),
    ("host", SITE, "listen {{ listen }};", "listen {{ listen }} default_server;", OF_SITE + "other_host_names"),
    ("role", SITE, "proxy_set_header X-May-Not $may_not;", "", OF_SITE + "reader_changes_nothing"),
    ("role of raw paths", SITE, "map $request_uri $only", "map $uri $only", OF_SITE + "reader"),
    ("limit by name", LIMITS, "limit_req zone=failures burst=10 nodelay;", "", OF_SITE + "failed_logins_are_limited"),
    ("limit by address", SITE, "limit_req zone=strangers burst=100 nodelay;", "", OF_SITE + "password_spraying"),
    ("known users of an address", SITE, 'set $stranger "";', "", OF_SITE + "password_spraying"),
    ("stranger without login server", LIMITS, '"~[^:]::0:0$"', '"~::0:0$"', OF_SITE + "password_spraying"),
    ("role without login server", LIMITS, '"~[^:]::0:0$"', '"~[^:]::"', OF_SITE + "known_login_grants"),
    ("failed login without login server", SITE, 'set $suspect "suspect";', "", OF_SITE + "failed_logins_of_a_known"),
    ("failures noted", LIMITS, "suspects/$new_suspect seen", "suspects/x seen", OF_SITE + "failed_logins_of_a"),
    ("names in paths", LIMITS, r'"~^[A-Za-z0-9._@+-]+\z" $remote_user', "~. $remote_user", OF_SITE + "user_name_alone"),
    ("end of a name", LIMITS, r'._@+-]+\z" $remote_user', '._@+-]+$" $remote_user', OF_SITE + "a_line_feed_in_a_name"),
    ("name in the log", SITE, "Authorization $login_password;", "Authorization $http_authorization;",
     OF_SITE + "a_line_feed_in_a_name"),
    ("file in the log", f"{NGINX}/nginx.conf", "    log_not_found off;\n", "", OF_SITE + "a_line_feed_in_a_name"),
    ("login's folder", "provisioning/rootfs/etc/systemd/system/nginx.service", "--mode=0710", "--mode=0755",
     OF_SITE + "the_socket_of_the_login"),
    ("login header", LIMITS, "$new_login seen if=$new_login", "$http_x_new_pair seen if=$http_x_new_pair",
     OF_SITE + "login_writes_no_file"),
    ("suspect header", LIMITS, "$new_suspect seen if=$new_suspect", "$http_x_known_pair seen if=$http_x_known_pair",
     OF_SITE + "login_writes_no_file"),
    ("prompt during the boot", LIMITS, 'try_files "" =403;', 'try_files "" =401;', OF_SITE + "page_needs_no_login"),
    ("headers of all", f"{NGINX}/mlflow-host-health.conf", "include /etc/nginx/mlflow-host-headers.conf;", "",
     OF_SITE + "no_location_of_the_site"),
    ("content policy", f"{NGINX}/mlflow-host-headers.conf", "add_header Content-Security-Policy", "add_header X-A",
     OF_SITE + "every_response"),
    ("in flight", SITE, "    limit_conn inflight 256;\n", "", OF_SITE + "requests_of_one_user"),
    ("markers", f"{HOST}/machine/nginx.py", "in found[MARKERS:]:", "in []:", OF_SITE + "number_of_login_files"),
    ("planted dump", f"{CONTRACT}/restore_request.py", "return _OURS.fullmatch(key) is not None",
     'return key.endswith(".dump")', "tests/unit/test_backups.py::planted"),
    ("dump without a digest", f"{HOST}/backups/restore_choice.py", " if dump.recorded), None)", "), None)",
     "tests/unit/test_backups.py::without_a_digest"),
    ("digest", f"{HOST}/postgres/dump_file.py", "if written[:1] != [found]:", "if False:",
     "tests/unit/test_one_cut.py::dump_with_another_content"),
    ("superuser's restore", f"{HOST}/postgres/dump_file.py", "as_owner = replace(cluster, user=cluster.owner)",
     "as_owner = replace(cluster)", "tests/schema/test_database_step.py::rights_of_its_owner"),
    ("decompression", f"{HOST}/server/request_limits.py", "if len(found) > DECOMPRESSED_BYTES:", "if False:",
     OF_LIMITS + "decompression"),
    ("presigned", f"{HOST}/server/request_limits.py", "if not 0 < seconds <= PRESIGNED_SECONDS:", "if False:",
     OF_LIMITS + "presigned"),
    ("NUL", f"{HOST}/server/request_limits.py", 'if b"\\0" in unquote_to_bytes(query):', "if False:",
     OF_LIMITS + "cannot_be_answered"),
    ("GraphQL", f"{HOST}/server/request_limits.py", '    if path.endswith("/graphql") and', "    if False and",
     OF_LIMITS + "graphql"),
    ("requests per user", f"{HOST}/server/request_limits.py",
     "await turn.acquire()\n            taken.append(turn)", "pass", OF_LIMITS + "one_user"),
    ("dear requests", f"{HOST}/server/request_limits.py", '"dear": is_dear(method, path)', '"dear": False',
     OF_LIMITS + "dear_requests_and"),
    ("JSON in a text", f"{HOST}/server/request_limits.py", "    if isinstance(body, str):\n", "    if False:\n",
     "tests/unit/test_artifact_location_checks.py::however_it_is_spelled"),
    ("protobuf's other names", f"{HOST}/server/request_limits.py", 'f"_{letter[0].lower()}"', "letter[0]",
     "tests/unit/test_artifact_location_checks.py::however_it_is_spelled"),
    ("GraphQL's searches", f"{HOST}/server/mlflow_patches.py", "        request_limits.bounded,\n",
     "        lambda search: search,\n", OF_LIMITS + "a_search_is_bounded"),
    ("bodies in chunks", f"{HOST}/server/request_limits.py", "if received > limit:", "if False:",
     OF_LIMITS + "of_unknown_length"),
    ("objects in JSON", f"{HOST}/server/request_limits.py", "if objects > OBJECTS and", "if False and",
     OF_LIMITS + "many_objects"),
    ("wait for a turn", f"{HOST}/server/request_limits.py", "asyncio.timeout(WAIT_SECONDS)", "asyncio.timeout(None)",
     OF_LIMITS + "waits_too_long"),
    ("spans", f"{HOST}/server/request_limits.py", "if spans_of(scope, body) > SPANS:", "if False:",
     OF_LIMITS + "spans_of_one_export"),
    ("time of queries", f"{HOST}/server/request_limits.py", "time.monotonic() > THIS_THREAD.until:", "False:",
     OF_LIMITS + "queries_of_a_dear"),
    ("points", f"{HOST}/server/fast_path/store.py", "        if found.token:\n", "        if False:\n",
     "tests/unit/test_direct_answers.py::history_of_too_many_points"),
    ("page tokens", f"{HOST}/server/refusals.py", "return classmethod(parsed)",
     "return classmethod(lambda _, token: parse(token))", OF_LIMITS + "page_token"),
    ("ended statements", f"{HOST}/server/refusals.py", "if sentence := too_dear(error):", "if sentence := None:",
     OF_LIMITS + "ended"),
    ("statements' time", f"{HOST}/server/environment.py", "%3D60s", "%3D0",
     "tests/unit/test_server.py::environment_contains"),
    ("health", f"{HOST}/server/health.py", "status = 503", "status = 200", OF_LIMITS + "health"),
    ("signature", f"{CLOUD}/signatures.py", "if not hmac.compare_digest(expected", "if None in (expected",
     OF_SIGNATURES + "sdk"),
    ("signed body", f"{CLOUD}/signatures.py", "digest = hashlib.sha256(body).hexdigest()",
     'digest = environ.get("HTTP_X_AMZ_CONTENT_SHA256") or hashlib.sha256(b"").hexdigest()', OF_SIGNATURES + "sdk"),
    ("signature's time", f"{CLOUD}/signatures.py", "SKEW_SECONDS = 900", "SKEW_SECONDS = 9e9", OF_SIGNATURES + "sdk"),
    ("session's token", f"{CLOUD}/roles.py", "if access_key == _access_key(claims[\"sid\"]) else None", "",
     OF_SIGNATURES + "session"),
    ("origin of a page", f"{CLOUD}/signatures.py", 'if origin := environ.get("HTTP_ORIGIN"):', "if origin := None:",
     OF_SIGNATURES + "web_page"),
    ("names of the cloud", f"{CLOUD}/signatures.py", "if host not in", "if not host and host not in",
     OF_SIGNATURES + "web_page"),
    ("CORS", f"{CLOUD}/signatures.py", 'if not name.lower().startswith("access-control-")', "",
     OF_SIGNATURES + "opens"),
    ("forwarded", SITE, "X-Forwarded-For $remote_addr", "X-A $remote_addr", OF_SITE + "forwarded_headers"),
    ("password sent to MLflow", SITE, 'proxy_set_header Authorization "";', "", OF_SITE + "password_is_accepted"),
    ("key of the login server", SITE, "X-Login-Key $login_key", "X-A 1", OF_SITE + "failed_logins_are_limited"),
    ("body's size", "provisioning/rootfs/etc/nginx/nginx.conf", "size 200m", "size 0", OF_SITE + "too_large_body"),
    ("last admin", "scripts/users.py", 'entry["role"] == "admin" for', "True for", "tests/unit/test_users.py"),
    ("hash", "scripts/users.py", "credentials.hashed(password), ", "password, ", "tests/unit/test_users.py"),
    ("unknown key", f"{CONTRACT}/launch.py", "for extra in ", "for extra in [] and ", "tests/unit/test_launch.py"),
    ("secret in a sentence", f"{CONTRACT}/credentials.py", "{_shown(extra)}", "{fields}",
     "tests/unit/test_credentials.py"),
    ("unsorted route", f"{HOST}/bake/reader_routes.py", "or reads == writes or", "or (reads and writes) or",
     "tests/unit/test_routes.py"),
    ("key's mode", f"{HOST}/boot/private_ca.py", "0o600", "0o644", "tests/unit/test_certificates.py"),
    ("sandbox", f"{UNITS}/mlflow-.service.d/10-sandbox.conf", "ProtectSystem=strict\n", "", "tests/unit/test_units.py"),
    ("versions of objects", "infra/iam_roles.py", '"s3:DeleteObject")', '"s3:DeleteObject*")', "tests/stack"),
    ("parameters", "infra/iam_roles.py", '"Resource": read', '"Resource": "*"', "tests/stack/test_permissions.py"),
    ("denial", "scripts/local_cloud/permissions.py", '== "Deny"):', "== 1):", "tests/local_cloud/test_permissions.py"),
    ("resource", "scripts/local_cloud/permissions.py", '("Resource", resource, False)', "",
     "tests/local_cloud/test_permissions.py"),
    ("token", "scripts/local_cloud/roles.py", "if not hmac.compare_digest(", "if bool(",
     "tests/local_cloud/test_permissions.py"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "text", "test"), [(g[1], g[2], g[4]) for g in GUARDS], ids=[g[0] for g in GUARDS])
def test_text_and_test_of_each_guard_exist(file: str, text: str, test: str) -> None:
    assert text in (REPOSITORY / file).read_text(encoding="utf-8")
    path, _, name = test.partition("::")
    assert (REPOSITORY / path).exists()
    if name:
        assert re.search(rf"def \w*{name}", (REPOSITORY / path).read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(("file", "text", "instead", "test"), [g[1:] for g in GUARDS], ids=[g[0] for g in GUARDS])
def test_removed_guard_fails_a_test(file: str, text: str, instead: str, test: str, tmp_path: Path) -> None:
    for part in PARTS:
        source, target = REPOSITORY / part, tmp_path / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    guarded = (tmp_path / file).read_text()
    assert text in guarded, f"{file} has no {text!r} any more: update GUARDS"
    (tmp_path / file).write_text(guarded.replace(text, instead))
    path, _, name = test.partition("::")
    chosen = ["-m", "not machine", "-k", name] if name else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", path, *chosen],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1, f"ended with {done.returncode}, where 1 is a test that fails:\n{done.stdout[-2000:]}"
