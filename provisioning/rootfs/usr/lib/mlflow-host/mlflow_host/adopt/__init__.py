"""Adopt the rows of another MLflow server, which scripts/adopt.py put into the backups bucket. The server stays up.

run                 the unit mlflow-host-adopt@NAME: read the request, prepare or load, report
staging             the rows, in a database of their own at the source's schema: values that do not fit, rows without a
                    parent
conflicts           experiment IDs and names that are in use here, and the new ones
artifact_locations  where artifacts are and where they go
merge               one transaction that merges the prepared rows into the database in service
"""
