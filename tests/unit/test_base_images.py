"""Making a source image takes minutes; its progress is logged."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.local_cloud import base_images


def test_each_stage_is_logged(tmp_path: Path) -> None:
    told: list[str] = []
    script = "echo 'I: running apt-get update...'; echo noise; sleep 1; echo 'I: extracting archives...' >&2; exit 3"
    assert base_images._mmdebstrap(["sh", "-c", script], tmp_path / "log", told.append) == 3
    assert [line.split(" s  ")[1] for line in told] == ["running apt-get update", "extracting archives"]
    assert "noise" in (tmp_path / "log").read_text()


def test_progress_is_logged_every_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_images, "TELL_SECONDS", 0.3)
    told: list[str] = []
    assert base_images._mmdebstrap(["sleep", "2"], tmp_path / "log", told.append) == 0
    assert told and "still running" in told[0]
