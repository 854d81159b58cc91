"""Boot step "certificates", and its daily timer: a certificate for the names served, and the encrypted site.

The authority and the certificates are on the data volume, so a client that trusts them does so across images.
"""

from __future__ import annotations

from collections.abc import Callable

from mlflow_host import aws, certificates, config, web
from mlflow_host.config import HostConfig
from mlflow_host.status import StepFailed, step


def main() -> None:
    host = config.load()
    if host.launch.web.tls == "off":
        return
    with step("certificates") as s:
        try:
            issued = certificates.ensure(host.launch.web.hostnames)
        except (OSError, ValueError) as error:
            raise StepFailed(f"no certificate for {host.url} can be made: {error}") from None
        if host.launch.web.authority_parameter:
            publish(host, issued.ca.read_text(), s.say)
        web.put_site(host, web.Certificate(issued.certificate, issued.key, trusted=False))
        s.say(f"serving {host.url}")


def publish(host: HostConfig, authority: str, say: Callable[[str], None]) -> None:
    """Put the authority's certificate where clients of the stack look for it. A parameter that cannot be written does
    not keep the server from serving: the certificate is the same, and clients that have it need no other."""
    name = host.launch.web.authority_parameter
    try:
        aws.put_parameter(host.launch, name, authority, aws.role_keys())
    except (aws.NoRole, aws.Unreachable, aws.Refused) as error:
        say(f"the authority could not be published as {name} ({error}); clients take it from the machine")


if __name__ == "__main__":
    main()
