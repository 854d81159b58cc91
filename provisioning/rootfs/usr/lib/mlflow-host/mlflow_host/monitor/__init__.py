"""Service `mlflow-host-monitor`, which reads nginx's request log: audit trail, metrics, and the page /mlflow-host/."""
