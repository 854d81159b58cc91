"""The rehearsal's resources: one JSON file, replaced atomically after every operation.

Secret values are encrypted (Fernet) with a key in a file beside the state, readable by its owner only, so the state can
be copied into a report without a password in it.
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
    """One resource as it was last applied.

    `inputs` are complete, with generated names and default tags; `outputs` are those that the program receives.
    `pending_delete` marks the old half of a replacement that is not deleted yet; `generated` names the inputs that the
    program left out.
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
    """The resources in order of creation, the unfinished operations, the settings and the stack's outputs."""

    resources: list[Resource] = field(default_factory=list)
    pending_operations: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    outputs: Props = field(default_factory=dict)
    engine: str = "own"
    """The engine of the stack: the rehearsal's "own", or "pulumi", whose CLI stores the resources elsewhere."""

    def live(self, urn: str) -> Resource | None:
        """The resource at `urn`, unless it is waiting for its deletion."""
        return next((each for each in self.resources if each.urn == urn and not each.pending_delete), None)


def deletion_order(doomed: Iterable[Resource]) -> Iterator[Resource]:
    """The resources in an order for deletion: dependents first, otherwise the newest first."""
    left = list(doomed)
    while left:
        needed = {urn for each in left for urn in each.needs() if urn != each.urn}
        # A replaced resource and its successor share a URN: delete the older one once no resource to delete depends on
        # it.
        free = [each for each in left if each.urn not in needed] or left
        chosen = free[-1]
        left.remove(chosen)
        yield chosen


def load(path: Path) -> State:
    """The state at `path`, empty without a file. Raises StateError if it cannot be read."""
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


def with_pulumis(state: State, path: Path) -> State:
    """`state` with the resources and outputs that Pulumi's CLI stores for the same stack, if any.

    Their secrets are encrypted with a passphrase that is not read here; they are Secret(None).
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
    """Replace the file at `path` in one step, mode 0600."""
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
    """Remove the state and its key."""
    path.unlink(missing_ok=True)
    _key_of(path).unlink(missing_ok=True)


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path`, mode 0600, so that a reader sees the old or the new file, never a part.

    Through sudo the sudo user owns the file and can read it.
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
                f"the secrets in {path} cannot be decrypted with the key beside it; `rehearse.py down --purge` starts "
                "over"
            ) from None
    return {key: _decrypt(each, cipher, path) for key, each in value.items()}
