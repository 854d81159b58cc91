"""The class Kind describes a resource type for the engine. The class Aws is the endpoint of the AWS calls."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from scripts.rehearsal.wire import Props


@dataclass(frozen=True)
class Aws:
    """An AWS endpoint. `client` returns the boto3 client of a service, and `note` prints a log line."""

    client: Callable[[str], Any]
    region: str
    note: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Kind:
    """One resource type of a provider, with its AWS calls. Property names are the provider's names (camelCase).

    create(aws, inputs) returns the new ID. read(aws, id, inputs) returns the computed outputs, or None if the resource
    does not exist any more. update(aws, id, old, new) changes the resource in place. If a type has no `update`, every
    change replaces the resource. `replace_on` lists the inputs that the AWS provider's documentation marks with "forces
    new resource". `replaces` returns further changed inputs that require a replacement because of their values.
    `generate` creates the physical names that the program does not set. A generated name stays the same until the
    resource is deleted. `tokens` creates values that are not inputs of the program, such as a client token or a random
    password. `secret_outputs` lists outputs that are always secret. recover(aws, inputs) uses the name or the token to
    find a resource whose creation was interrupted.
    """

    create: Callable[[Aws, Props], str]
    read: Callable[[Aws, str, Props], Props | None]
    delete: Callable[[Aws, str, Props], None]
    update: Callable[[Aws, str, Props, Props], None] | None = None
    replace_on: frozenset[str] = frozenset()
    replaces: Callable[[set[str], Props, Props], set[str]] | None = None
    generate: Mapping[str, Callable[[str, Props], Any]] = field(default_factory=dict)
    tokens: Mapping[str, Callable[[Props], Any]] = field(default_factory=dict)
    tagged: bool = False
    delete_before_replace: bool = False
    secret_outputs: frozenset[str] = frozenset()
    recover: Callable[[Aws, Props], str | None] | None = None


def physical_name(logical: str, inputs: Props) -> str:
    """Return a name in Pulumi's format: the logical name and seven hex digits. The digits are derived from `SEED`, or
    random if `SEED` is empty."""
    seed = SEED.get()
    digits = hashlib.sha256(seed + logical.encode()).hexdigest() if seed else secrets.token_hex(4)
    return f"{logical}-{digits[:7]}"


SEED: contextvars.ContextVar[bytes] = contextvars.ContextVar("seed", default=b"")


@contextlib.contextmanager
def seeded(seed: bytes) -> Iterator[None]:
    """Use `seed` for all names that are generated in the `with` block. Pulumi stores each resource's seed in the plan,
    so that `up --plan` creates the same names as the preview."""
    token = SEED.set(seed)
    try:
        yield
    finally:
        SEED.reset(token)
