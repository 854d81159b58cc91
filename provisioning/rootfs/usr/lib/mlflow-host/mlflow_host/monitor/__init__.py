"""Service `mlflow-host-monitor`: make the audit trail, metrics and the page /mlflow-host/ from nginx's request log."""
