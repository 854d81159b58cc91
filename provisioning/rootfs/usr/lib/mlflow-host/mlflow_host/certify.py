"""The certificate for the names served, and the encrypted site: started by `configure`, and by a timer for renewal.

The authority and the certificates are on the data volume, so a client that trusts them does so across images. The
private certificate serves at once; with ACME it goes on serving until, and whenever, the public one cannot be had.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mlflow_host import acme, aws, certificates, config, reader, web
from mlflow_host.config import HostConfig
from mlflow_host.status import StepFailed, step

ATTEMPTS_AFTER = (0, 60, 300, 900)
"""Seconds before each attempt at a public certificate: the address and its name may be younger than the machine. Let's
Encrypt takes five failures an hour; the timer goes on from there."""


def main() -> None:
    host = config.load()
    settings = host.launch.web
    if settings.tls == "off":
        return
    with step("certificates") as s:
        try:
            private = certificates.ensure(settings.hostnames)
        except (OSError, ValueError) as error:
            raise StepFailed(f"no certificate for {host.url} can be made: {error}") from None
        own = web.Certificate(private.certificate, private.key, trusted=False)
        public = acme.issued(acme.public_names(settings)) if settings.tls == "acme" else None
        web.put_site(host, public or own)
        s.say(f"serving {host.url}")
        if host.launch.postgres.cidrs:
            reader.put_certificate(private.certificate, private.key)
        if settings.authority_parameter:
            publish(host, private.ca.read_text(), s.say)
        if settings.tls == "acme" and not acme.issued(acme.public_names(settings), within=acme.RENEW_BEFORE):
            s.say(get_public(host, s.say))


def get_public(host: HostConfig, say: Callable[[str], None]) -> str:
    """Try for a public certificate and put it in service; the last word on how that went."""
    refusal = ""
    for seconds in ATTEMPTS_AFTER:
        time.sleep(seconds)
        try:
            web.put_site(host, acme.obtain(host.launch.web))
        except acme.NotIssued as error:
            refusal = f"serving {host.url} with the stack's own certificate: no public one was issued ({error})"
            say(refusal)
        else:
            return f"serving {host.url} with a public certificate"
    return refusal


def publish(host: HostConfig, authority: str, say: Callable[[str], None]) -> None:
    """Put the authority's certificate where clients of the stack look for it. A parameter that cannot be written does
    not keep the server from serving: the certificate is the same, and clients that have it need no other."""
    name, refusal = host.launch.web.authority_parameter, ""
    for seconds in (0, 1, 2, 4, 8, 16):
        time.sleep(seconds)
        try:
            return aws.put_parameter(host.launch, name, authority, aws.role_keys())
        except (aws.NoRole, aws.Unreachable, aws.Refused) as error:
            refusal = str(error)
    say(f"the authority could not be published as {name} ({refusal}); clients take it from the machine")


if __name__ == "__main__":
    main()
