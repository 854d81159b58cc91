"""In the files with the rows of another server, the secrets of gateway and webhooks are encrypted again, with the
stack's passphrase."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from mlflow.utils.crypto import KEKManager, _decrypt_secret, _encrypt_secret

from mlflow_host.contract import adoption
from mlflow_host.contract.adoption import AdoptionError, Manifest, Table
from mlflow_host.contract.credentials import webhook_key
from scripts.adopting import encryption, row_files

OLD, KEY = "the old server's passphrase", Fernet.generate_key().decode()
STACKS = "the passphrase of the stack"
SECRET = ("secret_id", "secret_name", "encrypted_value", "wrapped_dek", "kek_version", "description")
HOOK = ("webhook_id", "name", "secret")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[tuple[str | None, ...]]]:
    """Return two gateway secrets and two webhooks. One secret uses version 2 of the passphrase; one webhook has no
    secret."""
    rows: dict[str, list[tuple[str | None, ...]]] = {"secrets": [], "webhooks": []}
    for version in (1, 2):
        name, manager = (f"s-{version}", f"name {version}"), KEKManager(OLD, version)
        made = _encrypt_secret({"api_key": f"sk-{version}"}, manager, *name)
        value, key = (f"\\x{each.hex()}" for each in (made.encrypted_value, made.wrapped_dek))
        rows["secrets"].append((*name, value, key, str(version), "a\tb\u2028c"))
    rows["webhooks"] = [("w-1", "one", Fernet(KEY).encrypt(b"of the hook").decode()), ("w-2", "two", None)]
    return rows


@pytest.fixture
def source(rows: dict[str, list[tuple[str | None, ...]]], tmp_path: Path) -> Manifest:
    """The files of `rows`."""
    tables = {}
    for table, columns in (("secrets", SECRET), ("webhooks", HOOK)):
        lines = "".join("\t".join(map(adoption.escape, row)) + "\n" for row in rows[table])
        (tmp_path / f"{table}.gz").write_bytes(gzip.compress(lines.encode()))
        tables[table] = Table(columns, len(rows[table]), len(lines), "")
    return Manifest("0123456789ab", tables, {})


def asked(passphrase: str, key: str) -> Callable[[str], str]:
    return {"MLFLOW_CRYPTO_KEK_PASSPHRASE": passphrase, "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": key}.__getitem__


def test_stack_reads_the_secrets_and_nothing_else_changes(source: Manifest, tmp_path: Path) -> None:
    manifest = encryption.encrypt_again(source, tmp_path, asked(OLD, KEY), STACKS)
    for version, row in enumerate(row_files.read(tmp_path, manifest, "secrets", SECRET), 1):
        name, label, value, key, of, described = map(str, row)
        found = _decrypt_secret(
            bytes.fromhex(value[2:]), bytes.fromhex(key[2:]), KEKManager(STACKS, int(of)), name, label
        )
        assert (found, of, described) == ({"api_key": f"sk-{version}"}, "1", "a\tb\u2028c")
    (one, two) = row_files.read(tmp_path, manifest, "webhooks", HOOK)
    assert Fernet(webhook_key(STACKS)).decrypt(str(one[2]).encode()) == b"of the hook"
    assert two == ("w-2", "two", None)
    for table, entry in manifest.tables.items():
        assert entry.sha256 == hashlib.sha256((tmp_path / f"{table}.gz").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("passphrase", "key", "named"),
    [("wrong", KEY, "secret name 1"), (OLD, Fernet.generate_key().decode(), "webhook one"), (OLD, "", "webhook one")],
    ids=["passphrase", "key", "no key"],
)
def test_wrong_passphrase_is_refused_by_name(
    source: Manifest, tmp_path: Path, passphrase: str, key: str, named: str
) -> None:
    with pytest.raises(AdoptionError, match=named):
        encryption.encrypt_again(source, tmp_path, asked(passphrase, key), STACKS)
