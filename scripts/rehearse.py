#!/usr/bin/env python3
"""Launch an image on the local cloud exactly as `pulumi up` would on AWS, without an AWS account.

`up` runs the Pulumi program in infra/ in process and applies what it declares to the embedded cloud: creates what is
missing, changes what changed, replaces the machine when the image did, and waits until MLflow answers. It is
idempotent; run it again with another --ami to upgrade or roll back. Settings given with --set are remembered, as
`pulumi config set` does; `--set key=` takes one back to its default.

  rehearse.py up                                newest image of ours, default settings
  rehearse.py up --ami ami-0123456789abcdef0    pin an image: newer ones upgrade, older ones roll back
  rehearse.py up --set instanceType=t3.large --set backupRetentionDays=7
  rehearse.py preview --ami ami-…               what `up` would do, and nothing done
  rehearse.py status --json                     url, username, password, versions, state
  rehearse.py ssh                               a shell on the machine
  rehearse.py logs -f                           its journal, followed
  rehearse.py down                              stop it; image, data volume, buckets and parameters are kept
  rehearse.py down --data                       delete the data as well; images are kept
  rehearse.py down --purge                      delete all of it

The story goes to standard error, JSON to standard output. Exit status 2: something you can put right, said in a
sentence; 130: interrupted, and the next `up` goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from local_cloud import LocalCloud, LocalCloudError
from rehearsal import boot, stack, state, status
from rehearsal.errors import Interrupted, Refused, RehearsalError
from rehearsal.values import reveal

if TYPE_CHECKING:
    from rehearsal.engine import Step

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
        # Whoever reads the output has seen enough, as `| head` has; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rehearse.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stack",
        metavar="NAME",
        help=f"which of several stacks on the local cloud (default: ${stack.NAMED_BY}, else {stack.STACK})",
    )
    commands = parser.add_subparsers(required=True, metavar="up | preview | status | down | ssh | logs")

    wanted = argparse.ArgumentParser(add_help=False)
    wanted.add_argument("--ami", metavar="ID", help="image to run (default: the newest of ours)")
    wanted.add_argument("--base", choices=BASES, help="without --ami: the newest that was baked on this")
    wanted.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of infra/Pulumi.yaml; lists as a,b"
    )
    wanted.add_argument(
        "--secret", metavar="KEY", action="append", default=[], help="a setting read from standard input, one line each"
    )
    wanted.add_argument("--json", action="store_true", help="print the result as JSON")

    up = commands.add_parser("up", parents=[wanted], help="bring the stack about and wait for the first answer")
    up.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="patience with a boot (default: 300)")
    up.set_defaults(run=run_up)

    preview = commands.add_parser("preview", parents=[wanted], help="show what `up` would do")
    preview.set_defaults(run=run_preview)

    show = commands.add_parser("status", help="what there is and how to get in")
    show.add_argument("--json", action="store_true", help="print it as JSON")
    show.set_defaults(run=run_status)

    down = commands.add_parser("down", help="stop the machine and the local cloud; what holds data is kept")
    more = down.add_mutually_exclusive_group()
    more.add_argument("--data", action="store_true", help="delete data volume, buckets and parameters, too")
    more.add_argument("--purge", action="store_true", help="delete those, the images, and the local cloud itself")
    down.add_argument("--yes", action="store_true", help="do not ask before --data or --purge")
    down.set_defaults(run=run_down)

    ssh = commands.add_parser("ssh", help="a root shell on the machine, or one command")
    ssh.add_argument("command", nargs=argparse.REMAINDER, help="command to run instead of a shell")
    ssh.set_defaults(run=run_ssh)

    logs = commands.add_parser("logs", help="the machine's console and journal")
    logs.add_argument("-f", "--follow", action="store_true", help="go on showing new entries")
    logs.set_defaults(run=run_logs)
    arguments = parser.parse_args(argv)
    if arguments.stack:
        os.environ[stack.NAMED_BY] = arguments.stack
    return arguments


# Commands


def run_up(arguments: argparse.Namespace) -> None:
    with stack.exclusive():
        current = state.load(stack.state_path())
        settings = stack.with_changes(current.settings, arguments.set, arguments.secret)
        cloud = LocalCloud()
        cloud.up()
        client = stack.clients(cloud)
        ami = arguments.ami or stack.choose_image(client, arguments.base)
        say(f"applying infra/ with {ami}")
        engine = stack.bring_about(cloud, client, ami, settings, current, say=say, done=show_step)
        summarize(engine.steps)
        timing = await_server(cloud, client, engine, arguments.timeout)
        found = inspect(cloud, client, engine.state)
    result = {**found, **timing, "changes": changes(engine.steps)}
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(describe(found)))


def run_preview(arguments: argparse.Namespace) -> None:
    with stack.exclusive():
        current = state.load(stack.state_path())
        settings = stack.with_changes(current.settings, arguments.set, arguments.secret)
        cloud = LocalCloud()
        cloud.up()
        client = stack.clients(cloud)
        ami = arguments.ami or stack.choose_image(client, arguments.base)
        engine = stack.preview(cloud, client, ami, settings, current, say=say, done=show_step)
    summarize(engine.steps)
    if arguments.json:
        print(json.dumps({"ami_id": ami, "changes": changes(engine.steps)}, indent=2))


def run_status(arguments: argparse.Namespace) -> None:
    current = state.load(stack.state_path())
    cloud = LocalCloud()
    found = status.outline(current)
    if cloud.is_up():
        found = inspect(cloud, stack.clients(cloud), current)
    elif current.outputs:
        found |= {"state": "down", "message": "the local cloud is down; `rehearse.py up` brings it back"}
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(describe(found)))


def run_down(arguments: argparse.Namespace) -> None:
    cloud = LocalCloud()
    if arguments.purge:
        say(f"deletes the stack, its data and the images: all of {stack.state_path().parent}")
    elif arguments.data:
        say(
            "deletes the stack with its data volume, buckets and parameters, and stops the local cloud; images are kept"
        )
    else:
        say("removes the machine and stops the local cloud; images, data volume, buckets and parameters are kept")
    if (arguments.purge or arguments.data) and not arguments.yes and not confirmed():
        raise Refused("nothing was deleted; --yes skips the question")
    with stack.exclusive():
        if arguments.purge:
            cloud.purge()
            return
        current = state.load(stack.state_path())
        if arguments.data and current.resources:
            cloud.up()
            stack.destroy(cloud, stack.clients(cloud), current, say=say, done=show_step)
        elif cloud.is_up():
            stack.remove_machine(cloud, stack.clients(cloud), current, say=say, done=show_step)
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


# Parts of them


def await_server(cloud: LocalCloud, client: Client, engine: Any, seconds: float) -> dict[str, Any]:
    """Waits for the first authenticated 200; says, and answers with, the time since RunInstances and each step's."""
    from rehearsal.resources import ec2

    outputs = reveal(engine.outputs)
    instance = outputs["instanceId"]
    launched = next(
        (each.began for each in engine.steps if each.type == stack.INSTANCE and each.operation in BOOTING), None
    )
    if launched is None and ec2.instance_state(engine.aws, instance) == "stopped":
        say(f"starting {instance}, which was stopped")
        launched = time.time()
        ec2.start_instance(engine.aws, instance)
    username, password = way_in(client, outputs["credentialsParameter"])
    answered = boot.wait(
        outputs["url"],
        username,
        password or "",
        seconds=seconds,
        say=say,
        alive=lambda: ec2.instance_state(engine.aws, instance),
        certificate=lambda: status.authority(client("ssm"), outputs.get("authorityParameter")),
    )
    if launched is None:
        say(f"{outputs['url']} answers")
        return {"seconds_to_first_answer": None, "boot": []}
    steps = boot.step_times(read_step_statuses(cloud, instance), launched)
    say(f"first authenticated answer {answered - launched:.1f} s after RunInstances")
    for each in steps:
        say(f"  {each.step:<14} began at {each.after:5.1f} s, took {each.seconds:5.1f} s")
    return {"seconds_to_first_answer": round(answered - launched, 2), "boot": [vars(each) for each in steps]}


