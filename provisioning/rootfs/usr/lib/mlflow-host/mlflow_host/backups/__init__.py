"""Backups: the write-ahead log as it is written, base backups and dumps by timers, and the way back from them.

pgbackrest/    in the backups bucket: pgBackRest's repository, one stanza for each history of a cluster
dumps/         pg_dump's custom format: nightly, and before each change of the schema

archive      answers PostgreSQL's archive_command; runs for as long as PostgreSQL does
base         base backups: the first one soon after the first boot, then nightly
dump         the nightly dump
check        fails when one of these is older than it should be, and tells what there is
restore      the step before PostgreSQL at boot, and the command of that name
"""
