"""The stack that receives the data: its buckets, its machine, and its API."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import shutil
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode, urlsplit

from mlflow_host.contract import adoption, credentials
from mlflow_host.contract.adoption import AdoptionError, Request

SILENT_SECONDS = 120
"""adopt.py fails if the machine has not reported for this time. The machine reports every ten seconds."""
START_AGAIN_SECONDS = 5
"""If the machine has not reported the current request for this time, adopt.py starts the machine's unit again."""


@dataclass
class Api:
    """A client for the REST API of an MLflow server, with one connection per thread."""

    url: str
    headers: dict[str, str]
    certificate: str | None = None
    _local: threading.local = field(default_factory=threading.local)

    def get(self, path: str, /, **query: Any) -> dict[str, Any]:
        return self._ask("GET", f"{path}?{urlencode(query)}" if query else path)

    def post(self, path: str, /, **body: Any) -> dict[str, Any]:
        return self._ask("POST", path, json.dumps(body).encode())

    @contextlib.contextmanager
    def download(self, path: str) -> Iterator[http.client.HTTPResponse]:
        """The response to a GET request, over a separate connection. Raises AdoptionError."""
        where = urlsplit(self.url)
        opened = self._connect(where.scheme, where.netloc)
        try:
            opened.request("GET", where.path.rstrip("/") + path, headers=self.headers)
            answer = opened.getresponse()
            if answer.status != 200:
                raise AdoptionError(f"status {answer.status} for {path}")
            yield answer
        finally:
            opened.close()

    def _ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """Send a request, and retry if the connection breaks or the server is busy. Raises AdoptionError."""
        where = urlsplit(self.url)
        reason = ""
        for wait in (0, 1, 2, 4, 8):
            time.sleep(wait)
            try:
                if getattr(self._local, "opened", None) is None:
                    self._local.opened = self._connect(where.scheme, where.netloc)
                headers = {**self.headers, "Content-Type": "application/json"}
                self._local.opened.request(method, where.path.rstrip("/") + path, body, headers)
                answer = self._local.opened.getresponse()
                content = answer.read()
            except (OSError, http.client.HTTPException) as error:
                self._local.opened = None
                reason = str(error) or type(error).__name__
                continue
            if answer.status == 200:
                try:
                    return dict(json.loads(content))
                except ValueError:
                    raise AdoptionError(f"{self.url}{path.partition('?')[0]} returned no JSON") from None
            reason = f"status {answer.status}: {content[:300].decode(errors='replace')}"
            if answer.status not in (429, 502, 503, 504):
                break
        raise AdoptionError(f"{self.url}{path.partition('?')[0]} did not answer: {reason}")

    def _connect(self, scheme: str, netloc: str) -> http.client.HTTPConnection:
        if scheme == "http":
            return http.client.HTTPConnection(netloc, timeout=120)
        return http.client.HTTPSConnection(
            netloc, timeout=120, context=ssl.create_default_context(cafile=self.certificate)
        )


def basic(username: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()}


