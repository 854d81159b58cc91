"""The software bill of materials lists every package of the image under its name in vulnerability databases."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

STEP = Path(__file__).parents[2] / "provisioning" / "steps" / "record_facts.py"
IMAGE = {
    "image_version": "20261122T101500Z",
    "git_commit": "0" * 40,
    "os": "debian 12",
    "packages": {
        "deb": {"nginx-light": "1.22.1-9+deb12u3", "libstdc++6": "1:12.2.0-14", "zstd": "1.5.4"},
        "python": {"mlflow": "3.17.2"},
    },
}
SOURCES = {
    "nginx-light": ("nginx", "1.22.1-9+deb12u3"),
    "libstdc++6": ("gcc-12", "12.2.0-14"),
    "zstd": ("zstd", "1.5.4"),
}


@pytest.fixture(scope="module")
def bill() -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("record_facts", STEP)
    assert spec and spec.loader
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    made: dict[str, Any] = step.bill_of_materials(IMAGE, SOURCES)
    return made


def test_package_urls_match_vulnerability_databases(bill: dict[str, Any]) -> None:
    """The Package URL specification requires percent-encoding for the colon of an epoch and for plus signs. A package
    URL contains the source package if the source package has another name or version."""
    assert [each["purl"] for each in bill["components"]] == [
        "pkg:deb/debian/nginx-light@1.22.1-9%2Bdeb12u3?distro=debian-12&upstream=nginx",
        "pkg:deb/debian/libstdc%2B%2B6@1%3A12.2.0-14?distro=debian-12&upstream=gcc-12%4012.2.0-14",
        "pkg:deb/debian/zstd@1.5.4?distro=debian-12",
        "pkg:pypi/mlflow@3.17.2",
    ]
    assert len({each["bom-ref"] for each in bill["components"]}) == 4


def test_document_is_cyclonedx(bill: dict[str, Any]) -> None:
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.5", 1)
    assert bill["metadata"]["component"]["version"] == "20261122T101500Z"
    assert all(set(each) == {"type", "bom-ref", "name", "version", "purl"} for each in bill["components"])
    assert json.loads(json.dumps(bill)) == bill
