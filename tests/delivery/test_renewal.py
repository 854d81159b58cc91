"""Tests of the steps `renew` and `propose` with the command lines of renew.yml. The real git runs. Stand-ins replace gh
and this project's scripts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from scripts import lock
from scripts.delivering import commands
from tests.delivery.workflows import Runner, runner

LOCK = "mlflow==3.17.2 \\\n    --hash=sha256:00\n"
FOLLOW = """
import difflib, json, sys
from pathlib import Path
from scripts import follow
taken = follow.read_arguments(sys.argv[1:])
assert taken.without_bench and taken.json and not taken.without_machines
folder = Path("build/follow") / taken.mlflow_version
folder.mkdir(parents=True, exist_ok=True)
path = "provisioning/requirements.lock"
old = Path(path).read_text()
new = old.replace("3.17.2", taken.mlflow_version)
lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{path}", f"b/{path}")
(folder / "proposal.patch").write_text("".join(lines))
(folder / "page.md").write_text("# MLflow\\n")
failed = Path("fail").exists()
print(json.dumps([{"step": "bake", "result": "passed"}, {"step": "drill", "result": "exit 1" if failed else "passed"},
                  {"step": "bench", "result": "left out: --without-bench"}]))
sys.exit(1 if failed else 0)
"""
IMAGES = """
import json
print(json.dumps([{"channels": ["production"], "tags": {"mlflow-ami:mlflow-version": "RELEASE"}}]))
"""
DRILL = """
import json, sys
print(json.dumps({"lost": 0, "stops": []}))
print(sys.argv[1:], file=open("drilled", "w"))
"""


@pytest.fixture
def hosted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Create a runner whose repository locks MLflow 3.17.2. Production runs MLflow 3.17.2, and 3.19.0 is released."""
    checkout = tmp_path / "checkout"
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", "origin.git")
    git(tmp_path, "clone", "--quiet", "origin.git", "checkout")
    for name, text in (("follow.py", FOLLOW), ("images.py", IMAGES.replace("RELEASE", "3.17.2")), ("drill.py", DRILL)):
        path = checkout / "scripts" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (checkout / "provisioning").mkdir()
    (checkout / "provisioning/requirements.lock").write_text(LOCK)
    (checkout / ".gitignore").write_text("/build/\n")
    git(checkout, "switch", "--quiet", "--create", "main")
    git(checkout, "add", "--all")
    git(checkout, "-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "--quiet", "--message", "First")
    git(checkout, "push", "--quiet", "origin", "main")
    monkeypatch.setattr(commands, "REPOSITORY", checkout)
    monkeypatch.setattr(lock, "newest_release", lambda: "3.19.0")
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'provisioning/rootfs/usr/lib/mlflow-host'}")
    made = runner(tmp_path, monkeypatch)
    made.stand_in("gh", ("pr list", 0, ""))
    return made


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_newer_release_becomes_a_pull_request(hosted: Runner) -> None:
    found = hosted.take("renew", "renew")
    assert found == {"version": "3.19.0", "passed": "True"}
    assert "# MLflow" in hosted.summary
    proposed = hosted.take("renew", "propose", VERSION="3.19.0", PASSED=found["passed"])
    assert proposed == {"branch": "renew/mlflow-3.19.0"}
    origin = hosted.folder / "origin.git"
    assert "mlflow==3.19.0" in git(origin, "show", "renew/mlflow-3.19.0:provisioning/requirements.lock")
    assert git(origin, "log", "-1", "--format=%an %s", "renew/mlflow-3.19.0") == (
        "github-actions[bot] Renew MLflow to 3.19.0\n"
    )
    assert "mlflow==3.17.2" in git(origin, "show", "main:provisioning/requirements.lock")
    assert git(hosted.folder / "checkout", "rev-parse", "--abbrev-ref", "HEAD") == "main\n"
    call = hosted.calls("gh")[-1]
    assert call.startswith("pr create --head renew/mlflow-3.19.0 --base main --title Renew MLflow to 3.19.0")
    assert "--draft" not in call


def test_second_run_renews_the_pull_request(hosted: Runner) -> None:
    hosted.take("renew", "renew")
    hosted.take("renew", "propose", VERSION="3.19.0", PASSED="True")
    hosted.stand_in("gh", ("pr list", 0, "7\n"))
    hosted.take("renew", "propose", VERSION="3.19.0", PASSED="True")
    assert hosted.calls("gh")[-1].startswith("pr edit 7 --body-file")
    assert git(hosted.folder / "origin.git", "rev-list", "--count", "main..renew/mlflow-3.19.0") == "1\n"


def test_failed_step_makes_it_a_draft(hosted: Runner) -> None:
    (hosted.folder / "checkout/fail").touch()
    found = hosted.take("renew", "renew")
    assert found == {"version": "3.19.0", "passed": ""}
    hosted.take("renew", "propose", VERSION="3.19.0", PASSED=found["passed"])
    assert hosted.calls("gh")[-1].endswith("--draft")


def test_another_release_in_production_is_drilled_too(hosted: Runner) -> None:
    checkout = hosted.folder / "checkout"
    (checkout / "scripts/images.py").write_text(IMAGES.replace("RELEASE", "3.12.0"))
    hosted.take("renew", "renew")
    assert json.loads((checkout / "drilled").read_text().replace("'", '"')) == ["3.12.0", "3.19.0", "--json"]
    assert "## Drill with production's release, 3.12.0" in hosted.summary


def test_nothing_happens_when_the_newest_is_locked(hosted: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "newest_release", lambda: "3.17.2")
    assert hosted.take("renew", "renew") == {"version": "", "passed": ""}
    assert not (hosted.folder / "checkout/build").exists()
