"""The server process, the middleware around MLflow's applications, and the artifact repository."""
