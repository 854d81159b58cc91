"""Backups and their restores: the archived write-ahead log, base backups, and dumps.

The backups bucket has two folders:

pgbackrest/    pgBackRest's repository, with one stanza per cluster.
dumps/         dumps in pg_dump's custom format: each night, and before each schema change.

archive                      service: archive log segments while PostgreSQL runs.
pgbackrest_archive_command   PostgreSQL's archive_command: send a segment's name to the service `archive`.
base_backup                  timer: take base backups, soon after the first boot and then each night.
dump                         timer and command mlflow-host-dump: take dumps.
check                        timer: report the ages of backups, and fail if a backup is too old.
last_runs                    files on the data volume with the time of the last success of each kind of backup.
restore_choice               list the backups in the bucket, and find the backup of a restore request.
restore                      boot step before PostgreSQL, and command mlflow-host-restore: restore a backup.
"""
