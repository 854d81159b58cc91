"""Timer `mlflow-host-room`: warns from 90 %, refuses writes from 97 % until below 95 %, and logs each change once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_host.machine import config, file_system, nginx
from mlflow_host.upkeep import disk_space
from mlflow_host.upkeep.disk_space import Room


@pytest.fixture
def look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[float], tuple[int, dict[str, object], list[str]]]:
    """Run the unit with a volume of that use: exit status, published report, reloads of nginx so far."""
    reloads: list[str] = []
    for folder in ("nginx", "web"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(config, "RUN", tmp_path)
    monkeypatch.setattr(file_system, "grow", lambda device: "")
    monkeypatch.setattr(nginx, "reload", lambda: reloads.append((tmp_path / "nginx/room.map").read_text()))

    def look(used: float) -> tuple[int, dict[str, object], list[str]]:
        monkeypatch.setattr(disk_space, "measure", lambda folder: Room(used, 512))
        status = disk_space.main()
        return status, json.loads((tmp_path / "web/room.json").read_text()), reloads

    return look


def test_volume_with_room_is_not_reported(
    look: Callable[[float], tuple[int, dict[str, object], list[str]]],
) -> None:
    status, told, reloads = look(89.9)
    assert status == 0
    assert told == {"used_percent": 89.9, "free_mib": 512, "refusing": False, "problem": ""}
    assert reloads == []


def test_filling_volume_fails_the_unit_with_the_remedy(
    look: Callable[[float], tuple[int, dict[str, object], list[str]]],
) -> None:
    status, told, reloads = look(90.0)
    assert status == 2
    assert "90 % full (512 MiB left)" in str(told["problem"])
    assert "dataVolumeGib" in str(told["problem"])
    assert reloads == []


def test_writes_are_refused_from_97_to_below_95(
    look: Callable[[float], tuple[int, dict[str, object], list[str]]],
) -> None:
    refused = [bool(look(used)[1]["refusing"]) for used in (96.9, 97.0, 96.0, 95.0, 94.9, 96.9)]
    assert refused == [False, True, True, True, False, False]
    assert look(96.9)[2] == ["default 1;\n", "default 0;\n"]


def test_file_system_that_cannot_be_grown_fails_the_unit(
    look: Callable[[float], tuple[int, dict[str, object], list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_system, "grow", lambda device: f"{device.name} was not grown")
    status, told, _ = look(50.0)
    assert (status, told["problem"], told["refusing"]) == (2, "data-volume was not grown", False)
    assert str(look(98.0)[1]["problem"]).startswith("data-volume was not grown; the data volume is 98 % full")


def test_free_space_excludes_roots_reserve(tmp_path: Path) -> None:
    found = disk_space.measure(tmp_path)
    assert 0 <= found.used <= 100
    assert found.free_mib > 0
