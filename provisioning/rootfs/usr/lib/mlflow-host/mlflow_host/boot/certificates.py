"""Unit `mlflow-host-certificates`: create or renew the server's certificate, and put the HTTPS site in service.
The boot step `configure` starts the unit at boot, and a timer starts the unit for renewals.

The private authority and the certificates are on the data volume, so clients still trust the server after a change of
the image. The server first uses the private certificate. With ACME, the server uses a public certificate after the ACME
authority has issued it, and returns to the private certificate if the public certificate expires.

After the data volume is mounted, the starting page uses the stack's certificate, so clients can read on the page why
the boot step `configure` failed. The HTTPS site replaces the starting page after `configure` has succeeded.
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
"""Seconds to wait before each request for a public certificate. The DNS record and the public address may be created
after the machine. Let's Encrypt allows five failures per hour. If all requests fail, the unit's timer starts the unit
again later."""


def main() -> None:
    settings = config.launch_document().web
    if settings.tls == "off":
        return
    if not is_done("configure"):
        with suppress(OSError, ValueError, StepFailed):  # the step `certificates` below reports this error
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
    """The public certificate if one was issued, else the stack's private certificate."""
    public = acme.issued(acme.public_names(settings)) if settings.tls == "acme" else None
    return public or nginx.Certificate(private.certificate, private.key, trusted=False)


def get_public(host: HostConfig, say: Callable[[str], None]) -> str:
    """Request a public certificate, and configure nginx to use it. Returns the sentence for the status page."""
    refusal = ""
    for seconds in ATTEMPTS_AFTER:
        time.sleep(seconds)
        try:
            nginx.put_site(host, acme.obtain(host.launch.web))
        except acme.NotIssued as error:
            refusal = f"serving {host.url} with the stack's own certificate: no public certificate was issued ({error})"
            say(refusal)
        else:
            return f"serving {host.url} with a public certificate"
    return refusal


def publish(host: HostConfig, authority: str, say: Callable[[str], None]) -> None:
    """Write the authority's certificate to the SSM parameter that clients read. A failure is logged but does not stop
    the boot, because existing clients already have the authority's certificate."""
    name, refusal = host.launch.web.authority_parameter, ""
    for seconds in (0, 1, 2, 4, 8, 16):
        time.sleep(seconds)
        try:
            return aws.put_parameter(host.launch, name, authority, aws.role_keys())
        except (aws.NoRole, aws.ServiceUnreachable, aws.ServiceError) as error:
            refusal = str(error)
    say(f"the CA certificate could not be written to {name} ({refusal}); clients can download it from the machine")


if __name__ == "__main__":
    main()
