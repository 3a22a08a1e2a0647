-- How much disk do the draws of each sweep take, with their scores, and how many are there?
--
-- Sizes are those at the end of the newest run of each set of draws. Sweeps that share draws each count them; `shared_with` names the
-- other sweeps.
WITH draws_used AS (
    SELECT draws_key, sweep, max(draws_bytes) AS bytes, max(num_activations * num_draws) AS num_draws
    FROM runs WHERE draws_key IS NOT NULL AND status = 'finished' GROUP BY draws_key, sweep
), scores_used AS (
    SELECT draws_key, sweep, sum(bytes) AS bytes FROM (
        SELECT draws_key, scores_key, sweep, max(scores_bytes) AS bytes FROM runs
        WHERE scores_key IS NOT NULL AND status = 'finished' GROUP BY draws_key, scores_key, sweep
    ) GROUP BY draws_key, sweep
), used AS (
    SELECT d.draws_key, d.sweep, d.bytes + coalesce(s.bytes, 0) AS bytes, d.num_draws
    FROM draws_used AS d LEFT JOIN scores_used AS s USING (draws_key, sweep)
), sharing AS (
    SELECT draws_key, list(DISTINCT sweep) AS sweeps FROM used GROUP BY draws_key
)
SELECT u.sweep, count(*) AS num_draws_keys, sum(u.num_draws)::BIGINT AS num_draws, sum(u.bytes)::BIGINT AS bytes,
       sum(u.bytes) / sum(u.num_draws) FILTER (u.bytes IS NOT NULL) AS bytes_per_draw,
       list_sort(list_filter(list_distinct(flatten(list(s.sweeps))), lambda other: other <> u.sweep)) AS shared_with
FROM used AS u JOIN sharing AS s USING (draws_key)
GROUP BY u.sweep
ORDER BY bytes DESC NULLS LAST, u.sweep;
