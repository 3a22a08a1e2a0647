-- Views over Parquet files of the registry, made for each registry: ingest puts paths in the place of 'DRAWS_PARTS' and other
-- names in capitals. Comments are inherited as in views.sql.

CREATE VIEW activations AS
SELECT parse_path(a.filename)[-2] AS run_id, a.activation, a.row_id, a.document, a.position, a.role, a.norm, a.distance, a.num_failed, a.ks, a.errors
FROM read_parquet('ACTIVATIONS', union_by_name = false, filename = true) AS a WHERE 'IS_WHOLE';
COMMENT ON VIEW activations IS 'One row per run and activation, read directly from the files of the runs (one file per run: filter by run_id).';
COMMENT ON COLUMN activations.run_id IS 'Run that measured the errors.';
COMMENT ON COLUMN activations.activation IS 'Index of the activation within its store, 0-based.';
COMMENT ON COLUMN activations.row_id IS 'Row of text and token position that the activation comes from.';
COMMENT ON COLUMN activations.document IS 'Document that the activation comes from: the cluster that the bootstrap resamples.';
COMMENT ON COLUMN activations.position IS 'Token position of the activation in its row of text, 0-based.';
COMMENT ON COLUMN activations.role IS 'Role of the activation''s token: user, assistant, system, special, other; NULL where the chat format is unknown.';
COMMENT ON COLUMN activations.norm IS 'L2 norm of the activation.';
COMMENT ON COLUMN activations.distance IS 'Contribution of the activation to the run''s baseline, which is the mean of this column: its part of the distances between documents (may be negative), or its squared distance from the mean; for a stated constant that constant.';
COMMENT ON COLUMN activations.num_failed IS 'Number of the activation''s draws that failed.';
COMMENT ON COLUMN activations.ks IS 'Values of K of the column errors.';
COMMENT ON COLUMN activations.errors IS 'Expected smallest error among K draws, for each K in ks.';

CREATE VIEW texts AS
WITH files AS (
    -- union_by_name would open every file before reading one. All parts have the columns of draws.DRAWS_FILE_SCHEMA.
    SELECT * EXCLUDE (filename, error, cosine, norm, shuffled_error, shuffled_activation, reconstruction), filename,
           parse_path(filename)[-2] AS draws_key FROM read_parquet('DRAWS_PARTS', filename = true) WHERE 'IS_WHOLE'
)
-- Two sweeps that run at once may both sample a draw: it lies in two overlapping parts and counts once. draws_key is a plain
-- column here, so that a filter on it is pushed below the window function and only the files of that key are opened.
SELECT draws_key, activation, draw, explanation, text, num_tokens, finish, parse, log_probability, row_id, document, position, context,
       token_ids
FROM files QUALIFY row_number() OVER (PARTITION BY draws_key, activation, draw ORDER BY filename) = 1;
COMMENT ON VIEW texts IS 'One row per draw, whether it is scored or not: what the AV said, read directly from registry/draws without its scores. Filter by draws_key in a large registry.';

