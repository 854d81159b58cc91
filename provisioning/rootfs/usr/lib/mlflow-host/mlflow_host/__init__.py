"""What turns a freshly launched machine into an MLflow server: one module per boot step."""
