-- Which draws gave no explanation, and why?
--
-- A failed draw uses up one of the K. With a small baseline even one failure in a thousand lowers the FVE visibly.
SELECT f.cell, f.cause, f.num_failed_draws, f.failure_rate, r.cut_off_rate, r.fve_over_successes, c.fve AS fve_at_one, f.temperature, f.sweep
FROM v_draw_failures AS f JOIN runs AS r USING (run_id) LEFT JOIN run_curves AS c ON c.run_id = f.run_id AND c.k = 1
ORDER BY f.failure_rate DESC, f.cell, f.cause;
