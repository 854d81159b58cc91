"""Tests of the steps `bake`, `diff`, `drill` and `promote` with the command lines of bake.yml. The real images.py runs
with moto's EC2 and Systems Manager.

Both bake.py and drill.py need a machine, so stand-ins replace these scripts. The stand-ins accept the arguments of the
real scripts, and print documents that functions of the real scripts created.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.baking import report
from scripts.baking.report import StepClock
from scripts.delivering import commands
from scripts.drill import Stop
from scripts.imaging import comparing, ec2_images, record
from scripts.imaging.ec2_images import Place
from tests.delivery.workflows import ROOT, Runner, runner
from tests.support.moto_cloud import MotoCloud, moto_cloud, register_image

BAKE = """
import sys
from pathlib import Path
from scripts import bake
assert bake.parse(sys.argv[1:]).if_changed
print((Path(__file__).parent / "bake.json").read_text())
"""
DRILL = """
import json, sys
from pathlib import Path
from scripts import drill
taken, found = drill.read_arguments(sys.argv[1:]), json.loads((Path(__file__).parent / "drill.json").read_text())
assert [taken.older, taken.newer] == [found[end]["mlflow_version"] for end in ("older", "newer")]
assert (taken.base, taken.json) == ("ubuntu24.04", True)
print(json.dumps(found))
sys.exit(1 if found["lost"] else 0)
"""
FACTS: dict[str, Any] = {
    "packages": {"deb": {"nginx": "1.24"}, "python": {"mlflow": "3.19.0"}},
    "tables": {"runs": ["run_uuid"]},
    "migrations": [{"revision": "a", "title": "first"}],
}


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[MotoCloud]:
    """Start an empty AWS account in moto. OSV is unreachable."""
    with moto_cloud() as made:
        for name, value in made.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        yield made


@pytest.fixture
def hosted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Create a runner whose checkout has the real images.py, and stand-ins for bake.py and drill.py."""
    scripts = tmp_path / "checkout/scripts"
    scripts.mkdir(parents=True)
    for name, text in (("bake.py", BAKE), ("drill.py", DRILL)):
        (scripts / name).write_text(text)
    (scripts / "images.py").symlink_to(ROOT / "scripts/images.py")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'provisioning/rootfs/usr/lib/mlflow-host'}")
    monkeypatch.setattr(commands, "REPOSITORY", tmp_path / "checkout")
    return runner(tmp_path, monkeypatch)


def place(cloud: MotoCloud) -> Place:
    return Place(cloud.region, cloud.client)


def make(cloud: MotoCloud, version: str, mlflow: str) -> ec2_images.Image:
    """Register a finished image on Ubuntu with its record."""
    facts = {"mlflow_version": mlflow, "os": "ubuntu 24.04", "postgresql_major": "16", "migration_head": f"h{mlflow}"}
    facts["git_dirty"] = "false"
    ami = register_image(cloud, version, **facts)
    record.write(cloud.client("ssm"), {**FACTS, **facts, "image_version": version})
    return next(each for each in ec2_images.find(cloud.client("ec2")) if each.id == ami)


def baked(hosted: Runner, image: ec2_images.Image, *, log: Path | None) -> None:
    """Set the output of the stand-in for bake.py: a document in the format of the real bake.py."""
    arguments = argparse.Namespace(region="eu-central-1", local=False)
    document = report.result(image, arguments, StepClock(), log=log, reused=log is None)
    document.pop("report")
    (hosted.folder / "checkout/scripts/bake.json").write_text(json.dumps(document))


def drilled(hosted: Runner, older: ec2_images.Image, newer: ec2_images.Image, *, lost: int = 0) -> None:
    """Set the output of the stand-in for drill.py: a document in the format of the real drill.py."""
    stop = Stop(newer.id, newer.fact("mlflow-version"), "migrated", 27, 1650, lost, 0, 0, 33, 43.0, ())
    ends = {"older": comparing.about(older), "newer": comparing.about(newer)}
    document = {"lost": lost, "at": "2026-11-29T20:00:00Z", **ends, "stops": [dataclasses.asdict(stop)]}
    (hosted.folder / "checkout/scripts/drill.json").write_text(json.dumps(document))


def channel(cloud: MotoCloud) -> str | None:
    from scripts.imaging import channels

    return channels.read(cloud.client("ssm")).get("staging")


