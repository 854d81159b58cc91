"""PostgreSQL on this machine or on another host: connections, catalog, roles, dumps, pgBackRest, and the flip.

cluster       database connections and commands.
login         TLS, tokens and password files for a server on another host.
roles         create the roles of a server on another host.
catalog       tables, columns, keys and constraints, read from PostgreSQL's catalog.
ownership     the ownership record: a comment on a database with the MLflow release that last migrated the database.
dump_file     dump a database to the backups bucket, and load a dump.
flip          put a new database in service by renaming it, and drop kept databases and unfinished databases.
initdb        create an empty cluster.
pgbackrest    configure and call pgBackRest, and name stanzas.
reader_role   the read-only role for PostgreSQL clients outside the machine.
"""
