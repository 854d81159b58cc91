"""Code that ships in the image: boot steps, the server process, timers, and the checks that the bake runs.

Each folder is named for what starts its code. Imports only go down: contract < machine < postgres < schema, server,
backups < garbage, upkeep < boot, bake (tests/unit/test_layers.py).
"""
