"""Bring a copy of the database to the MLflow schema of this image, newer or older, and put the copy in service.

state            read the state of the database in service, and choose the action.
change           build the new database, verify it and put it in service.
revisions        list the migrations of the image's MLflow in order, without importing MLflow.
column_fit       write SQL that converts a column of one schema to the same column of another schema.
conversions      SQL that moves data back to the tables in which an older release stores the data.
copying          carry: copy all tables and columns that two schemas share, with PostgreSQL's COPY.
merging          after an upgrade, merge back the data that the older schema could not hold.
upgrade_losses   record the data that an upgrade's migrations drop or change, so that a rollback can restore the data.
release          run the image's MLflow in a separate process (release_worker).
empty_database   load the dump of an empty database, which the bake created.
verifying        check the copy: migration head, foreign keys, row counts, MLflow's stores.
reporting        write the report of a schema change.
"""
