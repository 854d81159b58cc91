"""The boot steps, one module per unit of mlflow-host.target, and modules that only they use."""
