"""The fast path: this project's SQL handles the most frequent tracking requests, instead of MLflow's Python code."""