@dataclass(frozen=True)
class Target:
    """`buckets` has the bucket names for the keys "artifacts", "models" and "backups". `start(name)` starts the
    machine's unit. `passphrase()` reads the passphrase that encrypts the secrets in the stack's database."""

    s3: Any
    buckets: dict[str, str]
    start: Callable[[str], None]
    api: Api
    passphrase: Callable[[], str]

    def read(self, name: str, file: str) -> Any:
        body = self.s3.get_object(Bucket=self.buckets["backups"], Key=adoption.key(name, file))["Body"].read()
        return json.loads(gzip.decompress(body) if file.endswith(".gz") else body)

    def write(self, name: str, file: str, content: bytes) -> None:
        self.s3.put_object(Bucket=self.buckets["backups"], Key=adoption.key(name, file), Body=content)

    def run(self, name: str, request: Request, say: Callable[[str], None]) -> None:
        """Run the request on the machine, and wait for the result. Raises AdoptionError with the machine's reason.

        systemd ignores a start while the unit still runs for the previous request. Therefore this function starts the
        unit again until the unit reports this request.
        """
        request = replace(request, id=uuid.uuid4().hex)
        self.write(name, "request.json", adoption.dump(request))
        self.start(name)
        last, heard, said = "", time.monotonic(), ""
        started = heard
        while True:
            try:
                status = self.read(name, "status.json")
            except self.s3.exceptions.NoSuchKey:
                status = {}
            if status.get("request") == request.id:
                if status["at"] != last:
                    last, heard = status["at"], time.monotonic()
                if status["message"] != said and status["state"] == "running":
                    said = status["message"]
                    say(f"the machine: {said}")
                if status["state"] == "done":
                    return
                if status["state"] == "failed":
                    raise AdoptionError(f"the machine refused: {status['message']}")
            elif time.monotonic() - started > START_AGAIN_SECONDS:
                self.start(name)
                started = time.monotonic()
            if time.monotonic() - heard > SILENT_SECONDS:
                raise AdoptionError(
                    f"the machine has not reported for {SILENT_SECONDS} s: read `journalctl -u "
                    f"mlflow-host-adopt@{name}` on the machine, and run adopt.py again; images that are older than "
                    "adopt.py do not have this unit"
                )
            time.sleep(0.3 if time.monotonic() - heard < 5 else 1)


def unit(name: str) -> str:
    return f"mlflow-host-adopt@{name}.service"


def start_command(name: str) -> list[str]:
    return ["systemctl", "start", "--no-block", unit(name)]


def session_command(shell: str, name: str) -> list[str]:
    """The command that starts the unit through Session Manager. Session Manager's shell does not run as root, so the
    command uses sudo. `shell` is the stack's output with the command `aws ssm start-session`."""
    parameters = json.dumps({"command": [" ".join(["sudo", *start_command(name)])]})
    return [*shell.split(), "--document-name", "AWS-StartNonInteractiveCommand", "--parameters", parameters]


def start_by_session(shell: str) -> Callable[[str], None]:
    def start(name: str) -> None:
        if shutil.which("aws") is None or shutil.which("session-manager-plugin") is None:
            raise AdoptionError(
                "the machine is reached by Session Manager: install the AWS CLI and its session-manager-plugin, or run "
                f"`sudo {' '.join(start_command(name))}` on the machine"
            )
        done = subprocess.run(session_command(shell, name), stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise AdoptionError(f"Session Manager cannot start the unit: {said[-1] if said else 'no reason given'}")

    return start


def choose(arguments: Any) -> Target:
    """The stack that the arguments select, as in connect.py. Raises connect.NotConnected or AdoptionError."""
    from scripts import connect

    stack = connect.choose(arguments)
    environment = connect.way_in(stack)
    headers = basic(environment["username"], environment["password"])
    certificate = environment.get("server_certificate")
    api = Api(environment["url"], headers, str(certificate) if certificate else None)

    def passphrase() -> str:
        name = environment["credentials_parameter"]
        text = stack.ssm.get_parameter(Name=name, WithDecryption=True)["Parameter"]["Value"]
        return credentials.parse(text).kek_passphrase

    if "instance_id" in stack.facts:
        return from_rehearsal(stack.facts, api, passphrase)
    from scripts import pulumi_stack

    outputs = pulumi_stack.run("stack", "output", "--json", stack=arguments.stack)
    s3 = pulumi_stack.client("s3", pulumi_stack.provider_settings(arguments.stack))
    return Target(s3, dict(outputs["buckets"]), start_by_session(outputs["shell"]), api, passphrase)


def from_rehearsal(facts: dict[str, Any], api: Api, passphrase: Callable[[], str]) -> Target:
    from scripts.local_cloud import LocalCloud, LocalCloudError

    cloud = LocalCloud()

    def start(name: str) -> None:
        try:
            done = cloud.exec(facts["instance_id"], start_command(name))
        except LocalCloudError as error:
            raise AdoptionError(str(error)) from None
        if done.returncode:
            raise AdoptionError(f"the machine cannot start {unit(name)}: {done.stderr.strip()}")

    return Target(cloud.client("s3"), dict(facts["buckets"]), start, api, passphrase)
