"""The machine's own modules, from where they ship: what it will refuse at boot, the stack refuses at preview."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "provisioning/rootfs/usr/lib/mlflow-host"))

from mlflow_host import launch as launch
from mlflow_host import metrics as metrics
from mlflow_host import room as room
from mlflow_host import sizing as sizing
from mlflow_host.backups import naming as naming
