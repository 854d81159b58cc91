"""The steps of scripts/adopt.py, in their order.

sources     read a SQLite file, a database, a pg_dump file, a folder mlruns/ or a tracking server
server      read a tracking server by its REST API into a SQLite file
row_files   one compressed file of rows per table, and the manifest
encryption  encrypt secrets for the stack
target      the stack: its buckets, its machine, its API
artifacts   copy artifacts into the two buckets, in parallel, resumable
verdict     read everything back through the new server's API and compare it with the source
"""
