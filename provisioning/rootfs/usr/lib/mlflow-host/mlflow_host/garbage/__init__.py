"""Garbage collection: permanently remove runs, logged models and experiments that users deleted long ago.

MLflow only marks deleted items, so that they can be restored, and its own `mlflow gc` ignores registered models. This
package never removes an item that a registered model version uses.

references   runs, logged models and paths that model versions use
plan         the deleted items: which can be removed, which are kept, and why (read-only)
removal      remove one item with MLflow's store, in one transaction
report       the report on the data volume
collect      the command mlflow-host-gc, which the weekly timer runs too
"""
