"""The HTTP server of the AWS APIs. For one request at a time, the server checks the permissions, calls moto, and saves
moto's records."""

from __future__ import annotations

import http
import io
import re
import threading
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app

from scripts.local_cloud import ec2, moto_state, permissions, s3_bucket_settings, signatures
from scripts.local_cloud.layout import Allotment, Places
from scripts.local_cloud.roles import Roles
from scripts.local_cloud.s3_bucket_settings import BucketSettings

READ_ONLY = ("Describe", "Get", "List", "Head", "BatchGet", "Lookup", "Search", "Simulate", "Decrypt")


class Api:
    """The WSGI application."""

    def __init__(
        self,
        places: Places,
        allotment: Allotment,
        roles: Roles,
        lock: threading.RLock,
        changed: Callable[[], None],
    ) -> None:
        """`lock` is the API lock. `changed` is called after each request that may have changed a record."""
        self.places = places
        self.roles = roles
        self.ports = (allotment.api_port, allotment.s3_port, allotment.s3_tls_port)
        self.lock = lock
        self.changed = changed
        self.called = set(places.calls.read_text().splitlines() if places.calls.exists() else ())
        self.app = DomainDispatcherApplication(create_backend_app)
        self.bucket_settings = BucketSettings(allotment, self.app, roles.refusal, lock, lambda: moto_state.save(places))

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Handle one request. Changed records are saved before the response is sent."""
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length) if length else b""
        environ["wsgi.input"] = io.BytesIO(body)
        if reason := signatures.of_a_page(environ, self.ports):
            return _refused(environ, permissions.Denial("AccessDenied", reason), start_response)
        if s3_bucket_settings.MARK in environ:  # the object store verified it
            return self._answer_for_store(environ, body, start_response)
        action, parameters = parse(environ, body)
        asked = permissions.read(environ, body, action, parameters)
        with self.lock:
            refused = signatures.problem(environ, body, self.roles.secret) or self.roles.refusal(environ, asked)
            if refused:
                return _refused(environ, refused, start_response)
            self.record_call(str(environ.get("HTTP_USER_AGENT", "")), asked.action)

            def without_cors(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
                return start_response(status, signatures.without_cors(headers), *more)

            ec2.call.parameters = parameters
            try:
                answer = list(self.app(environ, without_cors))
            finally:
                ec2.call.parameters = {}
            if changes(action, environ["REQUEST_METHOD"]):
                moto_state.save(self.places)
                self.changed()
        return answer

    def _answer_for_store(self, environ: dict[str, Any], body: bytes, start_response: Any) -> Iterable[bytes]:
        answer = self.bucket_settings(environ, body)
        headers = [*answer.headers.items(), ("Content-Length", str(len(answer.body)))]
        start_response(f"{answer.status} {http.HTTPStatus(answer.status).phrase}", headers)
        return [answer.body]

    def record_call(self, agent: str, action: str) -> None:
        """Log which program sent the request, and the requested action. A test compares the logged actions with the IAM
        policy for operators."""
        program = re.search(r"Packer|aws-cli|Boto3|terraform-provider-aws|aws-sdk-go", agent)
        call = f"{program[0] if program else 'another'} {action}"
        if call not in self.called:
            self.called.add(call)
            with self.places.calls.open("a") as file:
                file.write(f"{call}\n")


class RequestHandler(MotoRequestHandler):
    """moto's request handler without the log line for each request."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def _refused(environ: dict[str, Any], refused: permissions.Denial, start_response: Any) -> list[bytes]:
    status, headers, text = permissions.answer(environ, refused)
    start_response(status, [*headers, ("Content-Length", str(len(text)))])
    return [text]


def parse(environ: dict[str, Any], body: bytes) -> tuple[str, dict[str, str]]:
    """Return the action of a request ("" for REST services) and the request's parameters."""
    if target := environ.get("HTTP_X_AMZ_TARGET"):
        return str(target).rpartition(".")[2], {}
    parameters = dict(parse_qsl(environ.get("QUERY_STRING", "")))
    if str(environ.get("CONTENT_TYPE", "")).startswith("application/x-www-form-urlencoded"):
        parameters |= dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True))
    return parameters.get("Action", ""), parameters


def changes(action: str, method: str) -> bool:
    """Return whether a request may change a record."""
    if action:
        return not action.startswith(READ_ONLY)
    return method not in ("GET", "HEAD", "OPTIONS")
