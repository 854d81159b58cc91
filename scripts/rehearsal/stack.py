"""The rehearsal's stack: its settings, which image it runs, and bringing it about on the local cloud."""

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
from typing import TYPE_CHECKING, Any

import images
import yaml
from local_cloud import LocalCloud
from local_cloud.state import default_state_dir

from rehearsal import state
from rehearsal.errors import Refused
from rehearsal.kinds import Aws
from rehearsal.state import State
from rehearsal.values import Props, Secret, reveal

if TYPE_CHECKING:
    from rehearsal.engine import Engine, Step

PROGRAM = Path(__file__).resolve().parents[2] / "infra"
STACK = "rehearsal"
NAMED_BY = "MLFLOW_AMI_REHEARSAL"
"""Environment variable that chooses among several stacks on one local cloud."""
INSTANCE = "aws:ec2/instance:Instance"
LOOPBACK = "127.0.0.0/8"
MAKE_AN_IMAGE = "scripts/bake.py --local"

BUCKET = "aws:s3/bucket:Bucket"

Say = Callable[[str], None]
Client = Callable[[str], Any]
Done = Callable[["Step"], None]


def name() -> str:
    """The stack this process is about."""
    return os.environ.get(NAMED_BY) or STACK


def state_path() -> Path:
    """Where the stack's state is: with the local cloud it describes, so that both are purged together."""
    return default_state_dir() / ("rehearsal.json" if name() == STACK else f"rehearsal-{name()}.json")


def certificate_path() -> Path:
    """Where clients find the certificate that they verify the stack's server by."""
    return state_path().with_suffix(".pem")


def others_with_a_machine() -> list[str]:
    """Names of the other stacks on the same local cloud that have an instance."""
    found = []
    for path in sorted(default_state_dir().glob("rehearsal*.json")):
        if path != state_path() and any(each.type == INSTANCE for each in state.load(path).resources):
            found.append(path.stem.removeprefix("rehearsal-"))
    return found


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Holds the stack for one command at a time; Refused when another has it."""
    path = state_path().with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Refused(f"another rehearse.py is at work on {path.parent}; wait for it to end, or end it") from None
    finally:
        os.close(handle)


def clients(cloud: LocalCloud) -> Client:
    """The cloud's boto3 clients, each made once: making one costs more than using it."""
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


def with_changes(settings: Props, assignments: list[str], secret_names: list[str]) -> Props:
    """`settings` with each `key=value` set, `key=` taken back to its default, and secrets read from standard input.

    Lists may be written a,b,c. Whether a setting exists and its value is right is left to the stack, which says so
    better. Raises Refused for what is no assignment and for a secret on the command line.
    """
    types = {name: entry["type"] for name, entry in declared().items()}
    changed = dict(settings)
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise Refused(f"--set takes key=value, as in --set instanceType=t3.medium, not {assignment!r}")
        if name == "amiId":
            raise Refused(f"the image is chosen with --ami {value or 'ami-…'}, not with --set")
        if "password" in name.lower() and value:
            raise Refused(f"other users of this machine can read command lines: give {name} with --secret {name}")
        if not value:
            changed.pop(name, None)
        elif types.get(name) == "array" and not value.startswith("["):
            changed[name] = json.dumps([part.strip() for part in value.split(",") if part.strip()])
        else:
            changed[name] = value
    for name in secret_names:
        changed[name] = Secret(_read_secret(name))
    return changed


def _read_secret(name: str) -> str:
    if sys.stdin.isatty():
        import getpass

        return getpass.getpass(f"{name}: ")
    value = sys.stdin.readline().rstrip("\n")
    if not value:
        raise Refused(f"--secret {name} reads the value from standard input, which is empty")
    return value


def configuration(cloud: LocalCloud, ami: str, settings: Props) -> tuple[dict[str, str], list[str]]:
    """Pulumi's configuration of the stack: what the local cloud needs, then what was set; and the names of secrets."""
    prefix = project()
    config = {
        "aws:region": cloud.region,
        f"{prefix}:amiId": ami,
        f"{prefix}:allowedCidrs": json.dumps([LOOPBACK]),
        f"{prefix}:s3Endpoint": cloud.s3_endpoint,
        f"{prefix}:ssmEndpoint": cloud.endpoint,
        f"{prefix}:monitoringEndpoint": cloud.endpoint,
        f"{prefix}:backupsEndpoint": cloud.s3_tls_endpoint,
        f"{prefix}:backupsAuthority": cloud.s3_authority,
    }
    secret = []
    for key, value in settings.items():
        full = key if ":" in key else f"{prefix}:{key}"
        config[full] = str(reveal(value))
        if isinstance(value, Secret):
            secret.append(full)
    return config, secret


