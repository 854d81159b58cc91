"""Run the program of infra/ with stand-ins for Pulumi's engine and AWS's data sources, and record the program's
requests.

A subclass of pulumi.runtime's MockMonitor receives the requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
import runpy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pulumi
import pulumi_aws as aws
from google.protobuf import empty_pb2, json_format, struct_pb2
from pulumi.runtime import mocks, settings, stack
from pulumi.runtime.proto import provider_pb2, resource_pb2

from mlflow_host.contract import in_service, launch
from scripts.rehearsal.hooks import HookFailed, Hooks

with warnings.catch_warnings():
    # At the first use of a module, pulumi-aws warns about deprecated types in it, even if the used type is current.
    warnings.simplefilter("ignore", DeprecationWarning)
    LOADED = (aws.ec2.Instance, aws.s3.Bucket)

INFRA = Path(__file__).parents[2] / "infra"
SIGNATURE, SECRET = "4dabf18193072939515e22adb298388d", "1b47061264138c4ac30d75fd1eb44270"
"""In Pulumi's protocol, an object is a secret value if its key SIGNATURE has the value SECRET."""
NO_RESULTS = "Your query returned no results. Please change your search criteria and try again."

OLD, NEW, OTHER = "ami-0000000000000001a", "ami-0000000000000002b", "ami-0000000000000003c"
VOLUME = "vol-0123456789abcdef0"
ADDRESS = "52.1.2.3"
CONFIG = {"aws:region": "eu-central-1", "mlflow-ami:amiId": NEW, "mlflow-ami:allowedCidrs": '["203.0.113.7/32"]'}


def image_tags(**changes: str) -> dict[str, str]:
    """Return the tags of an image of this project. Underscores in names become hyphens. Empty values omit the tag."""
    tags = {
        "format": "1",
        "image-version": "20261122T101500Z",
        "mlflow-version": "3.17.2",
        "migration-head": "dc11669786a5",
        "migration-count": "67",
        "postgresql-major": "15",
        "launch-revision": str(launch.REVISION),
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    return {f"mlflow-ami:{name}": value for name, value in tags.items() if value}


@dataclass(frozen=True)
class Image:
    tags: Mapping[str, str] = field(default_factory=image_tags)
    state: str = "available"
    architecture: str = "x86_64"
    root_gib: int = 8


@dataclass(frozen=True)
class Volume:
    tags: Mapping[str, str]
    zone: str = "eu-central-1a"
    gib: int = 20


@dataclass(frozen=True)
class Account:
    """An AWS account with all resources that the program can look up in the account."""

    images: Mapping[str, Image] = field(default_factory=lambda: {NEW: Image()})
    volumes: Mapping[str, Volume] = field(default_factory=dict)
    zones: tuple[str, ...] = ("eu-central-1a", "eu-central-1b", "eu-central-1c")
    offered: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "t3.small": ("eu-central-1a", "eu-central-1b", "eu-central-1c"),
            "t4g.small": ("eu-central-1a",),
            "t3.nano": ("eu-central-1a",),
            "t3.micro": ("eu-central-1a",),
            "p5.huge": ("eu-central-1b", "eu-central-1c"),
        }
    )
    key_pairs: tuple[str, ...] = ()
    hosted_zones: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, str] = field(default_factory=dict)
    """Channel → image ID."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Last part of the name of a stack's parameter → value of the parameter."""
    objects: tuple[str, ...] = ()
    """Keys in the backups bucket."""
    addresses: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()
    broken: Mapping[str, str] = field(default_factory=dict)
    """Name of a look-up that fails → reason of the failure."""


