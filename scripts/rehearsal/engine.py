"""Our engine: create, update, replace or delete each registered resource, in the order of Pulumi's engine.

This engine follows the rules of Pulumi's deployment engine (pkg/resource/deploy/step_generator.go):

When the program registers a resource, the engine creates, updates or replaces the resource, or leaves it unchanged.
A replacement creates the new resource at once and deletes the old resource at the end of the run. The old resource is
  deleted first with the option `delete_before_replace`, or if the program chose its physical name, which is unique.
If a resource is deleted before its replacement, the engine first deletes the dependents whose changed inputs also
  require a replacement, in reverse order. The engine creates the dependents again when the program registers them.
If the program succeeds, the engine at the end deletes the resources that were not registered, dependents first.
A protected resource is never deleted or replaced. A resource with `retain_on_delete` is only removed from the state.

Operations run one at a time. The state is saved before and after each operation, so that the next run can continue.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from botocore.exceptions import BotoCoreError, ClientError
from pulumi.runtime.proto import resource_pb2

from scripts.rehearsal.errors import ApplyError, Interrupted
from scripts.rehearsal.hooks import HookFailed, Hooks
from scripts.rehearsal.resource_types import Aws, Kind
from scripts.rehearsal.state import Resource, State, deletion_order
from scripts.rehearsal.wire import UNKNOWN, Props, Secret, default_tags, from_wire, holds_secret, reveal, to_wire

T = TypeVar("T")
Operation = Literal["create", "update", "replace", "delete", "same", "retain"]
UNCHANGING_ID = "rehearsal"
READERS = 8


@dataclass(frozen=True)
class Step:
    """One operation on a resource. `changed` lists the changed inputs, `began` is the start in seconds since 1970, and
    `seconds` is the duration."""

    operation: Operation
    urn: str
    type: str
    name: str
    changed: tuple[str, ...] = ()
    seconds: float = 0.0
    began: float = 0.0


@dataclass(frozen=True)
class Diff:
    """The changed inputs (`changed`), and the changed inputs that require a replacement (`replace`)."""

    changed: frozenset[str] = frozenset()
    replace: frozenset[str] = frozenset()


@dataclass
class Engine:
    """Applies the resources that one run of a Pulumi program registers. This object owns the state during the run.

    The engine calls `save` with the state before and after each operation. The engine calls `done` after each step.
    With `dry_run`, the engine changes and saves nothing, and `steps` is the plan.
    """

    kinds: Mapping[str, Kind]
    aws: Aws
    state: State
    save: Callable[[State], None]
    done: Callable[[Step], None] = lambda _: None
    default_tags: Mapping[str, str] = field(default_factory=dict)
    dry_run: bool = False
    steps: list[Step] = field(default_factory=list)
    outputs: Props = field(default_factory=dict)
    failure: BaseException | None = None
    hooks: Hooks = field(default_factory=Hooks)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._registered: list[str] = []
        self._deleted_first: set[str] = set()
        self._provider_tags: dict[str, Mapping[str, str]] = {}
        self._cancelled = threading.Event()
        if self.dry_run:
            self.state = copy.deepcopy(self.state)

    def cancel(self) -> None:
        """Finish the current operation and refuse all later operations."""
        self._cancelled.set()

    @property
    def idle(self) -> bool:
        """Whether all resources were unchanged."""
        return all(each.operation == "same" for each in self.steps)

    # Called by the program

    def register(self, request: Any, urn: str) -> Any:
        """Create, update or replace the resource of a RegisterResourceRequest. Returns its ID and outputs."""
        with self._lock:
            if self._cancelled.is_set():
                raise Interrupted("interrupted")
            if self.failure is not None:
                raise ApplyError("an earlier resource failed")
            try:
                resource = self._settle(request, urn)
            except BaseException as error:
                self.failure = error
                raise
        unknown_id = not resource.id or resource.id == UNKNOWN
        return resource_pb2.RegisterResourceResponse(
            urn=urn, id="" if unknown_id else resource.id, object=to_wire(resource.outputs)
        )

    def finish(self) -> None:
        """Delete replaced resources and unregistered resources. Call this method only after the program succeeded."""
        with self._lock:
            registered = set(self._registered)
            doomed = [each for each in self.state.resources if each.pending_delete or each.urn not in registered]
            self._delete_all(doomed)
            order = {urn: place for place, urn in enumerate(self._registered)}
            self.state.resources.sort(key=lambda each: order.get(each.urn, -1))
            self.state.outputs = self.outputs
            self._save()

    def delete(self, doomed: list[Resource]) -> None:
        """Delete the resources in `doomed`, dependents first. All other resources remain."""
        with self._lock:
            self._delete_all(doomed)

    def refresh(self) -> list[Resource]:
        """Update the outputs of all resources. Remove missing resources from the state, and return these resources."""
        gone: list[Resource] = []
        applied = [each for each in self.state.resources if each.custom and each.type in self.kinds]

        def read(resource: Resource) -> Props | None:
            return self._call(resource, partial(_read, aws=self.aws, resource=resource))

        with ThreadPoolExecutor(READERS) as readers:
            answers = list(readers.map(read, applied))
        for resource, found in zip(applied, answers, strict=True):
            if found is None:
                gone.append(resource)
            else:
                resource.outputs = self._outputs(resource, found)
        self.state.resources = [each for each in self.state.resources if each not in gone]
        if gone:
            self._save()
        return gone

    def recover(self) -> list[str]:
        """If the last run was killed, complete the state. Returns sentences about the run's unfinished creations.

        If the cloud contains a resource with the physical name or token of an unfinished creation, the resource is
        adopted.
        """
        leftovers = []
        for pending in self.state.pending_operations:
            resource = Resource(**pending["resource"])
            if pending["operation"] != "create" or self.state.live(resource.urn):
                continue
            kind = self.kinds[resource.type]
            found = kind.recover(self.aws, reveal(resource.inputs)) if kind.recover else None
            if found is None:
                leftovers.append(
                    f"the creation of {resource.type} {resource.name} was interrupted; if it exists, it is unused, "
                    "and `rehearse.py down --purge` deletes it"
                )
                continue
            resource.id = found
            outputs = kind.read(self.aws, found, reveal(resource.inputs))
            if outputs is not None:
                resource.outputs = self._outputs(resource, outputs)
                self.state.resources.append(resource)
                leftovers.append(
                    f"the creation of {resource.type} {resource.name} was interrupted; {found} exists and is adopted "
                    "(Pulumi would require `pulumi import`)"
                )
        if self.state.pending_operations:
            self.state.pending_operations = []
            self._save()
        return leftovers

    # One resource

    def _settle(self, request: Any, urn: str) -> Resource:
        if urn in self._registered:
            raise ApplyError(
                f"two resources of type {request.type} are named {request.name!r}; Pulumi requires unique names"
            )
        self._registered.append(urn)
        old = self.state.live(urn) or self._by_alias(request, urn)
        wanted = Resource(
            urn=urn,
            type=request.type,
            id=old.id if old else "",
            inputs=from_wire(request.object),
            custom=request.custom,
            parent=request.parent,
            provider=request.provider,
            dependencies=sorted(request.dependencies),
            property_dependencies={key: sorted(each.urns) for key, each in request.propertyDependencies.items()},
            protect=request.protect,
            retain_on_delete=request.retainOnDelete,
            deleted_with=request.deletedWith,
        )
        if not request.custom or request.type.startswith("pulumi:"):
            return self._record_unapplied(wanted, old)
        kind = self._kind(wanted)
        if request.importId:
            raise ApplyError(
                f"the program imports {wanted.name} ({request.importId}), but a rehearsal does not support imports"
            )
        self._complete_inputs(kind, wanted, old, list(request.ignoreChanges))
        if old is None:
            self._call_hooks(request.hooks.before_create, wanted)
            return self._create(wanted, "replace" if urn in self._deleted_first else "create")
        diff = self._diff(kind, old.inputs, wanted.inputs, list(request.replaceOnChanges))
        if diff.replace:
            self._call_hooks(request.hooks.before_create, wanted)
            return self._replace(kind, old, wanted, diff, request)
        if diff.changed:
            self._call_hooks(request.hooks.before_update, wanted, old)
            return self._update(kind, old, wanted, diff)
        wanted.outputs = old.outputs
        self._put(old, wanted)
        self._report("same", wanted)
        return wanted

    def _record_unapplied(self, wanted: Resource, old: Resource | None) -> Resource:
        """Record a component or a provider in the state. No AWS call is needed."""
        if wanted.custom:
            wanted.id = UNCHANGING_ID
            wanted.outputs = wanted.inputs
        if wanted.type == "pulumi:providers:aws":
            self._provider_tags[wanted.urn] = default_tags(reveal(wanted.inputs).get("defaultTags"))
        self._put(old, wanted)
        return wanted

    def _complete_inputs(self, kind: Kind, wanted: Resource, old: Resource | None, ignored: list[str]) -> None:
        inputs = wanted.inputs
        if old is not None:
            for name in old.inputs if "*" in ignored else ignored:
                if name in old.inputs:
                    inputs[name] = old.inputs[name]
                else:
                    inputs.pop(name, None)
        for name, generate in kind.generate.items():
            if name not in inputs:
                kept = old.inputs.get(name) if old is not None and name in old.generated else None
                inputs[name] = kept or generate(wanted.name, inputs)
                wanted.generated.append(name)
        for name, make in kind.tokens.items():
            inputs[name] = old.inputs[name] if old is not None and name in old.inputs else make(inputs)
        if kind.tagged:
            provider = wanted.provider.rsplit("::", 1)[0]
            tags = {**self._provider_tags.get(provider, self.default_tags), **inputs.get("tags", {})}
            if tags:
                inputs["tagsAll"] = tags

    def _diff(self, kind: Kind, old: Props, new: Props, replace_on_changes: list[str]) -> Diff:
        before, after = reveal(old), reveal(new)
        changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        replace = changed & kind.replace_on if kind.update else set(changed)
        if kind.replaces is not None:
            replace |= kind.replaces(changed, before, after)
        if "*" in replace_on_changes:
            replace |= changed
        replace |= changed & set(replace_on_changes)
        return Diff(frozenset(changed), frozenset(replace))

    def _replace(self, kind: Kind, old: Resource, wanted: Resource, diff: Diff, request: Any) -> Resource:
        if old.protect:
            raise ApplyError(
                f"{old.type} {old.name} would have to be replaced because {_list(diff.replace)} changed, "
                "but it is protected; nothing was changed. Undo the change"
            )
        for name, generate in kind.generate.items():
            if name in wanted.generated:
                wanted.inputs[name] = generate(wanted.name, wanted.inputs)
        for name, make in kind.tokens.items():
            wanted.inputs[name] = make(wanted.inputs)
        chosen_name = any(name not in wanted.generated for name in kind.generate)
        first = (
            request.deleteBeforeReplace
            if request.deleteBeforeReplaceDefined
            else kind.delete_before_replace or chosen_name
        )
        wanted.id = ""
        if not first:
            old.pending_delete = True
            return self._create(wanted, "replace", diff)
        followers = self.followers(old)
        for each in followers:
            if each.protect:
                raise ApplyError(
                    f"the replacement of {old.type} {old.name} requires the deletion of {each.type} {each.name}, but "
                    f"{each.name} is protected; nothing was changed"
                )
        self._delete_all([*followers, old], reason=tuple(sorted(diff.replace)))
        self._deleted_first.update(each.urn for each in followers)
        return self._create(wanted, "replace", diff)

    def followers(self, root: Resource) -> list[Resource]:
        """Return the resources that must be replaced if `root` is replaced: their inputs come from `root`, or from a
        resource that must be replaced for the same reason."""
        replaced = {root.urn}
        followers = []
        for each in self.state.resources:
            if not each.custom or each.pending_delete or each.urn == root.urn or each.type not in self.kinds:
                continue
            inputs = dict(each.inputs)
            for name, urns in each.property_dependencies.items():
                if name in inputs and replaced.intersection(urns):
                    inputs[name] = UNKNOWN
            if self._diff(self.kinds[each.type], each.inputs, inputs, []).replace:
                replaced.add(each.urn)
                followers.append(each)
        return followers

    def _create(self, wanted: Resource, operation: Operation, diff: Diff | None = None) -> Resource:
        changed = tuple(sorted(diff.replace)) if diff else ()
        if self.dry_run:
            made = self._kind(wanted).tokens
            wanted.id = UNKNOWN
            wanted.outputs = {name: value for name, value in wanted.inputs.items() if name not in made}
            self.state.resources.append(wanted)
            self._report(operation, wanted, changed)
            return wanted
        started = time.monotonic()
        self._begin("create", wanted)
        wanted.id = self._call(wanted, lambda kind: kind.create(self.aws, reveal(wanted.inputs)))
        self.state.resources.append(wanted)
        self._save()
        self._read_back(wanted)
        self._end()
        self._report(operation, wanted, changed, started)
        return wanted

    def _update(self, kind: Kind, old: Resource, wanted: Resource, diff: Diff) -> Resource:
        changed = tuple(sorted(diff.changed - ({"tags"} if "tagsAll" in diff.changed else set())))
        if self.dry_run:
            wanted.outputs = {**old.outputs, **wanted.inputs}
            self._put(old, wanted)
            self._report("update", wanted, changed)
            return wanted
        started = time.monotonic()
        update = kind.update
        assert update is not None
        self._begin("update", wanted)
        self._call(wanted, lambda _: update(self.aws, old.id, reveal(old.inputs), reveal(wanted.inputs)))
        self._put(old, wanted)
        self._read_back(wanted)
        self._end()
        self._report("update", wanted, changed, started)
        return wanted

    def _delete_all(self, doomed: list[Resource], reason: tuple[str, ...] = ()) -> None:
        staying = [each for each in doomed if each.protect and not each.retain_on_delete]
        if staying:
            raise ApplyError(
                f"{_list(f'{each.type} {each.name}' for each in staying)} would have to be deleted, but is protected; "
                "register it again, or set protect=False first"
            )
        going = {each.urn for each in doomed}
        for resource in deletion_order(doomed):
            if self._cancelled.is_set():
                raise Interrupted("interrupted")
            started = time.monotonic()
            keep = resource.retain_on_delete or resource.deleted_with in going
            applied = resource.custom and resource.type in self.kinds
            if applied and not keep and not self.dry_run:
                self._begin("delete", resource)
                self._call(resource, partial(_delete, aws=self.aws, resource=resource))
            self.state.resources = [each for each in self.state.resources if each is not resource]
            if not self.dry_run:
                self._end()
            if applied:
                self._report("retain" if resource.retain_on_delete else "delete", resource, reason, started)

    # Helper functions

    def _call_hooks(self, names: Iterable[str], wanted: Resource, old: Resource | None = None) -> None:
        former = {"old_inputs": old.inputs, "old_outputs": old.outputs} if old else {}
        about = {"urn": wanted.urn, "id": wanted.id, "name": wanted.name, "type": wanted.type, **former}
        try:
            self.hooks.call(names, dry_run=self.dry_run, new_inputs=wanted.inputs, **about)
        except HookFailed as refused:
            raise ApplyError(str(refused)) from None

    def _kind(self, resource: Resource) -> Kind:
        if resource.type not in self.kinds:
            raise ApplyError(
                f"the rehearsal does not support {resource.type} ({resource.name}) yet: describe its AWS calls in "
                f"scripts/rehearsal/resources"
            )
        return self.kinds[resource.type]

    def _call(self, resource: Resource, call: Callable[[Kind], T]) -> T:
        try:
            return call(self._kind(resource))
        except ClientError as error:
            reason = error.response.get("Error", {})
            raise ApplyError(
                f"{resource.type} {resource.name}: {error.operation_name} failed with "
                f"{reason.get('Code', 'an error')}: {reason.get('Message', '')}"
            ) from error
        except BotoCoreError as error:
            raise ApplyError(f"{resource.type} {resource.name}: {error}") from error

    def _read_back(self, resource: Resource) -> None:
        found = self._call(resource, partial(_read, aws=self.aws, resource=resource))
        if found is None:
            raise ApplyError(f"{resource.type} {resource.name} ({resource.id}) was created but no longer exists")
        resource.outputs = self._outputs(resource, found)

    def _outputs(self, resource: Resource, computed: Props) -> Props:
        """Merge inputs and computed outputs. A value is secret if the input is secret, or if `secret_outputs` contains
        the value's name."""
        secret = {key for key, value in resource.inputs.items() if holds_secret(value)}
        secret |= self.kinds[resource.type].secret_outputs
        merged = {**reveal(resource.inputs), **computed}
        return {key: Secret(value) if key in secret else value for key, value in merged.items()}

    def _put(self, old: Resource | None, new: Resource) -> None:
        if old is None:
            self.state.resources.append(new)
        else:
            place = next(place for place, each in enumerate(self.state.resources) if each is old)
            self.state.resources[place] = new

    def _by_alias(self, request: Any, urn: str) -> Resource | None:
        """Return the resource that an alias of the request identifies in the state, or None."""
        stack, project, _, _ = urn.removeprefix("urn:pulumi:").split("::", 3)
        for alias in request.aliases:
            former = alias.urn
            if not former:
                spec = alias.spec
                parent = "" if spec.noParent else spec.parentUrn or request.parent
                kind = spec.type or request.type
                if parent:
                    kind = parent.split("::")[2].split("$")[-1] + "$" + kind
                former = (
                    f"urn:pulumi:{spec.stack or stack}::{spec.project or project}::{kind}::{spec.name or request.name}"
                )
            if found := self.state.live(former):
                return found
        return None

    def _begin(self, operation: str, resource: Resource) -> None:
        self.state.pending_operations = [{"operation": operation, "resource": vars(resource)}]
        self._save()

    def _end(self) -> None:
        self.state.pending_operations = []
        self._save()

    def _save(self) -> None:
        if not self.dry_run:
            self.save(self.state)

    def _report(
        self, operation: Operation, resource: Resource, changed: tuple[str, ...] = (), started: float | None = None
    ) -> None:
        seconds = time.monotonic() - started if started is not None else 0.0
        step = Step(operation, resource.urn, resource.type, resource.name, changed, seconds, time.time() - seconds)
        self.steps.append(step)
        self.done(step)


def _read(kind: Kind, aws: Aws, resource: Resource) -> Props | None:
    return kind.read(aws, resource.id, reveal(resource.inputs))


def _delete(kind: Kind, aws: Aws, resource: Resource) -> None:
    kind.delete(aws, resource.id, reveal(resource.inputs))


def _list(names: Any) -> str:
    return ", ".join(sorted(names))
