-- Which runs used this text, model, autoencoder or layer?
--
-- Set the variables to search for; each matches a part of a path or hub id as it was given:
--     ksweep sql @runs_by_source text=held_out model=SmolLM autoencoder=demo
SELECT run_id, status, finished, cell, coalesce(text_source, vectors) AS text, model, coalesce(checkpoint, av) AS autoencoder, ar, layer,
       num_activations, num_draws, sweep, activations_key, draws_key, scores_key
FROM runs
WHERE (getvariable('text') IS NULL OR contains(coalesce(text_source, vectors), getvariable('text')))
  AND (getvariable('model') IS NULL OR contains(model, getvariable('model')))
  AND (getvariable('autoencoder') IS NULL OR contains(concat_ws(' ', checkpoint, av, ar), getvariable('autoencoder')))
ORDER BY finished DESC, run_id;
