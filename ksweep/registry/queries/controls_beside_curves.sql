-- How do the controls compare with the FVE of the explanations?
--
-- An FVE near its controls says little about the explanations. Compare retrieval_top1, a fraction of activations, with
-- retrieval_chance.
SELECT c.cell, c.label, c.temperature, arg_min(c.fve, c.k) AS fve_at_one, max(c.k) AS largest_k, arg_max(c.fve, c.k) AS fve_at_largest_k,
       arg_max(c.shuffled_fve, c.k) AS shuffled, any_value(p.empty_text) AS empty_text, any_value(p.mean_vector) AS mean_vector,
       any_value(p.retrieval_top1) AS retrieval_top1, any_value(p.retrieval_chance) AS retrieval_chance, c.sweep
FROM curves AS c LEFT JOIN (
    SELECT run_id, max(value) FILTER (control = 'empty_text') AS empty_text, max(value) FILTER (control = 'mean_vector') AS mean_vector,
           max(value) FILTER (control = 'retrieval_top1') AS retrieval_top1,
           max(value) FILTER (control = 'retrieval_chance') AS retrieval_chance
    FROM controls GROUP BY run_id
) AS p USING (run_id)
GROUP BY c.run_id, c.cell, c.label, c.temperature, c.sweep
ORDER BY c.sweep, c.cell;
