"""A stack with a domain and tls acme gets a certificate automatically. The next machine of the stack requests no
certificate.

The certificate authority is Pebble, which runs on this host. Pebble resolves the machine's name with the record that
the stack wrote to its hosted zone, and connects through the security group. The clients resolve the machine's name with
a name server that serves this hosted zone. The test changes only one thing on the machine: the test adds Pebble to the
list of trusted authorities.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlflow_host.boot import private_ca
from scripts.local_cloud import LocalCloud, namespaces
from scripts.rehearsal.status_document import PIECES
from tests.journey.test_public_certificate import DOMAIN, ask, names_of
from tests.support.authority import name_server, pebble
from tests.support.servers import SCRIPTS, own_stack, run

pytestmark = [
    pytest.mark.machine,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("pebble"), reason="pebble is not installed (scripts/prepare.sh installs it)"),
]

STACK = "domain"
DIRECTORY = 14001
NAMES = ("127.10.255.53", 53)
"""Address and port of the clients' name server. The port is 53, because resolvers use no other port."""

CLIENT = """
import mlflow
client = mlflow.MlflowClient()
run = client.create_run("0").info
client.log_text(run.run_id, "found by its name", "note.txt")
print(mlflow.artifacts.load_text(f"{run.artifact_uri}/note.txt"))
"""

Person = Callable[..., str]
"""A function that runs a command as a user whose resolver serves the hosted zone, and returns the command's output."""


def test_stack_with_a_domain_gets_a_certificate_and_its_next_machine_requests_none(
    cloud: LocalCloud, image: Mapping[str, Any], tmp_path: Path
) -> None:
    own = private_ca.ensure(("127.0.0.1",), tmp_path / "pebble")
    with hosted_zone(cloud) as zone, own_stack(cloud, STACK), name_server(NAMES, addresses(cloud, zone)):
        with pebble(tmp_path, own, NAMES, directory=DIRECTORY) as root, trusting(cloud, own.ca.read_text()):
            issuer = root()
            person = user_with_the_zones_resolver(tmp_path, issuer)
            settings = {
                "domainName": DOMAIN,
                "hostedZoneId": zone,
                "tls": "acme",
                "acmeDirectory": f"https://127.0.0.1:{DIRECTORY}/dir",
            }
            first = launched(person, image["ami_id"], **settings)
        trusted = ssl.create_default_context(cadata=issuer)
        status, headers, certificate = ask(first["public_ip"], trusted)
        assert (first["url"], status, names_of(certificate)) == (f"https://{DOMAIN}", 200, [DOMAIN])
        assert headers["strict-transport-security"].startswith("max-age=")

        exports = json.loads(person(sys.executable, str(SCRIPTS / "connect.py"), "--json"))
        login = {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}
        assert set(exports) == {*login, *PIECES, "REQUESTS_CA_BUNDLE"}  # REQUESTS_CA_BUNDLE is needed for the local S3
        assert person(sys.executable, "-W", "ignore", "-c", CLIENT, **exports).split("\n")[-2] == "found by its name"
        user = f"{exports['MLFLOW_TRACKING_USERNAME']}:{exports['MLFLOW_TRACKING_PASSWORD']}"
        page = person("curl", "-sSf", "--noproxy", "*", "--config", "-", f"https://{DOMAIN}/", given=f"user = {user}")
        assert "<title>MLflow</title>" in page

        # Pebble is stopped. The second machine uses the certificate on the data volume.
        second = launched(person, image["ami_id"], jobExecution="true")
        assert second["instance_id"] != first["instance_id"]
        assert ask(second["public_ip"], trusted)[2] == certificate
        assert person(sys.executable, "-W", "ignore", "-c", CLIENT, **exports).split("\n")[-2] == "found by its name"


