#!/usr/bin/env python3
"""Launch an image on the local cloud exactly as `pulumi up` would on AWS, without an AWS account.

`up` runs the Pulumi program of infra/ and applies the program's resources to the local cloud. `up` creates and changes
resources, replaces the machine if the image changed, and waits until MLflow responds. `up` is idempotent. To upgrade or
roll back, run `up` with --newest or another --ami. The option --set stores a setting, like `pulumi config set`;
`--set key=` resets a setting to its default. If Pulumi's CLI is on PATH or was built with `make prepare-tools`, the
script uses Pulumi's engine (see --engine).

  rehearse.py up                                launch or update; a new stack gets the newest image
  rehearse.py up --newest                       change to the newest image
  rehearse.py up --ami ami-0123456789abcdef0    pin an image: a newer image upgrades, an older image rolls back
  rehearse.py up --set instanceType=t3.large --set backupRetentionDays=7
  rehearse.py preview --ami ami-…               show what `up` would do
  rehearse.py refresh                           read changes made by hand
  rehearse.py outputs                           print the stack's outputs
  eval "$(rehearse.py environment)"             set variables; then `cd infra` and run any `pulumi` command
  rehearse.py status --json                     url, username, password, versions, state
  rehearse.py ssh                               open a shell on the machine
  rehearse.py logs -f                           follow the machine's journal
  rehearse.py down                              stop the cloud; keep image, data volume, buckets and parameters
  rehearse.py down --data                       delete the data as well; keep the images
  rehearse.py down --purge                      delete the stack, its data and the images

The script prints its log to standard error and JSON to standard output. Exit status 2 means an error that you can
correct; one sentence describes the error. Exit status 130 means an interrupt; the next `up` continues the operation.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - this import restarts the script with the packages of .venv

# isort: split
import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from scripts import prompts
from scripts.enter_venv import ROOT_BYTECODE
from scripts.local_cloud import LocalCloud, LocalCloudError
from scripts.rehearsal import boot_wait, stack, state, status_document
from scripts.rehearsal.errors import Interrupted, Refused, RehearsalError
from scripts.rehearsal.wire import reveal

if TYPE_CHECKING:
    from scripts.rehearsal.engine import Step

DELETE = "rehearse: type yes to delete it: "
BASES = ("debian12", "debian13")
SIGNS = {"create": "+", "update": "~", "replace": "±", "delete": "-", "retain": "·"}
Client = Callable[[str], Any]


def main(argv: list[str] | None = None) -> int:
    arguments = read_arguments(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except (RehearsalError, LocalCloudError) as error:
        say(str(error))
        return 2
    except (Interrupted, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # The reader of standard output closed the pipe (for example `| head`). If standard output is not redirected
        # here, Python prints a second error when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rehearse.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stack",
        metavar="NAME",
        help=f"name of a stack on the local cloud (default: ${stack.NAMED_BY}, else {stack.STACK})",
    )
    commands = parser.add_subparsers(
        required=True, metavar="up | preview | refresh | outputs | environment | status | down | destroy | ssh | logs"
    )

    engine = argparse.ArgumentParser(add_help=False)
    engine.add_argument(
        "--engine",
        choices=("auto", "own", "pulumi"),
        default="auto",
        help="the engine; auto selects the engine that created the stack; for a new stack it selects "
        f"${stack.ENGINE_NAMED_BY}, else Pulumi's engine if Pulumi's CLI is installed",
    )

    wanted = argparse.ArgumentParser(add_help=False, parents=[engine])
    which = wanted.add_mutually_exclusive_group()
    which.add_argument(
        "--ami", metavar="ID", help="image to run (default: the current one; for a new stack the newest)"
    )
    which.add_argument("--newest", action="store_true", help="the newest image")
    which.add_argument("--base", choices=BASES, help="the newest image with this source image")
    wanted.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of infra/Pulumi.yaml; lists as a,b"
    )
    wanted.add_argument(
        "--secret", metavar="KEY", action="append", default=[], help="a setting read from standard input, one line each"
    )
    wanted.add_argument("--json", action="store_true", help="print the result as JSON")

    up = commands.add_parser("up", parents=[wanted], help="create or update the stack and wait until MLflow answers")
    up.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="limit for the boot (default: 300)")
    up.set_defaults(run=run_up)

    preview = commands.add_parser("preview", parents=[wanted], help="show what `up` would do")
    preview.set_defaults(run=run_preview)

    refresh = commands.add_parser("refresh", parents=[engine], help="read changes made by hand, like `pulumi refresh`")
    refresh.set_defaults(run=run_refresh)

    outputs = commands.add_parser("outputs", help="print the stack's outputs as JSON")
    outputs.set_defaults(run=run_outputs)

    environment = commands.add_parser("environment", help="the export lines for `pulumi` and AWS clients")
    environment.set_defaults(run=run_environment)

    show = commands.add_parser("status", help="print URL, credentials, versions and state")
    show.add_argument("--json", action="store_true", help="print it as JSON")
    show.set_defaults(run=run_status)

    down = commands.add_parser("down", help="stop the machine and the local cloud; keep all data")
    more = down.add_mutually_exclusive_group()
    more.add_argument("--data", action="store_true", help="also delete data volume, buckets and parameters")
    more.add_argument("--purge", action="store_true", help="like --data, and delete the images and the local cloud")
    down.add_argument("--yes", action="store_true", help="do not ask before --data or --purge")
    down.set_defaults(run=run_down)

    destroy = commands.add_parser("destroy", help="delete the stack with its data; the local cloud stays up")
    destroy.add_argument("--yes", action="store_true", help="do not ask")
    destroy.set_defaults(run=run_destroy)

    ssh = commands.add_parser("ssh", help="a root shell on the machine, or one command")
    ssh.add_argument("command", nargs=argparse.REMAINDER, help="command to run instead of a shell")
    ssh.set_defaults(run=run_ssh)

    logs = commands.add_parser("logs", help="the machine's console and journal")
    logs.add_argument("-f", "--follow", action="store_true", help="follow new entries")
    logs.set_defaults(run=run_logs)
    arguments = parser.parse_args(argv)
    if arguments.stack:
        os.environ[stack.NAMED_BY] = arguments.stack
    return arguments


# Commands


def run_up(arguments: argparse.Namespace) -> None:
    with stack.exclusive():
        current = state.load(stack.state_path())
        by = stack.engine_for(arguments.engine, current)
        say(f"engine: {by.described()}")
        settings, mistakes = stack.with_changes(current.settings, arguments.set, arguments.secret)
        cloud = LocalCloud()
        cloud.up()
        client = stack.clients(cloud)
        ami = stack.image_to_run(client, arguments, current, settings)
        if mistakes:
            stack.refuse(cloud, client, ami, settings, current, mistakes)
        say(f"applying infra/ with {ami}")
        engine = by.bring_about(cloud, client, ami, settings, current, say=say, done=show_step)
        summarize(engine.steps)
        timing = await_server(cloud, client, engine, arguments.timeout)
        found = inspect(cloud, client, engine.state)
    result = {**found, **timing, "changes": changes(engine.steps)}
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(describe(found)))


def run_preview(arguments: argparse.Namespace) -> None:
    with stack.exclusive():
        current = state.load(stack.state_path())
        by = stack.engine_for(arguments.engine, current)
        say(f"engine: {by.described()}")
        settings, mistakes = stack.with_changes(current.settings, arguments.set, arguments.secret)
        cloud = LocalCloud()
        cloud.up()
        client = stack.clients(cloud)
        ami = stack.image_to_run(client, arguments, current, settings)
        if mistakes:
            stack.refuse(cloud, client, ami, settings, current, mistakes)
        engine = by.preview(cloud, client, ami, settings, current, say=say, done=show_step)
    summarize(engine.steps)
    if arguments.json:
        print(json.dumps({"ami_id": ami, "changes": changes(engine.steps)}, indent=2))


def run_refresh(arguments: argparse.Namespace) -> None:
    with stack.exclusive():
        current = state.load(stack.state_path())
        cloud = LocalCloud()
        cloud.up()
        by = stack.engine_for(arguments.engine, current)
        say(f"engine: {by.described()}")
        by.refresh(cloud, stack.clients(cloud), current, say=say, done=show_step)


def run_outputs(arguments: argparse.Namespace) -> None:
    print(json.dumps(reveal(state.load(stack.state_path()).outputs), indent=2))


def run_environment(arguments: argparse.Namespace) -> None:
    from scripts.rehearsal import pulumi_cli

    cloud = LocalCloud()
    cloud.up()
    pulumi_cli.link_settings()
    for name, value in pulumi_cli.environment(cloud).items():
        print(f"export {name}={shlex.quote(value)}")


def run_destroy(arguments: argparse.Namespace) -> None:
    say("deletes the stack with its data volume, buckets and parameters; images are kept")
    if not arguments.yes and not prompts.confirmed(DELETE):
        raise Refused("nothing was deleted; --yes skips the question")
    with stack.exclusive():
        current = state.load(stack.state_path())
        cloud = LocalCloud()
        cloud.up()
        by = stack.engine_for("auto", current)
        by.destroy(cloud, stack.clients(cloud), current, say=say, done=show_step)


def run_status(arguments: argparse.Namespace) -> None:
    current = state.load(stack.state_path())
    cloud = LocalCloud()
    found = status_document.outline(current)
    if cloud.is_up():
        found = inspect(cloud, stack.clients(cloud), current)
    elif current.outputs:
        found |= {"state": "down", "message": "the local cloud is down; `rehearse.py up` brings it back"}
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(describe(found)))


def run_down(arguments: argparse.Namespace) -> None:
    cloud = LocalCloud()
    if arguments.purge:
        say(f"deletes the stack, its data and the images: all of {stack.state_path().parent}")
        for refusal in stack.refused_elsewhere():
            say(refusal)
    elif arguments.data:
        say(
            "deletes the stack with its data volume, buckets and parameters, and stops the local cloud; images are kept"
        )
    else:
        say("removes the machine and stops the local cloud; images, data volume, buckets and parameters are kept")
    if (arguments.purge or arguments.data) and not arguments.yes and not prompts.confirmed(DELETE):
        raise Refused("nothing was deleted; --yes skips the question")
    with stack.exclusive():
        if arguments.purge:
            for certificate in stack.certificates():
                certificate.unlink()
            shutil.rmtree(ROOT_BYTECODE, ignore_errors=True)
            cloud.purge()
            stack.unlink_settings()
            return
        current = state.load(stack.state_path())
        by = stack.engine_for("auto", current)
        if arguments.data and current.resources:
            cloud.up()
            by.destroy(cloud, stack.clients(cloud), current, say=say, done=show_step)
        elif cloud.is_up():
            by.remove_machine(cloud, stack.clients(cloud), current, say=say, done=show_step)
        if others := stack.others_with_a_machine():
            say(f"the local cloud stays up for {', '.join(others)}")
        else:
            cloud.down()


def run_ssh(arguments: argparse.Namespace) -> int:
    cloud, instance = running_machine()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    return replace_process(cloud.shell_command(instance, command or ["/bin/bash", "-l"]))


def run_logs(arguments: argparse.Namespace) -> int:
    cloud, instance = running_machine()
    if not arguments.follow:
        print(cloud.console_output(instance), flush=True)
    journal = ["journalctl", "--no-pager", "--boot", *(["--follow"] if arguments.follow else [])]
    return replace_process(cloud.shell_command(instance, journal))


# Parts of commands


def await_server(cloud: LocalCloud, client: Client, engine: Any, seconds: float) -> dict[str, Any]:
    """Wait for the first authenticated response with status 200. Log and return the seconds from RunInstances to this
    response, and the time of each boot step."""
    from scripts.rehearsal.resources import ec2

    outputs = reveal(engine.outputs)
    instance = outputs["instanceId"]
    launched = next(
        (each.began for each in engine.steps if each.type == stack.INSTANCE and each.operation in BOOTING), None
    )
    if launched is None and ec2.instance_state(engine.aws, instance) == "stopped":
        say(f"starting {instance}, which was stopped")
        launched = time.time()
        ec2.start_instance(engine.aws, instance)
    username, password = status_document.administrator(client("ssm"), status_document.parameters(outputs))
    answered = boot_wait.wait(
        outputs["url"],
        username,
        password or "",
        seconds=seconds,
        say=say,
        alive=lambda: ec2.instance_state(engine.aws, instance),
        certificate=lambda: status_document.authority(client("ssm"), outputs.get("authorityParameter")),
    )
    if launched is None:
        say(f"{outputs['url']} answers")
        return {"seconds_to_first_answer": None, "boot": []}
    steps = boot_wait.step_times(read_step_statuses(cloud, instance), launched)
    say(f"first authenticated response {answered - launched:.1f} s after RunInstances")
    for each in steps:
        say(f"  {each.step:<14} began at {each.after:5.1f} s, took {each.seconds:5.1f} s")
    return {"seconds_to_first_answer": round(answered - launched, 2), "boot": [vars(each) for each in steps]}


BOOTING = ("create", "replace")


def read_step_statuses(cloud: LocalCloud, instance: str) -> list[dict[str, Any]]:
    """Return the status files that the machine's boot wrote: one JSON document per step."""
    shell = "for each in /run/mlflow-host/status/*.json; do cat $each; echo; done"
    lines = cloud.exec(instance, ["sh", "-c", shell]).stdout.splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def read_backups(cloud: LocalCloud, found: dict[str, Any], certificate: str | None) -> dict[str, Any] | None:
    """Return the machine's last backup report, or None if there is no report yet. Only root can read the report in the
    machine's file system, so other users request the report from the server."""
    if os.geteuid():
        path = "/mlflow-host/backups.json"
        answer = boot_wait.ask(found["url"], found["username"], found["password"] or "", certificate, path=path)
        return answer.document if answer.status == 200 else None
    report = cloud.exec(found["instance_id"], ["cat", "/run/mlflow-host/web/backups.json"])
    return dict(json.loads(report.stdout)) if report.returncode == 0 else None


