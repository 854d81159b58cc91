"""The steps that read or change a stack of infra/: preview, deploy, rollback, drift."""

from __future__ import annotations

import re

from scripts import pulumi_stack
from scripts.delivering import commands, github
from scripts.delivering.commands import StepFailed, pulumi, tool

COMMENT_LIMIT = 60_000
"""Maximum number of characters. GitHub refuses a comment of more than 65,536 characters."""
DRIFTED = "no changes were expected"
"""Part of the error message that Pulumi prints if a preview with --expect-no-changes finds changes."""


def preview(stack: str, plan: str) -> None:
    """Run `pulumi preview` and save the plan. Write the preview to the job's summary and, for a pull request, to a
    comment. Print mistakes as annotations."""
    file = commands.REPOSITORY / plan
    file.parent.mkdir(parents=True, exist_ok=True)
    status, text = pulumi("preview", "--diff", "--save-plan", str(file), stack=stack)
    head = f"## Preview of `{stack}`" + (": refused" if status else "")
    body = f"{head}\n\n{github.fenced(github.shorten(text, COMMENT_LIMIT), 'diff')}\n"
    github.summary(body)
    mark_mistakes(stack, text)
    if number := github.pull_request():
        comment(number, body)
    if status:
        raise StepFailed(f"the preview of {stack} was refused; nothing was changed", 2)


def deploy(stack: str, plan: str) -> None:
    """Run `pulumi up` with the saved plan. The output `previous` is the image before the update, or empty for a new
    stack.

    Raises StepFailed if the update needs a change that is not in the plan; then run the step `preview` again.
    """
    github.output(previous=running_image(stack))
    status, text = pulumi("up", "--yes", "--skip-preview", "--plan", str(commands.REPOSITORY / plan), stack=stack)
    github.summary(f"## Update of `{stack}`{': failed' if status else ''}\n\n{github.fenced(text)}\n")
    mark_mistakes(stack, text)
    if status:
        raise StepFailed(f"the update of {stack} failed (exit status {status})")


def rollback(stack: str, image: str) -> None:
    """Set `amiId` to the image, and update the stack. All other settings stay as in the commit. At boot, the data is
    carried back to the schema of this image."""
    must(stack, "config", "set", "amiId", image)
    must(stack, "config", "rm", "channel")
    status, text = pulumi("up", "--yes", "--skip-preview", stack=stack)
    github.summary(f"## Rollback of `{stack}` to {image}{': failed' if status else ''}\n\n{github.fenced(text)}\n")
    if status:
        raise StepFailed(f"the rollback of {stack} to {image} failed (exit status {status}): the server may be down")
    github.annotate(
        "warning",
        f"{stack} runs {image} again, but the repository names another image: set amiId to {image} and remove channel "
        f"in infra/Pulumi.{stack}.yaml, or the next deployment repeats the failed update",
        f"infra/Pulumi.{stack}.yaml",
    )


def drift(stack: str) -> None:
    """If the stack differs from the repository, open an issue or add a comment to the open issue, and raise
    StepFailed."""
    status, text = pulumi("preview", "--refresh", "--expect-no-changes", "--diff", stack=stack)
    if not status:
        github.summary(f"`{stack}` is as the repository describes it.\n")
        return
    title = f"Drift of {stack}"
    github.summary(f"## {title}\n\n{github.fenced(text, 'diff')}\n")
    if DRIFTED not in text:
        mark_mistakes(stack, text)
        raise StepFailed(f"the preview of {stack} failed, so nothing is known about drift")
    body = f"{github.run_address()}\n\n{github.fenced(github.shorten(text, COMMENT_LIMIT), 'diff')}\n"
    known = tool("gh", "issue", "list", "--search", f'"{title}" in:title', "--json", "number", "--jq", ".[0].number")
    if known:
        tool("gh", "issue", "comment", known, "--body", body)
    else:
        tool("gh", "issue", "create", "--title", title, "--body", body)
    raise StepFailed(f"{stack} differs from the repository; the issue {title!r} has the difference")


def running_image(stack: str) -> str:
    """The image of the stack's last update, or an empty text if the stack was never launched. Raises StepFailed."""
    try:
        return str(pulumi_stack.run("stack", "output", "--json", stack=stack).get("amiId", ""))
    except pulumi_stack.PulumiError as error:
        raise StepFailed(str(error), 2) from None


def must(stack: str, *arguments: str) -> None:
    """Run a Pulumi command. Raises StepFailed if the command fails."""
    status, text = pulumi(*arguments, stack=stack)
    if status:
        raise StepFailed(f"pulumi {' '.join(arguments)} failed: {text}")


def comment(number: int, body: str) -> None:
    """Write a preview as a comment on a pull request. A new preview replaces the comment of the previous preview."""
    tool("gh", "pr", "comment", str(number), "--edit-last", "--create-if-none", "--body", body)


def mark_mistakes(stack: str, text: str) -> None:
    """Print an annotation for each error and warning in Pulumi's output. The annotation is shown at the line of the
    setting that the error or warning names."""
    settings = commands.REPOSITORY / f"infra/Pulumi.{stack}.yaml"
    lines = settings.read_text(encoding="utf-8").splitlines() if settings.exists() else []
    for level, sentence in dict.fromkeys(mistakes(text)):
        key = sentence.partition(":")[0]
        at = next(
            (n for n, line in enumerate(lines, start=1) if re.match(rf"\s*mlflow-ami:{re.escape(key)}:", line)), 0
        )
        github.annotate(level, sentence, f"infra/{settings.name}" if at else "", at)


def mistakes(text: str) -> list[tuple[str, str]]:
    """The level (error or warning) and the sentence of each diagnostic in Pulumi's output. If the Pulumi program prints
    a list of mistakes, each entry of the list counts as one diagnostic."""
    found, listing = [], False
    for line in text.splitlines():
        if listing and (item := re.match(r"\s+- (.+)", line)):
            found.append(("error", item[1]))
            continue
        listing = False
        if not (diagnostic := re.match(r"\s*(error|warning): (.+)", line)):
            continue
        listing = diagnostic[2].endswith("nothing was changed:")
        if not listing and "an unhandled error occurred" not in diagnostic[2]:
            found.append((diagnostic[1], diagnostic[2]))
    return found
