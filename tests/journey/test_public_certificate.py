"""A machine with a domain gets a public certificate by itself, renews it, and serves on while it cannot have one.

The authority is Pebble, Let's Encrypt's own for tests. It and its name server run on this host, in the network of the
machine, where every name is the machine. The machine's certbot is told to trust Pebble, which no other setting does.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from local_cloud import LocalCloud
from mlflow_host import certificates
from servers import REPOSITORY, Server

pytestmark = [
    pytest.mark.machine,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("pebble"), reason="pebble is not installed (scripts/prepare.sh does)"),
]

DOMAIN = "mlflow.example.test"
DIRECTORY, MANAGEMENT, NAMES = 14000, 15000, 8053
DROP_IN = "/run/systemd/system/mlflow-host-certificates.service.d"


def test_public_certificate_is_issued_renewed_and_not_missed_while_there_is_none(
    server: Server, cloud: LocalCloud, tmp_path: Path
) -> None:
    own = certificates.ensure(("127.0.0.1",), tmp_path / "pebble")
    private = ssl.create_default_context(cafile=server.server_certificate)
    with domain_set(server, cloud, own.ca.read_text()):
        until(lambda: "no public one was issued" in message(server, cloud), 60, lambda: message(server, cloud))
        assert "127.0.0.1" in message(server, cloud), "it does not say which authority did not answer"
        status, headers, _ = ask(server, private)
        assert status == 200 and "strict-transport-security" not in headers

        with pebble(server, cloud, own, tmp_path) as roots:
            machine(cloud, server, "systemctl restart mlflow-host-certificates")
            until(
                lambda: message(server, cloud).endswith("with a public certificate"), 90, lambda: journal(server, cloud)
            )
            public = ssl.create_default_context(cadata=roots())
            # nginx is told by a signal, and shows the new one from some moment after it.
            until(lambda: verifies(server, public), 15, lambda: "the private certificate is still served")
            status, headers, first = ask(server, public)
            assert status == 200 and headers["strict-transport-security"].startswith("max-age=")
            assert names_of(first) == [DOMAIN]

            # It is for ten days, so it is within the month before its end at once.
            machine(cloud, server, "systemctl restart mlflow-host-certificates")
            until(
                lambda: ask(server, public)[2].serial_number != first.serial_number, 90, lambda: journal(server, cloud)
            )
            assert "mlflow-host-certificates.timer" in machine(cloud, server, "systemctl list-timers --no-legend")

        # The authority is gone; what it issued is on the data volume and serves on.
        machine(cloud, server, "systemctl restart mlflow-host-certificates")
        until(lambda: "no public one was issued" in message(server, cloud), 60, lambda: message(server, cloud))
        assert ask(server, public)[0] == 200
    host = urllib.parse.urlsplit(server.url).netloc
    until(lambda: verifies(server, private, host), 60, lambda: "the private certificate is not back")


@contextmanager
def domain_set(server: Server, cloud: LocalCloud, authority: str) -> Iterator[None]:
    """While the block runs, the machine has the launch document of a stack with domainName and tls acme."""
    before = machine(cloud, server, "cat /etc/mlflow-host/launch.toml")
    host = urllib.parse.urlsplit(server.url).netloc
    wanted = before.replace(f'hostnames = ["{host}"]', f'hostnames = ["{DOMAIN}", "{host}"]')
    wanted = wanted.replace('tls = "private"', f'tls = "acme"\nacme_directory = "https://127.0.0.1:{DIRECTORY}/dir"')
    assert DOMAIN in wanted and "acme_directory" in wanted
    trust = f"[Service]\nEnvironment=REQUESTS_CA_BUNDLE={DROP_IN}/pebble.pem\n"
    try:
        machine(cloud, server, f"mkdir -p {DROP_IN}; cat >{DROP_IN}/pebble.pem", authority)
        machine(cloud, server, f"cat >{DROP_IN}/pebble.conf; systemctl daemon-reload", trust)
        configure(server, cloud, wanted)
        yield
    finally:
        machine(cloud, server, f"rm -rf {DROP_IN}; systemctl daemon-reload; rm -rf /srv/mlflow/certificates/acme")
        configure(server, cloud, before)


def configure(server: Server, cloud: LocalCloud, document: str) -> None:
    machine(cloud, server, "cat >/etc/mlflow-host/launch.toml", document)
    machine(cloud, server, "systemctl stop mlflow-host-certificates; /opt/mlflow/bin/python -m mlflow_host.configure")


@contextmanager
def pebble(server: Server, cloud: LocalCloud, own: Any, folder: Path) -> Iterator[Callable[[], str]]:
    """Pebble in the machine's network; yields what asks it for its root certificates."""
    settings = {
        "listenAddress": f"127.0.0.1:{DIRECTORY}",
        "managementListenAddress": f"127.0.0.1:{MANAGEMENT}",
        "certificate": str(own.certificate),
        "privateKey": str(own.key),
        "httpPort": 80,
        "tlsPort": 443,
        "certificateValidityPeriod": 10 * 24 * 3600,
    }
    (folder / "pebble.json").write_text(json.dumps({"pebble": settings}))
    inside = cloud.shell_command(server.instance_id)
    network = ["nsenter", f"--net=/proc/{inside[inside.index('--target') + 1]}/ns/net", "--"]
    commands = [
        [sys.executable, str(REPOSITORY / "tests" / "authority.py"), str(NAMES)],
        ["pebble", "-config", str(folder / "pebble.json"), "-dnsserver", f"127.0.0.1:{NAMES}"],
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0", "PATH": "/usr/bin:/bin:/usr/sbin"}
    running = [subprocess.Popen([*network, *command], env=environment, **quiet) for command in commands]  # type: ignore[call-overload]

    def roots() -> str:
        ask_for = ["curl", "-sSf", "--cacert", str(own.ca), f"https://127.0.0.1:{MANAGEMENT}/roots/0"]
        return subprocess.run([*network, *ask_for], capture_output=True, text=True, check=True).stdout

    def answers() -> bool:
        try:
            return bool(roots())
        except subprocess.CalledProcessError:
            return False

    try:
        until(answers, 30, lambda: "pebble does not answer")
        yield roots
    finally:
        for process in running:
            process.terminate()
            process.wait(10)


def ask(server: Server, trusted: ssl.SSLContext, name: str = DOMAIN) -> tuple[int, dict[str, str], x509.Certificate]:
    """/healthz under a name, verified: status, headers, and the certificate it was served with."""
    address = urllib.parse.urlsplit(server.url).netloc
    with (
        socket.create_connection((address, 443), timeout=10) as plain,
        trusted.wrap_socket(plain, server_hostname=name) as connection,
    ):
        certificate = connection.getpeercert(binary_form=True)
        assert certificate is not None
        connection.sendall(f"GET /healthz HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        headers = {key.lower(): value for key, value in answer.getheaders()}
        return answer.status, headers, x509.load_der_x509_certificate(certificate)


def verifies(server: Server, trusted: ssl.SSLContext, name: str = DOMAIN) -> bool:
    try:
        return ask(server, trusted, name)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def names_of(certificate: x509.Certificate) -> list[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return found.get_values_for_type(x509.DNSName)


def message(server: Server, cloud: LocalCloud) -> str:
    """What the status page says of the certificate."""
    page = json.loads(machine(cloud, server, "cat /run/mlflow-host/web/status.json"))
    return str(next(step["message"] for step in page["steps"] if step["step"] == "certificates"))


def journal(server: Server, cloud: LocalCloud) -> str:
    return machine(cloud, server, "journalctl --no-pager --lines=30 --unit=mlflow-host-certificates")


def machine(cloud: LocalCloud, server: Server, script: str, given: str | None = None) -> str:
    done = cloud.exec(server.instance_id, ["sh", "-c", script], input=given)
    assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
    return done.stdout


def until(true: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {otherwise()}"
        time.sleep(0.5)