def inspect(cloud: LocalCloud, client: Client, current: state.State) -> dict[str, Any]:
    """Return the status document. The local cloud must be running."""
    from scripts.rehearsal.resource_types import Aws
    from scripts.rehearsal.resources import ec2

    found = status_document.outline(current) | {
        "region": cloud.region,
        "endpoint": cloud.endpoint,
        "s3_endpoint": cloud.s3_endpoint,
        "s3_trust": str(stack.keep_trust(cloud)),
    }
    if not current.outputs:
        return found
    found["username"], found["password"] = status_document.administrator(client("ssm"), found)
    machine = ec2.instance_state(Aws(client, cloud.region), found["instance_id"])
    if machine != "running":
        return found | {"state": "stopped", "message": f"the machine is {machine}; `rehearse.py up` launches one"}
    certificate = status_document.authority(client("ssm"), found["authority_parameter"])
    if certificate:
        found["server_certificate"] = str(status_document.keep_certificate(stack.certificate_path(), certificate))
    answer = boot_wait.ask(found["url"], found["username"], found["password"] or "", certificate)
    found["backups"] = read_backups(cloud, found, certificate)
    if answer.status == 200:
        return found | {"state": "ready"}
    if answer.status == 0 and found["url"].startswith("https:"):
        answer = boot_wait.ask_port_80(found["url"])
    message = answer.document.get("message") or (
        f"HTTP status {answer.status}" if answer.status else "nothing answers yet"
    )
    return found | {"state": answer.document.get("state", "starting"), "message": message}


