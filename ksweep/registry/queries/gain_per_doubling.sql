-- What does twice the draws bring, at each K, with a paired interval?
--
-- Both points stand on the same draws and documents, so the interval is much narrower than those of the two FVE.
SELECT cell, label, temperature, k, doubled_k, gain, gain_low, gain_high, gain_low > 0 AS is_clear, shuffled_gain, sweep
FROM v_gain
ORDER BY sweep, cell, k;
