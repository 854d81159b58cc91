"""The fast path: the most frequent tracking requests, handled by our own SQL instead of MLflow's Python code."""
