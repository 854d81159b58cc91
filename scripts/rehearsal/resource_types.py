"""The description of a resource type for the engine, and the context of its AWS calls."""

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
    """An AWS endpoint: boto3 clients by service name, and a function for log lines."""

    client: Callable[[str], Any]
    region: str
    note: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Kind:
    """One resource type of a provider, with its AWS calls. Property names are the provider's (camelCase).

    create(aws, inputs) returns the new ID; read(aws, id, inputs) the computed outputs, or None if it no longer exists;
    update(aws, id, old, new) changes it in place; without it every change is a replacement. `replace_on`: the inputs
    that the AWS provider's documentation marks "forces new resource"; `replaces` returns those that depend on values.
    `generate` creates physical names that the program left out, from the logical name and the other inputs; they stay
    the same as long as the resource exists. `tokens` are created for each resource and are not inputs of the program:
    an identifier of the creation, or a random result. `secret_outputs` are always secret. recover(aws, inputs) finds
    the ID of a resource whose creation was interrupted, by its name or token.
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
    """A name in Pulumi's format: the logical name and seven random hex digits, which follow from the seed if there is
    one."""
    seed = SEED.get()
    digits = hashlib.sha256(seed + logical.encode()).hexdigest() if seed else secrets.token_hex(4)
    return f"{logical}-{digits[:7]}"


SEED: contextvars.ContextVar[bytes] = contextvars.ContextVar("seed", default=b"")


@contextlib.contextmanager
def seeded(seed: bytes) -> Iterator[None]:
    """Names made in the block follow from the seed. Pulumi keeps a resource's seed in its plan, so that `up --plan`
    creates the previewed names."""
    token = SEED.set(seed)
    try:
        yield
    finally:
        SEED.reset(token)
