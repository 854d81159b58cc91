"""Test ports and addresses of machines, and the client networks that security groups allow."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import signal
import socket
import subprocess
import threading
import time

import pytest

from .conftest import Account, wait_until

pytestmark = [pytest.mark.machine, pytest.mark.slow]

SERVER = """
import socket, threading
listening = socket.create_server(("0.0.0.0", 80), backlog=512)
def serve(connection, peer):
    with connection:
        request = connection.recv(65536)
        while request:
            body = peer[0].encode()
            connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
            request = connection.recv(65536)
while True:
    threading.Thread(target=serve, args=listening.accept(), daemon=True).start()
"""


@pytest.fixture(scope="module")
def group(shared: Account) -> str:
    return shared.group(22, 80)


@pytest.fixture(scope="module")
def web(shared: Account, group: str) -> str:
    """Start a machine that answers requests on port 80 with the address of the client."""
    instance = shared.launch(group)
    shared.run(instance, f"cat > /server.py <<'EOF'\n{SERVER}\nEOF\nsystemd-run -q --unit web python3 /server.py")
    wait_until(lambda: reachable(shared.address(instance), 80), 20, "the server does not answer")
    return instance


def reachable(address: str, port: int, source: str = "127.0.0.1") -> bool:
    """Return whether a program behind the port answers a client that connects from the address `source`."""
    try:
        connection = http.client.HTTPConnection(address, port, timeout=5, source_address=(source, 0))
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    except http.client.HTTPException:
        return False


def asker(address: str, source: str) -> str:
    connection = http.client.HTTPConnection(address, 80, timeout=5, source_address=(source, 0))
    connection.request("GET", "/")
    return connection.getresponse().read().decode()


def test_server_sees_the_clients_own_address(account: Account, web: str) -> None:
    assert asker(account.address(web), "127.0.0.1") == "127.0.0.1"
    assert asker(account.address(web), "127.44.5.6") == "127.44.5.6"


def test_only_the_groups_ports_are_open(account: Account, web: str) -> None:
    account.run(web, "systemd-run -q --unit other python3 -m http.server 8081")
    wait_until(lambda: "8081" in account.run(web, "ss -ltn"), 20, "no server on 8081")
    assert not reachable(account.address(web), 8081)


def test_rule_changes_act_at_once_and_cut_connections_no_longer_allowed(account: Account, web: str, group: str) -> None:
    address = account.address(web)
    account.allow(group, 8081, "127.9.0.0/16")
    wait_until(lambda: reachable(address, 8081, "127.9.1.1"), 10, "8081 is not open to 127.9.1.1")
    assert not reachable(address, 8081, "127.8.1.1"), "a network that is not allowed has connected"
    with socket.create_connection((address, 8081), source_address=("127.9.1.1", 0)) as connection:
        account.forbid(group, 8081, "127.9.0.0/16")
        assert not reachable(address, 8081, "127.9.1.1")
        connection.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert reachable(address, 80)


def test_service_on_the_machines_loopback_is_not_published(account: Account, web: str, group: str) -> None:
    account.run(web, "systemd-run -q --unit hidden python3 -m http.server --bind 127.0.0.1 8082")
    wait_until(lambda: "8082" in account.run(web, "ss -ltn"), 20, "no server on 8082")
    account.allow(group, 8082)
    assert not reachable(account.address(web), 8082)
    account.forbid(group, 8082)


def test_port_is_refused_until_a_server_listens(account: Account, web: str, group: str) -> None:
    address = account.address(web)
    account.allow(group, 8083)
    time.sleep(1.5)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, 8083), timeout=5)
    account.run(web, "systemd-run -q --unit late python3 -m http.server 8083")
    wait_until(lambda: reachable(address, 8083), 20, "8083 is not open")
    account.forbid(group, 8083)


def test_rule_for_all_ports_publishes_listening_ports(account: Account) -> None:
    group = account.group()
    permission = {"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    account.ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[permission])
    instance = account.launch(group)
    account.run(instance, "systemd-run -q --unit web python3 -m http.server 4321")
    wait_until(lambda: reachable(account.address(instance), 4321), 20, "4321 is not open")


def test_elastic_address_moves_with_its_association(account: Account, web: str) -> None:
    allocation, address = account.elastic_address()
    before = account.address(web)
    association = account.ec2.associate_address(AllocationId=allocation, InstanceId=web)["AssociationId"]
    assert account.address(web) == address
    wait_until(lambda: reachable(address, 80), 10, "the Elastic IP does not answer")
    assert not reachable(before, 80), "the released address still answers"
    account.ec2.disassociate_address(AssociationId=association)
    assert not reachable(address, 80)
    assert account.address(web) != address
    wait_until(lambda: reachable(account.address(web), 80), 10, "no address after disassociation")


def test_elastic_address_survives_stop_and_start(account: Account) -> None:
    allocation, address = account.elastic_address()
    instance = account.launch()
    account.ec2.associate_address(AllocationId=allocation, InstanceId=instance)
    account.ec2.stop_instances(InstanceIds=[instance])
    account.wait_state(instance, "stopped")
    account.ec2.start_instances(InstanceIds=[instance])
    account.wait_booted(instance)
    assert account.address(instance) == address
    wait_until(lambda: account.ssh(instance, "true").returncode == 0, 30, "ssh does not answer on the Elastic IP")


def test_large_transfers_arrive_whole_both_ways(account: Account, web: str, group: str) -> None:
    account.allow(group, 9000)
    echo = "import socket,hashlib\\ns=socket.create_server(('0.0.0.0',9000))\\nwhile True:\\n c,_=s.accept()\\n"
    echo += " while d:=c.recv(1<<20): c.sendall(d)\\n c.close()"
    account.run(web, f'printf "{echo}" > /echo.py; systemd-run -q --unit echo python3 /echo.py')
    wait_until(lambda: "9000" in account.run(web, "ss -ltn"), 20, "no echo server")
    block = bytes(range(256)) * 4096  # 1 MiB
    sent, received = hashlib.sha256(), hashlib.sha256()
    with socket.create_connection((account.address(web), 9000)) as connection:

        def send() -> None:
            for _ in range(256):
                connection.sendall(block)
                sent.update(block)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        started = time.monotonic()
        sender.start()
        while data := connection.recv(1 << 20):
            received.update(data)
        sender.join()
    assert sent.digest() == received.digest()
    print(f"256 MiB sent and echoed in {time.monotonic() - started:.1f} s")
    account.forbid(group, 9000)


def test_a_thousand_idle_connections_leave_room_for_others(account: Account, web: str) -> None:
    address = account.address(web)
    idle = [socket.create_connection((address, 80), timeout=10) for _ in range(1000)]
    try:
        assert reachable(address, 80)
    finally:
        for connection in idle:
            connection.close()


def test_object_store_and_apis_have_the_hosts_addresses_inside(account: Account, web: str) -> None:
    cloud = account.cloud
    assert account.run(web, f"curl -s -o /dev/null -w '%{{http_code}}' {cloud.s3_endpoint}/healthz") == "200"
    assert account.run(web, f"curl -s -o /dev/null -w '%{{http_code}}' {cloud.endpoint}/") == "403"


def test_machines_trust_the_object_stores_authority(account: Account, web: str) -> None:
    assert account.cloud.s3_endpoint.startswith("https://")
    bundle = "/etc/ssl/certs/ca-certificates.crt"
    for environment in ("systemd-run -q --wait --pipe env", "env"):
        assert f"AWS_CA_BUNDLE={bundle}" in account.run(web, environment).splitlines()
    account.run(web, f"curl -sf --cacert {bundle} {account.cloud.s3_endpoint}/healthz")


def test_ports_are_back_after_the_forwarder_died(account: Account, web: str) -> None:
    daemon = (account.cloud.places.root / "daemon.pid").read_text()
    started_by_daemon = subprocess.check_output(
        ["pgrep", "--parent", daemon, "--full", "local_cloud.port_forwarder"], text=True
    )
    os.kill(int(started_by_daemon), signal.SIGKILL)
    wait_until(lambda: reachable(account.address(web), 80), 20, "port 80 stayed closed")
    account.run(web, f"curl -sf {account.cloud.s3_endpoint}/healthz")


def test_nothing_is_published_for_a_terminated_machine(account: Account) -> None:
    instance = account.launch()
    address = account.address(instance)
    account.ec2.terminate_instances(InstanceIds=[instance])
    account.wait_state(instance, "terminated")
    assert f"{address}:" not in subprocess.check_output(["ss", "-ltn"], text=True)


LINGERING = """
import signal, socket, time
connection, _ = socket.create_server(("0.0.0.0", 80)).accept()
def stop(*_):
    time.sleep(4)
    connection.sendall(b"done")
    raise SystemExit
signal.signal(signal.SIGTERM, stop)
connection.sendall(b"accepted")
while True:
    time.sleep(1)
"""


def test_connections_last_until_a_stopping_machine_is_down(shared: Account, group: str) -> None:
    instance = shared.launch(group)
    server = "systemd-run -q --unit web --property After=network.target python3 /server.py"
    shared.run(instance, f"cat > /server.py <<'EOF'\n{LINGERING}\nEOF\n{server}")
    address = shared.address(instance)
    connected: list[socket.socket] = []

    def accepted() -> bool:
        with contextlib.suppress(OSError):
            connected[:] = [socket.create_connection((address, 80), timeout=30)]
            return connected[0].recv(64) == b"accepted"
        return False

    wait_until(accepted, 20, "the server does not answer")
    shared.ec2.stop_instances(InstanceIds=[instance])
    with connected[0] as connection:
        assert connection.recv(64) == b"done"
