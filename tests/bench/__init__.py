"""Measurements, started with `python -m tests.bench…`, which has no pytest to find the package `mlflow_host`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "provisioning/rootfs/usr/lib/mlflow-host"))
