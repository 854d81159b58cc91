"""The steps for a new release of MLflow. `renew` tests the release with follow.py, and with a drill that rehearses the
upgrade from the release in production. `propose` opens a pull request."""

from __future__ import annotations

import json
from pathlib import Path

from scripts import lock
from scripts.delivering import commands, github, image_steps
from scripts.delivering.commands import StepFailed, script, tool

LOCK = Path("provisioning/requirements.lock")
AUTHOR = ("-c", "user.name=github-actions[bot]", "-c", "user.email=github-actions[bot]@users.noreply.github.com")


def renew(channel: str, mlflow_version: str) -> None:
    """Test the newest release of MLflow: lock file, comparison with plain MLflow, bake and drill. The step needs root.

    The output `version` is empty if the lock file already names the newest release. The output `passed` is empty if a
    part of the test failed; the report page names the failed part.
    """
    try:
        locked = lock.locked_version(commands.REPOSITORY / LOCK, "mlflow")
        newest = mlflow_version or lock.newest_release()
    except lock.LockError as error:
        raise StepFailed(str(error), 2) from None
    if newest == locked:
        github.output(version=None, passed=None)
        github.summary(f"MLflow {locked} is the newest release and is already in the lock file.\n")
        return
    running = released(channel)  # read first, because the role's AWS session expires during the next steps
    steps = json.loads(
        script("follow.py", "--mlflow-version", newest, "--without-bench", "--json", accepted=(0, 1)) or "[]"
    )
    page = folder(newest) / "page.md"
    text = page.read_text(encoding="utf-8")
    passed = all(step["result"].startswith(("passed", "left")) for step in steps)
    if running and running not in (locked, newest) and passed:
        drilled = json.loads(script("drill.py", running, newest, "--json", accepted=(0, 1)))
        passed = not drilled["lost"]
        text += f"\n## Drill with {channel}'s release, {running}\n\n{image_steps.drilled(drilled)}\n"
        page.write_text(text, encoding="utf-8")
    github.output(version=newest, passed=passed)
    github.summary(text)


def propose(version: str, passed: bool) -> None:
    """Commit the proposal of follow.py to a branch. Then open a pull request, or update the open pull request.
    Idempotent.

    If `passed` is false, a new pull request is a draft. The output is `branch`."""
    patch, page, branch = folder(version) / "proposal.patch", folder(version) / "page.md", f"renew/mlflow-{version}"
    if not patch.exists():
        raise StepFailed(f"build/follow/{version} has no proposal: run `scripts/delivery.py renew` first", 2)
    base = tool("git", "rev-parse", "--abbrev-ref", "HEAD")
    tool("git", "switch", "--quiet", "--force-create", branch)
    tool("git", "apply", "--index", str(patch))
    tool("git", *AUTHOR, "commit", "--quiet", "--message", f"Renew MLflow to {version}\n\nProposed by follow.py.")
    tool("git", "push", "--force", "--quiet", "origin", branch)
    tool("git", "switch", "--quiet", base)
    body = github.shorten(page.read_text(encoding="utf-8"), 60_000)
    shown = page.with_name("body.md")
    shown.write_text(body, encoding="utf-8")
    known = tool("gh", "pr", "list", "--head", branch, "--json", "number", "--jq", ".[0].number")
    if known:
        tool("gh", "pr", "edit", known, "--body-file", str(shown))
    else:
        draft = () if passed else ("--draft",)
        named = ("--head", branch, "--base", base, "--title", f"Renew MLflow to {version}")
        tool("gh", "pr", "create", *named, "--body-file", str(shown), *draft)
    github.output(branch=branch)


def released(channel: str) -> str:
    """The MLflow release in the channel's image, or an empty text if the channel names no image."""
    found = json.loads(script("images.py", "list", "--json"))
    return next((image_steps.fact(each, "mlflow-version") for each in found if channel in each["channels"]), "")


def folder(version: str) -> Path:
    return commands.REPOSITORY / "build/follow" / version
