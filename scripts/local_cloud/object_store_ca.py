"""The certificate authority of a local cloud, the certificate for the HTTPS port of the object store, and the
certificate for the endpoints of all databases."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from scripts.local_cloud.layout import REGION, Places, write_atomically

ADDRESS = "127.0.0.1"
DATABASE_DOMAIN = f"aaaaaaaaaa.{REGION}.rds.amazonaws.com"
"""The domain of the endpoints that moto gives to databases."""
VALID_DAYS = 3650


def authority_file(places: Places) -> Path:
    """The CA's certificate, with which clients verify the object store. The private key of the CA is not stored."""
    return places.root / "authority.pem"


def certificate_file(places: Places) -> Path:
    return places.root / "object-store-certificate.pem"


def key_file(places: Places) -> Path:
    return places.root / "object-store-certificate.key"


def database_certificate_file(places: Places) -> Path:
    """The certificate for the endpoints of databases. It does not exist in clouds that were made before databases."""
    return places.root / "database-certificate.pem"


def database_key_file(places: Places) -> Path:
    return places.root / "database-certificate.key"


def ensure(places: Places) -> Path:
    """Return the path of the CA's certificate. If the object store has no certificate, first create all certificates.
    The object store's certificate is written last, as the sign that all files exist."""
    if certificate_file(places).exists():
        return authority_file(places)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _signed("mlflow-ami local cloud", authority_key, "mlflow-ami local cloud", authority_key, None)
    write_atomically(authority_file(places), _pem(authority))
    # Some clients compare an IP address only with the certificate's DNS names, so ADDRESS is also a DNS name.
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(ADDRESS)), x509.DNSName(ADDRESS)])
    endpoints = f"*.{DATABASE_DOMAIN}"
    _issue(
        authority_key,
        endpoints,
        x509.SubjectAlternativeName([x509.DNSName(endpoints)]),
        database_key_file(places),
        database_certificate_file(places),
    )
    _issue(authority_key, ADDRESS, names, key_file(places), certificate_file(places))
    return authority_file(places)


def _issue(
    authority_key: ec.EllipticCurvePrivateKey,
    subject: str,
    names: x509.SubjectAlternativeName,
    key_path: Path,
    certificate_path: Path,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _signed("mlflow-ami local cloud", authority_key, subject, key, names)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomically(key_path, private)
    write_atomically(certificate_path, _pem(certificate))


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _signed(
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    subject: str,
    subject_key: ec.EllipticCurvePrivateKey,
    names: x509.SubjectAlternativeName | None,
) -> x509.Certificate:
    """Return a signed certificate for `names`. If `names` is None, return a CA's certificate."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .public_key(subject_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(subject_key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=names is None), critical=True)
    )
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """Return the extension KeyUsage. Python 3.13 and later require this extension in an authority's certificate."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