CREATE VIEW draws AS
WITH said AS (
    -- Two sweeps that run at once may both sample a draw, in overlapping parts: the first part counts, for every scorer.
    SELECT * EXCLUDE (filename), parse_path(filename)[-1] AS part
    FROM (SELECT *, parse_path(filename)[-2] AS draws_key FROM read_parquet('DRAWS_PARTS', filename = true) WHERE 'IS_WHOLE')
    QUALIFY row_number() OVER (PARTITION BY draws_key, activation, draw ORDER BY part) = 1
), worth AS (
    -- part: the part of the draws store that these scores belong to.
    SELECT parse_path(filename)[-3] AS draws_key, parse_path(filename)[-2] AS scores_key,
           regexp_replace(parse_path(filename)[-1], '^part-.*-of-', 'part-') AS part, activation, draw, error, cosine, norm,
           shuffled_error, shuffled_activation
    FROM read_parquet('SCORES_PARTS', filename = true) WHERE 'IS_WHOLE'
), parts AS (
    -- Parts of earlier versions hold the scores themselves.
    SELECT s.* EXCLUDE (error, cosine, norm, shuffled_error, shuffled_activation, reconstruction), w.scores_key,
           coalesce(w.error, s.error) AS error, coalesce(w.cosine, s.cosine) AS cosine, coalesce(w.norm, s.norm) AS norm,
           coalesce(w.shuffled_error, s.shuffled_error) AS shuffled_error,
           coalesce(w.shuffled_activation, s.shuffled_activation) AS shuffled_activation
    FROM said AS s LEFT JOIN worth AS w USING (draws_key, part, activation, draw)
), cells AS (
    SELECT draws_key, scores_key, arg_max(cell, finished) AS cell FROM v_latest WHERE draws_key IS NOT NULL GROUP BY draws_key, scores_key
)
SELECT cells.cell, p.draws_key, p.scores_key, p.activation, p.draw,
       row_number() OVER (PARTITION BY p.draws_key, p.scores_key, p.activation ORDER BY p.error NULLS LAST, p.draw) AS rank,
       p.error, p.cosine, p.explanation, p.text, p.num_tokens, p.finish, p.parse, p.log_probability,
       p.shuffled_error, p.shuffled_activation,
       p.row_id, p.document, p.position, p.context, p.norm, p.token_ids
FROM parts AS p LEFT JOIN cells ON cells.draws_key = p.draws_key AND cells.scores_key IS NOT DISTINCT FROM p.scores_key;
COMMENT ON VIEW draws IS 'One row per draw and scorer: a sampled explanation and its score, read directly from the Parquet files of registry/draws and registry/scores, those of running and failed cells included. A draw without scores has one row, with a NULL error. Filter by draws_key in a large registry: only its files are read then.';
COMMENT ON COLUMN draws.cell IS 'Newest finished cell that used these draws and scores; NULL while none has finished. Cells that differ only in counts or scoring share them.';
COMMENT ON COLUMN draws.draws_key IS 'Key of the draws: name of a directory under registry/draws.';
COMMENT ON COLUMN draws.scores_key IS 'Key of the scores: name of a directory under registry/scores/<draws_key>. NULL for draws without scores, and for parts of earlier versions, which hold draws and scores together.';
COMMENT ON COLUMN draws.activation IS 'Index of the activation within its store, 0-based; a cell over N activations uses the first N.';
COMMENT ON COLUMN draws.draw IS 'Index of the draw, 0-based. In float32 the same draw for every batch size and number of ranks; in bfloat16 rounding may flip near ties (runs.engine). A cell of N draws uses the first N.';
COMMENT ON COLUMN draws.rank IS 'Rank of the draw by error among all stored draws of its activation with the same scorer, 1 is best; failed draws come last.';
COMMENT ON COLUMN draws.error IS 'Error of the reconstruction; NLA pairs: 2 (1 - cosine). NULL when the draw failed or has no scores.';
COMMENT ON COLUMN draws.cosine IS 'Cosine between the reconstruction and the activation; NULL when the draw failed.';
COMMENT ON COLUMN draws.explanation IS 'The explanation that was scored, extracted from text; NULL when none was found.';
COMMENT ON COLUMN draws.text IS 'Full text that the AV generated, tags included.';
COMMENT ON COLUMN draws.num_tokens IS 'Length of the generated text, tokens.';
COMMENT ON COLUMN draws.finish IS 'Why generation ended.';
COMMENT ON COLUMN draws.parse IS 'ok, or the reason why no explanation was found in text: the cause of a failed draw.';
COMMENT ON COLUMN draws.log_probability IS 'Log probability of the sampled tokens under the AV at its sampling temperature, nats.';
COMMENT ON COLUMN draws.shuffled_error IS 'Control: error of this draw''s reconstruction against another activation, shuffled_activation.';
COMMENT ON COLUMN draws.shuffled_activation IS 'Index of the other activation, from another document where there is one.';
COMMENT ON COLUMN draws.row_id IS 'Row of text and token position that the activation comes from.';
COMMENT ON COLUMN draws.document IS 'Document that the activation comes from: the cluster that the bootstrap resamples.';
COMMENT ON COLUMN draws.position IS 'Token position of the activation in its row of text, 0-based.';
COMMENT ON COLUMN draws.context IS 'Text around that position.';
COMMENT ON COLUMN draws.norm IS 'L2 norm of the reconstruction as the AR gave it, before scaling; NULL when the draw failed.';
COMMENT ON COLUMN draws.token_ids IS 'Token ids that the AV sampled.';

