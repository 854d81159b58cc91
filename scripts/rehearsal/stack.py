"""The rehearsal's stack: its settings, its image, and its creation and deletion on the local cloud."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import certifi
import yaml

from scripts import invoker, prompts
from scripts.imaging import channels, ec2_images
from scripts.local_cloud import LocalCloud
from scripts.local_cloud.base_images import BASES
from scripts.local_cloud.layout import default_state_dir
from scripts.rehearsal import state, status_document
from scripts.rehearsal.errors import Refused, RehearsalError, StateError
from scripts.rehearsal.resource_types import Aws
from scripts.rehearsal.state import State
from scripts.rehearsal.wire import Props, Secret, reveal

if TYPE_CHECKING:
    from scripts.rehearsal.engine import Engine, Step

PROGRAM = Path(__file__).resolve().parents[2] / "infra"
STACK = "rehearsal"
NAMED_BY = "MLFLOW_AMI_REHEARSAL"
"""The environment variable that contains the name of the stack on the local cloud."""
ENGINE_NAMED_BY = "MLFLOW_AMI_ENGINE"
"""The environment variable that contains the engine for new stacks. The option --engine overrides the variable."""
INSTANCE = "aws:ec2/instance:Instance"
LOOPBACK = "127.0.0.0/8"
MAKE_AN_IMAGE = "scripts/bake.py --local"

SOURCE = "mlflow-ami:source-ami"
BUCKET = "aws:s3/bucket:Bucket"
NOT_REHEARSED = (
    "these features have no effect in the local cloud: encryption of volumes, egress rules, routes, expiry of old "
    "object versions, recovery actions of alarms, quotas, and the permissions of the deploying user"
)

Say = Callable[[str], None]
Client = Callable[[str], Any]
Done = Callable[["Step"], None]


class ImageArguments(Protocol):
    """The command-line options that choose an image."""

    ami: str | None
    newest: bool
    base: str | None


def name() -> str:
    """Return the stack's name. Raises Refused for a name that Pulumi would reject."""
    given = os.environ.get(NAMED_BY) or STACK
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,49}", given):
        raise Refused(f"the stack's name {given!r} must be 1 to 50 letters, digits, dots, hyphens or underscores")
    return given


def state_path() -> Path:
    """Return the path of the stack's state file. A purge of the local cloud also deletes this file."""
    return default_state_dir() / ("rehearsal.json" if name() == STACK else f"rehearsal-{name()}.json")


def state_paths() -> dict[str, Path]:
    """Return name → state file for every stack on the local cloud."""
    paths = sorted(default_state_dir().glob("rehearsal*.json"))
    return {path.stem.removeprefix("rehearsal").removeprefix("-") or STACK: path for path in paths}


def certificate_path() -> Path:
    """Return the path of the certificate file of the stack's server. The file is outside the local cloud's private
    folder, so that clients can read it."""
    folder = default_state_dir()
    return folder.with_name(f"{folder.name}-{name()}.pem")


def certificates() -> list[Path]:
    """Return the certificate files of all stacks on the local cloud."""
    folder = default_state_dir()
    return sorted(folder.parent.glob(f"{folder.name}-*.pem"))


def keep_trust(cloud: LocalCloud) -> Path:
    """Write a certificate file for direct transfers to S3. The file contains the authorities that the package
    `requests` trusts, and the authority of the local S3. On AWS, clients already trust the authority of S3."""
    path = certificate_path().with_name(f"{certificate_path().stem}-s3.pem")
    known = Path(os.environ.get("REQUESTS_CA_BUNDLE") or certifi.where()).read_text()
    return status_document.keep_certificate(path, known if cloud.s3_authority in known else known + cloud.s3_authority)


