"""Adoption decrypts gateway secrets and webhooks with the old server's passphrase and encrypts them for the stack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_host.contract.credentials import webhook_key
from scripts.drilling.worker_client import without_mlflow
from tests.adopt.stack import PASSPHRASE, Stack
from tests.adopt.test_adopt import Reported, reported  # noqa: F401

pytestmark = [pytest.mark.service, pytest.mark.slow]
OLD = {
    "MLFLOW_CRYPTO_KEK_PASSPHRASE": "the old server's passphrase",
    "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": "b2xkLXNlcnZlci1vbGQtc2VydmVyLW9sZC1zZXJ2ZXI=",
}
HERE = {
    "MLFLOW_CRYPTO_KEK_PASSPHRASE": PASSPHRASE,
    "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": webhook_key(PASSPHRASE),
}
STORES = """
import json, sys
from mlflow.entities.webhook import WebhookAction, WebhookEntity, WebhookEvent
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
from mlflow.store.tracking.dbmodels.models import SqlGatewaySecret
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Tracking
from mlflow.utils.crypto import KEKManager, _decrypt_secret
tracking, registry = Tracking(sys.argv[1], "mlflow-artifacts:/"), Registry(sys.argv[1])
"""
WRITE = """
tracking.create_gateway_secret("openai", {"api_key": "sk-of-a-test"}, provider="openai")
event = WebhookEvent(WebhookEntity.MODEL_VERSION, WebhookAction.CREATED)
registry.create_webhook("hook", "https://93.184.215.14/hook", [event], secret="of the hook")
print("{}")
"""
READ = """
with tracking.ManagedSessionMaker() as session:
    row = session.query(SqlGatewaySecret).one()
    value = _decrypt_secret(row.encrypted_value, row.wrapped_dek, KEKManager(), row.secret_id, row.secret_name)
print(json.dumps({"openai": value, "hook": registry.list_webhooks()[0].secret}))
"""


def with_stores(uri: str, statements: str, variables: dict[str, str]) -> dict[str, object]:
    command = [sys.executable, "-W", "ignore", "-c", STORES + statements, uri]
    environment = {**without_mlflow(os.environ), "MLFLOW_DISABLE_TELEMETRY": "true", **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_secrets_and_webhooks_are_encrypted_for_the_stack(
    stack: Stack,
    reported: Reported,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with_stores(uri, WRITE, OLD)
    for name, text in OLD.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("MLFLOW_CRYPTO_KEK_PASSPHRASE", "another passphrase")
    status, told = reported(tmp_path / "mlflow.db", "--with-secrets")
    assert status == 2 and "does not decrypt the secret openai" in told["said"]
    monkeypatch.setenv("MLFLOW_CRYPTO_KEK_PASSPHRASE", OLD["MLFLOW_CRYPTO_KEK_PASSPHRASE"])
    status, report = reported(tmp_path / "mlflow.db", "--with-secrets")
    assert (report["lost"], status) == (0, 0)
    expected = {"openai": {"api_key": "sk-of-a-test"}, "hook": "of the hook"}
    assert with_stores(stack.cluster.uri(stack.cluster.database), READ, HERE) == expected
    status, report = reported(tmp_path / "mlflow.db", "--with-secrets")
    assert (report["lost"], status) == (0, 0), "a second run"
    for text in (*OLD.values(), PASSPHRASE):
        for key in stack.keys("backups"):
            if key.startswith("adoptions/"):
                body = stack.target.s3.get_object(Bucket=stack.target.buckets["backups"], Key=key)["Body"].read()
                assert text.encode() not in body, key


def test_without_the_passphrase_they_are_counted_as_lost(
    stack: Stack,
    reported: Reported,  # noqa: F811
    tmp_path: Path,
) -> None:
    with_stores(f"sqlite:///{tmp_path}/mlflow.db", WRITE, OLD)
    status, report = reported(tmp_path / "mlflow.db")
    assert status == 1
    counts = {entry["table"]: entry["count"] for entry in report["encrypted"]}
    assert (counts["secrets"], counts["webhooks"]) == (1, 1)
