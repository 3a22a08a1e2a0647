-- Which cell has the highest FVE for the same number of tokens sampled per activation?
--
-- `tokens` is K times the mean length of a draw. `place` is the rank of the cell among the cells over the same activations, each with
-- at most that many tokens.
WITH points AS (
    SELECT c.cell, c.label, c.temperature, c.k, c.k * r.mean_tokens AS tokens, c.fve, c.fve_low, c.fve_high, r.mean_tokens, c.sweep,
           c.activations_key, c.num_activations, c.run_id
    FROM curves AS c JOIN runs AS r USING (run_id)
    WHERE r.mean_tokens IS NOT NULL AND (bit_count(c.k) = 1 OR c.k = c.num_draws)
)
SELECT p.activations_key, p.tokens, p.cell, p.label, p.temperature, p.k, p.fve, p.fve_low, p.fve_high, p.mean_tokens,
       1 + count(DISTINCT o.run_id) AS place, p.num_activations, p.sweep
FROM points AS p LEFT JOIN points AS o
  ON o.activations_key = p.activations_key AND o.num_activations = p.num_activations AND o.run_id <> p.run_id
 AND o.tokens <= p.tokens AND o.fve > p.fve
GROUP BY ALL
ORDER BY p.activations_key, p.num_activations, p.tokens, p.cell;
