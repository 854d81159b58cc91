"""Service `mlflow-host-logs`, which sends the journal of nginx, MLflow and the units mlflow-* to CloudWatch Logs."""
