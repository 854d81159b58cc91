"""Request a public certificate with certbot (ACME, http-01 challenge), and store the certificate on the data volume.

certbot writes its response to a challenge into a folder that nginx serves on port 80. The certificate authority must
be able to connect to port 80 of each requested host name. The ACME account and the certificates stay on the data
volume when the machine is replaced, so the new machine does not request new certificates.
"""

from __future__ import annotations

import datetime
import subprocess
from itertools import pairwise
from pathlib import Path

from cryptography import x509

from mlflow_host.contract.launch import Web, host_is_public_name
from mlflow_host.machine import nginx
from mlflow_host.machine.config import DATA

HOME = DATA / "certificates" / "acme"
NAME = "mlflow"
RENEW_BEFORE = datetime.timedelta(days=30)
SECONDS = 300
"""Timeout of one attempt. A certificate authority needs some seconds per challenge."""


class NotIssued(Exception):
    """The authority issued no certificate. The message is one line with the reason."""


def issued(
    names: list[str], home: Path = HOME, *, within: datetime.timedelta = datetime.timedelta()
) -> nginx.Certificate | None:
    """The stored certificate, if it has exactly these names and stays valid for longer than `within`; else None."""
    live = home / "live" / NAME
    try:
        certificate = x509.load_pem_x509_certificate((live / "fullchain.pem").read_bytes())
        served = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return None
    lasts = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    if lasts <= within or set(served.get_values_for_type(x509.DNSName)) != set(names):
        return None
    return nginx.Certificate(live / "fullchain.pem", live / "privkey.pem", trusted=True)


def public_names(settings: Web) -> list[str]:
    """The host names for which a public authority can issue a certificate. IP addresses and names without a dot are
    left out."""
    return [name for name in settings.hostnames if host_is_public_name(name)]


def obtain(settings: Web, home: Path = HOME, challenges: Path = nginx.CHALLENGES) -> nginx.Certificate:
    """Request a new certificate, or renew the stored certificate. Raises NotIssued."""
    names = public_names(settings)
    contact = ["--email", settings.acme_email] if settings.acme_email else ["--register-unsafely-without-email"]
    directory = ["--server", settings.acme_directory] if settings.acme_directory else []
    command = ["certbot", "certonly", "--non-interactive", "--agree-tos", *contact, *directory]
    command += ["--webroot", "--webroot-path", str(challenges), "--cert-name", NAME, "--key-type", "ecdsa"]
    command += ["--renew-with-new-domains", "--keep-until-expiring", "--max-log-backups", "5"]
    command += [f"--config-dir={home}", f"--work-dir={home}/work", f"--logs-dir={home}/logs"]
    command += [argument for name in names for argument in ("--domain", name)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotIssued(f"certbot failed ({error})") from None
    certificate = issued(names, home)
    if done.returncode or certificate is None:
        raise NotIssued(reason(done.stdout + done.stderr))
    return certificate


def reason(output: str) -> str:
    """The cause of a failure, from certbot's output. The authority's message is preferred."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    details = [line.removeprefix("Detail:").strip() for line in lines if line.startswith("Detail:")]
    # certbot prints the line "An unexpected error occurred", and the cause in the next line.
    named = [after for line, after in pairwise(lines) if line.startswith("An unexpected error occurred")]
    errors = [line for line in lines if any(word in line.lower() for word in ("error", "unable", "failed"))]
    return (details or named or errors or lines or ["certbot gives no reason"])[0][:300]