def others_with_a_machine() -> list[str]:
    """Return the names of other stacks on this local cloud that have an instance."""
    others = {other: path for other, path in state_paths().items() if other != name()}
    return [
        other for other, path in others.items() if any(each.type == INSTANCE for each in state.load(path).resources)
    ]


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Lock the stack, so that only one command at a time uses it. Raises Refused if another command has the lock."""
    path = state_path().with_suffix(".lock")
    try:
        invoker.make_private_folder(path.parent)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except PermissionError:
        raise Refused(f"{path.parent} belongs to root, like the local cloud: use sudo") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Refused(f"another rehearse.py is running on {path.parent}; wait until it ends, or stop it") from None
    finally:
        os.close(handle)


def clients(cloud: LocalCloud) -> Client:
    """Return a function service → boto3 client. Each client is created only once, because the creation is slow."""
    made: dict[str, Any] = {}
    lock = threading.Lock()

    def client(service: str) -> Any:
        with lock:
            if service not in made:
                made[service] = cloud.client(service)
            return made[service]

    return client


# Settings


def declared() -> dict[str, dict[str, Any]]:
    """Return the settings that infra/Pulumi.yaml declares: name → type, default, description."""
    return dict(yaml.safe_load((PROGRAM / "Pulumi.yaml").read_text())["config"])


def project() -> str:
    return str(yaml.safe_load((PROGRAM / "Pulumi.yaml").read_text())["name"])


def with_changes(settings: Props, assignments: list[str], secret_names: list[str]) -> tuple[Props, list[str]]:
    """Return the changed settings, and a sentence for each invalid argument, such as a secret on the command line.

    `key=value` changes a setting, and `key=` resets it to its default. Secrets are read from the terminal or standard
    input. Lists may be written a,b,c. The stack's Pulumi program checks names and values later, because the program's
    error messages are better. Raises Refused for a missing secret.
    """
    types = {name: entry["type"] for name, entry in declared().items()}
    changed, mistakes = dict(settings), []
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            mistakes.append(f"--set takes key=value, as in --set instanceType=t3.medium, not {assignment!r}.")
        elif name == "amiId":
            mistakes.append(f"The image is chosen with --ami {value or 'ami-…'}, not with --set.")
        elif "password" in name.lower() and value:
            mistakes.append(f"Other users of this machine can read command lines: give {name} with --secret {name}.")
        elif not value:
            changed.pop(name, None)
        elif types.get(name) == "array" and not value.startswith("["):
            changed[name] = json.dumps([part.strip() for part in value.split(",") if part.strip()])
        else:
            changed[name] = value
    for name in secret_names:
        changed[name] = Secret(_read_secret(name))
    return changed, mistakes


def _read_secret(name: str) -> str:
    try:
        if prompts.stdin_is_terminal():
            value = prompts.ask_secret(name, "pass it on standard input")
        else:
            value = prompts.read_line(f"the value of --secret {name}")
    except prompts.NoAnswer as error:
        raise Refused(str(error)) from None
    if not value:
        raise Refused(f"--secret {name} has no value: `--set {name}=` resets it to its default")
    return value


def refuse(
    cloud: LocalCloud, client: Client, ami: str, settings: Props, current: State, mistakes: list[str]
) -> NoReturn:
    """Raise Refused with `mistakes` and with the mistakes that the Pulumi program finds in `settings`."""
    try:
        preview(cloud, client, ami, settings, current, say=lambda text: None, done=lambda step: None)
    except RehearsalError as error:
        mistakes = (
            [*mistakes, *re.findall(r"(?m)^  - (.*)$", str(error))] if "  - " in str(error) else [*mistakes, str(error)]
        )
    head = "There is a mistake in the settings" if len(mistakes) == 1 else f"There are {len(mistakes)} mistakes"
    raise Refused("\n".join([f"{head}; nothing was changed:", *(f"  - {mistake}" for mistake in mistakes)]))


def configuration(cloud: LocalCloud, ami: str, settings: Props) -> tuple[dict[str, str], list[str]]:
    """Return Pulumi's configuration of the stack, and the names of secret settings. The configuration consists of the
    local cloud's values and the user's settings."""
    prefix = project()
    config = {
        "aws:region": cloud.region,
        f"{prefix}:amiId": ami,
        f"{prefix}:allowedCidrs": json.dumps([LOOPBACK]),
        f"{prefix}:s3Endpoint": cloud.s3_endpoint,
        f"{prefix}:ssmEndpoint": cloud.endpoint,
        f"{prefix}:stsEndpoint": cloud.endpoint,
        f"{prefix}:monitoringEndpoint": cloud.endpoint,
        f"{prefix}:logsEndpoint": cloud.endpoint,
    }
    if "channel" in settings:
        del config[f"{prefix}:amiId"]
    secret = []
    for key, value in settings.items():
        full = key if ":" in key else f"{prefix}:{key}"
        config[full] = str(reveal(value))
        if isinstance(value, Secret):
            secret.append(full)
    return config, secret


# Images


def image_to_run(client: Client, arguments: ImageArguments, current: State, settings: Props) -> str:
    """Return the ID of the image to run. The option --ami chooses the image and removes the setting `channel`. Without
    --ami, a stack with a channel gets the channel's image. A stack without a channel gets the newest image if the stack
    is new or if --newest or --base is given. Every other stack keeps its current image."""
    if arguments.ami:
        settings.pop("channel", None)
        return str(arguments.ami)
    if channel := settings.get("channel"):
        named = channels.read(client("ssm")).get(str(channel))
        if named is None:
            raise Refused(
                f"the local cloud has no channel {channel}: create it with scripts/images.py promote IMAGE {channel} "
                "--local, or reset it with --set channel="
            )
        return named
    pinned = reveal(current.outputs).get("amiId")
    if arguments.newest or arguments.base or not pinned:
        return newest_image(client, arguments.base)
    if not any(image.id == pinned for image in ec2_images.find(client("ec2"))):
        raise Refused(f"the stack's image {pinned} is no longer in the local cloud: choose one with --ami, or --newest")
    return str(pinned)


def newest_image(client: Client, base: str | None) -> str:
    """Return the ID of the newest finished x86_64 image in the local cloud. If `base` is given, only images that were
    baked on this base count. Images for arm64 must be chosen by their ID. Raises Refused if no image is found."""
    system = re.sub(r"(?<=[a-z])(?=\d)", " ", base or "")
    found = [
        image
        for image in ec2_images.find(client("ec2"), {"mlflow-ami:os": system} if base else None)
        if image.finished and image.state == "available" and image.architecture == "x86_64"
    ]
    if not found:
        bake = MAKE_AN_IMAGE + (f" --base {base}" if base else "")
        on = f" baked on {base}" if base else ""
        raise Refused(
            f"there is no image{on} in the local cloud yet: bake one with `{bake}`, which takes a few minutes"
        )
    return max(found, key=lambda image: image.tags[ec2_images.OURS]).id


def require_trust(client: Client, ami: str) -> None:
    """Raise Refused if the base image from which `ami` was baked does not trust the local S3's certificate."""
    source = {tag["Value"] for each in _images(client, ami) for tag in each.get("Tags", []) if tag["Key"] == SOURCE}
    for each in _images(client, *source):
        base = next((base for base in BASES.values() if each["Name"].startswith(base.series)), None)
        if base and each["Name"] != base.ami_name:
            raise Refused(
                f"{ami} was baked on {each['Name']}, which does not trust the local S3's certificate, so a server from "
                f"this image could not use S3: bake it again with `{MAKE_AN_IMAGE}`"
            )


