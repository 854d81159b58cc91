"""prepare_tools.py builds only missing tools. A stand-in replaces `go` in these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import prepare_tools
from scripts.prepare_tools import ACTIONLINT, AMAZON, PACKER, PULUMI, ToolsMissing

GO = """#!/bin/sh
echo "$*" >>"$(dirname "$0")/calls"
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo built >"$2"; shift; done
"""


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a stand-in for `go` on PATH, which creates the requested output file. Tools are built below `tmp_path`."""
    program = tmp_path / "path/go"
    program.parent.mkdir()
    program.write_text(GO)
    program.chmod(0o755)
    monkeypatch.setattr(prepare_tools, "BIN", tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr(prepare_tools, "elsewhere", lambda name: None)
    monkeypatch.setattr(prepare_tools, "install_language_host", lambda go: None)
    monkeypatch.setattr(prepare_tools, "install_plugin", lambda: None)
    return program


def test_a_second_run_builds_nothing(go: Path) -> None:
    assert prepare_tools.missing() == [PULUMI, PACKER, AMAZON, ACTIONLINT]
    prepare_tools.prepare(prepare_tools.missing())
    assert prepare_tools.missing() == []
    calls = (go.parent / "calls").read_text()
    prepare_tools.prepare(prepare_tools.missing())
    assert (go.parent / "calls").read_text() == calls
    assert calls.count("build ") == 4


def test_a_plug_in_that_was_built_but_not_installed_is_missing(go: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ToolsMissing("packer does not accept the plug-in that was built")

    monkeypatch.setattr(prepare_tools, "install_plugin", refuse)
    with pytest.raises(ToolsMissing):
        prepare_tools.prepare(prepare_tools.missing())
    assert prepare_tools.missing() == [AMAZON, ACTIONLINT]


def test_without_go_the_vendors_ways_are_named(go: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go.unlink()
    with pytest.raises(ToolsMissing, match=r"get\.pulumi\.com"):
        prepare_tools.prepare([PULUMI])
