-- How does FVE grow with the best of K draws, and how much of that is due to selection alone?
--
-- One row per cell and power of two. `shuffled_fve` is the best of K draws of another activation, which grows with K too. Above half of
-- the draws (`few_subsets`) all choices of K share most of their draws, so the points are strongly correlated.
SELECT cell, label, temperature, k, fve, fve_low, fve_high, fve - first_value(fve) OVER w AS over_one_draw, shuffled_fve,
       shuffled_fve - first_value(shuffled_fve) OVER w AS shuffled_over_one_draw, all_failed_rate, k > num_draws / 2 AS few_subsets,
       num_draws, num_activations, num_documents, effective_documents, baseline, baseline_kind, level, num_replicates, sweep
FROM curves
WHERE bit_count(k) = 1 OR k = num_draws
WINDOW w AS (PARTITION BY run_id ORDER BY k)
ORDER BY sweep, cell, k;
