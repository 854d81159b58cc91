#!/usr/bin/env python3
"""The steps of the workflows in .github/workflows, one command each. They also work on your own machine.

From a commit to a promoted image:

  delivery.py bake                              bake the image, unless one has the same inputs
  delivery.py diff ami-… staging                the changes from the image that the channel names
  delivery.py drill ami-… staging               drill the change from that image's MLflow and back (needs root)
  delivery.py promote ami-… staging --drill build/delivery/drill.json

From a merge to production:

  delivery.py preview prod                      preview, and save it as the plan
  delivery.py deploy prod                       `pulumi up` within that plan
  delivery.py smoke --stack prod                MLflow's client writes, reads back and deletes
  delivery.py rollback prod ami-…               pin the image that ran before
  delivery.py drift prod                        open an issue if the stack was changed by hand

And from a release of MLflow to a pull request:

  delivery.py renew production                  test the newest MLflow, also against the channel's (needs root)
  delivery.py propose 3.19.0                    open a pull request with the proposal of `renew`

In a workflow a step sets outputs (GITHUB_OUTPUT), adds to the job's summary (GITHUB_STEP_SUMMARY) and writes
annotations for mistakes; on your own machine all of it is printed to standard error. An empty argument counts as left
out, so that a workflow can pass a variable that is not set. infra/README.md says how to set the workflows up.

Exit status 0: done; 1: a step failed or found drift; 2: refused, with one sentence; 130: interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - starts this script again with the project's packages

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


# Not `match`, so that a Python that is too old can parse the file and print an error.
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
        ("deploy", "update the stack within the plan"),
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
