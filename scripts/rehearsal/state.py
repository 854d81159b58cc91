"""The state of a rehearsal's stack: a JSON file that is replaced atomically after every operation.

Secret values in the state are encrypted (Fernet). The encryption key is in a second file, and only the file's owner can
read the key. A report with a copy of the state therefore shows no password.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet, InvalidToken

from scripts import invoker
from scripts.rehearsal.errors import StateError
from scripts.rehearsal.wire import SECRET_SIGNATURE, SIGNATURE, Props, Secret, transform

FORMAT = 1
CIPHER_KEY = "rehearsal:ciphertext"


@dataclass
class Resource:
    """One resource, with the values that the last apply set.

    `inputs` is complete: it includes generated names and default tags. `outputs` contains the values that the program
    receives. `pending_delete` marks the old resource of a replacement until that resource is deleted. `generated` lists
    the inputs that the program did not set.
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
        """Return the URNs of the resources that must exist while this resource exists."""
        urns = {self.parent, self.provider.rsplit("::", 1)[0], self.deleted_with, *self.dependencies}
        for each in self.property_dependencies.values():
            urns.update(each)
        return urns - {""}


@dataclass
class State:
    """The resources in creation order, the unfinished operations, the settings and the stack's outputs."""

    resources: list[Resource] = field(default_factory=list)
    pending_operations: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    outputs: Props = field(default_factory=dict)
    engine: str = "own"
    """The stack's engine: "own" (the rehearsal's) or "pulumi", whose CLI stores the resources in its own files."""

    def live(self, urn: str) -> Resource | None:
        """Return the resource with this URN, or None. Resources with `pending_delete` are ignored."""
        return next((each for each in self.resources if each.urn == urn and not each.pending_delete), None)


def deletion_order(doomed: Iterable[Resource]) -> Iterator[Resource]:
    """Yield the resources in deletion order: dependents before the resources that they need, newer resources first."""
    left = list(doomed)
    while left:
        needed = {urn for each in left for urn in each.needs() if urn != each.urn}
        # A replaced resource and its successor have the same URN. The older resource is deleted when no resource in
        # `left` needs this URN.
        free = [each for each in left if each.urn not in needed] or left
        chosen = free[-1]
        left.remove(chosen)
        yield chosen


def load(path: Path) -> State:
    """Return the state in the file `path`, or an empty state without a file. Raises StateError if the file cannot be
    read."""
    return with_pulumis(_load(path), path)


def _load(path: Path) -> State:
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        return State()
    except PermissionError:
        raise StateError(invoker.not_readable(path)) from None
    except ValueError as error:
        raise StateError(
            f"{path} is not a rehearsal's state ({error}): delete it with `rehearse.py down --purge`"
        ) from None
    if document.get("format") != FORMAT:
        raise StateError(
            f"{path} has format {document.get('format')!r}, this checkout reads format {FORMAT}; "
            "use the checkout that wrote the file, or delete the file with `rehearse.py down --purge`"
        )
    cipher = _cipher(path)
    clear = _decrypt(document, cipher, path)
    return State(
        resources=[Resource(**each) for each in clear["resources"]],
        pending_operations=clear["pending_operations"],
        settings=clear["settings"],
        outputs=clear["outputs"],
    )


def with_pulumis(state: State, path: Path) -> State:
    """If Pulumi's CLI has stored resources for this stack, copy the resources and outputs to `state`. Return `state`.

    This function does not read the passphrase of Pulumi's secrets, so each secret in Pulumi's files becomes
    Secret(None).
    """
    name = path.stem.removeprefix("rehearsal-")
    checkpoints = (path.parent / "pulumi/stacks/.pulumi/stacks").glob(f"*/{name}.json")
    for latest in (json.loads(each.read_text())["checkpoint"].get("latest") or {} for each in checkpoints):
        if resources := latest.get("resources"):
            state.engine = "pulumi"
            state.resources = [_from_checkpoint(each) for each in resources]
            roots = (each for each in state.resources if each.type == "pulumi:pulumi:Stack")
            state.outputs = next((each.outputs for each in roots), {})
    return state


def _from_checkpoint(entry: dict[str, Any]) -> Resource:
    return Resource(
        urn=entry["urn"],
        type=entry["type"],
        id=entry.get("id", ""),
        inputs=_sealed(entry.get("inputs") or {}),
        outputs=_sealed(entry.get("outputs") or {}),
        custom=entry.get("custom", False),
        parent=entry.get("parent", ""),
        provider=entry.get("provider", ""),
        dependencies=sorted(entry.get("dependencies") or []),
        property_dependencies={
            key: sorted(urns or []) for key, urns in (entry.get("propertyDependencies") or {}).items()
        },
        protect=entry.get("protect", False),
        retain_on_delete=entry.get("retainOnDelete", False),
        deleted_with=entry.get("deletedWith", ""),
        pending_delete=entry.get("delete", False),
    )


def _sealed(value: Any) -> Any:
    if isinstance(value, list):
        return [_sealed(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.get(SIGNATURE) == SECRET_SIGNATURE:
        return Secret(None)
    return {key: _sealed(each) for key, each in value.items()}


def save(path: Path, state: State) -> None:
    """Replace the file at `path` atomically. Its mode is 0600."""
    invoker.make_private_folder(path.parent)
    cipher = _cipher(path)
    document = {
        "format": FORMAT,
        "resources": [dict(vars(each)) for each in state.resources] if state.engine == "own" else [],
        "pending_operations": state.pending_operations,
        "settings": state.settings,
        "outputs": state.outputs,
    }

    def encrypt(secret: Secret) -> dict[str, str]:
        return {CIPHER_KEY: cipher.encrypt(json.dumps(secret.value).encode()).decode()}

    write_private(path, json.dumps(transform(document, encrypt), indent=1))


def forget(path: Path) -> None:
    """Delete the state file and its key file."""
    path.unlink(missing_ok=True)
    _key_of(path).unlink(missing_ok=True)


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path` with mode 0600. A concurrent reader gets the complete old file or the complete new file.

    If the program runs through sudo, the user who called sudo owns the file and can read it.
    """
    fresh = path.with_name(path.name + ".new")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    invoker.hand_over(fresh)
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
                f"the secrets in {path} cannot be decrypted with the key beside it: delete the state with "
                "`rehearse.py down --purge`"
            ) from None
    return {key: _decrypt(each, cipher, path) for key, each in value.items()}