def report(volume: str = "", **changes: str) -> dict[str, str]:
    """Return the parameter `in-service`, as a machine writes it if its image has the tags `image_tags(**changes)`."""
    told = {name.split(":")[1].replace("-", "_"): value for name, value in image_tags(**changes).items()}
    known = {each: told[each] for each in ("image_version", "mlflow_version", "migration_head")}
    numbers = {each: int(told[each]) for each in ("migration_count", "postgresql_major")}
    written = in_service.InService(volume or VOLUME, **known, **numbers, at="2026-11-22T10:20:00Z")  # type: ignore[arg-type]
    return {"in-service": in_service.dump(written)}


def data_volume(last: str = OLD, zone: str = "eu-central-1a", gib: int = 20, **changes: str) -> dict[str, Volume]:
    """Return the stack's data volume, as an earlier run with the image `last` leaves it."""
    tags = image_tags(**changes)
    del tags["mlflow-ami:format"]
    stack_tags = {"mlflow-ami:project": "mlflow-ami", "mlflow-ami:stack": "dev", "mlflow-ami:role": "data"}
    return {VOLUME: Volume({**stack_tags, "mlflow-ami:last-image": last, **tags}, zone, gib)}


@dataclass(frozen=True)
class Registration:
    """One resource that the program registered."""

    urn: str
    type: str
    name: str
    inputs: dict[str, Any]
    """Values of the inputs, with secrets in clear, by the names of the inputs in Pulumi's protocol."""
    secret: frozenset[str]
    """Names of the inputs that are marked as secret or contain a value that is marked as secret."""
    request: Any
    """resource_pb2.RegisterResourceRequest"""

    @property
    def dependencies(self) -> set[str]:
        """Return the URNs of all resources on which this resource depends."""
        return set(self.request.dependencies)


@dataclass
class Run:
    """The result of one run of the program."""

    registered: list[Registration] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    lookups: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    refusal: str = ""
    """Error message of the program, or an empty string if the program succeeded."""

    def of_type(self, kind: str) -> list[Registration]:
        """Return the registered resources of the type with the Python name `kind`, such as "ec2.Instance"."""
        module, _, name = kind.rpartition(".")
        token = f"{module}/{name[0].lower()}{name[1:]}:{name}"
        return [each for each in self.registered if each.type.split(":", 1)[1] == token]

    def one(self, kind: str, name: str | None = None) -> Registration:
        (found,) = [each for each in self.of_type(kind) if name in (None, each.name)]
        return found

    @property
    def stated(self) -> list[str]:
        """The sentences of a refusal."""
        return [line.removeprefix("  - ") for line in self.refusal.splitlines() if line.startswith("  - ")]


def run(
    account: Account | None = None,
    *,
    preview: bool = False,
    stack_name: str = "dev",
    state: str = "",
    secrets: Mapping[str, str] | None = None,
    **config: str | None,
) -> Run:
    """Run the program once. `config` overrides settings in CONFIG: `aws_` stands for `aws:`, None removes a setting.

    `state` is the stack in Pulumi's state: "empty", or "complete" with an optional former name ("complete prod"). The
    default is "complete" if the account has a data volume, and "empty" otherwise.
    """
    named = {("aws:" + key[4:] if key[:4] == "aws_" else f"mlflow-ami:{key}"): value for key, value in config.items()}
    hidden = {f"mlflow-ami:{key}": value for key, value in (secrets or {}).items()}
    wanted = {key: value for key, value in {**CONFIG, **named, **hidden}.items() if value is not None}
    there = account or Account()
    known = state or ("complete" if there.volumes else "empty")
    return _run(there, preview, stack_name, wanted, list(hidden), known)


