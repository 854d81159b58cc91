"""Pulumi provider for rehearsals, with the resource types of `resources` and the data sources of `data_sources`.

The provider replaces pulumi-aws and pulumi-random, and uses the endpoint in AWS_ENDPOINT_URL. For each command and
package ("aws", "random"), Pulumi's engine starts one process, the plug-in `pulumi-resource-<package>`. The engine calls
the plug-in's gRPC service pulumirpc.ResourceProvider. The methods Check and Diff follow pulumi-terraform-bridge.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from google.protobuf import empty_pb2
from pulumi.runtime.proto import engine_pb2, engine_pb2_grpc, plugin_pb2, provider_pb2, provider_pb2_grpc

from scripts import aws_session
from scripts.rehearsal.data_sources import LOOKUPS
from scripts.rehearsal.errors import RehearsalError
from scripts.rehearsal.plugin_server import serve
from scripts.rehearsal.resource_types import Aws, Kind, seeded
from scripts.rehearsal.resources import KINDS
from scripts.rehearsal.wire import Props, Secret, default_tags, from_wire, holds_secret, reveal, to_wire

GENERATED = "__defaults"
"""Name of the input that lists the inputs with generated values, as in pulumi-terraform-bridge."""


class Provider(provider_pb2_grpc.ResourceProviderServicer):
    """Provider of one package's resources. This object owns the AWS clients and the values from Configure."""

    def __init__(self, package: str, version: str, log: Callable[[str, str], None]) -> None:
        """`log` is called with a text and the URN of the resource that the text concerns."""
        self.package = package
        self.version = version
        self.log = log
        self.region = os.environ.get("AWS_REGION", "")
        self.tags: Mapping[str, str] = {}
        self._clients: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    # The plug-in

    def Handshake(self, request: Any, context: Any) -> Any:
        return provider_pb2.ProviderHandshakeResponse(accept_secrets=True)

    def GetPluginInfo(self, request: Any, context: Any) -> Any:
        return plugin_pb2.PluginInfo(version=self.version)

    def GetSchema(self, request: Any, context: Any) -> Any:
        return provider_pb2.GetSchemaResponse(schema=f'{{"name": "{self.package}", "version": "{self.version}"}}')

    def CheckConfig(self, request: Any, context: Any) -> Any:
        return provider_pb2.CheckResponse(inputs=request.news)

    def DiffConfig(self, request: Any, context: Any) -> Any:
        return difference(
            Kind(_none, _none, _none, update=_none), from_wire(request.old_inputs), from_wire(request.news)
        )

    def Configure(self, request: Any, context: Any) -> Any:
        given = reveal(from_wire(request.args))
        if given.get("region"):
            self.region = given["region"]
        self.tags = default_tags(given.get("defaultTags"))
        return provider_pb2.ConfigureResponse(acceptSecrets=True, supportsPreview=True)

    def Cancel(self, request: Any, context: Any) -> Any:
        return empty_pb2.Empty()

    # Resources

    def Check(self, request: Any, context: Any) -> Any:
        kind = _kind(request.type, context)
        inputs, olds = from_wire(request.news), from_wire(request.olds)
        with seeded(request.randomSeed):
            return provider_pb2.CheckResponse(inputs=to_wire(checked(kind, request.name, inputs, olds, self.tags)))

    def Diff(self, request: Any, context: Any) -> Any:
        kind = _kind(request.type, context)
        return difference(kind, from_wire(request.old_inputs), from_wire(request.news))

    def Create(self, request: Any, context: Any) -> Any:
        kind, inputs = _kind(request.type, context), from_wire(request.properties)
        if request.preview:
            return provider_pb2.CreateResponse(properties=to_wire(outputs(kind, inputs, {})))
        made = {name: make(reveal(inputs)) for name, make in kind.tokens.items()}
        whole = {**inputs, **made}
        aws = self._aws(request.urn)
        with _refusing(context):
            id_ = kind.create(aws, reveal(whole))
            found = kind.read(aws, id_, reveal(whole))
        if found is None:
            return context.abort(grpc.StatusCode.UNKNOWN, f"{id_} was created and no longer exists")
        return provider_pb2.CreateResponse(id=id_, properties=to_wire(outputs(kind, inputs, found)))

    def Read(self, request: Any, context: Any) -> Any:
        kind, inputs, known = _kind(request.type, context), from_wire(request.inputs), from_wire(request.properties)
        aws = self._aws(request.urn)
        with _refusing(context):
            found = kind.read(aws, request.id, reveal({**known, **inputs}))
        if found is None:
            return provider_pb2.ReadResponse()
        # Inputs for `pulumi import`. The input `region` is omitted if it is the provider's region.
        imported = {name: value for name, value in found.items() if (name, value) != ("region", aws.region)}
        inputs = {name: _as(value, found.get(name, reveal(value))) for name, value in inputs.items()}
        return provider_pb2.ReadResponse(
            id=request.id,
            properties=to_wire(outputs(kind, {**_kept(kind, known), **inputs}, found)),
            inputs=to_wire(inputs or imported),
        )

    def Update(self, request: Any, context: Any) -> Any:
        kind, old, new = _kind(request.type, context), from_wire(request.old_inputs), from_wire(request.news)
        known = from_wire(request.olds)
        kept = {name: value for name, value in known.items() if name not in old}
        if request.preview:
            return provider_pb2.UpdateResponse(properties=to_wire({**kept, **outputs(kind, new, {})}))
        assert kind.update is not None
        aws = self._aws(request.urn)
        with _refusing(context):
            kind.update(aws, request.id, reveal(old), reveal(new))
            found = kind.read(aws, request.id, reveal({**kept, **new}))
        if found is None:
            return context.abort(grpc.StatusCode.UNKNOWN, f"{request.id} no longer exists: run `pulumi refresh`")
        return provider_pb2.UpdateResponse(properties=to_wire(outputs(kind, {**_kept(kind, known), **new}, found)))

    def Delete(self, request: Any, context: Any) -> Any:
        kind = _kind(request.type, context)
        with _refusing(context):
            kind.delete(self._aws(request.urn), request.id, reveal(from_wire(request.old_inputs)))
        return empty_pb2.Empty()

    def Invoke(self, request: Any, context: Any) -> Any:
        if request.tok not in LOOKUPS:
            context.abort(
                grpc.StatusCode.UNIMPLEMENTED,
                f"the rehearsal lacks the data source {request.tok}: add it to scripts/rehearsal/data_sources.py",
            )
        with _refusing(context):
            found = LOOKUPS[request.tok](self._aws(""), reveal(from_wire(request.args)))
        return provider_pb2.InvokeResponse(**{"return": to_wire(found)})

    def _aws(self, urn: str) -> Aws:
        return Aws(self._client, self.region, lambda text: self.log(text, urn))

    def _client(self, service: str) -> Any:
        """Return a service's boto3 client in the region of the provider. Raises RehearsalError if AWS_ENDPOINT_URL is
        not set."""
        with self._lock:
            key = (service, self.region)
            if key not in self._clients:
                if not os.environ.get("AWS_ENDPOINT_URL"):
                    raise RehearsalError(
                        "this provider serves rehearsals only, and AWS_ENDPOINT_URL is not set: "
                        'eval "$(scripts/rehearse.py environment)"'
                    )
                settings = Config(s3={"addressing_style": "path"}, retries={"max_attempts": 3, "mode": "standard"})
                connect: Any = aws_session.isolated().client
                self._clients[key] = connect(service, region_name=self.region, config=settings)
            return self._clients[key]


