-- Which cells were measured more than once, with which code, and do the numbers agree?
--
-- `largest_difference` is over all K. The same draws give the same curve up to rounding; another machine may sample other draws
-- where logits are nearly tied. `within_interval`: each later FVE lies in the interval of the first.
WITH numbered AS (
    SELECT *, row_number() OVER (PARTITION BY cell_key, k ORDER BY finished, run_id) AS n FROM curve_history
), compared AS (
    SELECT f.cell_key, f.k, abs(l.fve - f.fve) AS difference, l.fve BETWEEN f.fve_low AND f.fve_high AS within
    FROM numbered AS f JOIN numbered AS l ON l.cell_key = f.cell_key AND l.k = f.k AND f.n = 1 AND l.n > 1
), agreement AS (
    SELECT cell_key, max(difference) AS largest_difference, arg_max(k, difference) AS at_k, bool_and(within) AS within_interval
    FROM compared GROUP BY cell_key
)
SELECT arg_max(r.cell, r.finished) AS cell, count(*) AS num_runs, count(DISTINCT r.git_commit) AS num_commits,
       list(DISTINCT r.git_commit[:12] ORDER BY r.git_commit[:12]) AS commits, bool_or(r.git_dirty) AS any_dirty,
       list(DISTINCT r.packages['torch'] ORDER BY r.packages['torch']) AS torch_versions,
       any_value(a.largest_difference) AS largest_difference, any_value(a.at_k) AS at_k, any_value(a.largest_difference) < 1e-6 AS agree,
       any_value(a.within_interval) AS within_interval, min(r.finished) AS first_run, max(r.finished) AS last_run
FROM runs AS r JOIN agreement AS a USING (cell_key)
WHERE r.status = 'finished'
GROUP BY r.cell_key
ORDER BY largest_difference DESC, cell;
