"""The rehearsal's stack: its settings, its image, and creating it on the local cloud."""

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
from scripts.imaging import catalog, channels
from scripts.local_cloud import LocalCloud
from scripts.local_cloud.base_images import BASES
from scripts.local_cloud.layout import default_state_dir
from scripts.rehearsal import state, status
from scripts.rehearsal.errors import Refused, RehearsalError, StateError
from scripts.rehearsal.resource_types import Aws
from scripts.rehearsal.state import State
from scripts.rehearsal.wire import Props, Secret, reveal

if TYPE_CHECKING:
    from scripts.rehearsal.engine import Engine, Step

PROGRAM = Path(__file__).resolve().parents[2] / "infra"
STACK = "rehearsal"
NAMED_BY = "MLFLOW_AMI_REHEARSAL"
"""Environment variable with the name of the stack on the local cloud."""
ENGINE_NAMED_BY = "MLFLOW_AMI_ENGINE"
"""Environment variable with the engine of new stacks, if --engine is not given."""
INSTANCE = "aws:ec2/instance:Instance"
LOOPBACK = "127.0.0.0/8"
MAKE_AN_IMAGE = "scripts/bake.py --local"

SOURCE = "mlflow-ami:source-ami"
BUCKET = "aws:s3/bucket:Bucket"
NOT_REHEARSED = (
    "declared but without effect in the local cloud: encryption of volumes, egress rules and routes, expiry of old "
    "object versions, the recovery that an alarm starts, quotas, and the permissions of the deploying user"
)

Say = Callable[[str], None]
Client = Callable[[str], Any]
Done = Callable[["Step"], None]


class ImageArguments(Protocol):
    """The options that choose an image."""

    ami: str | None
    newest: bool
    base: str | None


def name() -> str:
    """The stack of this process. Raises Refused for a name that Pulumi would reject."""
    given = os.environ.get(NAMED_BY) or STACK
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,49}", given):
        raise Refused(f"the stack's name {given!r} must be 1 to 50 letters, digits, dots, hyphens or underscores")
    return given


def state_path() -> Path:
    """File of the stack's state, in the local cloud's folder, so that both are purged together."""
    return default_state_dir() / ("rehearsal.json" if name() == STACK else f"rehearsal-{name()}.json")


def state_paths() -> dict[str, Path]:
    """Name and state file of every stack on the local cloud."""
    paths = sorted(default_state_dir().glob("rehearsal*.json"))
    return {path.stem.removeprefix("rehearsal").removeprefix("-") or STACK: path for path in paths}


def certificate_path() -> Path:
    """File with the certificate of the stack's server, outside the cloud's private folder, so that clients can read
    it."""
    folder = default_state_dir()
    return folder.with_name(f"{folder.name}-{name()}.pem")


def certificates() -> list[Path]:
    """The certificates of all stacks on the local cloud."""
    folder = default_state_dir()
    return sorted(folder.parent.glob(f"{folder.name}-*.pem"))


def keep_trust(cloud: LocalCloud) -> Path:
    """Write a bundle of the authorities that `requests` trusts and the local S3's authority, for direct transfers. On
    AWS, clients already trust Amazon's authority."""
    path = certificate_path().with_name(f"{certificate_path().stem}-s3.pem")
    known = Path(os.environ.get("REQUESTS_CA_BUNDLE") or certifi.where()).read_text()
    return status.keep_certificate(path, known if cloud.s3_authority in known else known + cloud.s3_authority)


def others_with_a_machine() -> list[str]:
    """Names of the other stacks on the same local cloud that have an instance."""
    others = {other: path for other, path in state_paths().items() if other != name()}
    return [
        other for other, path in others.items() if any(each.type == INSTANCE for each in state.load(path).resources)
    ]


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Lock the stack for one command at a time. Raises Refused if another command has the lock."""
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
        raise Refused(f"another rehearse.py is running on {path.parent}; wait for it to end, or end it") from None
    finally:
        os.close(handle)


def clients(cloud: LocalCloud) -> Client:
    """The cloud's boto3 clients, created once each: creating one takes longer than using it."""
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
    """The stack's settings as infra/Pulumi.yaml declares them: name → type, default, description."""
    return dict(yaml.safe_load((PROGRAM / "Pulumi.yaml").read_text())["config"])


def project() -> str:
    return str(yaml.safe_load((PROGRAM / "Pulumi.yaml").read_text())["name"])


