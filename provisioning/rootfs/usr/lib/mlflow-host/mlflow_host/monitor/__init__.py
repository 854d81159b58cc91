"""Service `mlflow-host-monitor`, which reads nginx's request log: the audit trail, and metrics for Prometheus."""
