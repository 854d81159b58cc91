"""Service `mlflow-host-logs`, which sends the journal of nginx, MLflow and this host's own units to CloudWatch Logs."""
