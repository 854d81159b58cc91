"""Run Pulumi's own CLI and engine for the rehearsal's stack, with the provider plug-ins of the module `provider`.

All files of the CLI are in a folder beside the local cloud's state: $PULUMI_HOME with the plug-ins, the stacks, the
passphrase that encrypts the stacks' secrets, and a project whose program is infra/. The user's own Pulumi account is
not read or changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scripts.local_cloud import LocalCloud
from scripts.rehearsal import plugin_versions, stack, state, tools
from scripts.rehearsal.engine import Operation, Step
from scripts.rehearsal.errors import ApplyError, Interrupted, Refused
from scripts.rehearsal.resource_types import Aws
from scripts.rehearsal.state import State
from scripts.rehearsal.wire import Props, Secret

OPERATIONS: Mapping[str, Operation] = {
    "same": "same",
    "create": "create",
    "update": "update",
    "delete": "delete",
    "create-replacement": "replace",
    "delete-replaced": "delete",
    "import": "create",
}
"""Operation of Pulumi's engine → name of the operation in a rehearsal. The engine's operation `replace` is omitted,
because it changes nothing. `create-replacement` and `delete-replaced` make the changes of a replacement."""

NOISE = "program exited with non-zero exit code"
"""Text of the line that the CLI adds after the program's own error message."""


@dataclass
class Run:
    """The result of a run of Pulumi's CLI. rehearse.py reads the same fields from `engine.Engine`."""

    aws: Aws
    state: State
    steps: list[Step] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    passes: int = 0
    """Number of times that the program has run. `up` runs the program twice, because it begins with a preview."""

    @property
    def outputs(self) -> Props:
        return self.state.outputs

    @property
    def idle(self) -> bool:
        return all(each.operation == "same" for each in self.steps)


def described() -> str:
    """Return the first line of a run's output: the path and version of Pulumi's CLI."""
    cli = _require()
    version = subprocess.run([cli, "version"], capture_output=True, text=True, env=_plain_environment()).stdout.strip()
    return f"{cli} {version}"


def folder() -> Path:
    """Return the folder of Pulumi's CLI for the stacks on this local cloud."""
    return stack.state_path().parent / "pulumi"


def environment(cloud: LocalCloud) -> dict[str, str]:
    """Return the environment variables for `pulumi` commands on the local cloud. Creates the folders that the variables
    name."""
    home = folder()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    (home / "stacks").mkdir(exist_ok=True)
    passphrase = home / "passphrase"
    if not passphrase.exists():
        state.write_private(passphrase, secrets.token_urlsafe(32))
    _install_plugins(home)
    _write_project(home)
    return {
        **cloud.environment(),
        "PULUMI_HOME": str(home / "home"),
        "PULUMI_BACKEND_URL": f"file://{home / 'stacks'}",
        "PULUMI_CONFIG_PASSPHRASE_FILE": str(passphrase),
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION": "true",
        "PULUMI_SUPPRESS_NEO_LINK": "true",
        "PATH": os.pathsep.join([str(_require().parent), os.environ.get("PATH", os.defpath)]),
    }


def _require() -> Path:
    cli = tools.find_pulumi()
    if cli is None:
        raise Refused(
            "Pulumi's CLI is not on PATH and was not built: run `make prepare-tools`, or install the CLI "
            "(https://www.pulumi.com/docs/install/), or rehearse with --engine own"
        )
    return cli


def _install_plugins(home: Path) -> None:
    """Install the module `provider` as the provider plug-in of every installed Pulumi package."""
    for package, version in plugin_versions.provider_versions().items():
        plugin = home / f"home/plugins/resource-{package}-v{version}/pulumi-resource-{package}"
        plugin.parent.mkdir(parents=True, exist_ok=True)
        write_executable(plugin, ["-m", "scripts.rehearsal.provider", package, version])


def write_executable(path: Path, arguments: list[str]) -> None:
    """Write a script to `path`. The script runs Python with `arguments`, followed by the script's own arguments."""
    command = shlex.join([sys.executable, *arguments])
    path.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(tools.CHECKOUT))} exec {command} "$@"\n')
    path.chmod(0o755)


def _project_folder() -> Path:
    return folder() / "project"


def _settings_file() -> Path:
    return _project_folder() / f"Pulumi.{stack.name()}.yaml"


