"""PostgreSQL on this host: connections, catalog, roles, dumps, pgBackRest, the flip of databases.

cluster       connections and commands
catalog       tables, columns, keys and constraints, read from PostgreSQL's catalog
ownership     the ownership record: a comment on a database that names the release that last migrated it
dump_file     dump a database to the backups bucket; load a dump
flip          exchange two databases by rename; drop kept databases and leftovers
initdb        create an empty cluster
pgbackrest    configure and call pgBackRest; name stanzas
reader_role   the read-only role for PostgreSQL clients outside the machine
"""
