"""Issue a public certificate by ACME: certbot runs as in the image, with Pebble, Let's Encrypt's test authority."""

from __future__ import annotations

import datetime
import http.server
import shutil
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509

from mlflow_host.boot import acme, certificates, private_ca
from mlflow_host.contract import launch, sizing
from mlflow_host.machine import config, nginx
from tests.support.authority import name_server, pebble
from tests.support.services import free_port

DOMAIN = "mlflow.example.test"

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(
        not (shutil.which("pebble") and shutil.which("certbot")), reason="pebble and certbot are not installed"
    ),
]


@dataclass(frozen=True)
class Authority:
    directory: str
    challenges: Path
    """Folder with the challenge responses. A web server on another port stands in for port 80 of every host name and
    returns the files of this folder."""


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Authority]:
    """Run Pebble, a DNS server for Pebble, and a web server for the challenge responses."""
    own = private_ca.ensure(("127.0.0.1",), tmp_path / "pebble")
    port, challenge_port, names = free_port(), free_port(), ("127.0.0.1", free_port())
    challenges = tmp_path / "challenges"
    challenges.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(challenges))
    site = http.server.ThreadingHTTPServer(("127.0.0.1", challenge_port), handler)
    threading.Thread(target=site.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(own.ca))
    monkeypatch.setattr(acme, "SECONDS", 120)
    made = partial(pebble, management=free_port(), httpPort=challenge_port, tlsPort=free_port())
    try:
        with name_server(names, lambda name: "127.0.0.1"), made(tmp_path, own, names, directory=port):
            yield Authority(f"https://127.0.0.1:{port}/dir", challenges)
    finally:
        site.shutdown()
        site.server_close()


def settings_for(authority: Authority, *names: str) -> launch.Web:
    return launch.Web((*names, "52.1.2.3"), "acme", "ops@example.test", authority.directory)


def test_certificate_is_issued_kept_and_replaced_when_the_names_change(authority: Authority, tmp_path: Path) -> None:
    home = tmp_path / "acme"
    settings = settings_for(authority, DOMAIN)
    got = acme.obtain(settings, home, authority.challenges)
    assert got.trusted
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(got.chain, got.key)
    certificate = x509.load_pem_x509_certificate(got.chain.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [DOMAIN]
    assert got.key.stat().st_mode & 0o077 == 0
    assert acme.issued([DOMAIN], home) == got
    assert acme.issued([DOMAIN], home, within=datetime.timedelta(days=36_500)) is None
    assert acme.issued([DOMAIN, f"www.{DOMAIN}"], home) is None

    acme.obtain(settings, home, authority.challenges)
    assert x509.load_pem_x509_certificate(got.chain.read_bytes()) == certificate, "requested again without a reason"

    acme.obtain(settings_for(authority, DOMAIN, f"www.{DOMAIN}"), home, authority.challenges)
    assert acme.issued([DOMAIN, f"www.{DOMAIN}"], home)


def test_refusal_quotes_the_authority(authority: Authority, tmp_path: Path) -> None:
    elsewhere = tmp_path / "nobody-serves-this"
    elsewhere.mkdir()
    with pytest.raises(acme.NotIssued, match=r"Invalid response from|[Nn]on-200|not found|404"):
        acme.obtain(settings_for(authority, DOMAIN), tmp_path / "acme", elsewhere)
    assert acme.issued([DOMAIN], tmp_path / "acme") is None


def test_unreachable_authority_is_reported(tmp_path: Path) -> None:
    settings = launch.Web((DOMAIN,), "acme", "", "https://127.0.0.1:9/dir")
    with pytest.raises(acme.NotIssued, match=r"127\.0\.0\.1.*(refused|Max retries)"):
        acme.obtain(settings, tmp_path / "acme", tmp_path)


def test_addresses_use_the_private_certificate() -> None:
    settings = launch.Web((DOMAIN, "52.1.2.3", "2001:db8::1", "localhost"))
    assert acme.public_names(settings) == [DOMAIN]


# ── The step ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Machine:
    host: config.HostConfig
    sites: list[nginx.Certificate | None]
    said: list[str]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    document = launch.LaunchDocument(
        stack=launch.Stack("dev", "eu-central-1"),
        buckets=launch.Buckets("aaa", "mmm", "bbb"),
        credentials=launch.CredentialsParameter("/x"),
        data_volume=launch.DataVolume("vol-01234567"),
        web=launch.Web((DOMAIN,), "acme"),
    )
    host = config.host_config(document, sizing.size(sizing.MachineSize(2048, 2)))
    made = Machine(host, [], [])
    monkeypatch.setattr(nginx, "put_site", lambda host, certificate=None: made.sites.append(certificate))
    monkeypatch.setattr(certificates, "ATTEMPTS_AFTER", (0, 0, 0))
    return made


def test_private_certificate_is_used_until_a_public_one_is_issued(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(settings: launch.Web) -> nginx.Certificate:
        raise acme.NotIssued("DNS problem: NXDOMAIN")

    monkeypatch.setattr(acme, "obtain", refuse)
    last = certificates.get_public(machine.host, machine.said.append)
    assert machine.sites == []
    assert last == (
        f"serving https://{DOMAIN} with the stack's own certificate: "
        "no public certificate was issued (DNS problem: NXDOMAIN)"
    )
    assert machine.said == [last] * 3


def test_public_certificate_is_used_once_issued(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    issued = nginx.Certificate(Path("chain"), Path("key"), trusted=True)
    refusals = [acme.NotIssued("too early")]

    def obtain(settings: launch.Web) -> nginx.Certificate:
        if refusals:
            raise refusals.pop()
        return issued

    monkeypatch.setattr(acme, "obtain", obtain)
    assert (
        certificates.get_public(machine.host, machine.said.append)
        == f"serving https://{DOMAIN} with a public certificate"
    )
    assert machine.sites == [issued]
