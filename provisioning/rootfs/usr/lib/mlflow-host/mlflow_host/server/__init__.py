"""MLflow's server at request time: the process, middleware around MLflow's applications, the artifact repository."""
