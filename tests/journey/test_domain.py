"""A stack with a domain and tls acme gets a certificate automatically, and the next machine requests none.

The authority is Pebble, on this host: it resolves the machine's name by the record that the stack wrote to its hosted
zone, and connects through the security group. The clients do the same, with a name server that serves the zone. The
only change on the machine is that its list of authorities contains Pebble.
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
from scripts.rehearsal.status import PIECES
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
"""Address and port of the clients' name server: resolvers use only port 53."""

CLIENT = """
import mlflow
client = mlflow.MlflowClient()
run = client.create_run("0").info
client.log_text(run.run_id, "found by its name", "note.txt")
print(mlflow.artifacts.load_text(f"{run.artifact_uri}/note.txt"))
"""

Person = Callable[..., str]
"""Runs a command as a user whose resolver knows the zone; returns its output."""


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
        assert set(exports) == {*login, *PIECES, "REQUESTS_CA_BUNDLE"}  # the last one for the local S3
        assert person(sys.executable, "-W", "ignore", "-c", CLIENT, **exports).split("\n")[-2] == "found by its name"
        user = f"{exports['MLFLOW_TRACKING_USERNAME']}:{exports['MLFLOW_TRACKING_PASSWORD']}"
        page = person("curl", "-sSf", "--noproxy", "*", "--config", "-", f"https://{DOMAIN}/", given=f"user = {user}")
        assert "<title>MLflow</title>" in page

        # Pebble no longer runs: its certificate is on the data volume.
        second = launched(person, image["ami_id"], jobExecution="true")
        assert second["instance_id"] != first["instance_id"]
        assert ask(second["public_ip"], trusted)[2] == certificate
        assert person(sys.executable, "-W", "ignore", "-c", CLIENT, **exports).split("\n")[-2] == "found by its name"


def launched(person: Person, ami: str, **settings: str) -> dict[str, Any]:
    """The output of `rehearse.py up`, after the server's first response to a login by its name."""
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    found: dict[str, Any] = json.loads(
        person(sys.executable, str(SCRIPTS / "rehearse.py"), "up", "--ami", ami, *words, "--json")
    )
    return found


@contextmanager
def hosted_zone(cloud: LocalCloud) -> Iterator[str]:
    """The ID of a zone that the domain is in."""
    route53 = cloud.client("route53")
    made = route53.create_hosted_zone(Name=DOMAIN.partition(".")[2], CallerReference=str(time.time_ns()))
    zone = made["HostedZone"]["Id"].rpartition("/")[2]
    try:
        yield zone
    finally:
        route53.delete_hosted_zone(Id=zone)


def addresses(cloud: LocalCloud, zone: str) -> Callable[[str], str | None]:
    """The zone's records of a name."""
    route53 = cloud.client("route53")

    def address_of(name: str) -> str | None:
        records = route53.list_resource_record_sets(HostedZoneId=zone)["ResourceRecordSets"]
        found = [each for each in records if (each["Name"], each["Type"]) == (f"{name}.", "A")]
        return str(found[0]["ResourceRecords"][0]["Value"]) if found else None

    return address_of


def user_with_the_zones_resolver(folder: Path, root: str) -> Person:
    """It also trusts Pebble's root, as clients trust Let's Encrypt's."""
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
    """During the block, the stack's machine can reach Pebble's directory at the same address as this host, and trusts
    it."""
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
    """Make Pebble's directory available in a network at the same address as on this host; closes the given
    descriptor."""
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
