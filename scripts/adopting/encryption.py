"""Encrypt the source's gateway secrets and webhook secrets for the stack, in the row files.

MLflow encrypts each gateway secret with a data key, and encrypts the data key with a key from the server's passphrase.
For a gateway secret, this module encrypts only the data key again. MLflow encrypts webhook secrets with the server's
webhook key."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

from mlflow_host.contract import adoption
from mlflow_host.contract.adoption import AdoptionError, Manifest

SECRETS, WEBHOOKS = "secrets", "webhooks"
Row = dict[str, str | None]


def encrypt_again(manifest: Manifest, folder: Path, ask: Callable[[str], str], passphrase: str) -> Manifest:
    """Encrypt the gateway secrets and the webhook secrets. `ask(variable)` returns the value that an environment
    variable has on the old server, or "". `passphrase` is the stack's passphrase. Raises AdoptionError."""
    for table, prepare in ((SECRETS, for_secrets), (WEBHOOKS, for_webhooks)):
        if table in manifest.tables and manifest.tables[table].rows:
            manifest = rewritten(manifest, folder, table, prepare(ask, passphrase))
    return manifest


def for_secrets(ask: Callable[[str], str], passphrase: str) -> Callable[[Row], None]:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.crypto import CRYPTO_KEK_PASSPHRASE_ENV_VAR, KEKManager, rotate_secret_encryption

    old, new = ask(CRYPTO_KEK_PASSPHRASE_ENV_VAR), KEKManager(passphrase, 1)
    managers: dict[int, KEKManager] = {}

    def change(row: Row) -> None:
        version = int(row["kek_version"] or 1)
        managers.setdefault(version, KEKManager(old, version))
        encrypted, wrapped = (bytes.fromhex((row[name] or "")[2:]) for name in ("encrypted_value", "wrapped_dek"))
        try:
            rotated = rotate_secret_encryption(encrypted, wrapped, managers[version], new)
        except MlflowException:
            raise AdoptionError(
                f"the passphrase does not decrypt the secret {row['secret_name']}: enter the old server's "
                f"{CRYPTO_KEK_PASSPHRASE_ENV_VAR}, or leave out --with-secrets"
            ) from None
        row["wrapped_dek"], row["kek_version"] = f"\\x{rotated.wrapped_dek.hex()}", "1"

    return change


def for_webhooks(ask: Callable[[str], str], passphrase: str) -> Callable[[Row], None]:
    from cryptography.fernet import Fernet, InvalidToken

    from mlflow_host.contract.credentials import webhook_key

    variable = "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"
    old, new = ask(variable), Fernet(webhook_key(passphrase))

    def change(row: Row) -> None:
        if row.get("secret"):
            try:
                row["secret"] = new.encrypt(Fernet(old).decrypt((row["secret"] or "").encode())).decode()
            except (InvalidToken, ValueError):
                raise AdoptionError(
                    f"the key does not decrypt the secret of the webhook {row['name']}: enter the old server's "
                    f"{variable}, or leave out --with-secrets"
                ) from None

    return change


def rewritten(manifest: Manifest, folder: Path, table: str, change: Callable[[Row], None]) -> Manifest:
    entry, path = manifest.tables[table], folder / f"{table}.gz"
    lines = []
    for line in gzip.decompress(path.read_bytes()).decode().rstrip("\n").split("\n"):
        row = dict(zip(entry.columns, map(adoption.unescape, line.split("\t")), strict=True))
        change(row)
        lines.append("\t".join(adoption.escape(row[column]) for column in entry.columns) + "\n")
    rows = "".join(lines).encode()
    path.write_bytes(gzip.compress(rows))
    changed = dataclasses.replace(entry, bytes=len(rows), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return dataclasses.replace(manifest, tables={**manifest.tables, table: changed})
