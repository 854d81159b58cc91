"""Every command in the READMEs runs exactly as printed in a new user's shell, or is listed here with a reason.

The shell has an empty environment, a new user's PATH and home, no virtual environment, and a checkout in another folder
that uses this checkout's .venv. tests/journey/test_readme_commands.py runs the commands that need a server.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.readme_commands import REPOSITORY, clone, commands, run

RUN_HERE: dict[str, tuple[int, str]] = {
    "make help": (0, "make test-chaos"),
    "scripts/bake.py --region eu-central-1": (2, "there are no AWS credentials: run aws configure"),
    "scripts/bake.py --region eu-central-1 --architecture arm64": (2, "there are no AWS credentials"),
    'eval "$(scripts/connect.py --stack prod)"': (0, "install Pulumi (https://www.pulumi.com/docs/install/)"),
    "cd infra": (0, ""),
    "cd ..": (0, ""),
}
"""Command → exit status and part of the output, on a machine without AWS account, Pulumi and server."""

ON_A_SERVER = {
    "make demo", "make demo-down", 'eval "$(scripts/connect.py)"',
    ".venv/bin/python scripts/examples/classification_iris.py",
    ".venv/bin/python scripts/examples/regression_diabetes.py",
    "scripts/users.py add ada", "scripts/users.py add bob --role reader --prompt", "scripts/users.py rotate ada",
    "scripts/users.py remove bob", "mlflow-host-restore list", "mlflow-host-gc",
}  # fmt: skip

NOT_RUN = {
    "make prepare": "installs packages; run on a fresh Debian 12 by hand",
    "curl -s https://checkip.amazonaws.com": "asks AWS",
    "pulumi login": "asks Pulumi's cloud",
    "pulumi stack init prod": "Pulumi's CLI: tests/stack and tests/rehearsal run the program",
    "pulumi config set aws:region eu-central-1": "Pulumi's CLI",
    "pulumi config set amiId ami-0123456789abcdef0": "Pulumi's CLI",
    "pulumi config set --path 'allowedCidrs[0]' 203.0.113.7/32": "Pulumi's CLI",
    "pulumi config set amiId ami-0fedcba9876543210": "Pulumi's CLI",
    "pulumi config set instanceType t4g.small": "Pulumi's CLI",
    "pulumi config set restoreFrom latest && pulumi up": "Pulumi's CLI; tests/journey/test_backups.py restores",
    "pulumi up": "needs an AWS account",
    "sudo scripts/drill.py 3.12.0 3.17.2": "takes many minutes; tests/journey/test_drill.py runs the script",
    "mlflow-host-restore latest": "replaces the data; tests/journey/test_backups.py runs it",
    "mlflow-host-gc --older-than 90 --delete": "tests/journey/test_housekeeping.py runs it",
    "make bench": "takes an hour",
    ".venv/bin/python -m tests.bench --only log-metric --clients 1 8": "takes many minutes",
    '.venv/bin/python -m tests.bench --only nothing --files "1 GB" --rounds 5 --contenders ours --no-growth': "as well",
    ".venv/bin/python -m tests.bench.against HEAD~20": "takes many minutes",
    "sudo -E .venv/bin/python -m tests.bench.bake_and_launch": "takes many minutes",
    "sudo -E .venv/bin/python -m tests.bench.machine": "takes ten minutes of full load",
    "sudo -E .venv/bin/python -m tests.bench.machine --connections 200": "takes minutes of full load",
    "sudo apt-get install qemu-user-static arch-test": "installs packages; these six were run by hand as root",
    "mountpoint -q /proc/sys/fs/binfmt_misc || sudo mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc": (
        "as well"
    ),
    "test ! -e /proc/sys/fs/binfmt_misc/qemu-aarch64 || echo -1 | sudo tee /proc/sys/fs/binfmt_misc/qemu-aarch64": (
        "as well"
    ),
    "sed s/:OPF/:OPCF/ /usr/lib/binfmt.d/qemu-aarch64.conf | sudo tee /proc/sys/fs/binfmt_misc/register": "as well",
    "sudo scripts/bake.py --local --architecture arm64": "as well",
    "sudo scripts/rehearse.py up --ami ami-0123456789abcdef0 --set instanceType=t4g.medium": "as well",
    "scripts/retire_stack.py --stack prod --dry-run": "needs a stack; tests/rehearsal runs the script",
    "scripts/retire_stack.py --stack prod --keep ./leaving": "as well",
    "scripts/recover_backups.py --bucket mlflow-backups-1a2b3c4 --before 2026-11-29T12:00:00Z": (
        "needs a bucket; tests/rehearsal runs the script"
    ),
    "pulumi -C infra stack rm prod": "Pulumi's CLI",
    "scripts/adopt.py ~/mlflow/mlflow.db --dry-run": "needs a source; tests/journey/test_adopt.py runs the script",
    "scripts/adopt.py ~/mlflow/mlflow.db": "as well",
    "scripts/adopt.py postgresql://mlflow@10.0.0.5/mlflow": "needs a source; tests/adopt runs the script",
    "scripts/adopt.py mysql://mlflow@10.0.0.5/mlflow": "as well",
    "scripts/adopt.py https://mlflow.example.com": "as well",
    "scripts/images.py diff production ami-0fedcba9876543210": "tests/image/test_images_script.py runs the script",
    "scripts/images.py promote ami-0fedcba9876543210 production --drill drill.json": "as well",
    "sudo scripts/drill.py 3.12.0 3.17.2 --json > drill.json": "takes many minutes",
    "pulumi config rm amiId && pulumi config set channel production && pulumi up": "Pulumi's CLI",
    "aws cloudformation deploy --stack-name delivery-roles --template-file infra/delivery-roles.yaml \\": "needs an "
    "AWS account; tests/delivery/test_roles.py creates the stack on moto",
    "aws cloudformation describe-stacks --stack-name delivery-roles --query 'Stacks[0].Outputs'": "as well",
    "make lint": "`make test` begins with it",
    **{each: "runs these tests" for each in commands() if re.fullmatch(r"make test(-\w+)?", each)},
}  # fmt: skip
"""Command → reason why no test runs the command as printed."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("somewhere else"))


