"""Backups: the archived write-ahead log, base backups, dumps, and restores from them.

In the backups bucket:

pgbackrest/    pgBackRest's repository, one stanza per cluster
dumps/         dumps in pg_dump's custom format: nightly, and before each schema change

archive                      service that archives log segments, for as long as PostgreSQL runs
pgbackrest_archive_command   PostgreSQL's archive_command: sends a segment's name to that service
base                         timer: base backups, the first one soon after the first boot, then nightly
dump                         timer and command mlflow-host-dump: dumps
check                        timer: report backup ages, fail when one is stale
last_runs                    when each kind of backup last succeeded, on the data volume
recovery_points              the backups in the bucket, and which of them a restore request names
restore                      boot step before PostgreSQL, and the command mlflow-host-restore
"""
