-- Which temperature is best for a pair on its data, and by how much?
--
-- One row per setting (everything but the temperature) and K in (1, largest). `lead` is the paired difference to the next best
-- temperature over the same activations; if its interval contains 0 the two are not distinguishable. The best of several on the
-- same data is biased upwards by the choice: confirm it on other documents.
WITH placed AS MATERIALIZED (
    SELECT *, count(*) OVER (PARTITION BY setting, k) AS num_temperatures FROM v_temperature
    QUALIFY k = 1 OR k = max(k) OVER (PARTITION BY setting)
), pairs AS MATERIALIZED (
    SELECT v.*, paired_quantiles(c.replicates, d.replicates, v.level) AS quantiles
    FROM placed AS b JOIN placed AS r ON r.setting = b.setting AND r.k = b.k AND b.place = 1 AND r.place = 2
    JOIN v_pairs AS v ON v.run_id = b.run_id AND v.other_run_id = r.run_id AND v.k = b.k
    JOIN run_curves AS c ON c.run_id = v.run_id AND c.k = v.k JOIN run_curves AS d ON d.run_id = v.other_run_id AND d.k = v.k
)
SELECT coalesce(b.checkpoint, b.av) AS autoencoder, b.layer, b.k, b.temperature AS best_temperature, b.fve, b.fve_low, b.fve_high,
       p.other_temperature AS next_temperature, p.difference AS lead,
       interval_end(p.difference, p.quantiles, p.interval_reach, -1) AS lead_low,
       interval_end(p.difference, p.quantiles, p.interval_reach, 1) AS lead_high, b.num_temperatures,
       b.num_activations, b.num_documents, b.effective_documents, b.baseline, b.baseline_kind, b.level, b.num_replicates, b.cell, b.sweep
FROM placed AS b LEFT JOIN pairs AS p ON p.run_id = b.run_id AND p.k = b.k
WHERE b.place = 1
ORDER BY autoencoder, b.layer, b.num_activations, b.setting, b.k;