def test_each_command_is_run_or_listed() -> None:
    classified = RUN_HERE.keys() | ON_A_SERVER | NOT_RUN.keys()
    assert set(commands()) == classified


@pytest.mark.long
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.service if "bake.py" in command else ())  # it looks for Packer
        for command in RUN_HERE
    ],
)
def test_command_runs_as_printed(command: str, checkout: Path) -> None:
    if "connect.py --stack" in command and any(shutil.which("pulumi", path=p) for p in ("/usr/bin", "/usr/local/bin")):
        pytest.skip("Pulumi is installed, so the sentence about its absence is not printed")
    status, part = RUN_HERE[command]
    done = run(command, checkout if command != "cd .." else checkout / "infra")
    assert done.returncode == status, done.stdout + done.stderr
    assert part in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def scripts() -> list[str]:
    return sorted(path.name for path in (REPOSITORY / "scripts").glob("*.py") if path.read_text().startswith("#!"))


@pytest.mark.long
@pytest.mark.parametrize("name", scripts())
def test_each_script_starts_from_any_folder(name: str, checkout: Path, tmp_path: Path) -> None:
    done = run(f"'{checkout}/scripts/{name}' --help", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_no_command_names_a_program_that_debian_lacks() -> None:
    """On Debian, a shell without a virtual environment has no command `python`."""
    words = [word for command in commands() for word in re.split(r"[\s$()\"]+", command)]
    assert not {"python", "pip", "python3"} & set(words)


@pytest.mark.parametrize("target", sorted({c.split()[1] for c in commands() if c.startswith("make ")}))
def test_make_target_can_be_planned(target: str, checkout: Path) -> None:
    done = subprocess.run(["make", "-n", target], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
