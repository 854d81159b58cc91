"""Unit `mlflow-host-in-service`: write the image and the database schema that are in service to an SSM parameter.

The unit runs after the boot step `database`. `pulumi preview` compares the report with the pinned image. No other unit
depends on this unit. systemd restarts this unit when it fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from mlflow_host.contract import in_service
from mlflow_host.contract.in_service import InService
from mlflow_host.machine import aws, config


def main() -> int:
    document = config.load().launch
    name = document.data_volume.report_parameter
    if not name:
        print("the stack names no parameter for the report")
        return 0
    facts = json.loads(config.IMAGE_FACTS.read_text())
    report = of_image(facts, document.data_volume.id, datetime.now(UTC))
    try:
        aws.put_parameter(document, name, in_service.dump(report), aws.role_keys())
    except (aws.NoRole, aws.ServiceUnreachable, aws.ServiceError) as error:
        print(
            f"mlflow-host: {name} could not be written: {error}; the role must allow ssm:PutParameter on it, and the "
            "machine must reach Systems Manager (the setting ssmEndpoint)",
            file=sys.stderr,
        )
        return 2
    print(f"reported schema {report.migration_head} to {name}")
    return 0


def of_image(facts: Mapping[str, Any], volume: str, now: datetime) -> InService:
    return InService(
        volume=volume,
        image_version=facts["image_version"],
        mlflow_version=facts["mlflow_version"],
        migration_head=facts["migration_head"],
        migration_count=int(facts["migration_count"]),
        postgresql_major=int(facts["postgresql_major"]),
        at=f"{now:%Y-%m-%dT%H:%M:%SZ}",
    )


if __name__ == "__main__":
    raise SystemExit(main())
