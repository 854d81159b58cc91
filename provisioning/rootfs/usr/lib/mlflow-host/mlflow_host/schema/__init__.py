"""Any image, any time: bring the database to this image's MLflow schema, forwards or backwards, on a copy, then flip.

revisions     which migrations the image's MLflow knows, in order, without importing it
record        who last owned the database and what waits in kept ones: a comment on the database
catalog       tables, columns, keys and constraints as PostgreSQL holds them
shapes        how one column of the newer schema fits into the older (pure)
conversions   data that moved between tables from one release to the next, and how its older form is rebuilt
copying       every table and column both know, by COPY, with constraints put back afterwards
merging       what the older release could not hold, put back under what was written since
verifying     counts, foreign keys, and MLflow's own stores as the last judge
flipping      the exchange by renames, kept databases, and clearing up after a crash
dumping       the dump to the backups bucket that comes before any change
reporting     what was carried, converted, shortened, left behind
"""