def _images(client: Client, *ids: str) -> list[dict[str, Any]]:
    if not ids:
        return []
    found: list[dict[str, Any]] = client("ec2").describe_images(Filters=[{"Name": "image-id", "Values": [*ids]}])[
        "Images"
    ]
    return found


def settings_link() -> Path:
    """Return the file in infra/ from which `pulumi` reads the stack's settings."""
    return PROGRAM / f"Pulumi.{name()}.yaml"


def unlink_settings() -> None:
    """Remove the link to a rehearsal's settings from infra/. A regular file stays, because it belongs to the user."""
    if settings_link().is_symlink():
        settings_link().unlink()


# Running the program


def engine_for(asked: str, current: State) -> Any:
    """Return the module that applies the stack: this module for our own engine, `pulumi_cli` for Pulumi's engine.

    A stack keeps the engine that created it. For a new stack, `auto` selects Pulumi's engine if Pulumi's CLI is
    installed. Raises Refused if the stack was created with a different engine.
    """
    from scripts.rehearsal import tools

    made = current.engine if current.resources else None
    asked = os.environ.get(ENGINE_NAMED_BY, "auto") if asked == "auto" and not made else asked
    if made and asked not in ("auto", made):
        raise Refused(
            f"the stack {name()} was created with --engine {made}: use --engine {made}, or delete the stack first with "
            "`rehearse.py down --data`"
        )
    if (made or asked) == "own" or ((made or asked) == "auto" and tools.find_pulumi() is None):
        return sys.modules[__name__]
    from scripts.rehearsal import pulumi_cli

    current.settings = pulumi_cli.settings(current)
    return pulumi_cli


