"""The modules of scripts/adopt.py, in the order of its steps.

`sources` reads a SQLite file, a database, a dump by pg_dump, a folder mlruns/ or a tracking server.
`server` reads a tracking server through its REST API into a SQLite file.
`row_files` writes one compressed file of rows per table, and a manifest of these files.
`encryption` encrypts the old server's secrets for the stack.
`target` is the stack that receives the data: its buckets, its machine and its API.
`artifacts` copies artifacts into two buckets in parallel. An interrupted copy can be resumed.
`verdict` reads all data back through the new server's API and compares the data with the source.
"""
