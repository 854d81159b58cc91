"""When the Elastic IP is attached during the boot, open connections are cut. Each AWS call of the boot succeeds even if
its connection is cut once, with or without a TCP reset."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mlflow_host.backups import restore
from mlflow_host.boot import certificates
from mlflow_host.contract import launch, sizing
from mlflow_host.machine import aws, config, parameters
from mlflow_host.postgres import dump_file
from mlflow_host.postgres.cluster import Cluster
from tests.support.services import ObjectStore, object_store

pytestmark = pytest.mark.service

RESET = struct.pack("ii", 1, 0)
"""struct linger: on, zero seconds."""
DUMP = os.urandom(1 << 20) * 40


class OneCut:
    """A port that forwards connections to a service. The first connection is cut after `carried` bytes, counted in both
    directions together, with or without a TCP reset. All other connections are forwarded."""

    def __init__(self, target: tuple[str, int], carried: int, kind: str):
        self._target, self._left, self._kind = target, carried, kind
        self.cuts = 0
        self._counting = threading.Lock()
        self._kept: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        first = True
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._kept += [client, server]
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=(*ends, first), daemon=True).start()
                first = False

    def _carry(self, source: socket.socket, sink: socket.socket, first: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                passed = data
                if first:
                    with self._counting:
                        passed = data[: self._left]
                        self._left -= len(passed)
                sink.sendall(passed)
                if len(passed) < len(data):
                    return self._cut(source, sink)
            sink.shutdown(socket.SHUT_WR)

    def _cut(self, *ends: socket.socket) -> None:
        self.cuts = 1
        if self._kind == "reset":
            for end in ends:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                end.close()

    def close(self) -> None:
        for each in (self._listener, *self._kept):
            each.close()


@contextmanager
def cut(address: str, carried: int, kind: str) -> Iterator[tuple[OneCut, str]]:
    """Yield the port that cuts one connection, and the URL of this port."""
    where = urlsplit(address)
    assert where.hostname and where.port
    between = OneCut((where.hostname, where.port), carried, kind)
    try:
        yield between, f"{where.scheme}://127.0.0.1:{between.port}"
    finally:
        between.close()


class Parameters(BaseHTTPRequestHandler):
    """A stand-in for AWS Systems Manager. Every parameter contains the credentials."""

    written: list[dict[str, Any]]
    value = json.dumps({"format": 1, "kek_passphrase": "x" * 32, "users": {"ada": "password"}})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["X-Amz-Target"].endswith("PutParameter"):
            self.written.append(asked)
        body = json.dumps({"Parameter": {"Value": self.value}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def ssm(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the address of a stand-in for Systems Manager, and the list of parameters written to it."""
    monkeypatch.setattr(aws, "role_keys", lambda: aws.Keys("AKIA", "secret", "session"))

    class Own(Parameters):
        written: list[dict[str, Any]] = []

    with ThreadingHTTPServer(("127.0.0.1", 0), Own) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", Own.written
        server.shutdown()


def document(ssm: str = "", s3: str = "") -> launch.LaunchDocument:
    return launch.LaunchDocument(
        stack=launch.Stack("dev", "eu-central-1"),
        buckets=launch.Buckets("aaa", "mmm", "bbb"),
        credentials=launch.CredentialsParameter("/x"),
        data_volume=launch.DataVolume("vol-01234567"),
        web=launch.Web(("127.0.0.1",), authority_parameter="/authority"),
        endpoints=launch.Endpoints(s3=s3, ssm=ssm),
    )


@pytest.mark.parametrize("kind", ["reset", "silence"])
@pytest.mark.parametrize("carried", [0, 200, 700])
def test_credentials_are_fetched(carried: int, kind: str, ssm: tuple[str, list[dict[str, Any]]]) -> None:
    with cut(ssm[0], carried, kind) as (between, address):
        assert parameters.fetch(document(address), print).users[0].name == "ada"
        assert parameters.secret(document(address), "/reader") == Parameters.value
        assert between.cuts == 1


@pytest.mark.parametrize("kind", ["reset", "silence"])
def test_authority_is_published(kind: str, ssm: tuple[str, list[dict[str, Any]]]) -> None:
    said: list[str] = []
    with cut(ssm[0], 0, kind) as (between, address):
        host = config.host_config(document(address), sizing.size(sizing.MachineSize(2048, 2)))
        certificates.publish(host, "PEM", said.append)
        assert (between.cuts, said) == (1, [])
    assert ssm[1][-1]["Value"] == "PEM"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("store")) as store:
        store.client().create_bucket(Bucket="bbb")
        yield store


@pytest.mark.parametrize("kind", ["reset", "silence"])
@pytest.mark.parametrize("carried", [0, 3 << 20])
def test_interrupted_dump_upload_and_download_are_complete(
    carried: int, kind: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dump_file, "READ_SECONDS", 2)
    content = tmp_path / "dumped"
    content.write_bytes(DUMP)
    monkeypatch.setattr(dump_file, "dump_command", lambda *_: ["cat", str(content)])
    key = f"dumps/{kind}-{carried}.dump"
    with cut(store.endpoint, carried, kind) as (between, address):
        bucket = dump_file.Bucket("bbb", "eu-central-1", address)
        dump_file.dump(Cluster(), "mlflow", bucket, key, {"head": "abc"})
        assert between.cuts == 1
    with cut(store.endpoint, carried, kind) as (between, address), (tmp_path / "fetched").open("w+b") as fetched:
        found = dump_file.fetch(dump_file.Bucket("bbb", "eu-central-1", address), key, fetched)
        assert (between.cuts, found["head"]) == (1, "abc")
        assert fetched.read() == DUMP


def test_dump_with_another_content_is_refused(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    content = tmp_path / "dumped"
    content.write_bytes(DUMP)
    monkeypatch.setattr(dump_file, "dump_command", lambda *_: ["cat", str(content)])
    key, bucket = "dumps/changed.dump", dump_file.Bucket("bbb", "eu-central-1", store.endpoint)
    dump_file.dump(Cluster(), "mlflow", bucket, key, {"head": "abc"})
    written = store.client().get_object(Bucket="bbb", Key=f"{key}.sha256")["Body"].read().decode()
    assert written == f"{hashlib.sha256(DUMP).hexdigest()}  changed.dump\n"
    store.client().put_object(Bucket="bbb", Key=key, Body=DUMP[:-1] + b"!")
    with (
        (tmp_path / "fetched").open("w+b") as fetched,
        pytest.raises(dump_file.DumpError, match="does not match its digest"),
    ):
        dump_file.fetch(bucket, key, fetched)


def test_interrupted_segment_is_fetched_again(tmp_path: Path) -> None:
    script = tmp_path / "fetch"
    script.write_text(f"#!/bin/sh\n[ -e {tmp_path}/again ] && exit 0; touch {tmp_path}/again; exit 103\n")
    script.chmod(0o755)
    shell = restore.FETCH.format(fetch=script).replace("%f", "F").replace("%p", "P")
    assert subprocess.run(["sh", "-c", shell]).returncode == 0