def _run(
    account: Account, preview: bool, stack_name: str, config: dict[str, str], secret_keys: list[str], state: str
) -> Run:
    found = Run()
    logger = logging.Logger("program")
    logger.addHandler(_Log(found.log))
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    # Ignore errors of the resources that depend on a refused resource.
    loop.set_exception_handler(lambda loop, context: None)
    try:
        monitor = Monitor(account, found, preview, state)
        mocks.set_mocks(_NoMocks(), "mlflow-ami", stack_name, preview, logger, monitor=monitor)
        settings.set_root_resource(None)  # type: ignore[arg-type]  # the program creates its own stack, as under Pulumi
        pulumi.runtime.set_all_config(config, secret_keys)
        loop.run_until_complete(stack.run_in_stack(lambda: _program()))
    except pulumi.RunError as refusal:
        found.refusal = str(refusal)
    finally:
        settings.set_root_resource(None)  # type: ignore[arg-type]
        settings.SETTINGS.outputs.clear()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        asyncio.set_event_loop(None)
    return found


def _program() -> None:
    runpy.run_path(str(INFRA), run_name="__main__")


class Monitor(mocks.MockMonitor):
    """A stand-in for Pulumi's engine that creates each resource immediately and records the requests."""

    def __init__(self, account: Account, found: Run, preview: bool, state: str) -> None:
        super().__init__(_NoMocks())
        self.account, self.found, self.preview = account, found, preview
        self.state, self.hooks = state, Hooks()

    def RegisterResourceHook(self, request: Any) -> Any:
        self.hooks.register(request)
        return empty_pb2.Empty()

    def call_hooks(self, request: Any, urn: str, inputs: Mapping[str, Any]) -> None:
        """Call the hooks of a resource, as Pulumi's engine does before it creates or updates the resource."""
        known, _, former = self.state.partition(" ")
        about = {"urn": urn, "name": request.name, "type": request.type, "new_inputs": dict(inputs)}
        names = request.hooks.before_create
        if known == "complete":
            tags = {"mlflow-ami:stack": former or pulumi.get_stack()}
            names, about = request.hooks.before_update, {**about, "id": VOLUME, "old_outputs": {"tagsAll": tags}}
        try:
            self.hooks.call(names, dry_run=self.preview, **about)
        except HookFailed as refused:
            raise pulumi.RunError(str(refused)) from None

    def RegisterResource(self, request: Any) -> Any:
        # Pulumi's engine omits the stack from the type in a URN, because every resource is in the stack.
        urn = f"urn:pulumi:{pulumi.get_stack()}::{pulumi.get_project()}::{request.type}::{request.name}"
        if request.type == "pulumi:pulumi:Stack":
            return resource_pb2.RegisterResourceResponse(urn=urn)
        wire = json_format.MessageToDict(request.object)
        inputs = {key: _clear(value) for key, value in wire.items()}
        secret = frozenset(key for key, value in wire.items() if SIGNATURE in json.dumps(value))
        self.call_hooks(request, urn, inputs)
        copy = resource_pb2.RegisterResourceRequest()
        copy.CopyFrom(request)
        self.found.registered.append(Registration(urn, request.type, request.name, inputs, secret, copy))
        # For a resource in the state, a preview returns the outputs of the last run.
        settled = not self.preview or self.state.startswith("complete")
        known = {**wire, **(computed(request.type, request.name, inputs) if settled else {})}
        made = struct_pb2.Struct()
        json_format.ParseDict(known, made)
        id_ = identifier(request.type, request.name, inputs) if settled else ""
        return resource_pb2.RegisterResourceResponse(urn=urn, id=id_, object=made)

    def RegisterResourceOutputs(self, request: Any) -> Any:
        self.found.outputs = json_format.MessageToDict(request.outputs)
        return empty_pb2.Empty()

    def Invoke(self, request: Any) -> Any:
        arguments = json_format.MessageToDict(request.args)
        self.found.lookups.append((request.tok.split(":")[-1], arguments))
        try:
            answer = look_up(self.account, request.tok.split(":")[-1], arguments)
        except LookupError as error:
            # Return the failure, because an exception would end the run even if the program handles failures.
            failure = provider_pb2.CheckFailure(property="", reason=str(error.args[0]))
            return resource_pb2.ResourceInvokeResponse(failures=[failure])
        made = struct_pb2.Struct()
        json_format.ParseDict(answer, made)
        return resource_pb2.ResourceInvokeResponse(**{"return": made})


