-- Views over schema.sql and over the Parquet files of the draws store, made by ingest: DRAWS_PARTS stands for their path.
-- A column without a comment here has the name and the meaning of a column of schema.sql, and gets its comment from there.

CREATE VIEW v_latest AS
SELECT * FROM runs WHERE status = 'finished'
QUALIFY row_number() OVER (PARTITION BY cell_key ORDER BY finished DESC, run_id DESC) = 1;
COMMENT ON VIEW v_latest IS 'The newest finished run of each cell.';

CREATE VIEW curve_history AS
SELECT runs.cell, runs.label, coalesce(c.metric, 'fve') AS metric, c.k, c.fve, c.fve_low, c.fve_high, c.level, c.error, c.cosine, c.shuffled_fve,
       c.fve_over_successes, c.failure_rate AS all_failed_rate, c.num_activations, c.num_documents, c.num_draws, c.baseline, c.baseline_kind,
       runs.temperature, runs.layer, runs.failure_rate, runs.cut_off_rate,
       runs.sweep, runs.cell_key, runs.draws_key, runs.activations_key, c.run_id, runs.finished
FROM run_curves AS c JOIN runs USING (run_id);
COMMENT ON VIEW curve_history IS 'One row per finished run and K: every curve ever measured.';
COMMENT ON COLUMN curve_history.all_failed_rate IS 'Chance that all of k draws fail, mean over activations, fraction.';
COMMENT ON COLUMN curve_history.failure_rate IS 'Draws of the cell without a usable explanation, fraction.';

CREATE VIEW curves AS
SELECT * FROM curve_history WHERE run_id IN (SELECT run_id FROM v_latest);
COMMENT ON VIEW curves IS 'One row per cell and K: the curve of the newest finished run of each cell.';
COMMENT ON COLUMN curves.all_failed_rate IS 'Chance that all of k draws fail, mean over activations, fraction.';
COMMENT ON COLUMN curves.failure_rate IS 'Draws of the cell without a usable explanation, fraction.';

CREATE VIEW controls AS
SELECT runs.cell, runs.label, c.control, c.k, c.value, c.num_activations, c.note, runs.temperature, runs.sweep, runs.cell_key, c.run_id
FROM run_controls AS c JOIN v_latest AS runs USING (run_id);
COMMENT ON VIEW controls IS 'One row per cell and control, of the newest finished run of each cell.';

CREATE VIEW reference_quantities AS
SELECT runs.cell, runs.label, c.quantity, c.role, c.k, c.value, c.low, c.high, c.bca_low, c.bca_high, c.std, c.bias, c.spread,
       c.num_activations, runs.temperature, runs.sweep, runs.cell_key, c.run_id
FROM run_reference AS c JOIN v_latest AS runs USING (run_id);
COMMENT ON VIEW reference_quantities IS 'One row per cell, quantity of the reference sweep, role and K, of the newest finished run of each cell.';

CREATE VIEW v_token_roles AS
WITH counted AS (
    SELECT cell, label, run_id, sweep, 'evaluated' AS tokens, selected_token_roles AS roles FROM v_latest
    UNION ALL SELECT cell, label, run_id, sweep, 'all', token_roles FROM v_latest
)
SELECT cell, label, tokens, r.key AS role, r.value AS num_tokens,
       CASE WHEN r.key <> 'pad' THEN r.value / nullif(roles['total'] - roles['pad'], 0) END AS share, sweep, run_id
FROM (SELECT *, unnest(map_entries(roles)) AS r FROM counted)
WHERE r.key <> 'total';
COMMENT ON VIEW v_token_roles IS 'Tokens by role, of the newest finished run of each cell; cells without a known chat format are not in it.';
COMMENT ON COLUMN v_token_roles.tokens IS 'evaluated: the positions that were measured. all: every token of the rows of text that were looked at.';
COMMENT ON COLUMN v_token_roles.role IS 'Whose token: user, assistant, system, special, other, pad.';
COMMENT ON COLUMN v_token_roles.num_tokens IS 'Tokens of the role.';
COMMENT ON COLUMN v_token_roles.share IS 'Fraction of the tokens that are not padding; NULL for pad.';

CREATE VIEW draws AS
WITH parts AS (
    SELECT *, parse_path(filename)[-2] AS draws_key
    FROM read_parquet('DRAWS_PARTS', union_by_name = true, filename = true)
    -- Two sweeps at once may both have taken a draw: it is in two parts that overlap, and counts once.
    QUALIFY row_number() OVER (PARTITION BY draws_key, activation, draw ORDER BY filename) = 1
), cells AS (
    SELECT draws_key, arg_max(cell, finished) AS cell FROM v_latest WHERE draws_key IS NOT NULL GROUP BY draws_key
)
SELECT cells.cell, p.draws_key, p.activation, p.draw,
       row_number() OVER (PARTITION BY p.draws_key, p.activation ORDER BY p.error NULLS LAST, p.draw) AS rank,
       p.error, p.cosine, p.explanation, p.text, p.num_tokens, p.finish, p.parse, p.log_probability,
       p.shuffled_error, p.shuffled_activation,
       p.row_id, p.document, p.position, p.context, p.norm, p.token_ids
