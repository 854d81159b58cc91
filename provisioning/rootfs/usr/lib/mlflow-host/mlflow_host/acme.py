"""A certificate that every client trusts, by ACME http-01 with certbot, kept on the data volume.

certbot writes the answer to a challenge where nginx serves it on port 80; the authority has to reach that port under
the names asked for. Account and certificates are kept across images, so a replaced machine asks for nothing.
"""

from __future__ import annotations

import datetime
import subprocess
from itertools import pairwise
from pathlib import Path

from cryptography import x509

from mlflow_host import web
from mlflow_host.config import DATA
from mlflow_host.launch import Web, host_is_public_name

HOME = DATA / "certificates" / "acme"
NAME = "mlflow"
RENEW_BEFORE = datetime.timedelta(days=30)
SECONDS = 300
"""For one attempt; an authority takes a few to look at every challenge."""


class NotIssued(Exception):
    """The authority gave no certificate; says why in one line."""


def issued(
    names: list[str], home: Path = HOME, *, within: datetime.timedelta = datetime.timedelta()
) -> web.Certificate | None:
    """The certificate in hand, if it is for these names and lasts longer than `within`."""
    live = home / "live" / NAME
    try:
        certificate = x509.load_pem_x509_certificate((live / "fullchain.pem").read_bytes())
        served = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return None
    lasts = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    if lasts <= within or set(served.get_values_for_type(x509.DNSName)) != set(names):
        return None
    return web.Certificate(live / "fullchain.pem", live / "privkey.pem", trusted=True)


def public_names(settings: Web) -> list[str]:
    """Those of the names served that an authority certifies: no addresses, no names of one label."""
    return [name for name in settings.hostnames if host_is_public_name(name)]


def obtain(settings: Web, home: Path = HOME, challenges: Path = web.CHALLENGES) -> web.Certificate:
    """Ask for a certificate, or for its renewal. Raises NotIssued."""
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
        raise NotIssued(f"certbot did not end well ({error})") from None
    certificate = issued(names, home)
    if done.returncode or certificate is None:
        raise NotIssued(reason(done.stdout + done.stderr))
    return certificate


def reason(said: str) -> str:
    """What certbot's output gives as the cause: the authority's own words where there are some."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    details = [line.removeprefix("Detail:").strip() for line in lines if line.startswith("Detail:")]
    # certbot announces what it did not expect in one line and names it in the next.
    named = [after for line, after in pairwise(lines) if line.startswith("An unexpected error occurred")]
    errors = [line for line in lines if any(word in line.lower() for word in ("error", "unable", "failed"))]
    return (details or named or errors or lines or ["certbot gives no reason"])[0][:300]
