"""What the rehearsal has made so far: one JSON file, replaced atomically after every operation.

Secret values are encrypted (Fernet) with a key that lies beside the state and is readable by its owner only, so the
state can be copied into a report without handing out a password.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet, InvalidToken

from rehearsal.errors import StateError
from rehearsal.values import Props, Secret, transform

FORMAT = 1
CIPHER_KEY = "rehearsal:ciphertext"


@dataclass
class Resource:
    """One resource as it was last applied.

    `inputs` are what was asked for, complete with generated names and default tags; `outputs` what a program sees.
    `pending_delete` marks the old half of a replacement whose deletion is still to come; `generated` names the inputs
    that were made up because the program left them out.
    """

    urn: str
    type: str
    id: str
    inputs: Props = field(default_factory=dict)
    outputs: Props = field(default_factory=dict)
    custom: bool = True
    parent: str = ""
    provider: str = ""
    dependencies: list[str] = field(default_factory=list)
    property_dependencies: dict[str, list[str]] = field(default_factory=dict)
    protect: bool = False
    retain_on_delete: bool = False
    deleted_with: str = ""
    pending_delete: bool = False
    generated: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.urn.rsplit("::", 1)[-1]

    def needs(self) -> set[str]:
        """URNs that must exist while this resource does."""
        urns = {self.parent, self.provider.rsplit("::", 1)[0], self.deleted_with, *self.dependencies}
        for each in self.property_dependencies.values():
            urns.update(each)
        return urns - {""}


@dataclass
class State:
    """The resources in the order they were made, the operations under way, the settings and the stack's outputs."""

    resources: list[Resource] = field(default_factory=list)
    pending_operations: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    outputs: Props = field(default_factory=dict)

    def live(self, urn: str) -> Resource | None:
        """The resource at `urn` that is not waiting for its deletion."""
        return next((each for each in self.resources if each.urn == urn and not each.pending_delete), None)


def deletion_order(doomed: Iterable[Resource]) -> Iterator[Resource]:
    """`doomed` so that nothing is deleted before what depends on it; among equals the youngest first."""
    left = list(doomed)
    while left:
        needed = {urn for each in left for urn in each.needs() if urn != each.urn}
        # A replaced resource and its successor share a URN: the older copy is free once nobody doomed names it.
        free = [each for each in left if each.urn not in needed] or left
        chosen = free[-1]
        left.remove(chosen)
        yield chosen


def load(path: Path) -> State:
    """The state at `path`, empty where there is none. Raises StateError when it cannot be read."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        return State()
    except ValueError as error:
        raise StateError(
            f"{path} is not a rehearsal's state ({error}); `rehearse.py down --purge` starts over"
        ) from None
    if document.get("format") != FORMAT:
        raise StateError(
            f"{path} has format {document.get('format')!r}, this checkout reads format {FORMAT}; "
            "use the checkout that wrote it, or `rehearse.py down --purge`"
        )
    cipher = _cipher(path)
    clear = _decrypt(document, cipher, path)
    return State(
        resources=[Resource(**each) for each in clear["resources"]],
        pending_operations=clear["pending_operations"],
        settings=clear["settings"],
        outputs=clear["outputs"],
    )


def save(path: Path, state: State) -> None:
    """Replaces the file at `path` in one step, mode 0600."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cipher = _cipher(path)
    document = {
        "format": FORMAT,
        "resources": [dict(vars(each)) for each in state.resources],
        "pending_operations": state.pending_operations,
        "settings": state.settings,
        "outputs": state.outputs,
    }

    def encrypt(secret: Secret) -> dict[str, str]:
        return {CIPHER_KEY: cipher.encrypt(json.dumps(secret.value).encode()).decode()}

    write_private(path, json.dumps(transform(document, encrypt), indent=1))


def forget(path: Path) -> None:
    """Removes the state and its key, for a stack that is no more."""
    path.unlink(missing_ok=True)
    _key_of(path).unlink(missing_ok=True)


def write_private(path: Path, text: str) -> None:
    """Writes `text` to `path`, mode 0600, so that a reader sees the old file or the new one and never a part."""
    fresh = path.with_name(path.name + ".new")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _key_of(path: Path) -> Path:
    return path.with_suffix(".key")


def _cipher(path: Path) -> Fernet:
    key_path = _key_of(path)
    if not key_path.exists():
        write_private(key_path, Fernet.generate_key().decode())
    return Fernet(key_path.read_text().strip())


def _decrypt(value: Any, cipher: Fernet, path: Path) -> Any:
    if isinstance(value, list):
        return [_decrypt(each, cipher, path) for each in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {CIPHER_KEY}:
        try:
            return Secret(json.loads(cipher.decrypt(value[CIPHER_KEY].encode())))
        except InvalidToken:
            raise StateError(
                f"the secrets in {path} do not open with the key beside it; `rehearse.py down --purge` starts over"
            ) from None
    return {key: _decrypt(each, cipher, path) for key, each in value.items()}
