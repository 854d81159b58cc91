"""Code that ships in the image: boot steps, the server process, timers, and the checks that the bake runs.

A folder is named after the event that starts its code. A folder imports only folders on its left in this order:
contract < machine < postgres < schema, server, backups < garbage, upkeep < boot, bake (tests/unit/test_layers.py).
"""
