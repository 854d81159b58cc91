"""A cloud that stores resources in memory and records calls, with an invented resource type for Pulumi programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pulumi
from botocore.exceptions import ClientError

from scripts.rehearsal import program_runner
from scripts.rehearsal.engine import Engine
from scripts.rehearsal.resource_types import Aws, Kind
from scripts.rehearsal.state import State
from scripts.rehearsal.wire import Props


@dataclass
class RecordingCloud:
    """A cloud that stores resources by ID, and records every call in order as (verb, name, ID)."""

    things: dict[str, Props] = field(default_factory=dict)
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    failing: set[tuple[str, str]] = field(default_factory=set)
    on_call: Callable[[str, str], None] = lambda verb, name: None
    saves: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)

    def _call(self, verb: str, inputs: Props, id_: str = "") -> None:
        name = inputs["name"]
        self.on_call(verb, name)
        self.calls.append((verb, name, id_))
        if (verb, name) in self.failing:
            raise ClientError({"Error": {"Code": "Broken", "Message": f"no {verb} today"}}, verb.capitalize())

    def create(self, aws: Aws, inputs: Props) -> str:
        self._call("create", inputs)
        id_ = f"{inputs['name']}-{next(self._numbers)}"
        self.things[id_] = dict(inputs)
        return id_

    def read(self, aws: Aws, id_: str, inputs: Props) -> Props | None:
        return {"address": f"at-{id_}"} if id_ in self.things else None

    def update(self, aws: Aws, id_: str, old: Props, new: Props) -> None:
        self._call("update", new, id_)
        self.things[id_] = dict(new)

    def delete(self, aws: Aws, id_: str, inputs: Props) -> None:
        self._call("delete", inputs, id_)
        del self.things[id_]

    def verbs(self) -> list[str]:
        """Return the recorded calls, each as "verb name", and clear the record."""
        calls, self.calls = self.calls, []
        return [f"{verb} {name}" for verb, name, _ in calls]

    def kinds(self) -> dict[str, Kind]:
        """Return the resource type. A change of `size` updates a `test:index:Thing`. A change of `fixed` or `on`
        replaces the resource."""
        thing = Kind(
            create=self.create,
            read=self.read,
            update=self.update,
            delete=self.delete,
            replace_on=frozenset({"fixed", "on"}),
            generate={"label": lambda logical, inputs: f"{logical}-made-up"},
            recover=lambda aws, inputs: next(
                (id_ for id_, each in self.things.items() if each.get("label") == inputs["label"]), None
            ),
        )
        return {"test:index:Thing": thing}


class Thing(pulumi.CustomResource):
    """A resource with an `address` that the cloud assigns."""

    address: pulumi.Output[str]

    def __init__(self, name: str, opts: pulumi.ResourceOptions | None = None, **props: Any) -> None:
        super().__init__("test:index:Thing", name, {"name": name, **props, "address": None}, opts)


def engine_of(cloud: RecordingCloud, state: State, *, dry_run: bool = False) -> Engine:
    return Engine(
        cloud.kinds(),
        Aws(lambda service: None, "eu-central-1"),
        state,
        save=lambda now: cloud.saves.append([each.urn for each in now.resources]),
        dry_run=dry_run,
    )


def up(
    cloud: RecordingCloud,
    state: State,
    body: Callable[[], object],
    *,
    dry_run: bool = False,
    config: Mapping[str, str] | None = None,
) -> Engine:
    """Do the same as `rehearse.py up`: recover, refresh, run `body` as the program, and finish. The return value of
    `body` is ignored."""

    def program() -> None:
        body()

    engine = engine_of(cloud, state, dry_run=dry_run)
    engine.recover()
    engine.refresh()
    program_runner.run(
        program,
        engine,
        {},
        project="test",
        stack_name="dev",
        config=config or {},
        secret_keys=[],
        on_log=lambda text: None,
    )
    engine.finish()
    return engine


def opts(**given: Any) -> pulumi.ResourceOptions:
    return pulumi.ResourceOptions(**given)
