"""A machine with a domain requests a public certificate automatically and renews it. If the certificate authority
issues no certificate, the machine continues to serve.

The certificate authority is Pebble, Let's Encrypt's test server. Pebble and its name server run on this host, in the
network namespace of the machine, where every name resolves to the machine. The machine's certbot is configured to trust
Pebble.
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

import pytest
from cryptography import x509

from mlflow_host.boot import private_ca
from mlflow_host.boot.private_ca import Certificates
from scripts.local_cloud import LocalCloud
from tests.support.authority import pebble
from tests.support.servers import REPOSITORY, Server

pytestmark = [
    pytest.mark.machine,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("pebble"), reason="pebble is not installed (scripts/prepare.sh installs it)"),
]

DOMAIN = "mlflow.example.test"
DIRECTORY, NAMES = 14000, 8053
DAY = 24 * 3600
DROP_IN = "/run/systemd/system/mlflow-host-certificates.service.d"


def test_public_certificate_is_issued_renewed_and_not_missed_while_there_is_none(
    server: Server, cloud: LocalCloud, tmp_path: Path
) -> None:
    own = private_ca.ensure(("127.0.0.1",), tmp_path / "pebble")
    private = ssl.create_default_context(cafile=server.server_certificate)
    host = urllib.parse.urlsplit(server.url).netloc
    with domain_set(server, cloud, own.ca.read_text()):
        until(lambda: "no public certificate was issued" in message(server, cloud), 60, lambda: message(server, cloud))
        assert "127.0.0.1" in message(server, cloud), "it does not name the authority that did not answer"
        status, headers, _ = ask(host, private)
        assert status == 200 and "strict-transport-security" not in headers

        with pebble_beside(server, cloud, own, tmp_path) as root:
            machine(cloud, server, "systemctl restart mlflow-host-certificates")
            until(
                lambda: message(server, cloud).endswith("with a public certificate"), 90, lambda: journal(server, cloud)
            )
            public = ssl.create_default_context(cadata=root())
            # nginx reloads after a signal, so it serves the public certificate with a delay.
            until(lambda: verifies(host, public), 15, lambda: "the private certificate is still served")
            status, headers, first = ask(host, public)
            assert status == 200 and headers["strict-transport-security"].startswith("max-age=")
            assert names_of(first) == [DOMAIN]

            # The certificate is valid for ten days, so it is due for renewal at once.
            machine(cloud, server, "systemctl restart mlflow-host-certificates")
            until(lambda: ask(host, public)[2].serial_number != first.serial_number, 90, lambda: journal(server, cloud))
            assert "mlflow-host-certificates.timer" in machine(cloud, server, "systemctl list-timers --no-legend")

        # Pebble is stopped. The public certificate is on the data volume and stays in use.
        machine(cloud, server, "systemctl restart mlflow-host-certificates")
        until(lambda: "no public certificate was issued" in message(server, cloud), 60, lambda: message(server, cloud))
        assert ask(host, public)[0] == 200
    until(lambda: verifies(host, private, host), 60, lambda: "the private certificate is not back")


@contextmanager
def domain_set(server: Server, cloud: LocalCloud, authority: str) -> Iterator[None]:
    """During the `with` block, the machine has the launch document of a stack with domainName and tls acme."""
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
    machine(
        cloud, server, "systemctl stop mlflow-host-certificates; /opt/mlflow/bin/python -m mlflow_host.boot.configure"
    )


@contextmanager
def pebble_beside(server: Server, cloud: LocalCloud, own: Certificates, folder: Path) -> Iterator[Callable[[], str]]:
    """Run Pebble in the machine's network. Yields a function that returns Pebble's root certificate."""
    inside = cloud.shell_command(server.instance_id)
    network = ["nsenter", f"--net=/proc/{inside[inside.index('--target') + 1]}/ns/net", "--"]
    names = subprocess.Popen([*network, sys.executable, str(REPOSITORY / "tests/support/authority.py"), str(NAMES)])
    try:
        with pebble(folder, own, ("127.0.0.1", NAMES), network=network, certificateValidityPeriod=10 * DAY) as root:
            yield root
    finally:
        names.terminate()
        names.wait(10)


def ask(address: str, trusted: ssl.SSLContext, name: str = DOMAIN) -> tuple[int, dict[str, str], x509.Certificate]:
    """Request /healthz under a name and verify the certificate. Returns status, headers and certificate."""
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


def verifies(address: str, trusted: ssl.SSLContext, name: str = DOMAIN) -> bool:
    try:
        return ask(address, trusted, name)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def names_of(certificate: x509.Certificate) -> list[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return found.get_values_for_type(x509.DNSName)


def message(server: Server, cloud: LocalCloud) -> str:
    """Return the status page's message about the certificate."""
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