def with_changes(settings: Props, assignments: list[str], secret_names: list[str]) -> tuple[Props, list[str]]:
    """`settings` with each `key=value` applied, `key=` reset to its default, and secrets read from standard input; and
    a sentence for each argument that is not an assignment, or a secret on the command line.

    Lists may be written a,b,c. Names and values are checked later, by the stack's program, whose error messages are
    better. Raises Refused for a missing secret.
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
    """Raises Refused with these mistakes and those that the program finds in the other settings."""
    try:
        preview(cloud, client, ami, settings, current, say=lambda text: None, done=lambda step: None)
    except RehearsalError as error:
        mistakes = (
            [*mistakes, *re.findall(r"(?m)^  - (.*)$", str(error))] if "  - " in str(error) else [*mistakes, str(error)]
        )
    head = "There is a mistake in the settings" if len(mistakes) == 1 else f"There are {len(mistakes)} mistakes"
    raise Refused("\n".join([f"{head}; nothing was changed:", *(f"  - {mistake}" for mistake in mistakes)]))


def configuration(cloud: LocalCloud, ami: str, settings: Props) -> tuple[dict[str, str], list[str]]:
    """Pulumi's configuration of the stack: the local cloud's values and the user's settings; and the names of
    secrets."""
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
    """The image of --ami, which ends the setting `channel`; with a channel the image that it names; the newest with
    --newest or --base; else the current one; for a new stack the newest."""
    if arguments.ami:
        settings.pop("channel", None)
        return str(arguments.ami)
    if channel := settings.get("channel"):
        named = channels.read(client("ssm")).get(str(channel))
        if named is None:
            raise Refused(
                f"the local cloud has no channel {channel}: make it with scripts/images.py promote IMAGE {channel} "
                "--local, or reset it with --set channel="
            )
        return named
    pinned = reveal(current.outputs).get("amiId")
    if arguments.newest or arguments.base or not pinned:
        return newest_image(client, arguments.base)
    if not any(image.id == pinned for image in catalog.find(client("ec2"))):
        raise Refused(f"the stack's image {pinned} is no longer in the local cloud: choose one with --ami, or --newest")
    return str(pinned)


def newest_image(client: Client, base: str | None) -> str:
    """The newest finished x86_64 image in the local cloud, of those baked on `base` if given; one for arm64 is chosen
    by its ID. Raises Refused without one."""
    system = re.sub(r"(?<=[a-z])(?=\d)", " ", base or "")
    found = [
        image
        for image in catalog.find(client("ec2"), {"mlflow-ami:os": system} if base else None)
        if image.finished and image.state == "available" and image.architecture == "x86_64"
    ]
    if not found:
        bake = MAKE_AN_IMAGE + (f" --base {base}" if base else "")
        on = f" baked on {base}" if base else ""
        raise Refused(
            f"there is no image{on} in the local cloud yet: bake one with `{bake}`, which takes a few minutes"
        )
    return max(found, key=lambda image: image.tags[catalog.OURS]).id


def require_trust(client: Client, ami: str) -> None:
    """Refuse an image whose source image does not trust the local S3's certificate."""
    source = {tag["Value"] for each in _images(client, ami) for tag in each.get("Tags", []) if tag["Key"] == SOURCE}
    for each in _images(client, *source):
        base = next((base for base in BASES.values() if each["Name"].startswith(base.series)), None)
        if base and each["Name"] != base.ami_name:
            raise Refused(
                f"{ami} was baked on {each['Name']}, which does not trust the local S3's certificate, so its server "
                f"would not reach its buckets: bake it again with `{MAKE_AN_IMAGE}`"
            )


def _images(client: Client, *ids: str) -> list[dict[str, Any]]:
    if not ids:
        return []
    found: list[dict[str, Any]] = client("ec2").describe_images(Filters=[{"Name": "image-id", "Values": [*ids]}])[
        "Images"
    ]
    return found


def settings_link() -> Path:
    """The file in infra/ from which `pulumi` reads the stack's settings."""
    return PROGRAM / f"Pulumi.{name()}.yaml"


def unlink_settings() -> None:
    """Remove the link to a rehearsal's settings from infra/; a file of the user's stays."""
    if settings_link().is_symlink():
        settings_link().unlink()


# Running the program


def engine_for(asked: str, current: State) -> Any:
    """The module that applies the stack: this one, or `pulumi_cli` for Pulumi's own engine.

    A stack keeps the engine that created it; for a new one `auto` is Pulumi's if its CLI is there. Raises Refused for
    another engine.
    """
    from scripts.rehearsal import tools

    made = current.engine if current.resources else None
    asked = os.environ.get(ENGINE_NAMED_BY, "auto") if asked == "auto" and not made else asked
    if made and asked not in ("auto", made):
        raise Refused(
            f"the stack {name()} was created with --engine {made}: use that one, or delete it first with "
            "`rehearse.py down --data`"
        )
    if (made or asked) == "own" or ((made or asked) == "auto" and tools.find_pulumi() is None):
        return sys.modules[__name__]
    from scripts.rehearsal import pulumi_cli

    current.settings = pulumi_cli.settings(current)
    return pulumi_cli


