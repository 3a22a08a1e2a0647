-- How much does FVE gain from twice the draws, at each K, with a paired interval?
--
-- Both FVEs are computed from the same draws and documents, so the interval is much narrower than those of the two FVEs.
SELECT cell, label, temperature, k, doubled_k, gain, gain_low, gain_high, gain_low > 0 AS is_clear, shuffled_gain, sweep
FROM v_gain
ORDER BY sweep, cell, k;
