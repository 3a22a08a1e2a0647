-- How does FVE differ by token role, position and norm, and is the error concentrated in a few activations?
--
-- At K = 1 and the largest K, against two baselines: `overall`, that of all activations (weighted by size, groups average to the
-- whole), and `own`, that of the group alone. `worst_share` is the fraction of the error in the worst 1 % of a group: 0.01 if errors
-- were equal.
SELECT cell, breakdown, part, against, k, fve, fve_low, fve_high, error, median_error, worst_share, failure_rate, baseline,
       baseline_kind, num_activations, num_documents, effective_documents, level, num_replicates
FROM metrics
WHERE (getvariable('cell') IS NULL OR getvariable('cell') IN (cell, label, run_id))
  AND (getvariable('against') IS NULL OR against = getvariable('against'))
QUALIFY k = 1 OR k = max(k) OVER (PARTITION BY run_id)
ORDER BY cell, breakdown, k, place, against DESC;
