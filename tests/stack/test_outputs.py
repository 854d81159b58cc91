"""The outputs tell where the server is and what it runs, and the client lines work in a shell as they are."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from stack.program import ADDRESS, NEW, VOLUME, run


def test_the_outputs() -> None:
    outputs = run().outputs
    lines = outputs.pop("clientEnvironment")
    assert outputs == {
        "url": f"http://{ADDRESS}",
        "username": "admin",
        "instanceId": "i-0123456789abcdef0",
        "publicIp": ADDRESS,
        "amiId": NEW,
        "imageVersion": "20261122T101500Z",
        "mlflowVersion": "3.17.2",
        "migrationHead": "dc11669786a5",
        "dataVolumeId": VOLUME,
        "buckets": {
            "artifacts": "mlflow-artifacts-1a2b3c4",
            "models": "mlflow-models-1a2b3c4",
            "backups": "mlflow-backups-1a2b3c4",
        },
        "credentialsParameter": "/mlflow-ami/dev/credentials",
        "connect": 'eval "$(scripts/connect.py --stack dev)"',
        "shell": "aws ssm start-session --region eu-central-1 --target i-0123456789abcdef0",
    }
    assert lines.count("export ") == 3


def test_the_client_lines_do_what_they_say_in_a_shell(tmp_path: Path) -> None:
    """With an `aws` that answers as the real one does to exactly this call."""
    password = "p'a\"s$s`w\\o r*d"
    value = json.dumps({"format": 1, "users": {"admin": {"password": password, "role": "admin"}}})
    (tmp_path / "value").write_text(value + "\n")
    aws = tmp_path / "aws"
    aws.write_text(
        "#!/bin/sh\n"
        '[ "$*" = "ssm get-parameter --region eu-central-1 --name /mlflow-ami/dev/credentials --with-decryption'
        ' --query Parameter.Value --output text" ] || exit 9\n'
        f"cat {tmp_path}/value\n"
    )
    aws.chmod(0o755)
    script = run().outputs["clientEnvironment"] + "\nenv -0\n"
    path = f"{tmp_path}:{os.environ['PATH']}"
    printed = subprocess.run(["sh", "-c", script], env={"PATH": path}, capture_output=True, text=True, check=True)
    exported = dict(line.split("=", 1) for line in printed.stdout.split("\0") if line)
    assert exported["MLFLOW_TRACKING_URI"] == f"http://{ADDRESS}"
    assert exported["MLFLOW_TRACKING_USERNAME"] == "admin"
    assert exported["MLFLOW_TRACKING_PASSWORD"] == password
