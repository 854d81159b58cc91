"""The boot steps: one module per unit of mlflow-host.target, and the modules that only the boot steps import."""