FROM parts AS p LEFT JOIN cells USING (draws_key);
COMMENT ON VIEW draws IS 'One row per draw: a sampled explanation and its score, straight from the Parquet files of the draws store (registry/draws). Draws of running and failed cells are in it too.';
COMMENT ON COLUMN draws.cell IS 'Newest finished cell that used these draws; NULL while none has finished. Cells that differ only in counts or scoring share draws.';
COMMENT ON COLUMN draws.draws_key IS 'Identity of the draws: directory under registry/draws.';
COMMENT ON COLUMN draws.activation IS 'Index of the activation within its store, 0-based; a cell over N activations uses the first N.';
COMMENT ON COLUMN draws.draw IS 'Index of the draw, 0-based; the same draw whatever the number of ranks. A cell of N draws uses the first N.';
COMMENT ON COLUMN draws.rank IS 'Place of the draw by error among all stored draws of its activation, 1 is best; failed draws come last.';
COMMENT ON COLUMN draws.error IS 'Error of the reconstruction; NLA pairs: 2 (1 - cosine). NULL when the draw failed.';
COMMENT ON COLUMN draws.cosine IS 'Cosine of the reconstruction with its activation; NULL when the draw failed.';
COMMENT ON COLUMN draws.explanation IS 'The explanation that was scored, cut out of text; NULL when none was found.';
COMMENT ON COLUMN draws.text IS 'What the AV wrote, tags included.';
COMMENT ON COLUMN draws.num_tokens IS 'Length of what the AV wrote, tokens.';
COMMENT ON COLUMN draws.finish IS 'Why the AV stopped.';
COMMENT ON COLUMN draws.parse IS 'Whether an explanation was found in text, or why not: the cause of a failed draw.';
COMMENT ON COLUMN draws.log_probability IS 'Log probability of the sampled tokens under the AV at its sampling temperature, nats.';
COMMENT ON COLUMN draws.shuffled_error IS 'Control: error of this draw against another activation, shuffled_activation.';
COMMENT ON COLUMN draws.shuffled_activation IS 'The other activation, from another document where there is one.';
COMMENT ON COLUMN draws.row_id IS 'Row of text and position that the activation comes from.';
COMMENT ON COLUMN draws.document IS 'Document that the activation comes from: cluster of the bootstrap.';
COMMENT ON COLUMN draws.position IS 'Token position of the activation in its row of text, 0-based.';
COMMENT ON COLUMN draws.context IS 'Text around that position.';
COMMENT ON COLUMN draws.norm IS 'Length of the reconstruction as the AR gave it, before scaling; NULL when the draw failed.';
COMMENT ON COLUMN draws.token_ids IS 'Token ids that the AV sampled.';

CREATE VIEW best_draws AS
SELECT * EXCLUDE (rank) FROM draws WHERE rank = 1 AND error IS NOT NULL;
COMMENT ON VIEW best_draws IS 'The best of all stored draws of each activation; activations all of whose draws failed are not in it.';

CREATE VIEW v_temperature AS
WITH siblings AS (
    SELECT run_id, av, ar, checkpoint, model,
           -- specs written before there were checkpoints lack the field
           md5(concat(checkpoint, json_merge_patch(spec, '{"sampling": {"temperature": null}, "autoencoder": {"checkpoint": null}}')))
           AS setting FROM v_latest
)
SELECT s.setting, c.k, c.temperature, c.fve, c.fve_low, c.fve_high,
       rank() OVER (PARTITION BY s.setting, c.k ORDER BY c.fve DESC) AS place,
       c.shuffled_fve, c.num_activations, c.num_documents, c.baseline, c.baseline_kind,
       s.av, s.ar, s.checkpoint, s.model, c.layer, c.cell, c.label, c.sweep, c.run_id
FROM curves AS c JOIN siblings AS s USING (run_id);
COMMENT ON VIEW v_temperature IS 'FVE by temperature: cells that differ in nothing else share a setting. The best of several temperatures on the same activations is flattered by the choice (winner''s curse): look at the intervals.';
COMMENT ON COLUMN v_temperature.setting IS 'Fingerprint of the spec without its temperature.';
COMMENT ON COLUMN v_temperature.place IS 'Place of the temperature by FVE at this K within its setting, 1 is best.';

CREATE VIEW v_failures AS
SELECT r.run_id, r.cell, r.sweep, r.status, r.error_class, r.error_type, r.error_message,
       coalesce(r.finished < l.finished, false) AS superseded,
       r.started, r.finished, r.host, r.device, r.tracebacks, a.ranks, r.job, r.start, r.cell_key
FROM runs AS r LEFT JOIN v_latest AS l USING (cell_key) LEFT JOIN (
    SELECT job, start, list({
        'rank': rank, 'host': host, 'device': device, 'gpu': gpu, 'phase': phase, 'status': status, 'error_class': error_class,
        'message': message, 'traceback': traceback, 'last_log_lines': last_log_lines} ORDER BY rank) AS ranks
    FROM attempts GROUP BY job, start
) AS a ON a.job = r.job AND a.start = r.start
WHERE r.status <> 'finished'
ORDER BY r.finished DESC;
COMMENT ON VIEW v_failures IS 'Runs that did not finish, newest first.';
COMMENT ON COLUMN v_failures.ranks IS 'Every rank of the start that came to nothing, from attempts: host, device, gpu, phase, status, error_class, message, traceback, last_log_lines.';
COMMENT ON COLUMN v_failures.superseded IS 'Whether a later run of the same cell finished.';

CREATE VIEW v_draw_failures AS
SELECT cell, label, f.key AS cause, f.value AS num_failed_draws, f.value / (num_activations * num_draws) AS failure_rate,
       temperature, sweep, run_id
FROM (SELECT *, unnest(map_entries(failures)) AS f FROM v_latest);
COMMENT ON VIEW v_draw_failures IS 'Failed draws by cell and cause, of the newest finished run of each cell.';
COMMENT ON COLUMN v_draw_failures.cause IS 'Why the draws failed.';
COMMENT ON COLUMN v_draw_failures.num_failed_draws IS 'Draws that failed for this cause.';
COMMENT ON COLUMN v_draw_failures.failure_rate IS 'Draws that failed for this cause over all draws of the cell, fraction.';