def running_machine() -> tuple[LocalCloud, str]:
    cloud = LocalCloud()
    current = state.load(stack.state_path())
    if not current.outputs or not cloud.is_up():
        raise Refused("there is no machine: launch one with `rehearse.py up`")
    return cloud, str(current.outputs["instanceId"])


def replace_process(argv: list[str]) -> int:
    sys.stdout.flush()
    os.execvp(argv[0], argv)


# Output


def say(text: str) -> None:
    for line in text.splitlines() or [""]:
        print(f"rehearse: {line}", file=sys.stderr, flush=True)


def show_step(step: Step) -> None:
    if step.operation == "same" or step.type.startswith("pulumi:"):
        return
    why = f"  because of {', '.join(step.changed)}" if step.changed else ""
    took = f"  {step.seconds:.1f} s" if step.seconds >= 0.05 else ""
    say(f"  {SIGNS[step.operation]} {step.operation:<7} {step.type.split(':')[-1]} {step.name}{took}{why}")


def changes(steps: list[Step]) -> list[dict[str, Any]]:
    """Return the steps as JSON objects, without the steps that change nothing."""
    return [
        {"operation": each.operation, "type": each.type, "name": each.name, "because_of": list(each.changed)}
        for each in steps
        if each.operation != "same"
    ]


def summarize(steps: list[Step]) -> None:
    counts: dict[str, int] = {}
    for each in steps:
        counts[each.operation] = counts.get(each.operation, 0) + 1
    same = counts.pop("same", 0)
    say(
        ", ".join(f"{count} to {name}" for name, count in counts.items()) + f", {same} unchanged"
        if counts
        else f"nothing to change ({same} resources)"
    )


def describe(found: dict[str, Any]) -> list[str]:
    if found["state"] == "none":
        return ["nothing is launched: rehearse.py up"]
    lines = [
        ("state", found["state"] + (f": {found['message']}" if found["message"] else "")),
        ("url", found["url"]),
        ("username", found["username"]),
        ("password", found["password"] or "(not kept in clear)"),
        *([("certificate", found["server_certificate"])] if found["server_certificate"] else []),
        ("MLflow", found["mlflow_version"]),
        ("image", f"{found['ami_id']} ({found['image_version']})"),
        ("instance", found["instance_id"]),
        ("data volume", found["data_volume_id"]),
        ("buckets", ", ".join((found["buckets"] or {}).values())),
    ]
    return [f"{name:<12} {value}" for name, value in lines]


if __name__ == "__main__":
    sys.exit(main())