def checked(kind: Kind, name: str, inputs: Props, olds: Props, tags: Mapping[str, str]) -> Props:
    """Return `inputs` with generated names and the provider's default tags. A generated name stays the same until the
    resource is deleted."""
    inputs = {key: value for key, value in inputs.items() if key != GENERATED}
    generated = []
    for key, generate in kind.generate.items():
        if key not in inputs:
            kept = olds.get(key) if key in olds.get(GENERATED, []) else None
            inputs[key] = kept or generate(name, inputs)
            generated.append(key)
    if kind.tagged and (both := {**tags, **inputs.get("tags", {})}):
        inputs["tagsAll"] = both
    return {**inputs, GENERATED: generated} if generated else inputs


def difference(kind: Kind, old: Props, new: Props) -> Any:
    """Compare inputs. The returned DiffResponse contains the changed inputs and the inputs that require a replacement.

    An unknown input counts as changed. If the program chose the resource's name, the resource is deleted before its
    replacement is created, because two resources cannot have the same name.
    """
    before, after = reveal(old), reveal(new)
    keys = (before.keys() | after.keys()) - {GENERATED}
    changed = {key for key in keys if before.get(key) != after.get(key)}
    replaced = replacing(kind, changed, before, after)
    details = {}
    for key in sorted(changed):
        for path, verb in _paths(key, before.get(key), after.get(key)):
            verb = f"{verb}_REPLACE" if key in replaced else verb
            details[path] = provider_pb2.PropertyDiff(kind=provider_pb2.PropertyDiff.Kind.Value(verb), inputDiff=True)
    generated = new.get(GENERATED, [])
    chosen_name = bool(kind.generate) and not any(name in generated for name in kind.generate)
    return provider_pb2.DiffResponse(
        changes=provider_pb2.DiffResponse.DIFF_SOME if changed else provider_pb2.DiffResponse.DIFF_NONE,
        diffs=sorted(changed),
        replaces=sorted(replaced),
        deleteBeforeReplace=bool(replaced) and (kind.delete_before_replace or chosen_name),
        detailedDiff=details,
        hasDetailedDiff=True,
    )


