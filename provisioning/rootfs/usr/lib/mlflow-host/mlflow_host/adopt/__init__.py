"""Merge the rows of another MLflow server (the source) into this server's database while this server stays up.
scripts/adopt.py stores the rows in the backups bucket.

run                 the unit mlflow-host-adopt@NAME: read the request, prepare or load, report.
staging             load the rows into a database at the source's schema, and count values that a column cannot store.
conflicts           choose new experiment IDs and names if the old ones are in use on this server.
artifact_locations  find the artifacts' old locations, and write their new locations.
merge               merge the prepared rows into the database in service, in one transaction.
"""