CREATE VIEW best_draws AS
SELECT * EXCLUDE (rank) FROM draws WHERE rank = 1 AND error IS NOT NULL;
COMMENT ON VIEW best_draws IS 'The best of all stored draws of each activation, by scorer; activations whose draws all failed are left out.';

CREATE VIEW stored_metrics AS
WITH identities AS (
    SELECT parse_path(filename)[-3] AS draws_key, parse_path(filename)[-2] AS metric_key, metric, TRY_CAST(recorded AS TIMESTAMP) AS recorded, columns
    FROM read_json('METRIC_IDENTITIES', filename = true, format = 'unstructured', columns = {
        metric: 'VARCHAR', recorded: 'VARCHAR', columns: 'MAP(VARCHAR, STRUCT(description VARCHAR, better VARCHAR))'})
    WHERE recorded IS NOT NULL AND 'IS_WHOLE'  -- identities of reconstruction have none
), newest AS (
    SELECT * FROM identities QUALIFY row_number() OVER (PARTITION BY draws_key, metric ORDER BY recorded DESC, metric_key DESC) = 1
), columns AS (
    SELECT * EXCLUDE (columns), unnest(map_entries(columns)) AS c FROM newest
)
SELECT draws_key, metric, c.key AS name, c.value.description AS description, c.value.better AS better, recorded, metric_key
FROM columns;
COMMENT ON VIEW stored_metrics IS 'One row per set of draws, metric and column of it, beside reconstruction: which scores are stored. Of a metric that was computed or imported again with another result, the key that was recorded last.';
COMMENT ON COLUMN stored_metrics.draws_key IS 'Key of the draws: name of a directory under registry/draws.';
COMMENT ON COLUMN stored_metrics.metric IS 'Name of the metric: text, judge, ...';
COMMENT ON COLUMN stored_metrics.name IS 'Column of the metric.';
COMMENT ON COLUMN stored_metrics.description IS 'What the column measures, with its unit.';
COMMENT ON COLUMN stored_metrics.better IS 'Which values are better: lower, higher or neither.';
COMMENT ON COLUMN stored_metrics.recorded IS 'When the scores were last computed or imported, UTC.';
COMMENT ON COLUMN stored_metrics.metric_key IS 'Key of the scores: name of a directory under registry/scores/<draws_key>.';

CREATE VIEW draw_scores AS
WITH parts AS (
    -- A draw that lies in two overlapping parts counts once, as in texts.
    SELECT parse_path(filename)[-3] AS draws_key, parse_path(filename)[-2] AS metric_key, name, activation, draw, value
    FROM read_parquet('METRIC_PARTS', filename = true) WHERE 'IS_WHOLE'
    QUALIFY row_number() OVER (PARTITION BY draws_key, metric_key, name, activation, draw ORDER BY filename) = 1
)
SELECT p.draws_key, p.metric_key, m.metric, p.name, p.activation, p.draw, p.value, NULL::VARCHAR AS scores_key
FROM parts AS p JOIN stored_metrics AS m ON m.draws_key = p.draws_key AND m.metric_key = p.metric_key AND m.name = p.name
UNION ALL
SELECT draws_key, scores_key, 'reconstruction', unnest(['error', 'cosine']), activation, draw, unnest([error, cosine]), scores_key
FROM draws;
COMMENT ON VIEW draw_scores IS 'One row per draw, metric and column of it: every score of a draw in one long table. Of a metric that was computed or imported again, the scores recorded last; of reconstruction, error and cosine by every AR. Filter by draws_key in a large registry.';
COMMENT ON COLUMN draw_scores.metric_key IS 'Key of the scores: name of a directory under registry/scores/<draws_key>. NULL as scores_key is.';
COMMENT ON COLUMN draw_scores.metric IS 'Name of the metric: reconstruction, text, judge, ...';
COMMENT ON COLUMN draw_scores.name IS 'Column of the metric; stored_metrics says what it measures and which values are better.';
COMMENT ON COLUMN draw_scores.value IS 'The score; NULL where the draw failed or has none.';
COMMENT ON COLUMN draw_scores.scores_key IS 'Of reconstruction, the key of the AR''s scores, as in draws; NULL for other metrics, and for parts of earlier versions, which hold draws and scores together.';