def described() -> str:
    """Return the first line of a run's output: the engine's name."""
    return "the rehearsal's own engine; `make prepare-tools` builds Pulumi's"


def bring_about(
    cloud: LocalCloud, client: Client, ami: str, settings: Props, current: State, *, say: Say, done: Done
) -> Engine:
    """Apply the stack, like `pulumi up`. A preview before the changes detects settings and images that are refused.

    Returns the engine, whose `steps` are the executed steps. Raises ProgramError with the program's message for
    rejected settings, Refused for an unusable image, and ApplyError for a failed operation. After Ctrl-C, raises
    Interrupted when the current operation is recorded.
    """
    plan = preview(cloud, client, ami, settings, current, say=say, done=lambda step: None)
    if plan.idle and plan.outputs == current.outputs:
        if current.settings != settings:
            current.settings = settings
            state.save(state_path(), current)
        return plan
    say(NOT_REHEARSED)
    current.settings = settings
    engine = _engine(cloud, client, current, say, done, dry_run=False)
    for leftover in engine.recover():
        say(leftover)
    for gone in engine.refresh():
        say(
            f"{gone.type} {gone.name} ({gone.id}) is no longer in the local cloud: a new, empty one is created. "
            "Pulumi detects missing resources only with `pulumi up --refresh`"
        )
    with cancelled_by_interrupt(engine.cancel, say):
        # The program's messages are not logged here, because the preview has already logged them.
        _run(engine, cloud, ami, settings, say=lambda text: None)
    return engine


def preview(
    cloud: LocalCloud, client: Client, ami: str, settings: Props, current: State, *, say: Say, done: Done
) -> Engine:
    """Run the Pulumi program and change no resource. The `steps` of the returned engine are the plan."""
    require_trust(client, ami)
    engine = _engine(cloud, client, current, say, done, dry_run=True)
    engine.recover()
    engine.refresh()
    _run(engine, cloud, ami, settings, say=say)
    return engine


def refresh(cloud: LocalCloud, client: Client, current: State, *, say: Say, done: Done) -> Engine:
    """Update the state from the local cloud, like `pulumi refresh`."""
    engine = _engine(cloud, client, current, say, done, dry_run=False)
    engine.recover()
    for gone in engine.refresh():
        say(f"{gone.type} {gone.name} ({gone.id}) is no longer in the local cloud")
    state.save(state_path(), current)
    return engine


def remove_machine(cloud: LocalCloud, client: Client, current: State, *, say: Say, done: Done) -> None:
    """Detach the data volume and the address, and terminate the instance, like the first half of a replacement."""
    engine = _engine(cloud, client, current, say, done, dry_run=False)
    engine.recover()
    engine.refresh()
    _remove_machine(engine, current)


def _remove_machine(engine: Engine, current: State) -> None:
    machines = [each for each in current.resources if each.type == INSTANCE]
    engine.delete([*(follower for each in machines for follower in engine.followers(each)), *machines])


