"""Bring a copy of the database to this image's MLflow schema, upwards or downwards, and put the copy in service.

state            which database is in service, and what this image has to do
change           build the successor, verify it, put it in service
revisions        the migrations of the image's MLflow, in order, read without importing MLflow
column_fit       how a column of one schema fits the same column of another (SQL text only)
conversions      data that a release moved between tables, and the SQL that moves it back
copying          carry: copy all tables and columns that two schemas share, by COPY
merging          merge data that the older schema could not hold back into the upgraded database
upgrade_losses   what an upgrade's migrations dropped or changed, put back by a rollback
release          run the image's MLflow in a process of its own (release_worker)
empty_database   load the empty database that the bake dumped
verifying        check the copy: migration head, foreign keys, row counts, MLflow's stores
reporting        the report of a schema change
"""
