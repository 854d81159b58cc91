"""What the engine must know of a resource type, and the context its AWS calls run in."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rehearsal.values import Props


@dataclass(frozen=True)
class Aws:
    """An AWS endpoint: boto3 clients by service name, and where the story of what happens goes."""

    client: Callable[[str], Any]
    region: str
    note: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Kind:
    """One resource type of a provider, as far as applying it goes. Property names are the provider's (camelCase).

    create(aws, inputs) returns the new id; read(aws, id, inputs) the computed outputs, or None when it is gone;
    update(aws, id, old, new) changes it in place; without it every change replaces. `replace_on` names the inputs the
    AWS provider's documentation marks "forces new resource"; `replaces` answers where it depends on values. `generate`
    makes inputs the program left out (physical names) from the logical name and the other inputs; they live as long as
    the resource. `secret_outputs` are secret whatever their inputs were. recover(aws, inputs) finds the id of one whose
    creation was cut short, by a name or token that was chosen before.
    """

    create: Callable[[Aws, Props], str]
    read: Callable[[Aws, str, Props], Props | None]
    delete: Callable[[Aws, str, Props], None]
    update: Callable[[Aws, str, Props, Props], None] | None = None
    replace_on: frozenset[str] = frozenset()
    replaces: Callable[[set[str], Props, Props], set[str]] | None = None
    generate: Mapping[str, Callable[[str, Props], Any]] = field(default_factory=dict)
    tagged: bool = False
    delete_before_replace: bool = False
    secret_outputs: frozenset[str] = frozenset()
    recover: Callable[[Aws, Props], str | None] | None = None


def physical_name(logical: str, inputs: Props) -> str:
    """A name as Pulumi gives where the program gives none: the logical name and seven random hex digits."""
    return f"{logical}-{secrets.token_hex(4)[:7]}"
