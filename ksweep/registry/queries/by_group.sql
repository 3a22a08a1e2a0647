-- For which activations does it work: by token role, position and norm, and is the error in a few of them?
--
-- At K = 1 and the largest K, against two baselines: `overall`, that of all activations (groups weighted by their sizes average to the
-- whole), and `own`, that of the group alone. `worst_share` is the part of the error that the worst 1 % of a group has: 0.01 would be
-- an even spread.
SELECT cell, breakdown, part, against, k, fve, fve_low, fve_high, error, median_error, worst_share, failure_rate, baseline,
       baseline_kind, num_activations, num_documents, effective_documents, level, num_replicates
FROM metrics
WHERE (getvariable('cell') IS NULL OR getvariable('cell') IN (cell, label, run_id))
  AND (getvariable('against') IS NULL OR against = getvariable('against'))
QUALIFY k = 1 OR k = max(k) OVER (PARTITION BY run_id)
ORDER BY cell, breakdown, k, place, against DESC;
