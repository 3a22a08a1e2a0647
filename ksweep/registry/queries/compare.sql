-- Do two cells differ, over the same activations, at each K?
--
-- Differences are paired: variation that both cells share cancels. Set `cell` and `other`; without `other`, `cell` is compared with
-- all cells over the same activations:
--     ksweep sql @compare "cell=temperature=0.4" "other=temperature=0.8"
SELECT cell, other_cell, k, difference, difference_low, difference_high, difference_low > 0 OR difference_high < 0 AS is_clear,
       fve, other_fve, level, baseline, baseline_kind, num_activations, num_documents, effective_documents, num_replicates
FROM v_compare
WHERE (getvariable('cell') IS NULL OR getvariable('cell') IN (cell, label, run_id))
  AND (getvariable('other') IS NULL OR getvariable('other') IN (other_cell, other_label, other_run_id))
  AND (getvariable('cell') IS NOT NULL OR cell < other_cell)
ORDER BY cell, other_cell, k;