CREATE VIEW chosen_curves AS
SELECT * FROM (SELECT * EXCLUDE (filename) FROM read_parquet('CHOSEN', filename = true) WHERE 'IS_WHOLE')
WHERE run_id IN (SELECT run_id FROM v_latest)
QUALIFY row_number() OVER (PARTITION BY run_id, chosen_by, reported, k, level ORDER BY recorded DESC) = 1;
COMMENT ON VIEW chosen_curves IS 'One row per cell, choosing score, reported score and K: best-of-K chosen by one score and reported in another, as `ksweep choose` recorded it, from the newest finished run of each cell.';
COMMENT ON COLUMN chosen_curves.chosen_by IS 'The score that chooses: error (the cell''s own AR), the label of a cell with another AR, or a metric; a minus in front turns its direction round.';
COMMENT ON COLUMN chosen_curves.reported IS 'The score in which the chosen draws are reported, named as in chosen_by.';
COMMENT ON COLUMN chosen_curves.measure IS 'fve: value is FVE by the reporting AR. mean: value is the mean of the reported metric over the chosen draws that have one.';
COMMENT ON COLUMN chosen_curves.value IS 'FVE or mean of the chosen draws.';
COMMENT ON COLUMN chosen_curves.value_low IS 'Lower end of the interval of value, from the bootstrap over documents.';
COMMENT ON COLUMN chosen_curves.value_high IS 'Upper end of the interval of value.';
COMMENT ON COLUMN chosen_curves.oracle IS 'The same where the reported score itself chooses; NULL for a metric of which no value is better.';
COMMENT ON COLUMN chosen_curves.oracle_low IS 'Lower end of the interval of oracle.';
COMMENT ON COLUMN chosen_curves.oracle_high IS 'Upper end of the interval of oracle.';
COMMENT ON COLUMN chosen_curves.difference IS 'value - oracle, paired over the same documents.';
COMMENT ON COLUMN chosen_curves.difference_low IS 'Lower end of the interval of difference.';
COMMENT ON COLUMN chosen_curves.difference_high IS 'Upper end of the interval of difference.';
COMMENT ON COLUMN chosen_curves.share_with_choice IS 'Share of the draws that did not fail which have a score to choose by; the others are chosen only among themselves.';
COMMENT ON COLUMN chosen_curves.share_with_value IS 'Share of the chosen draws that have a value: did not fail, or have a score of the reported metric.';
COMMENT ON COLUMN chosen_curves.num_replicates IS 'Bootstrap replicates behind the intervals.';
COMMENT ON COLUMN chosen_curves.note IS 'A limitation of the intervals.';
COMMENT ON COLUMN chosen_curves.chosen_by_key IS 'Key of the choosing scores: name of a directory under registry/scores/<draws_key>. NULL for errors of earlier versions.';
COMMENT ON COLUMN chosen_curves.reported_key IS 'Key of the reported scores.';
COMMENT ON COLUMN chosen_curves.recorded IS 'When this was last recorded, UTC.';
