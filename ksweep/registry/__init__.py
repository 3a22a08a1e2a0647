"""The registry: the results of runs as immutable files, and a database over them.

`draws`, `run_record`, `attempts`, `sweeps` and `activation_metadata` each write one kind of file. `database` turns the records
into `ksweep.duckdb`, an index that can be deleted and rebuilt; `query` reads it. `schema.sql`, `views.sql` and
`file_views.sql` are the data dictionary.
"""
