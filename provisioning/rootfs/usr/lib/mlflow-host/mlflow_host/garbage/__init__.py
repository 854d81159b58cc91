"""Garbage collection: permanently remove runs, logged models and experiments that users deleted long ago.

MLflow only marks deleted items, so users can restore them. The command `mlflow gc` does not check registered models.
This package never removes an item that a registered model version uses.

references   find the runs, logged models and paths that model versions use
plan         list the deleted items that can be removed, and the items to keep with the reasons (read-only)
removal      remove one item with MLflow's store, in one transaction
report       write the report to the data volume
collect      the command mlflow-host-gc, which the weekly timer also runs
"""
