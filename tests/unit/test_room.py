"""The timer `mlflow-host-room` warns if the volume is 90 % full. From 97 %, the timer makes the server refuse writes
until the volume is less than 95 % full. Each change is logged once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_host.machine import config, file_system
from mlflow_host.upkeep import disk_space
from mlflow_host.upkeep.disk_space import Room


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], tuple[int, dict[str, object]]]:
    """Return a function that runs the unit with a given use of the volume, and returns exit status and report."""
    for folder in ("nginx", "web"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(config, "RUN", tmp_path)
    monkeypatch.setattr(file_system, "grow", lambda device: "")

    def look(used: float) -> tuple[int, dict[str, object]]:
        monkeypatch.setattr(disk_space, "measure", lambda folder: Room(used, 512))
        status = disk_space.main()
        return status, json.loads((tmp_path / "web/room.json").read_text())

    return look


def test_volume_with_room_is_not_reported(
    look: Callable[[float], tuple[int, dict[str, object]]],
) -> None:
    status, told = look(89.9)
    assert status == 0
    assert told == {"used_percent": 89.9, "free_mib": 512, "refusing": False, "problem": ""}


def test_filling_volume_fails_the_unit_with_the_remedy(
    look: Callable[[float], tuple[int, dict[str, object]]],
) -> None:
    status, told = look(90.0)
    assert status == 2
    assert "90 % full (512 MiB left)" in str(told["problem"])
    assert "dataVolumeGib" in str(told["problem"])


def test_writes_are_refused_from_97_to_below_95(
    look: Callable[[float], tuple[int, dict[str, object]]], tmp_path: Path
) -> None:
    for used, refused in ((96.9, False), (97.0, True), (96.0, True), (95.0, True), (94.9, False), (96.9, False)):
        assert look(used)[1]["refusing"] == (tmp_path / "nginx/volume-full").exists() == refused


def test_file_system_that_cannot_be_grown_fails_the_unit(
    look: Callable[[float], tuple[int, dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_system, "grow", lambda device: f"{device.name} was not grown")
    status, told = look(50.0)
    assert (status, told["problem"], told["refusing"]) == (2, "data-volume was not grown", False)
    assert str(look(98.0)[1]["problem"]).startswith("data-volume was not grown; the data volume is 98 % full")


def test_free_space_excludes_roots_reserve(tmp_path: Path) -> None:
    found = disk_space.measure(tmp_path)
    assert 0 <= found.used <= 100
    assert found.free_mib > 0