def launched(person: Person, ami: str, **settings: str) -> dict[str, Any]:
    """Run `rehearse.py up` and return its output. The command waits until a login at the server's name succeeds."""
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    found: dict[str, Any] = json.loads(
        person(sys.executable, str(SCRIPTS / "rehearse.py"), "up", "--ami", ami, *words, "--json")
    )
    return found


@contextmanager
def hosted_zone(cloud: LocalCloud) -> Iterator[str]:
    """Create a hosted zone that contains the domain, and yield the zone's ID."""
    route53 = cloud.client("route53")
    made = route53.create_hosted_zone(Name=DOMAIN.partition(".")[2], CallerReference=str(time.time_ns()))
    zone = made["HostedZone"]["Id"].rpartition("/")[2]
    try:
        yield zone
    finally:
        route53.delete_hosted_zone(Id=zone)


def addresses(cloud: LocalCloud, zone: str) -> Callable[[str], str | None]:
    """Return a function that returns the address of a name in the hosted zone, or None."""
    route53 = cloud.client("route53")

    def address_of(name: str) -> str | None:
        records = route53.list_resource_record_sets(HostedZoneId=zone)["ResourceRecordSets"]
        found = [each for each in records if (each["Name"], each["Type"]) == (f"{name}.", "A")]
        return str(found[0]["ResourceRecords"][0]["Value"]) if found else None

    return address_of


def user_with_the_zones_resolver(folder: Path, root: str) -> Person:
    """Return a function that runs commands as a user whose name server serves the hosted zone. The user trusts Pebble's
    root, like clients trust Let's Encrypt's root."""
    resolver, trusted = folder / "resolv.conf", folder / "root.pem"
    resolver.write_text(f"nameserver {NAMES[0]}\n")
    trusted.write_text(root)
    prefix = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/resolv.conf && exec "$@"', str(resolver)]
    variables = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")

    def person(*command: str, given: str | None = None, **exports: str) -> str:
        environment = {**os.environ, **dict.fromkeys(variables, str(trusted)), "NO_PROXY": "*", **exports}
        return run([*prefix, *command], env=environment, given=given).stdout

    return person


@contextmanager
def trusting(cloud: LocalCloud, authority: str) -> Iterator[None]:
    """During the `with` block, the stack's machine trusts Pebble, and reaches Pebble's ACME directory at the address
    that this host uses."""
    done = threading.Event()
    preparing = threading.Thread(target=prepare_machine, args=(cloud, authority, done))
    preparing.start()
    try:
        yield
    finally:
        done.set()
        preparing.join()


def prepare_machine(cloud: LocalCloud, authority: str, done: threading.Event) -> None:
    while not (instance := running_machine(cloud)):
        if done.wait(0.2):
            return
    inside = cloud.shell_command(instance)
    with forwarded(namespaces.of_process(int(inside[inside.index("--target") + 1]))):
        cloud.exec(instance, ["sh", "-c", "cat >>/etc/ssl/certs/ca-certificates.crt"], input=authority)
        done.wait()


def running_machine(cloud: LocalCloud) -> str | None:
    wanted = [
        {"Name": "tag:mlflow-ami:stack", "Values": [STACK]},
        {"Name": "instance-state-name", "Values": ["running"]},
    ]
    found = cloud.client("ec2").describe_instances(Filters=wanted)["Reservations"]
    return found[0]["Instances"][0]["InstanceId"] if found else None


@contextmanager
def forwarded(namespace: int) -> Iterator[None]:
    """Make Pebble's ACME directory available in a network namespace, at the address that this host uses. Closes the
    descriptor `namespace`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "scripts.local_cloud.port_forwarder", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=SCRIPTS.parent)
    with ours, namespaces.listener("127.0.0.1", DIRECTORY, namespace) as listening:
        order = {"op": "open", "id": "pebble", "cidrs": None, "target": ["127.0.0.1", DIRECTORY], "keep_source": False}
        socket.send_fds(ours, [json.dumps(order).encode()], [listening.fileno()])
        try:
            yield
        finally:
            os.close(namespace)
    process.wait(10)
