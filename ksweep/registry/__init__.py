"""What runs say, and how it is asked about later.

`landing` is the only thing a job writes: immutable files, one directory a run. `database` turns them into `ksweep.duckdb`, an
index that can be deleted and rebuilt. `schema.sql` and `views.sql` are the data dictionary.
"""
