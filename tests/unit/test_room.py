"""The data volume's room: warned of at 90 %, refused at 97 %, taken again below 95 %, and each change told once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow_host import config, room, web
from mlflow_host.room import Room


@pytest.fixture
def look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[float], tuple[int, dict[str, object], list[str]]]:
    """Have the unit look at a volume that is so full; its exit status, what it publishes, nginx's reloads so far."""
    reloads: list[str] = []
    for folder in ("nginx", "web"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(config, "RUN", tmp_path)
    monkeypatch.setattr(web, "reload", lambda: reloads.append((tmp_path / "nginx/room.map").read_text()))

    def look(used: float) -> tuple[int, dict[str, object], list[str]]:
        monkeypatch.setattr(room, "measure", lambda folder: Room(used, 512))
        status = room.main()
        return status, json.loads((tmp_path / "web/room.json").read_text()), reloads

    return look


def test_a_volume_with_room_is_nothing_to_tell(
    look: Callable[[float], tuple[int, dict[str, object], list[str]]],
) -> None:
    status, told, reloads = look(89.9)
    assert status == 0
    assert told == {"used_percent": 89.9, "free_mib": 512, "refusing": False, "problem": ""}
    assert reloads == []


def test_a_filling_volume_fails_the_unit_and_says_what_to_do(
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


def test_a_volume_is_measured_as_those_see_it_who_are_not_root(tmp_path: Path) -> None:
    found = room.measure(tmp_path)
    assert 0 <= found.used <= 100
    assert found.free_mib > 0
