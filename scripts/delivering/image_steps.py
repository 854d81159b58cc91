"""The steps from a commit to a promoted image: bake, diff, drill and promote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.delivering import github
from scripts.delivering.commands import StepFailed, keep, script

TAG = "mlflow-ami:"


def bake(source_ami: str, source_owner: str, mlflow_version: str) -> None:
    """Bake the image. The outputs are `image`, `mlflow_version` and `sbom`. `sbom` is empty if no bake was needed."""
    options = {"--source-ami": source_ami, "--source-owner": source_owner, "--mlflow-version": mlflow_version}
    given = [word for name, value in options.items() if value for word in (name, value)]
    baked = json.loads(script("bake.py", "--if-changed", "--json", *given))
    facts, sbom = baked["facts"], None
    if baked["log"] and (bill := Path(baked["log"]).with_name("sbom.cdx.json")).exists():
        sbom = keep(bill.name, bill.read_bytes())
    github.output(image=baked["ami_id"], mlflow_version=facts["mlflow_version"], sbom=sbom)
    head = f"## {baked['ami_id']}: MLflow {facts['mlflow_version']}"
    head += ", made before from the same inputs" if baked["reused"] else f", baked in {baked['seconds']:.0f} s"
    rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in sorted(facts.items()) if ":" not in name]
    github.summary("\n".join([head, "", "| fact | |", "|---|---|", *rows, ""]))


def diff(image: str, channel: str) -> None:
    """Compare this image with the channel's image, and write the changes into the job's summary."""
    _, held = ends(image, channel)
    if held is None:
        github.annotate("notice", f"the channel {channel} names no image yet, so there is no image to compare")
        return
    text = script("images.py", "diff", held["id"], image)
    github.summary(f"## {held['id']} ({channel}) → {image}\n\n{github.fenced(text)}\n")


def drill(image: str, channel: str) -> None:
    """Rehearse the upgrade from the MLflow release of the channel's image to the release of this image, and the
    rollback. The step needs root.

    The output `drill` is the path of the drill's report, which the step `promote` reads. No drill runs, and the output
    is empty, if the channel names no image or this image, or if the two images have already passed a drill.
    """
    new, held = ends(image, channel)
    if held is None or held["id"] == new["id"] or held["version"] in new["drills"] or new["version"] in held["drills"]:
        github.annotate("notice", f"no drill is needed between {image} and the image of the channel {channel}")
        github.output(drill=None)
        return
    base = fact(new, "os").replace(" ", "")
    text = script("drill.py", fact(held, "mlflow-version"), fact(new, "mlflow-version"), "--base", base, "--json")
    github.output(drill=keep("drill.json", text.encode()))
    github.summary(f"## Drill against {channel}\n\n{drilled(json.loads(text))}\n")


def promote(image: str, channel: str, drill: str) -> None:
    """Set the channel to the image. The output `promoted` is the image that the channel names after this step."""
    done = json.loads(script("images.py", "promote", image, channel, *(("--drill", drill) if drill else ()), "--json"))
    github.output(promoted=done["image"])
    before = f", instead of {done['before']}" if done["changed"] and done["before"] else ""
    github.summary(f"The channel `{channel}` of {done['region']} names {done['image']}{before}.\n")


def ends(image: str, channel: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """This image and the channel's image, in the form of `images.py list --json`. Raises StepFailed."""
    found = json.loads(script("images.py", "list", "--json"))
    new = next((each for each in found if each["id"] == image), None)
    if new is None:
        raise StepFailed(f"the region has no image {image} of this project: scripts/images.py list prints all", 2)
    return new, next((each for each in found if channel in each["channels"]), None)


def fact(image: dict[str, Any], name: str) -> str:
    return str(image["tags"].get(TAG + name, "?"))


def drilled(found: dict[str, Any]) -> str:
    """The result table of a drill in Markdown."""
    names = ("mlflow_version", "written", "compared", "values", "missing", "changed", "waiting", "outage_seconds")
    rows = [[str(number), *(str(stop[name]) for name in names)] for number, stop in enumerate(found["stops"], start=1)]
    head = ["stop", *(name.replace("_", " ") for name in names)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