def described() -> str:
    """The engine's name, which is printed as the first line of a run."""
    return "the rehearsal's own engine; `make prepare-tools` builds Pulumi's"


def bring_about(
    cloud: LocalCloud, client: Client, ami: str, settings: Props, current: State, *, say: Say, done: Done
) -> Engine:
    """`pulumi up`: a preview, which finds all refusals, and then, if anything differs, the changes.

    Returns the engine with its steps. Raises Refused with the program's message for rejected settings, ApplyError for a
    failed operation, Interrupted after Ctrl-C, once the current operation is recorded.
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
            f"{gone.type} {gone.name} ({gone.id}) is no longer in the local cloud: it is created again, empty. "
            "Pulumi detects this only with `pulumi up --refresh`"
        )
    with cancelled_by_interrupt(engine.cancel, say):
        # The preview has already logged the program's messages.
        _run(engine, cloud, ami, settings, say=lambda text: None)
    return engine


def preview(
    cloud: LocalCloud, client: Client, ami: str, settings: Props, current: State, *, say: Say, done: Done
) -> Engine:
    """The program's dry run: nothing is changed, and the returned engine's steps are the plan."""
    require_trust(client, ami)
    engine = _engine(cloud, client, current, say, done, dry_run=True)
    engine.recover()
    engine.refresh()
    _run(engine, cloud, ami, settings, say=say)
    return engine


def refresh(cloud: LocalCloud, client: Client, current: State, *, say: Say, done: Done) -> Engine:
    """`pulumi refresh`: update the state from the local cloud."""
    engine = _engine(cloud, client, current, say, done, dry_run=False)
    engine.recover()
    for gone in engine.refresh():
        say(f"{gone.type} {gone.name} ({gone.id}) is no longer in the local cloud")
    state.save(state_path(), current)
    return engine


def remove_machine(cloud: LocalCloud, client: Client, current: State, *, say: Say, done: Done) -> None:
    """Detach the data volume and the address and terminate the instance, as a replacement begins."""
    engine = _engine(cloud, client, current, say, done, dry_run=False)
    engine.recover()
    engine.refresh()
    _remove_machine(engine, current)


def _remove_machine(engine: Engine, current: State) -> None:
    machines = [each for each in current.resources if each.type == INSTANCE]
    engine.delete([*(follower for each in machines for follower in engine.followers(each)), *machines])


def destroy(cloud: LocalCloud, client: Client, current: State, *, say: Say, done: Done) -> None:
    """Delete all resources of the stack, protected or not empty included, and log where AWS would refuse; images
    stay."""
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
    """Log which deletions `pulumi destroy` and S3 would refuse, and the actions of this command instead."""
    if protected := _protected(current):
        say(
            f"Pulumi refuses to delete {protected}: its protection is removed first, as scripts/retire_stack.py does "
            f"on AWS"
        )
    for each in current.resources:
        if each.type == BUCKET:
            found = client("s3").list_object_versions(Bucket=each.id, MaxKeys=1)
            if found.get("Versions") or found.get("DeleteMarkers"):
                say(f"S3 refuses to delete {each.id}, which holds objects or old versions: emptied first")


def empty_buckets(client: Client, current: State) -> None:
    """Delete every object of the stack's buckets. Call it when the machine is deleted: until it has stopped, it
    archives segments. Raises RehearsalError for an object that is not deleted."""
    from scripts import retire_stack

    for each in current.resources:
        if each.type == BUCKET:
            try:
                retire_stack.empty(client("s3"), each.id)
            except retire_stack.DeletionRefused as error:
                raise RehearsalError(str(error)) from None


def refused_elsewhere() -> list[str]:
    """The deletions that AWS or Pulumi would refuse, for a purge, which deletes the local cloud itself."""
    try:
        current = state.load(state_path())
    except StateError:
        return []
    if not (protected := _protected(current)):
        return []
    return [
        f"on AWS Pulumi refuses to delete {protected}, and S3 to delete buckets that hold anything: "
        "scripts/retire_stack.py unprotects and empties them first; here the whole local cloud is deleted"
    ]


def _protected(current: State) -> str:
    kinds = sorted(f"{each.type.split(':')[-1]} {each.name}" for each in current.resources if each.protect)
    return f"what is protected ({', '.join(kinds)})" if kinds else ""


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
    """Make Ctrl-C end a run between two operations, so that every created resource is in the state."""

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