# Images


def choose_image(client: Client, base: str | None) -> str:
    """The newest finished image of ours in the local cloud, of those baked on `base` if given. Refused without one."""
    system = re.sub(r"(?<=[a-z])(?=\d)", " ", base or "")
    found = [
        image
        for image in images.find(client("ec2"), {"mlflow-ami:os": system} if base else None)
        if image.finished and image.state == "available"
    ]
    if not found:
        bake = MAKE_AN_IMAGE + (f" --base {base}" if base else "")
        on = f" baked on {base}" if base else ""
        raise Refused(
            f"there is no image{on} in the local cloud yet: bake one with `{bake}`, which takes a few minutes"
        )
    return max(found, key=lambda image: image.tags[images.OURS]).id


# Running the program


def bring_about(
    cloud: LocalCloud, client: Client, ami: str, settings: Props, current: State, *, say: Say, done: Done
) -> Engine:
    """What `pulumi up` does: a preview, which refuses what can be refused, and then, if anything differs, the rest.

    Answers with the engine, whose steps tell what was done. Raises Refused with the program's own words for settings
    it does not take, ApplyError for what failed, Interrupted after Ctrl-C, once the operation under way is recorded.
    """
    plan = preview(cloud, client, ami, settings, current, say=say, done=lambda step: None)
    if plan.idle and plan.outputs == current.outputs:
        if current.settings != settings:
            current.settings = settings
            state.save(state_path(), current)
        return plan
    current.settings = settings
    engine = _engine(cloud, client, current, say, done, dry_run=False)
    for leftover in engine.recover():
        say(leftover)
    for gone in engine.refresh():
        if gone.protect:
            say(f"{gone.type} {gone.name} ({gone.id}) is no longer in the local cloud: it is made anew, empty")
    with cancelled_by_interrupt(engine.cancel, say):
        # What the program says it has said in the preview.
        _run(engine, cloud, ami, settings, say=lambda text: None)
    return engine


def preview(
    cloud: LocalCloud, client: Client, ami: str, settings: Props, current: State, *, say: Say, done: Done
) -> Engine:
    """The program's dry run: nothing is changed, and the steps of the engine it answers with are the plan."""
    engine = _engine(cloud, client, current, say, done, dry_run=True)
    engine.recover()
    engine.refresh()
    _run(engine, cloud, ami, settings, say=say)
    return engine


def remove_machine(cloud: LocalCloud, client: Client, current: State, *, say: Say, done: Done) -> None:
    """Detaches the data volume and the address and terminates the instance, as a replacement begins."""
    engine = _engine(cloud, client, current, say, done, dry_run=False)
    engine.recover()
    engine.refresh()
    machines = [each for each in current.resources if each.type == INSTANCE]
    engine.delete([*(follower for each in machines for follower in engine.followers(each)), *machines])


def destroy(cloud: LocalCloud, client: Client, current: State, *, say: Say, done: Done) -> None:
    """Deletes all the stack ever made, protected and filled or not; images stay."""
    for each in current.resources:
        each.protect = each.retain_on_delete = False
        if each.type == BUCKET:
            each.inputs["forceDestroy"] = True
    engine = _engine(cloud, client, current, say, done, dry_run=False)
    engine.recover()
    engine.refresh()
    engine.delete(list(current.resources))
    current.outputs, current.settings = {}, {}
    state.forget(state_path())
    certificate_path().unlink(missing_ok=True)


def _engine(cloud: LocalCloud, client: Client, current: State, say: Say, done: Done, *, dry_run: bool) -> Engine:
    from rehearsal.engine import Engine
    from rehearsal.resources import KINDS

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
    from rehearsal import program
    from rehearsal.lookups import LOOKUPS

    config, secret_keys = configuration(cloud, ami, settings)
    program.run(
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
    """Makes Ctrl-C end a run between two operations, so that nothing is made that the state does not know."""

    def on_interrupt(number: int, frame: Any) -> None:
        cancel()
        say("interrupted: finishing the operation under way, so that the next `up` can go on from here")
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
