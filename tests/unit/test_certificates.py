"""If the server certificate is renewed for new names or before its end, the private authority stays the same."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from functools import partial
from pathlib import Path

import pytest

from mlflow_host.boot import certificates, private_ca
from mlflow_host.contract import launch, sizing
from mlflow_host.machine import config, nginx, status
from tests.support.shipped_nginx import ROOTFS

NOW = datetime.datetime.now(datetime.UTC)
NAMES = ("127.0.0.1", "mlflow.example.com")


def handshake(issued: private_ca.Certificates, name: str, *, trusting: Path) -> str:
    """Connect a server with the certificate `issued` and a client that trusts only the authority in the file
    `trusting`, and return the TLS version."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(issued.certificate, issued.key)
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server_context.wrap_socket(theirs, server_side=True).close()
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        context = ssl.create_default_context(cafile=str(trusting))
        with context.wrap_socket(ours, server_hostname=name) as connection:
            return connection.version() or ""
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_trusts_the_authority_verifies_each_name(tmp_path: Path, name: str) -> None:
    issued = private_ca.ensure(NAMES, tmp_path)
    assert handshake(issued, name, trusting=issued.ca) == "TLSv1.3"


def test_a_name_that_is_not_served_is_refused(tmp_path: Path) -> None:
    issued = private_ca.ensure(NAMES, tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(issued, "elsewhere.example.com", trusting=issued.ca)


def test_another_stacks_authority_is_not_trusted(tmp_path: Path) -> None:
    issued, other = private_ca.ensure(NAMES, tmp_path / "a"), private_ca.ensure(NAMES, tmp_path / "b")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(issued, NAMES[0], trusting=other.ca)


def test_a_second_call_changes_nothing(tmp_path: Path) -> None:
    private_ca.ensure(NAMES, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert not private_ca.ensure(NAMES, tmp_path).renewed
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_new_names_renew_the_certificate_and_keep_the_authority(tmp_path: Path) -> None:
    ca = private_ca.ensure(NAMES, tmp_path).ca.read_bytes()
    issued = private_ca.ensure(("198.51.100.7",), tmp_path)
    assert issued.renewed
    assert issued.ca.read_bytes() == ca
    assert handshake(issued, "198.51.100.7", trusting=issued.ca)


@pytest.mark.parametrize(("days", "renewed"), [(59, False), (61, True), (1000, True)])
def test_certificate_is_renewed_thirty_days_before_its_end(tmp_path: Path, days: int, renewed: bool) -> None:
    private_ca.ensure(NAMES, tmp_path, now=NOW)
    later = NOW + datetime.timedelta(days=days)
    assert private_ca.ensure(NAMES, tmp_path, now=later).renewed is renewed


def test_an_authority_near_its_end_is_replaced(tmp_path: Path) -> None:
    first = private_ca.ensure(NAMES, tmp_path, now=NOW).ca.read_bytes()
    later = NOW + private_ca.CA_LIFETIME - datetime.timedelta(days=80)
    issued = private_ca.ensure(NAMES, tmp_path, now=later)
    assert issued.ca.read_bytes() != first
    assert issued.renewed


@pytest.mark.parametrize("victim", ["server.crt", "server.key"])
def test_damaged_or_missing_file_is_created_again(tmp_path: Path, victim: str) -> None:
    private_ca.ensure(NAMES, tmp_path)
    (tmp_path / victim).write_bytes(b"damaged")
    assert private_ca.ensure(NAMES, tmp_path).renewed
    (tmp_path / victim).unlink()
    issued = private_ca.ensure(NAMES, tmp_path)
    assert issued.renewed
    assert handshake(issued, NAMES[0], trusting=issued.ca)


def test_keys_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    private_ca.ensure(NAMES, tmp_path / "certificates")
    for key in ("ca.key", "server.key"):
        assert (tmp_path / "certificates" / key).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "certificates").stat().st_mode & 0o777 == 0o700


def test_certificate_without_names_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one name"):
        private_ca.ensure((), tmp_path)


@pytest.mark.parametrize(("configured", "served"), [(False, ["starting page", "configured", "site"]), (True, ["site"])])
def test_starting_page_has_the_certificate_while_the_machine_is_not_configured(
    configured: bool, served: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = launch.LaunchDocument(
        stack=launch.Stack("dev", "eu-central-1"),
        buckets=launch.Buckets("aaa", "mmm", "bbb"),
        credentials=launch.CredentialsParameter("/x"),
        data_volume=launch.DataVolume("vol-01234567"),
        web=launch.Web(NAMES, "private"),
    )
    happened: list[str] = []
    shown = private_ca.ensure(NAMES, tmp_path / "certificates")
    (tmp_path / "status").mkdir()

    def wait(name: str) -> None:
        happened.extend(["configured"] if not configured else [])

    def put(what: str, certificate: nginx.Certificate) -> None:
        assert (certificate.chain, certificate.key) == (shown.certificate, shown.key)
        happened.append(what)

    monkeypatch.setattr(config, "launch_document", lambda: document)
    monkeypatch.setattr(config, "load", lambda: config.host_config(document, sizing.size(sizing.MachineSize(2048, 2))))
    monkeypatch.setattr(private_ca, "ensure", lambda names: shown)
    monkeypatch.setattr(certificates, "is_done", lambda name: configured)
    monkeypatch.setattr(certificates, "wait_until_done", wait)
    monkeypatch.setattr(certificates, "step", lambda name: status.step(name, tmp_path))
    monkeypatch.setattr(nginx, "put_starting_certificate", lambda certificate: put("starting page", certificate))
    monkeypatch.setattr(nginx, "put_site", lambda host, certificate: put("site", certificate))
    certificates.main()
    assert happened == served


@pytest.mark.long
def test_nginx_is_reloaded_only_for_a_change_and_drained_before_a_reload_in_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = launch.LaunchDocument(
        stack=launch.Stack("dev", "eu-central-1"),
        buckets=launch.Buckets("aaa", "mmm", "bbb"),
        credentials=launch.CredentialsParameter("/x"),
        data_volume=launch.DataVolume("vol-01234567"),
        web=launch.Web(NAMES, "private"),
    )
    host = config.host_config(document, sizing.size(sizing.MachineSize(2048, 2)))
    stopping, drained = tmp_path / "stopping", []
    (tmp_path / "nginx").mkdir()
    render = partial(nginx.render_site, templates=ROOTFS / "usr/share/mlflow-host/templates")
    monkeypatch.setattr(nginx, "render_site", render)
    monkeypatch.setattr(nginx, "put_login_page", lambda host, run: None)
    monkeypatch.setattr(nginx, "reload", lambda: drained.append(stopping.exists()))
    monkeypatch.setattr(nginx, "reload_after_drain", partial(nginx.reload_after_drain, stopping))
    issued = private_ca.ensure(NAMES, tmp_path / "certificates", now=NOW - datetime.timedelta(days=61))
    certificate = nginx.Certificate(issued.certificate, issued.key, trusted=False)
    for _ in range(2):
        nginx.put_site(host, certificate, run=tmp_path)
    assert drained == [False], "the site replaces the starting page, and the second call changes nothing"
    assert private_ca.ensure(NAMES, tmp_path / "certificates").renewed
    nginx.put_site(host, certificate, run=tmp_path)
    assert drained == [False, True]

    def refuse() -> None:
        raise status.StepFailed("nginx does not accept the site")

    private_ca.ensure(("elsewhere.example.com",), tmp_path / "certificates")
    monkeypatch.setattr(nginx, "reload", refuse)
    before = (tmp_path / "nginx/site.conf").read_text()
    with pytest.raises(status.StepFailed):
        nginx.put_site(host, certificate, run=tmp_path)
    assert (tmp_path / "nginx/site.conf").read_text() == before and not stopping.exists()