def destroy(cloud: LocalCloud, client: Client, current: State, *, say: Say, done: Done) -> None:
    """Delete all resources of the stack, including protected resources and buckets with objects. Logs the deletions
    that Pulumi or S3 would refuse. Images are not deleted."""
    engine = _engine(cloud, client, current, say, done, dry_run=False)
    engine.recover()
    engine.refresh()
    say_refusals(client, current, say)
    _remove_machine(engine, current)
    empty_buckets(client, current)
    for each in current.resources:
        each.protect = each.retain_on_delete = False
    engine.delete(list(current.resources))
    current.outputs, current.settings = {}, {}
    state.forget(state_path())
    certificate_path().unlink(missing_ok=True)


def say_refusals(client: Client, current: State, say: Say) -> None:
    """Log the deletions that `pulumi destroy` and S3 would refuse, and the actions that make them possible."""
    if protected := _protected(current):
        say(
            f"Pulumi refuses to delete {protected}: the protection is removed first, as scripts/retire_stack.py does "
            f"on AWS"
        )
    for each in current.resources:
        if each.type == BUCKET:
            found = client("s3").list_object_versions(Bucket=each.id, MaxKeys=1)
            if found.get("Versions") or found.get("DeleteMarkers"):
                say(f"S3 refuses to delete {each.id}, which contains objects or old versions: it is emptied first")


def empty_buckets(client: Client, current: State) -> None:
    """Delete all objects in the stack's buckets. Delete the machine first, because a running machine archives WAL
    segments. Raises RehearsalError if an object is not deleted."""
    from scripts import retire_stack

    for each in current.resources:
        if each.type == BUCKET:
            try:
                retire_stack.empty(client("s3"), each.id)
            except retire_stack.DeletionRefused as error:
                raise RehearsalError(str(error)) from None


def refused_elsewhere() -> list[str]:
    """Return sentences about the deletions in a purge that AWS or Pulumi would refuse. A purge deletes the whole local
    cloud."""
    try:
        current = state.load(state_path())
    except StateError:
        return []
    if not (protected := _protected(current)):
        return []
    return [
        f"on AWS, Pulumi refuses to delete {protected}, and S3 refuses to delete buckets with objects: "
        "scripts/retire_stack.py removes protection and objects first; here the whole local cloud is deleted"
    ]


def _protected(current: State) -> str:
    kinds = sorted(f"{each.type.split(':')[-1]} {each.name}" for each in current.resources if each.protect)
    return f"protected resources ({', '.join(kinds)})" if kinds else ""


def _engine(cloud: LocalCloud, client: Client, current: State, say: Say, done: Done, *, dry_run: bool) -> Engine:
    from scripts.rehearsal.engine import Engine
    from scripts.rehearsal.resources import KINDS

    noted: set[str] = set()

    def note(text: str) -> None:
        if text not in noted:
            noted.add(text)
            say(text)

    return Engine(
        KINDS,
        Aws(client, cloud.region, note),
        current,
        save=lambda now: state.save(state_path(), now),
        done=done,
        dry_run=dry_run,
    )


def _run(engine: Engine, cloud: LocalCloud, ami: str, settings: Props, *, say: Say) -> None:
    from scripts.rehearsal import program_runner
    from scripts.rehearsal.data_sources import LOOKUPS

    config, secret_keys = configuration(cloud, ami, settings)
    program_runner.run(
        PROGRAM,
        engine,
        LOOKUPS,
        project=project(),
        stack_name=name(),
        config=config,
        secret_keys=secret_keys,
        on_log=say,
    )
    engine.finish()


@contextlib.contextmanager
def cancelled_by_interrupt(cancel: Callable[[], None], say: Say) -> Iterator[None]:
    """After Ctrl-C, complete the current operation before the run ends. The state thus has all created resources."""

    def on_interrupt(number: int, frame: Any) -> None:
        cancel()
        say("interrupted: finishing the current operation, so that the next `up` can continue")
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
