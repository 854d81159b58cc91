"""Code that ships in the image: boot steps, the server process, timers, and the checks that the bake runs.

A folder says who starts the code. Imports only go down: contract < machine < postgres < schema, server, backups <
garbage, upkeep < boot, bake (tests/unit/test_layers.py).
"""
