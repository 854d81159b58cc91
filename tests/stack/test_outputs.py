"""The stack's outputs contain the server's address, the versions, and lines that a client's shell can run unchanged."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from scripts.rehearsal.status_document import PIECES
from tests.stack.program import ADDRESS, NEW, VOLUME, run


def test_stack_exports_url_versions_and_ids() -> None:
    outputs = run().outputs
    lines = outputs.pop("clientEnvironment")
    assert outputs == {
        "url": f"https://{ADDRESS}",
        "username": "admin",
        "instanceId": "i-0123456789abcdef0",
        "publicIp": ADDRESS,
        "amiId": NEW,
        "channel": "",
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
        "passwordParameter": "/mlflow-ami/dev/admin-password",
        "authorityParameter": "/mlflow-ami/dev/certificate-authority",
        "postgresParameter": "",
        "connect": 'eval "$(scripts/connect.py --stack dev)"',
        "shell": "aws ssm start-session --region eu-central-1 --target i-0123456789abcdef0",
    }
    assert lines.count("export ") == 5


PASSWORD = "p'a\"s$s`w\\o r*d"
AUTHORITY = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


@pytest.fixture
def aws(tmp_path: Path) -> Path:
    """Return a folder with a stand-in for the program `aws`, which returns the password and the authority and refuses
    all other calls."""
    (tmp_path / "password").write_text(PASSWORD + "\n")
    (tmp_path / "authority").write_text(AUTHORITY)
    call = "ssm get-parameter --region eu-central-1 --query Parameter.Value --output text --name /mlflow-ami/dev"
    (tmp_path / "aws").write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f"'{call}/admin-password --with-decryption') cat {tmp_path}/password ;;\n"
        f"'{call}/certificate-authority') cat {tmp_path}/authority ;;\n"
        "*) exit 9 ;;\n"
        "esac\n"
    )
    (tmp_path / "aws").chmod(0o755)
    return tmp_path


def exported(lines: str, aws: Path) -> dict[str, str]:
    """Run `lines` unchanged in a shell, and return the shell's variables whose names begin with MLFLOW_."""
    environment = {"PATH": f"{aws}:{os.environ['PATH']}", "HOME": str(aws / "home of a user")}
    shell = ["sh", "-e", "-c", f"{lines}\nenv -0\n"]
    printed = subprocess.run(shell, env=environment, capture_output=True, text=True, check=True).stdout
    pairs = dict(line.split("=", 1) for line in printed.split("\0") if line)
    return {name: value for name, value in pairs.items() if name.startswith("MLFLOW_")}


def test_client_lines_work_in_a_shell(aws: Path) -> None:
    assert exported(run(tls="off").outputs["clientEnvironment"], aws) == {
        "MLFLOW_TRACKING_URI": f"http://{ADDRESS}",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        **PIECES,
    }


def test_client_lines_fetch_the_certificate_with_tls(aws: Path) -> None:
    found = run().outputs
    assert found["authorityParameter"] == "/mlflow-ami/dev/certificate-authority"
    variables = exported(found["clientEnvironment"], aws)
    assert variables["MLFLOW_TRACKING_URI"] == f"https://{ADDRESS}"
    assert Path(variables["MLFLOW_TRACKING_SERVER_CERT_PATH"]).read_text() == AUTHORITY
