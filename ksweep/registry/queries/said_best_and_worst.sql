-- What are the explanations of the best, median and worst reconstructed activations, beside the text they explain?
--
-- Shows the best draw of each activation. Set `cell` for one cell (or one run), `rank` for best, median or worst:
--     ksweep sql @said_best_and_worst rank=worst
SELECT cell, rank, number, error, cosine, context, coalesce(explanation, '(' || parse || ') ' || text) AS explanation, document, position,
       activation, draw, run_id
FROM examples
WHERE (getvariable('cell') IS NULL OR getvariable('cell') IN (cell, label, run_id))
  AND (getvariable('rank') IS NULL OR rank = getvariable('rank'))
ORDER BY cell, rank, number;
