"""A user's terminal in a separate checkout, with the real `pulumi` and a cloud that stands in for AWS."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.rehearsal import pulumi_cli

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Terminal:
    """A terminal with its current folder, its environment variables, and the file that records its session."""

    folder: Path
    environment: Mapping[str, str]
    log: Path

    def run(self, command: str, *, status: int | None = 0, input: str = "", seconds: float = 1800) -> str:
        """Run a command and return stdout and stderr as one text. `status` is the expected exit status, or None for any
        failure."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=dict(self.environment),
            input=input,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        with self.log.open("a") as file:
            file.write(f"$ {command}\n{done.stdout}\n")
        right = done.returncode != 0 if status is None else done.returncode == status
        assert right, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout


def open_terminal(cloud: Any, folder: Path, log: Path) -> Terminal:
    """Copy the files for baking and launching below `folder`, and return a terminal in the copy of infra/. The log is
    emptied first."""
    checkout = folder / "checkout"
    shutil.copytree(REPOSITORY / "infra", checkout / "infra", ignore=shutil.ignore_patterns("Pulumi.*.yaml"))
    shutil.copytree(REPOSITORY / "scripts", checkout / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("packer", "provisioning", ".venv"):
        (checkout / name).symlink_to((REPOSITORY / name).resolve())
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    environment = {**os.environ, **pulumi_cli.environment(cloud), "HOME": str(folder)}
    # The local cloud's S3 has a certificate of its own authority. moto's S3 has no certificate.
    if "AWS_CA_BUNDLE" in environment:
        environment["REQUESTS_CA_BUNDLE"] = environment["AWS_CA_BUNDLE"]
    environment["PATH"] = os.pathsep.join([str(REPOSITORY / ".venv/bin"), environment["PATH"]])
    return Terminal(checkout / "infra", environment, log)
