-- How much of the oracle's curve is left where another score chooses the draw (ksweep choose)?
SELECT label, chosen_by, reported, k, value, value_low, value_high, oracle, difference, difference_low, difference_high, share_with_value, cell
FROM chosen_curves
WHERE log2(k) = floor(log2(k)) OR k = num_draws
ORDER BY label, chosen_by, reported, k;