def test_first_image_is_baked_and_promoted_without_a_drill(
    cloud: MotoCloud, hosted: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    image = make(cloud, "20261129T150000Z", "3.19.0")
    build = hosted.folder / "bake-log"
    build.mkdir()
    (build / "sbom.cdx.json").write_text('{"bomFormat": "CycloneDX"}')
    baked(hosted, image, log=build / "bake.log")
    found = hosted.take("bake", "bake", SOURCE_AMI="", SOURCE_OWNER="")
    assert found == {"image": image.id, "mlflow_version": "3.19.0", "sbom": "build/delivery/sbom.cdx.json"}
    assert (hosted.folder / "checkout" / found["sbom"]).read_text() == '{"bomFormat": "CycloneDX"}'
    assert f"## {image.id}: MLflow 3.19.0, baked in" in hosted.summary
    assert "| postgresql major | 16 |" in hosted.summary
    hosted.take("bake", "diff", IMAGE=image.id, CHANNEL="staging")
    assert hosted.take("bake", "drill", IMAGE=image.id, CHANNEL="staging") == {"drill": ""}
    assert capsys.readouterr().out.count("::notice::") == 2
    assert hosted.take("bake", "promote", IMAGE=image.id, CHANNEL="staging", DRILL="") == {"promoted": image.id}
    assert channel(cloud) == image.id


def test_next_image_is_compared_drilled_and_promoted(cloud: MotoCloud, hosted: Runner) -> None:
    old = make(cloud, "20261101T150000Z", "3.18.0")
    hosted.take("bake", "promote", IMAGE=old.id, CHANNEL="staging", DRILL="")
    new = make(cloud, "20261129T150000Z", "3.19.0")
    baked(hosted, new, log=None)
    assert hosted.take("bake", "bake", SOURCE_AMI="", SOURCE_OWNER="")["sbom"] == ""
    assert "made before from the same inputs" in hosted.summary
    hosted.take("bake", "diff", IMAGE=new.id, CHANNEL="staging")
    assert f"## {old.id} (staging) → {new.id}" in hosted.summary and "3.18.0 → 3.19.0" in hosted.summary
    drilled(hosted, old, new)
    drill = hosted.take("bake", "drill", IMAGE=new.id, CHANNEL="staging")["drill"]
    assert "| 1 | 3.19.0 | 33 | 27 | 1650 | 0 | 0 | 0 | 43.0 |" in hosted.summary
    assert hosted.take("bake", "promote", IMAGE=new.id, CHANNEL="staging", DRILL=drill) == {"promoted": new.id}
    assert channel(cloud) == new.id
    assert f"names {new.id}, instead of {old.id}." in hosted.summary
    assert hosted.take("bake", "drill", IMAGE=new.id, CHANNEL="staging") == {"drill": ""}, (
        "it is what the channel names"
    )
    hosted.take("bake", "promote", IMAGE=new.id, CHANNEL="staging", DRILL="")


def test_promotion_without_a_drill_is_an_annotation_with_the_remedy(
    cloud: MotoCloud, hosted: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = make(cloud, "20261101T150000Z", "3.18.0"), make(cloud, "20261129T150000Z", "3.19.0")
    hosted.take("bake", "promote", IMAGE=old.id, CHANNEL="staging", DRILL="")
    hosted.take("bake", "promote", status=2, IMAGE=new.id, CHANNEL="staging", DRILL="")
    assert f"::error::scripts/images.py ended with 2: images: no drill between {old.id}" in capsys.readouterr().out
    assert channel(cloud) == old.id


def test_failed_drill_ends_the_job(cloud: MotoCloud, hosted: Runner) -> None:
    old, new = make(cloud, "20261101T150000Z", "3.18.0"), make(cloud, "20261129T150000Z", "3.19.0")
    hosted.take("bake", "promote", IMAGE=old.id, CHANNEL="staging", DRILL="")
    drilled(hosted, old, new, lost=2)
    assert hosted.take("bake", "drill", status=1, IMAGE=new.id, CHANNEL="staging") == {}


def test_unknown_image_is_refused(cloud: MotoCloud, hosted: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    hosted.take("bake", "diff", status=2, IMAGE="ami-0123456789abcdef0", CHANNEL="staging")
    assert "::error::the region has no image ami-0123456789abcdef0" in capsys.readouterr().out


def test_source_image_is_passed_on(hosted: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    script = hosted.folder / "checkout/scripts/bake.py"
    script.write_text("import sys\nprint(' '.join(sys.argv[1:]), file=sys.stderr)\nsys.exit(2)")
    hosted.take("bake", "bake", status=2, SOURCE_AMI="debian-12-amd64-*", SOURCE_OWNER="136693071363")
    assert "--if-changed --json --source-ami debian-12-amd64-* --source-owner 136693071363" in capsys.readouterr().out
