"""Code that runs only in the bake: checks of the installed MLflow, and files that the bake generates from MLflow."""
