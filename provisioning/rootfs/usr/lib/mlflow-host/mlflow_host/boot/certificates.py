"""Unit `mlflow-host-certificates`: the server's certificate, and the HTTPS site. `configure` starts it at boot, a timer
starts it for renewal.

The authority and the certificates are on the data volume, so clients trust them across images. The private certificate
is used first; with ACME it stays in use until a public one is issued, and again if the public one expires.

As soon as the data volume is mounted, the starting page uses the stack's certificate, so that clients can read why
`configure` failed. The site replaces the page once `configure` is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from mlflow_host.boot import acme, private_ca
from mlflow_host.contract.launch import Web
from mlflow_host.machine import aws, config, nginx
from mlflow_host.machine.config import HostConfig
from mlflow_host.machine.status import StepFailed, is_done, step, wait_until_done
from mlflow_host.postgres import reader_role

ATTEMPTS_AFTER = (0, 60, 300, 900)
"""Seconds before each attempt at a public certificate, because DNS record and address may be created after the machine.
Let's Encrypt allows five failures per hour; the timer makes later attempts."""


def main() -> None:
    settings = config.launch_document().web
    if settings.tls == "off":
        return
    if not is_done("configure"):
        with suppress(OSError, ValueError, StepFailed):  # the step below reports the same error
            nginx.put_starting_certificate(in_hand(settings, private_ca.ensure(settings.hostnames)))
    wait_until_done("configure")
    host = config.load()
    settings = host.launch.web
    with step("certificates") as s:
        try:
            private = private_ca.ensure(settings.hostnames)
        except (OSError, ValueError) as error:
            raise StepFailed(f"no certificate for {host.url} can be made: {error}") from None
        nginx.put_site(host, in_hand(settings, private))
        s.say(f"serving {host.url}")
        if host.launch.postgres.cidrs:
            reader_role.put_certificate(private.certificate, private.key)
        if settings.authority_parameter:
            publish(host, private.ca.read_text(), s.say)
        if settings.tls == "acme" and not acme.issued(acme.public_names(settings), within=acme.RENEW_BEFORE):
            s.say(get_public(host, s.say))


def in_hand(settings: Web, private: private_ca.Certificates) -> nginx.Certificate:
    """The public certificate if there is one, else the stack's own."""
    public = acme.issued(acme.public_names(settings)) if settings.tls == "acme" else None
    return public or nginx.Certificate(private.certificate, private.key, trusted=False)


def get_public(host: HostConfig, say: Callable[[str], None]) -> str:
    """Request a public certificate and use it; returns the sentence for the status page."""
    refusal = ""
    for seconds in ATTEMPTS_AFTER:
        time.sleep(seconds)
        try:
            nginx.put_site(host, acme.obtain(host.launch.web))
        except acme.NotIssued as error:
            refusal = f"serving {host.url} with the stack's own certificate: no public one was issued ({error})"
            say(refusal)
        else:
            return f"serving {host.url} with a public certificate"
    return refusal


def publish(host: HostConfig, authority: str, say: Callable[[str], None]) -> None:
    """Write the authority's certificate to the parameter that clients read. A failure is logged and does not stop the
    boot: clients that already have the certificate do not need it again."""
    name, refusal = host.launch.web.authority_parameter, ""
    for seconds in (0, 1, 2, 4, 8, 16):
        time.sleep(seconds)
        try:
            return aws.put_parameter(host.launch, name, authority, aws.role_keys())
        except (aws.NoRole, aws.ServiceUnreachable, aws.ServiceError) as error:
            refusal = str(error)
    say(f"the authority could not be published as {name} ({refusal}); clients take it from the machine")


if __name__ == "__main__":
    main()
