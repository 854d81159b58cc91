"""The launch document's format and checks, imported from the image's code. The preview therefore refuses every launch
document that the boot would refuse."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "provisioning/rootfs/usr/lib/mlflow-host"))

from mlflow_host.contract import alarms as alarms
from mlflow_host.contract import audit_trail as audit_trail
from mlflow_host.contract import in_service as in_service
from mlflow_host.contract import launch as launch
from mlflow_host.contract import restore_request as restore_request
from mlflow_host.contract import sizing as sizing
