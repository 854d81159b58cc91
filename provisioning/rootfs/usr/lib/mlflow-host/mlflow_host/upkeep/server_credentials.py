"""Timer `mlflow-host-server-credentials`: renew the AWS credentials of MLflow's processes.

The credentials belong to the stack's server role, which can access only objects in the artifacts and models buckets.
MLflow's processes cannot connect to the metadata service, which returns credentials of the machine's own role.
The setting `credential_process` in /usr/share/mlflow-host/aws-config makes botocore read the file that this program
writes (`FILE`). Before the credentials expire, botocore reads the file again.

If the launch document comes from an older stack, it names no server role, and MLflow uses the machine's role.
"""

from __future__ import annotations

import grp
import json
import sys
from datetime import UTC, datetime

from mlflow_host.contract.launch import LaunchDocument
from mlflow_host.machine import aws, config, nginx

FILE = config.RUN / "server-credentials.json"


def main() -> int:
    document = config.load().launch
    try:
        keys = current(document, aws.role_keys(), datetime.now(UTC))
    except (aws.NoRole, aws.ServiceUnreachable, aws.ServiceError) as error:
        role = document.mlflow.role or "the machine's role"
        print(
            f"mlflow-host: MLflow's AWS credentials are not renewed: {role} cannot be assumed ({error}); the machine's "
            f"role must allow sts:AssumeRole on this role, and the machine must reach {aws.sts_address(document)} (the "
            "setting stsEndpoint)",
            file=sys.stderr,
        )
        return 2
    nginx.write_private(FILE, as_json(keys), mode=0o640, group=grp.getgrnam("mlflow").gr_gid)
    return 0


def current(document: LaunchDocument, machine: aws.Keys, now: datetime) -> aws.Keys:
    """Return credentials of the server role. Raises aws.ServiceUnreachable or aws.ServiceError."""
    return aws.assume_role(document, document.mlflow.role, machine, now) if document.mlflow.role else machine


def as_json(keys: aws.Keys) -> str:
    """Return the credentials in the JSON format of botocore's credential_process."""
    content = {
        "Version": 1,
        "AccessKeyId": keys.access,
        "SecretAccessKey": keys.secret,
        "SessionToken": keys.token,
        "Expiration": keys.expires,
    }
    return json.dumps(content) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