def _write_project(home: Path) -> None:
    """Write a Pulumi project for infra/ to another folder, so that a rehearsal writes no settings to the checkout."""
    document = yaml.safe_load((stack.PROGRAM / "Pulumi.yaml").read_text())
    document["main"] = str(stack.PROGRAM)
    document["runtime"]["options"]["virtualenv"] = sys.prefix
    _project_folder().mkdir(exist_ok=True)
    (_project_folder() / "Pulumi.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def link_settings() -> None:
    """Create a link in infra/ to the stack's settings file, so that `pulumi` finds it. Does not replace a regular
    file."""
    stack.unlink_settings()
    if not stack.settings_link().exists():
        stack.settings_link().symlink_to(_settings_file())


# Settings


def settings(current: State) -> Props:
    """Return `current.settings` with the later changes of `pulumi config set` and `pulumi config rm`."""
    prefix = f"{stack.project()}:"
    written = {
        name.removeprefix(prefix): value
        for name, value in _document().get("config", {}).items()
        if name.startswith(prefix) and name.removeprefix(prefix) not in GIVEN
    }
    found: Props = {name: current.settings[name] for name in GIVEN if name in current.settings}
    for name, value in written.items():
        if isinstance(value, dict) and "secure" in value:
            found[name] = current.settings.get(name, Unread(value["secure"]))
        else:
            found[name] = value if isinstance(value, str) else json.dumps(value)
    return found


GIVEN = (
    "amiId",
    "allowedCidrs",
    "s3Endpoint",
    "ssmEndpoint",
    "stsEndpoint",
    "monitoringEndpoint",
    "logsEndpoint",
)
"""Settings that the rehearsal sets at every run. Values that the user gave with --set are kept."""


@dataclass(frozen=True)
class Unread:
    """A secret that `pulumi config set --secret` stored. The rehearsal does not decrypt or change this secret."""

    ciphertext: str


def _document() -> dict[str, Any]:
    path = _settings_file()
    return dict(yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def write_settings(cloud: LocalCloud, ami: str, wanted: Props, environment: Mapping[str, str]) -> None:
    """Write the stack's settings like `pulumi config set`. Pulumi's CLI encrypts the secrets."""
    prefix = f"{stack.project()}:"
    plain = {name: value for name, value in wanted.items() if not isinstance(value, (Secret, Unread))}
    config, _ = stack.configuration(cloud, ami, plain)
    types = {f"{prefix}{name}": entry["type"] for name, entry in stack.declared().items()}
    document = _document()
    secure = {name: value for name, value in document.get("config", {}).items() if isinstance(value, dict)}
    kept = {name: value for name, value in secure.items() if name.removeprefix(prefix) in wanted}
    document["config"] = {name: _typed(types.get(name, "string"), text) for name, text in config.items()} | kept
    state.write_private(_settings_file(), yaml.safe_dump(document, sort_keys=False))
    for name, value in wanted.items():
        if isinstance(value, Secret):
            _quietly(["config", "set", "--secret", f"{prefix}{name}"], environment, input=str(value.value))


def _typed(kind: str, text: str) -> Any:
    """Convert a text to the setting's YAML type. An invalid text stays unchanged; the program refuses it later."""
    if kind == "array":
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return text


# Running the CLI


def bring_about(
    cloud: LocalCloud,
    client: stack.Client,
    ami: str,
    wanted: Props,
    current: State,
    *,
    say: stack.Say,
    done: stack.Done,
) -> Run:
    """Run `pulumi up --refresh` with these settings. Raises Refused for rejected settings, ApplyError for a failed
    operation, and Interrupted after Ctrl-C."""
    known = _prepared(cloud, ami, wanted, current)
    _recover(known, say)
    run = _operate(["up", "--yes", "--refresh"], known, cloud, client, current, say, done)
    current.settings = wanted
    state.save(stack.state_path(), current)
    return run


def preview(
    cloud: LocalCloud,
    client: stack.Client,
    ami: str,
    wanted: Props,
    current: State,
    *,
    say: stack.Say,
    done: stack.Done,
) -> Run:
    """Run `pulumi preview --refresh` with these settings, and store the settings like `pulumi config set`."""
    return _operate(["preview", "--refresh"], _prepared(cloud, ami, wanted, current), cloud, client, current, say, done)


def refresh(cloud: LocalCloud, client: stack.Client, current: State, *, say: stack.Say, done: stack.Done) -> Run:
    """Run `pulumi refresh`, which updates the state from the local cloud."""
    known = environment(cloud)
    _recover(known, say)
    return _operate(["refresh", "--yes", "--skip-preview"], known, cloud, client, current, say, done)


def remove_machine(
    cloud: LocalCloud, client: stack.Client, current: State, *, say: stack.Say, done: stack.Done
) -> None:
    """Detach the data volume and the address, and terminate the instance, like the first half of a replacement."""
    machines = [each.urn for each in current.resources if each.type == stack.INSTANCE]
    if not machines:
        return
    known = environment(cloud)
    _recover(known, say)
    targets = [part for urn in machines for part in ("--target", urn)]
    arguments = ["destroy", "--yes", "--skip-preview", "--refresh", "--target-dependents", *targets]
    _operate(arguments, known, cloud, client, current, say, done)


def destroy(cloud: LocalCloud, client: stack.Client, current: State, *, say: stack.Say, done: stack.Done) -> None:
    """Delete all resources of the stack, including protected resources and buckets with objects. Logs the deletions
    that Pulumi or S3 would refuse. Images are not deleted."""
    from scripts import retire_stack

    known = environment(cloud)
    _recover(known, say)
    stack.say_refusals(client, current, say)
    remove_machine(cloud, client, current, say=say, done=done)
    stack.empty_buckets(client, current)
    retire_stack.unprotect(lambda *arguments: _quietly([*arguments], known), stack.name())
    _operate(["destroy", "--yes", "--skip-preview", "--refresh"], known, cloud, client, current, say, done)
    _quietly(["stack", "rm", "--yes", stack.name()], known)
    _settings_file().unlink(missing_ok=True)
    state.forget(stack.state_path())
    stack.certificate_path().unlink(missing_ok=True)


def _prepared(cloud: LocalCloud, ami: str, wanted: Props, current: State) -> dict[str, str]:
    known = environment(cloud)
    _quietly(["stack", "select", "--create", stack.name()], known)
    write_settings(cloud, ami, wanted, known)
    return known


def _recover(known: Mapping[str, str], say: stack.Say) -> None:
    """If a run of this stack was killed, remove the lock of that run."""
    for lock in (folder() / "stacks/.pulumi/locks").rglob("*.json"):
        if stack.project() not in lock.parts or stack.name() not in lock.parts:
            continue
        owner = json.loads(lock.read_text())
        if not Path(f"/proc/{owner.get('pid')}").exists():
            say(f"removing the lock of a run that was killed (process {owner.get('pid')})")
            _quietly(["cancel", "--yes", "--stack", stack.name()], known)


def _operate(
    arguments: list[str],
    known: Mapping[str, str],
    cloud: LocalCloud,
    client: stack.Client,
    current: State,
    say: stack.Say,
    done: stack.Done,
) -> Run:
    """Run one command of Pulumi's CLI and call `done` with each step. The CLI prints to standard error."""
    events = folder() / f"events-{stack.name()}.jsonl"
    events.unlink(missing_ok=True)
    command = [
        _require(),
        *arguments,
        "--non-interactive",
        "--suppress-permalink",
        "--suppress-progress",
        *("--stack", stack.name()),
        *("--event-log", events),
    ]
    run = Run(Aws(client, cloud.region), current)
    status, interrupted = _watched(command, {**known, "PULUMI_DEBUG_COMMANDS": "true"})
    for event in read_events(events):
        _take_in(event, run)
    for step in run.steps:
        done(step)
    state.with_pulumis(current, stack.state_path())
    state.save(stack.state_path(), current)
    if interrupted:
        raise Interrupted("interrupted")
    if status != 0:
        failure = "\n".join(dict.fromkeys(run.errors)) or f"pulumi {arguments[0]} ended with status {status}"
        only_previewed = arguments[0] == "preview" or (arguments[0] == "up" and run.passes < 2)
        raise (Refused if only_previewed else ApplyError)(failure)
    return run


def _watched(command: list[Any], known: Mapping[str, str]) -> tuple[int, bool]:
    """Run Pulumi's CLI. Return the CLI's exit status, and whether the user interrupted the run. After Ctrl-C, the CLI
    completes the current operation."""
    process = subprocess.Popen(
        command,
        cwd=_project_folder(),
        env={**os.environ, **known},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
    )
    interrupted = threading.Event()

    def cancel() -> None:
        interrupted.set()
        process.send_signal(signal.SIGINT)

    with stack.cancelled_by_interrupt(cancel, lambda text: print(f"rehearse: {text}", file=sys.stderr, flush=True)):
        return process.wait(), interrupted.is_set()


def _quietly(arguments: list[str], known: Mapping[str, str], input: str = "") -> str:
    done = subprocess.run(
        [_require(), *arguments, "--non-interactive"],
        cwd=_project_folder(),
        env={**os.environ, **known},
        capture_output=True,
        text=True,
        input=input,
    )
    if done.returncode != 0:
        reason = " ".join((done.stderr.strip() or done.stdout.strip()).split())
        raise Refused(f"pulumi {' '.join(arguments[:2])} failed: {reason}")
    return done.stdout


def _plain_environment() -> dict[str, str]:
    return {**os.environ, "PULUMI_SKIP_UPDATE_CHECK": "true"}


# Events


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the engine's events in their order."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _take_in(event: dict[str, Any], run: Run) -> None:
    if said := event.get("diagnosticEvent"):
        text = _plain(said["message"])
        if said["severity"] == "error" and NOISE not in text:
            run.errors.append(text)
        return
    if "preludeEvent" in event:
        # `up` begins with a preview. Remove the steps of this preview, because these steps were not executed.
        run.steps.clear()
        run.passes += 1
        return
    metadata = event.get("resourcePreEvent", {}).get("metadata")
    if metadata is None or metadata["op"] not in OPERATIONS:
        return
    changed = tuple(sorted(each for each in metadata.get("keys") or metadata.get("diffs") or [] if each != "tags"))
    name = metadata["urn"].rsplit("::", 1)[-1]
    operation = OPERATIONS[metadata["op"]]
    if operation == "delete" and (metadata.get("old") or {}).get("retainOnDelete"):
        operation = "retain"
    run.steps.append(Step(operation, metadata["urn"], metadata["type"], name, changed, began=float(event["timestamp"])))


def _plain(text: str) -> str:
    """Return the text without the colour codes of Pulumi's CLI."""
    return re.sub(r"<\{%.*?%\}>", "", text).strip()
