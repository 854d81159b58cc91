"""Benchmarks, started with `python -m tests.bench…`. pytest does not run these modules, so this file adds the folder of
the package `mlflow_host` to sys.path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "provisioning/rootfs/usr/lib/mlflow-host"))
