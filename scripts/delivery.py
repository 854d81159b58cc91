#!/usr/bin/env python3
"""The steps of the workflows in .github/workflows. Each step is one command, which also works on your own machine.

From a commit to a promoted image:

  delivery.py bake                              bake the image, or find an image from the same inputs
  delivery.py diff ami-… staging                print the changes from the channel's image
  delivery.py drill ami-… staging               rehearse an upgrade from the channel's image and a rollback (needs root)
  delivery.py promote ami-… staging --drill build/delivery/drill.json    set the channel to the image.

From a merge to production:

  delivery.py preview prod                      run `pulumi preview`, and save the plan
  delivery.py deploy prod                       run `pulumi up` with the saved plan
  delivery.py smoke --stack prod                write, read and delete data with MLflow's client
  delivery.py rollback prod ami-…               update the stack to its previous image
  delivery.py drift prod                        open an issue if the stack was changed by hand.

From a release of MLflow to a pull request:

  delivery.py renew production                  test the newest MLflow, and an upgrade to it (needs root)
  delivery.py propose 3.19.0                    open a pull request with the proposal of `renew`.

In a workflow, a step sets outputs (GITHUB_OUTPUT), adds text to the job's summary (GITHUB_STEP_SUMMARY) and writes
annotations for mistakes. On your own machine, a step prints its outputs, summary and mistakes to standard error. An
empty argument counts as a missing argument, so that a workflow can pass a variable that is not set. infra/README.md
explains the setup of the workflows.

Exit status 0: done; 1: a step failed or found drift; 2: refused, with one sentence; 130: interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - this import restarts the script with the packages of .venv

# isort: split
import argparse
import sys
from collections.abc import Callable

from scripts import connect
from scripts.delivering import commands, github, image_steps, renewal, smoke_test, stack_steps
from scripts.delivering.commands import StepFailed
from scripts.interrupts import end_like_ctrl_c


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    end_like_ctrl_c()
    try:
        STEPS[arguments.step](arguments)
    except StepFailed as failed:
        github.annotate("error", str(failed))
        return failed.status
    except KeyboardInterrupt:
        return 130
    return 0


# STEPS is a dict and not a `match` statement, so that an older Python can parse the file and print an error.
STEPS: dict[str, Callable[[argparse.Namespace], None]] = {
    "bake": lambda given: image_steps.bake(given.source_ami, given.source_owner, given.mlflow_version),
    "diff": lambda given: image_steps.diff(given.image, given.channel),
    "drill": lambda given: image_steps.drill(given.image, given.channel),
    "promote": lambda given: image_steps.promote(given.image, given.channel, given.drill),
    "preview": lambda given: stack_steps.preview(given.stack, given.plan),
    "deploy": lambda given: stack_steps.deploy(given.stack, given.plan),
    "smoke": smoke_test.smoke,
    "rollback": lambda given: stack_steps.rollback(given.stack, given.image),
    "drift": lambda given: stack_steps.drift(given.stack),
    "renew": lambda given: renewal.renew(given.channel, given.mlflow_version),
    "propose": lambda given: renewal.propose(given.version, given.passed == "True"),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="delivery.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    def step(name: str, help: str, *positional: str) -> argparse.ArgumentParser:
        made = steps.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        for each in positional:
            made.add_argument(each, metavar=each.upper(), type=given, help=MEANT[each])
        return made

    baking = step("bake", "bake the machine image on AWS, unless one has the same inputs")
    baking.add_argument("--source-ami", default="", metavar="IMAGE", help="as of bake.py")
    baking.add_argument("--source-owner", default="", metavar="ID", help="as of bake.py")
    baking.add_argument("--mlflow-version", default="", metavar="X", help="as of bake.py")
    step("diff", "show the changes from the channel's image to this one", "image", "channel")
    step("drill", "rehearse the change from the channel's image to this one and back", "image", "channel")
    promoting = step("promote", "set the channel to the image", "image", "channel")
    promoting.add_argument("--drill", default="", metavar="FILE", help="what `drill` wrote")
    plan = str(commands.RESULTS / "plan.json")
    for name, help in (
        ("preview", "preview the stack's next update, and save it as a plan"),
        ("deploy", "update the stack with the saved plan"),
    ):
        step(name, help, "stack").add_argument(
            "--plan", default=plan, metavar="FILE", help=f"the plan (default {plan})"
        )
    smoking = step("smoke", "wait for the server, then write, read back and delete with MLflow's client")
    connect.add_choice(smoking)
    smoking.add_argument("--wait", type=int, default=900, metavar="SECONDS", help="for its boot (default 900)")
    step("rollback", "pin an image and update the stack to it", "stack", "image")
    step("drift", "compare the stack with the repository; open an issue if they differ", "stack")
    renewing = step("renew", "lock, compare, bake and drill the newest MLflow", "channel")
    renewing.add_argument("--mlflow-version", default="", metavar="X", help="another release than the newest")
    proposing = step("propose", "open a pull request with the proposal of `renew`", "version")
    proposing.add_argument("--passed", default="", help="`True` if every step passed; otherwise it is a draft")
    return parser.parse_args(argv)


MEANT = {
    "image": "the image's ID",
    "channel": "a channel of scripts/images.py, such as staging",
    "stack": "a Pulumi stack of infra/, with its settings in infra/Pulumi.STACK.yaml",
    "version": "a release of MLflow",
}


def given(text: str) -> str:
    if not text or text.startswith("-"):
        raise argparse.ArgumentTypeError("it is empty: is the variable of the workflow set?")
    return text


if __name__ == "__main__":
    sys.exit(main())
