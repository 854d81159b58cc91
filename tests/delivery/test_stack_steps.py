"""Tests of the steps `preview`, `deploy`, `rollback` and `drift` with stand-ins for pulumi and gh.

tests/delivery/test_with_pulumi.py tests these steps with the real Pulumi.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from scripts import delivery
from scripts.delivering import commands, github, stack_steps
from settings import as_sentences
from tests.delivery.workflows import ROOT, Runner, runner

IMAGE = "ami-0123456789abcdef0"
MISTAKES = as_sentences(["allowedCidrs: '[\"everybody\"]' has 'everybody'", f"amiId: there is no image {IMAGE}"])
DIAGNOSTICS = "\n".join(f"    {line}" for line in f"error: {MISTAKES}".splitlines())
REFUSED = f"""Previewing update (prod):
Diagnostics:
  pulumi:pulumi:Stack (mlflow-ami-prod):
    warning: allowedCidrs has 0.0.0.0/0: the login is open to the whole internet.
{DIAGNOSTICS}
    error: an unhandled error occurred: program exited with non-zero exit code: 1
"""
OUTPUTS = json.dumps({"amiId": "ami-0fedcba9876543210"})
DRIFT = "  ~ aws:ec2:SecurityGroup server update\nerror: no changes were expected but changes were proposed\n"


@pytest.fixture
def hosted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    infra = tmp_path / "checkout/infra"
    infra.mkdir(parents=True)
    (infra / "Pulumi.prod.yaml").write_text(f"config:\n  aws:region: eu-central-1\n  mlflow-ami:amiId: {IMAGE}\n")
    monkeypatch.setattr(commands, "REPOSITORY", tmp_path / "checkout")
    return runner(tmp_path, monkeypatch)


def pull_request(hosted: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    event = hosted.folder / "event.json"
    event.write_text(json.dumps({"action": "synchronize", "number": 7, "pull_request": {"number": 7}}))
    monkeypatch.setenv("GITHUB_EVENT_PATH", str(event))


def test_preview_is_summary_and_comment(hosted: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    pull_request(hosted, monkeypatch)
    hosted.stand_in("pulumi", ("preview", 0, "Resources:\n    ~ 1 to update\n"))
    hosted.stand_in("gh", ("", 0, ""))
    hosted.take("preview", "preview", STACK="prod")
    [call] = hosted.calls("pulumi")
    plan = hosted.folder / "checkout/build/delivery/plan.json"
    assert call == f"preview --diff --save-plan {plan} --non-interactive --color never --stack prod"
    assert "## Preview of `prod`" in hosted.summary and "~ 1 to update" in hosted.summary
    [comment] = hosted.calls("gh")
    assert comment.startswith("pr comment 7 --edit-last --create-if-none --body ## Preview of `prod`")


def test_mistakes_are_annotations_at_the_line_of_the_setting(
    hosted: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pull_request(hosted, monkeypatch)
    hosted.stand_in("pulumi", ("preview", 255, REFUSED))
    hosted.stand_in("gh", ("", 0, ""))
    hosted.take("preview", "preview", status=2, STACK="prod")
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "::warning::allowedCidrs has 0.0.0.0/0: the login is open to the whole internet.",
        "::error::allowedCidrs: '[\"everybody\"]' has 'everybody'",
        f"::error file=infra/Pulumi.prod.yaml,line=3::amiId: there is no image {IMAGE}",
        "::error::the preview of prod was refused; nothing was changed",
    ]
    assert "## Preview of `prod`: refused" in "".join(hosted.calls("gh"))


def test_one_mistake_and_pulumis_own_error_are_annotations() -> None:
    one = f"    error: {as_sentences(['amiId is missing'])}\n"
    assert stack_steps.mistakes(one) == [("error", "amiId is missing")]
    own = "error: Stack 'prod' with configuration key 'dataVolumeGib' must be of type 'integer'\n - of an update\n"
    assert stack_steps.mistakes(own) == [("error", own.splitlines()[0].removeprefix("error: "))]


def test_deploy_stays_within_the_plan_and_outputs_the_previous_image(hosted: Runner) -> None:
    hosted.stand_in("pulumi", ("stack output", 0, OUTPUTS), ("up", 0, "Resources:\n    +-3 replaced\n"))
    options = "--non-interactive --color never --stack prod"
    plan = hosted.folder / "checkout/build/delivery/plan.json"
    assert hosted.take("deploy", "deploy", STACK="prod") == {"previous": "ami-0fedcba9876543210"}
    assert hosted.calls("pulumi") == [
        "stack output --json --stack prod",
        f"up --yes --skip-preview --plan {plan} {options}",
    ]
    assert "+-3 replaced" in hosted.summary


def test_previous_image_is_output_when_the_update_fails(hosted: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    hosted.stand_in("pulumi", ("stack output", 0, OUTPUTS), ("up", 255, "error: resource violates plan: x\n"))
    assert hosted.take("deploy", "deploy", status=1, STACK="prod") == {"previous": "ami-0fedcba9876543210"}
    assert "::error::resource violates plan: x" in capsys.readouterr().out


def test_new_stack_has_nothing_to_roll_back_to(hosted: Runner) -> None:
    hosted.stand_in("pulumi", ("stack output", 0, "{}"), ("up", 0, ""))
    assert hosted.take("deploy", "deploy", STACK="prod") == {"previous": ""}


def test_rollback_pins_the_image_and_warns_that_the_repository_differs(
    hosted: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    hosted.stand_in("pulumi", ("", 0, ""))
    hosted.take("deploy", "rollback", STACK="prod", PREVIOUS=IMAGE)
    calls = [each.partition(" --non-interactive")[0] for each in hosted.calls("pulumi")]
    assert calls == [f"config set amiId {IMAGE}", "config rm channel", "up --yes --skip-preview"]
    assert f"::warning file=infra/Pulumi.prod.yaml::prod runs {IMAGE} again" in capsys.readouterr().out


def test_failed_rollback_is_an_error(hosted: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    hosted.stand_in("pulumi", ("config", 0, ""), ("up", 255, "error: no\n"))
    hosted.take("deploy", "rollback", status=1, STACK="prod", PREVIOUS=IMAGE)
    assert "the server may be down" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("known", "call"), [("", "issue create --title Drift of prod"), ("12\n", "issue comment 12 --body")]
)
def test_drift_opens_one_issue(hosted: Runner, monkeypatch: pytest.MonkeyPatch, known: str, call: str) -> None:
    for name, value in (("SERVER_URL", "https://github.com"), ("REPOSITORY", "example/mlflow-ami"), ("RUN_ID", "42")):
        monkeypatch.setenv(f"GITHUB_{name}", value)
    hosted.stand_in("pulumi", ("preview --refresh --expect-no-changes", 255, DRIFT))
    hosted.stand_in("gh", ("issue list", 0, known))
    hosted.take("drift", "drift", status=1, STACK="prod")
    last = hosted.calls("gh")[-1]
    assert last.startswith(call)
    assert "https://github.com/example/mlflow-ami/actions/runs/42" in last and "SecurityGroup server update" in last


def test_no_drift_opens_no_issue(hosted: Runner) -> None:
    hosted.stand_in("pulumi", ("preview", 0, "Resources:\n    48 unchanged\n"))
    hosted.take("drift", "drift", STACK="prod")
    assert "is as the repository describes it" in hosted.summary and hosted.calls("gh") == []


def test_preview_that_fails_is_not_taken_for_drift(hosted: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    hosted.stand_in("pulumi", ("preview", 255, "error: there are no AWS credentials\n"))
    hosted.take("drift", "drift", status=1, STACK="prod")
    said = capsys.readouterr().out
    assert "::error::there are no AWS credentials" in said and "nothing is known about drift" in said
    assert hosted.calls("gh") == []


def test_text_of_an_annotation_cannot_add_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    github.annotate("error", "100 %\n::set-env name=PATH::/tmp", "a,b:c", 3)
    assert capsys.readouterr().out == "::error file=a%2Cb%3Ac,line=3::100 %25%0A::set-env name=PATH::/tmp\n"


def test_output_of_two_lines_is_a_fault() -> None:
    with pytest.raises(ValueError, match="more than one line"):
        github.output(image="ami-1\nother=1")


def test_comment_fits_and_keeps_its_end() -> None:
    text = github.shorten("a" * 70_000 + "Resources: 48 unchanged", 60_000)
    assert len(text) <= 60_000 and text.endswith("Resources: 48 unchanged")


def test_at_a_desk_all_is_printed_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("GITHUB_ACTIONS", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_EVENT_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert delivery.main(["drift", "prod"]) == 2
    out, error = capsys.readouterr()
    assert (out, error) == ("", "delivery: there is no pulumi on PATH: see https://www.pulumi.com/docs/install/\n")


def test_it_runs_as_a_program_from_any_folder(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": "/usr/bin:/bin", "GITHUB_ACTIONS": "true"}
    done = subprocess.run(
        [ROOT / "scripts/delivery.py", "preview", "prod"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (
        2,
        "::error::there is no pulumi on PATH: see https://www.pulumi.com/docs/install/\n",
    )
