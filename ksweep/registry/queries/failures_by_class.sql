-- Why do runs fail, how often and where, and how many cells have not finished since?
SELECT coalesce(error_class, status) AS class, count(*) AS num_runs, count(DISTINCT cell_key) AS num_cells,
       count(*) FILTER (NOT superseded) AS num_open, list(DISTINCT host ORDER BY host) AS hosts,
       list(DISTINCT sweep ORDER BY sweep) AS sweeps, min(finished) AS first_seen, max(finished) AS last_seen,
       arg_max(error_message, finished) AS last_message, arg_max(run_id, finished) AS last_run
FROM v_failures
GROUP BY class
ORDER BY num_runs DESC, class;
