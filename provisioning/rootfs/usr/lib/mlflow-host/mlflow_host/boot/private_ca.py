"""Create the stack's private certificate authority (CA), and sign the server's certificate with it.

The CA and the certificate are on the data volume, so clients that trust the CA also trust the server after every
upgrade and rollback. The CA signs only certificates of this server.

Files below the given directory (default /srv/mlflow/certificates), all PEM:
    ca.crt  ca.key          the CA's certificate and key; only root can read the key
    server.crt  server.key  the server's certificate (with the names as subject alternative names) and its key
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DIRECTORY = Path("/srv/mlflow/certificates")
CA_LIFETIME = datetime.timedelta(days=3650)
# Apple and Chromium accept server certificates of at most 398 days (CA/Browser Forum baseline requirements 6.3.2,
# before the reductions of 2026). A certificate from Let's Encrypt is valid for 90 days, and clients renew it 30 days
# before the end.
SERVER_LIFETIME = datetime.timedelta(days=90)
RENEW_BEFORE = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Certificates:
    ca: Path
    certificate: Path
    key: Path
    renewed: bool  # True if this call wrote a new server certificate; nginx must then reload


def ensure(names: tuple[str, ...], directory: Path = DIRECTORY, now: datetime.datetime | None = None) -> Certificates:
    """Create the authority if it is missing. Create a new server certificate if the certificate is missing or invalid,
    has other names, was signed by another authority, or expires within RENEW_BEFORE. Idempotent.

    `names` are the server's host names and IP addresses. The first name is the host in the server's URL. Raises
    ValueError if `names` is empty. Each file is written under a temporary name and then renamed. The key is written
    before the certificate.
    """
    if not names:
        raise ValueError("a server certificate needs at least one name")
    now = now or datetime.datetime.now(datetime.UTC)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    ca_key, ca = _authority(directory, names[0], now)
    certificate_path, key_path = directory / "server.crt", directory / "server.key"
    renewed = not _still_good(certificate_path, key_path, ca, names, now)
    if renewed:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _sign_server(names, key, ca_key, ca, now)
        _write(key_path, _private_pem(key), 0o600)
        _write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return Certificates(directory / "ca.crt", certificate_path, key_path, renewed)


def _authority(
    directory: Path, first_name: str, now: datetime.datetime
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key_path, certificate_path = directory / "ca.key", directory / "ca.crt"
    if certificate_path.exists():
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{key_path} has no elliptic-curve key; move {directory} away to create a new authority")
        if certificate.not_valid_after_utc - now > SERVER_LIFETIME:
            return key, certificate
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "mlflow-ami private authority"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"mlflow-ami {first_name}"[:64]),
        ]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    # The certificate is written after the key, so a key exists for every certificate.
    _write(key_path, _private_pem(key), 0o600)
    _write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return key, certificate


def _sign_server(
    names: tuple[str, ...],
    key: ec.EllipticCurvePrivateKey,
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    now: datetime.datetime,
) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + SERVER_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _still_good(
    certificate_path: Path, key_path: Path, ca: x509.Certificate, names: tuple[str, ...], now: datetime.datetime
) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        certificate.verify_directly_issued_by(ca)
        served = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    return (
        certificate.public_key() == key.public_key()
        and set(served) == {_general_name(name) for name in names}
        and certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc - RENEW_BEFORE
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    beside = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