def identifier(kind: str, name: str, inputs: Mapping[str, Any]) -> str:
    """Return an ID for a resource. The ID has AWS's form if the program or the machine checks the form."""
    return {
        "aws:ebs/volume:Volume": VOLUME,
        "aws:s3/bucket:Bucket": f"{name}-1a2b3c4",
        "aws:ec2/instance:Instance": "i-0123456789abcdef0",
        "aws:ssm/parameter:Parameter": inputs.get("name", ""),
    }.get(kind) or f"{name}-id"


def computed(kind: str, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outputs that AWS adds to the inputs of a resource."""
    outputs: dict[str, dict[str, Any]] = {
        "aws:s3/bucket:Bucket": {"bucket": f"{name}-1a2b3c4", "arn": f"arn:aws:s3:::{name}-1a2b3c4"},
        "aws:ec2/eip:Eip": {"publicIp": ADDRESS},
        "aws:iam/role:Role": {"name": f"{name}-1a2b3c4", "arn": f"arn:aws:iam::123456789012:role/{name}-1a2b3c4"},
        "aws:cloudwatch/logGroup:LogGroup": {
            "arn": f"arn:aws:logs:eu-central-1:123456789012:log-group:{inputs.get('name', '')}"
        },
        "aws:iam/instanceProfile:InstanceProfile": {"name": f"{name}-profile-1a2b3c4"},
        "aws:ssm/parameter:Parameter": {
            "arn": f"arn:aws:ssm:eu-central-1:123456789012:parameter{inputs.get('name', '')}"
        },
        "random:index/randomPassword:RandomPassword": {"result": {SIGNATURE: SECRET, "value": f"generated-{name}"}},
    }
    return outputs.get(kind, {})


def look_up(account: Account, function: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return a data source's response in the AWS provider's form. Raises LookupError with the provider's message."""
    if function in account.broken:
        raise LookupError(account.broken[function])
    wanted = {each["name"]: each["values"] for each in asked.get("filters", [])}
    return _LOOKUPS[function](account, asked, wanted)


def _get_ami(account: Account, asked: Mapping[str, Any], wanted: Mapping[str, list[str]]) -> dict[str, Any]:
    image = account.images.get(wanted["image-id"][0])
    if image is None:
        raise LookupError(NO_RESULTS)
    return {
        "id": wanted["image-id"][0],
        "name": "mlflow-ami-3.17.2-20261122T101500Z",
        "state": image.state,
        "architecture": image.architecture,
        "rootDeviceName": "/dev/sda1",
        # The provider does not convert the map `ebs`, so the keys of this map contain underscores.
        "blockDeviceMappings": [
            {"deviceName": "/dev/sdb", "ebs": {}, "virtualName": "ephemeral0", "noDevice": ""},
            {
                "deviceName": "/dev/sda1",
                "ebs": {"volume_size": str(image.root_gib)},
                "virtualName": "",
                "noDevice": "",
            },
        ],
        "tags": dict(image.tags),
    }


def _get_volumes(account: Account, asked: Mapping[str, Any], wanted: Mapping[str, list[str]]) -> dict[str, Any]:
    return {
        "ids": [
            id_
            for id_, volume in account.volumes.items()
            if all(volume.tags.get(name.removeprefix("tag:")) in values for name, values in wanted.items())
        ]
    }


def _get_volume(account: Account, asked: Mapping[str, Any], wanted: Mapping[str, list[str]]) -> dict[str, Any]:
    volume = account.volumes[wanted["volume-id"][0]]
    return {"availabilityZone": volume.zone, "size": volume.gib, "tags": dict(volume.tags)}


def _get_parameters(account: Account, asked: Mapping[str, Any], wanted: Mapping[str, list[str]]) -> dict[str, Any]:
    assert asked["withDecryption"] is False, "no test needs the secrets in clear"
    there = account.channels if asked["path"] == "/mlflow-ami/images" else account.parameters
    names = [f"{asked['path']}/{name}" for name in there]
    return {"names": names, "values": list(there.values())}


def _get_objects(account: Account, asked: Mapping[str, Any], wanted: Mapping[str, list[str]]) -> dict[str, Any]:
    assert asked["bucket"] == "mlflow-backups-1a2b3c4"
    prefix, delimiter = asked["prefix"], asked.get("delimiter")
    keys = [key for key in account.objects if key.startswith(prefix)]
    if not delimiter:
        return {"keys": keys[: int(asked["maxKeys"])], "commonPrefixes": []}
    folders = [prefix + key.removeprefix(prefix).split(delimiter)[0] + delimiter for key in keys]
    return {"keys": [], "commonPrefixes": list(dict.fromkeys(folders))}


def _get_offerings(account: Account, asked: Mapping[str, Any], wanted: Mapping[str, list[str]]) -> dict[str, Any]:
    return {"locations": list(account.offered.get(wanted["instance-type"][0], ()))}


def _get_instance_type(account: Account, asked: Mapping[str, Any], wanted: Mapping[str, list[str]]) -> dict[str, Any]:
    name = asked["instanceType"]
    memory = {"t3.nano": 512, "t3.micro": 1024}.get(name, 2048)
    return {"supportedArchitectures": ["arm64"] if name.startswith("t4g") else ["x86_64"], "memorySize": memory}


def _get_key_pair(account: Account, asked: Mapping[str, Any], wanted: Mapping[str, list[str]]) -> dict[str, Any]:
    if asked["keyName"] not in account.key_pairs:
        raise LookupError(NO_RESULTS)
    return {"keyName": asked["keyName"]}


def _get_zone(account: Account, asked: Mapping[str, Any], wanted: Mapping[str, list[str]]) -> dict[str, Any]:
    if asked["zoneId"] not in account.hosted_zones:
        raise LookupError("reading Route 53 Hosted Zone: NoSuchHostedZone: No hosted zone found with ID")
    return {"name": account.hosted_zones[asked["zoneId"]]}


_LOOKUPS: dict[str, Callable[[Account, Mapping[str, Any], Mapping[str, list[str]]], dict[str, Any]]] = {
    "getAmi": _get_ami,
    "getAvailabilityZones": lambda account, asked, wanted: {"names": list(account.zones)},
    "getEbsVolumes": _get_volumes,
    "getVolume": _get_volume,
    "getInstanceType": _get_instance_type,
    "getInstanceTypeOfferings": _get_offerings,
    "getEips": lambda account, asked, wanted: {"allocationIds": list(account.addresses)},
    "getInstances": lambda account, asked, wanted: {"ids": list(account.instances)},
    "getKeyPair": _get_key_pair,
    "getObjects": _get_objects,
    "getParametersByPath": _get_parameters,
    "getZone": _get_zone,
}


def _clear(value: Any) -> Any:
    if isinstance(value, dict):
        if value.get(SIGNATURE) == SECRET:
            return _clear(value["value"])
        return {key: _clear(inner) for key, inner in value.items()}
    return [_clear(inner) for inner in value] if isinstance(value, list) else value


class _NoMocks(mocks.Mocks):
    """MockMonitor requires a Mocks object, but its subclass Monitor answers all requests without this object."""

    def call(self, args: mocks.MockCallArgs) -> Any:
        raise NotImplementedError(args.token)

    def new_resource(self, args: mocks.MockResourceArgs) -> Any:
        raise NotImplementedError(args.typ)


class _Log(logging.Handler):
    def __init__(self, lines: list[tuple[str, str]]) -> None:
        super().__init__(logging.INFO)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


__all__ = ["Account", "Image", "Run", "Volume", "data_volume", "image_tags", "replace", "report", "run"]