def replacing(kind: Kind, changed: set[str], before: Props, after: Props) -> set[str]:
    """Return the changed inputs that require a replacement."""
    replaced = changed & kind.replace_on if kind.update else set(changed)
    return replaced | (kind.replaces(changed, before, after) if kind.replaces else set())


def outputs(kind: Kind, inputs: Props, found: Props) -> Props:
    """Merge inputs and computed outputs. A value is secret if the input is secret, or if `secret_outputs` of the
    resource type contains the value's name."""
    secret = {key for key, value in inputs.items() if holds_secret(value)} | kind.secret_outputs
    merged = {**reveal(inputs), **reveal(found)}
    merged.pop(GENERATED, None)
    return {key: Secret(value) if key in secret else value for key, value in merged.items()}


def _kept(kind: Kind, known: Props) -> Props:
    """Return the outputs that only `Create` sets. `Read` does not return these outputs."""
    return {name: known[name] for name in kind.tokens if name in known}


def _as(old: Any, value: Any) -> Any:
    return Secret(value) if isinstance(old, Secret) else value


def _paths(path: str, old: Any, new: Any) -> Iterator[tuple[str, str]]:
    """Yield each difference in a property as (path, "ADD", "DELETE" or "UPDATE"). Lists are compared as a whole."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            inner = f"{path}.{key}" if key.isidentifier() else f'{path}["{key}"]'
            yield from _paths(inner, old.get(key), new.get(key))
    else:
        yield path, "ADD" if old is None else "DELETE" if new is None else "UPDATE"


def _none(*arguments: Any) -> Any:
    """Placeholder for the functions of a Kind that is used only to compute differences."""


def _kind(type_: str, context: Any) -> Kind:
    if type_ not in KINDS:
        context.abort(
            grpc.StatusCode.UNIMPLEMENTED,
            f"the rehearsal does not support {type_} yet: describe its AWS calls in scripts/rehearsal/resources",
        )
    return KINDS[type_]


@contextmanager
def _refusing(context: Any) -> Iterator[None]:
    """Convert an AWS error to one sentence, which the engine shows to the user."""
    try:
        yield
    except ClientError as error:
        reason = error.response.get("Error", {})
        context.abort(
            grpc.StatusCode.UNKNOWN,
            f"{error.operation_name} failed with {reason.get('Code', 'an error')}: {reason.get('Message', '')}",
        )
    except (BotoCoreError, RehearsalError, ValueError) as error:
        context.abort(grpc.StatusCode.UNKNOWN, str(error))


@dataclass
class EngineLog:
    """Sends messages to Pulumi's engine. Sends a repeated message only once."""

    address: str
    said: set[str] = field(default_factory=set)

    def __call__(self, text: str, urn: str) -> None:
        if text in self.said:
            return
        self.said.add(text)
        with grpc.insecure_channel(self.address) as channel:
            request = engine_pb2.LogRequest(severity=engine_pb2.INFO, message=text, urn=urn)
            engine_pb2_grpc.EngineStub(channel).Log(request)


def main() -> None:
    """Usage: provider.py PACKAGE VERSION ENGINE_ADDRESS"""
    package, version, engine = sys.argv[1:4]
    serve(Provider(package, version, EngineLog(engine)), provider_pb2_grpc.add_ResourceProviderServicer_to_server)


if __name__ == "__main__":
    main()