BOOTING = ("create", "replace")


def read_step_statuses(cloud: LocalCloud, instance: str) -> list[dict[str, Any]]:
    """The machine's own record of its boot, one document a step."""
    shell = "for each in /run/mlflow-host/status/*.json; do cat $each; echo; done"
    lines = cloud.exec(instance, ["sh", "-c", shell]).stdout.splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def read_backups(cloud: LocalCloud, instance: str) -> dict[str, Any] | None:
    """What the machine last found of its backups; None until it has looked for the first time."""
    found = cloud.exec(instance, ["cat", "/run/mlflow-host/web/backups.json"])
    return dict(json.loads(found.stdout)) if found.returncode == 0 else None


def way_in(client: Client, parameter: str) -> tuple[str, str | None]:
    """User and password, from the credentials parameter, which is where people are managed."""
    value = client("ssm").get_parameter(Name=parameter, WithDecryption=True)["Parameter"]["Value"]
    return status.first_user(value)


def inspect(cloud: LocalCloud, client: Client, current: state.State) -> dict[str, Any]:
    """The status document of a local cloud that is up."""
    from rehearsal.kinds import Aws
    from rehearsal.resources import ec2

    found = status.outline(current) | {
        "region": cloud.region,
        "endpoint": cloud.endpoint,
        "s3_endpoint": cloud.s3_endpoint,
    }
    if not current.outputs:
        return found
    found["username"], found["password"] = way_in(client, found["credentials_parameter"])
    machine = ec2.instance_state(Aws(client, cloud.region), found["instance_id"])
    if machine != "running":
        return found | {"state": "stopped", "message": f"the machine is {machine}; `rehearse.py up` launches one"}
    certificate = status.authority(client("ssm"), found["authority_parameter"])
    if certificate:
        found["server_certificate"] = str(status.keep_certificate(stack.certificate_path(), certificate))
    answer = boot.ask(found["url"], found["username"], found["password"] or "", certificate)
    found["backups"] = read_backups(cloud, found["instance_id"])
    if answer.status == 200:
        return found | {"state": "ready"}
    if answer.status == 0 and found["url"].startswith("https:"):
        answer = boot.ask_port_80(found["url"])
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


def confirmed() -> bool:
    if not sys.stdin.isatty():
        return False
    print("rehearse: type yes to delete it: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() == "yes"


# What is said


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
    """The steps that change something, as JSON."""
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
