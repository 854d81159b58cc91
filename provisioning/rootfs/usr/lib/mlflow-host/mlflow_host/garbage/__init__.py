"""Removes for good what users deleted through MLflow longer ago than a grace period.

MLflow only marks what is deleted, so that it can be restored, and its own `mlflow gc` knows nothing of registered
models. Here nothing goes that a registered version stands on.

references   what registered versions stand on
plan         what there is to remove, and what is kept and why: reads only
removal      removes one thing, by MLflow's own store, in one transaction
report       what was found and done, on the data volume
collect      the command and the weekly unit
"""
