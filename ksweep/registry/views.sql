-- Views over the tables of schema.sql. A column without a comment here means what the column of that name means in schema.sql, and
-- inherits its comment from there. They are the same in every registry; file_views.sql has those that are not.

CREATE VIEW v_latest AS
-- Two runs are of one cell when draws and spec are the same, even if their keys name different versions of the statistics.
SELECT * FROM runs WHERE status = 'finished'
QUALIFY row_number() OVER (PARTITION BY coalesce(draws_key || md5(spec), cell_key) ORDER BY finished DESC, run_id DESC) = 1;
COMMENT ON VIEW v_latest IS 'The newest finished run of each cell. Runs that differ only in the version of the statistics belong to the same cell.';

CREATE VIEW curve_history AS
SELECT runs.cell, runs.label, coalesce(c.metric, 'fve') AS metric, c.k, c.fve, c.fve_low, c.fve_high, c.band_low, c.band_high, c.level, c.error, c.cosine, c.shuffled_fve,
       c.fve_over_successes, c.failure_rate AS all_failed_rate, c.num_activations, c.num_documents, c.effective_documents, c.num_draws,
       c.baseline, c.baseline_kind, runs.baseline_from_mean, (runs.spec->>'$.scoring.num_replicates')::INTEGER AS num_replicates, runs.temperature, runs.step, runs.layer, runs.failure_rate, runs.cut_off_rate,
       runs.sweep, runs.cell_key, runs.draws_key, runs.activations_key, c.run_id, runs.finished
FROM run_curves AS c JOIN runs USING (run_id);
COMMENT ON VIEW curve_history IS 'One row per finished run and K: every curve ever measured.';
COMMENT ON COLUMN curve_history.num_replicates IS 'Bootstrap replicates behind the interval; NULL in imported runs.';
COMMENT ON COLUMN curve_history.all_failed_rate IS 'Probability that all of k draws fail, mean over activations.';
COMMENT ON COLUMN curve_history.failure_rate IS 'Fraction of the cell''s draws that gave no usable explanation.';

CREATE VIEW curves AS
SELECT * FROM curve_history WHERE run_id IN (SELECT run_id FROM v_latest);
COMMENT ON VIEW curves IS 'One row per cell and K: the curve of the newest finished run of each cell.';
COMMENT ON COLUMN curves.num_replicates IS 'Bootstrap replicates behind the interval; NULL in imported runs.';
COMMENT ON COLUMN curves.all_failed_rate IS 'Probability that all of k draws fail, mean over activations.';
COMMENT ON COLUMN curves.failure_rate IS 'Fraction of the cell''s draws that gave no usable explanation.';

CREATE VIEW controls AS
SELECT runs.cell, runs.label, c.control, c.k, c.value, c.num_activations, c.note, runs.temperature, runs.sweep, runs.cell_key, c.run_id
FROM run_controls AS c JOIN v_latest AS runs USING (run_id);
COMMENT ON VIEW controls IS 'One row per cell and control, from the newest finished run of each cell.';

CREATE VIEW metrics AS
SELECT runs.cell, runs.label, m.breakdown, m.part, m.place, m.against, m.k, m.fve, m.fve_low, m.fve_high, m.level, m.error,
       m.median_error, m.worst_share, m.baseline, m.baseline_kind, m.failure_rate, m.all_failed_rate, m.num_activations,
       m.num_documents, m.effective_documents, (runs.spec->>'$.scoring.num_replicates')::INTEGER AS num_replicates, runs.temperature, runs.sweep, runs.cell_key, m.run_id
FROM run_metrics AS m JOIN v_latest AS runs USING (run_id);
COMMENT ON VIEW metrics IS 'One row per cell, group of activations (by role, position, norm; all), baseline (against) and K, from the newest finished run of each cell.';

CREATE VIEW examples AS
SELECT runs.cell, runs.label, e.rank, e.number, e.error, e.cosine, e.explanation, e.text, e.parse, e.context, e.activation, e.draw,
       e.document, e.position, runs.temperature, runs.sweep, runs.cell_key, e.run_id
FROM run_examples AS e JOIN v_latest AS runs USING (run_id);
COMMENT ON COLUMN metrics.num_replicates IS 'Bootstrap replicates behind the interval; NULL in imported runs.';
COMMENT ON VIEW examples IS 'Explanations beside the text that they explain, for the activations where the newest finished run of each cell is best, middling and worst.';

CREATE VIEW cells AS
WITH newest AS (
    SELECT * FROM runs QUALIFY row_number() OVER (PARTITION BY cell_key ORDER BY finished DESC, run_id DESC) = 1
), counted AS (
    SELECT cell_key, count(*) AS num_runs, count(*) FILTER (status = 'finished') AS num_finished,
           count(*) FILTER (status = 'failed') AS num_failed, list(DISTINCT sweep ORDER BY sweep) AS sweeps
    FROM runs GROUP BY cell_key
), ends AS (
    SELECT run_id, arg_max(k, k) AS k, arg_max(fve, k) AS fve, arg_max(fve_low, k) AS fve_low, arg_max(fve_high, k) AS fve_high
    FROM run_curves GROUP BY run_id
)
SELECT n.cell, n.label, n.status, c.num_runs, c.num_finished, c.num_failed, l.run_id, l.finished, e.k, e.fve, e.fve_low, e.fve_high,
       n.temperature, n.step, n.layer, coalesce(l.num_activations, n.num_activations) AS num_activations, coalesce(l.num_draws, n.num_draws) AS num_draws,
       n.av, n.ar, n.checkpoint, n.model, n.text_source, n.vectors, c.sweeps, n.spec, n.cell_key, n.draws_key, n.scores_key, n.activations_key
FROM newest AS n JOIN counted AS c USING (cell_key) LEFT JOIN v_latest AS l USING (cell_key) LEFT JOIN ends AS e ON e.run_id = l.run_id;
COMMENT ON VIEW cells IS 'One row per cell that was ever run: its settings, how often it ran, and the last point of its newest finished curve.';
COMMENT ON COLUMN cells.status IS 'How the cell''s newest run ended: finished, failed or stopped.';
COMMENT ON COLUMN cells.num_runs IS 'Runs of the cell, whatever their status.';
COMMENT ON COLUMN cells.num_finished IS 'Runs that finished.';
COMMENT ON COLUMN cells.num_failed IS 'Runs that failed.';
COMMENT ON COLUMN cells.run_id IS 'Newest finished run of the cell; NULL while there is none.';
COMMENT ON COLUMN cells.finished IS 'When that run ended, UTC.';
COMMENT ON COLUMN cells.k IS 'Largest K of that run.';
COMMENT ON COLUMN cells.sweeps IS 'Sweeps that have requested the cell.';

CREATE VIEW v_sweeps AS
SELECT sweep, question, num_cells, asked, argv, git_commit, git_dirty, number, sweep_id FROM sweeps
QUALIFY row_number() OVER (PARTITION BY sweep ORDER BY number DESC, asked DESC, sweep_id DESC) = 1;
COMMENT ON VIEW v_sweeps IS 'The newest version of each sweep. Sweeps of ksweep versions that did not record them, and imported ones, are missing.';

-- The training step that a label states; where it states none, another. The label of a cell depends on the sweep.
CREATE MACRO step_in(label, otherwise) AS
    coalesce(try_cast(nullif(regexp_extract(label, '(?:^|, )step=(\d+)(?:,|$)', 1), '') AS BIGINT), otherwise);

CREATE VIEW v_sweep_cells AS
WITH asked AS (
    SELECT s.sweep, c.place, c.label, c.cell_key FROM v_sweeps AS s JOIN sweep_cells AS c USING (sweep_id)
), newest AS (
    SELECT * FROM runs QUALIFY row_number() OVER (PARTITION BY cell_key ORDER BY finished DESC, run_id DESC) = 1
), unrecorded AS (
    -- A sweep of an earlier version may have been run again with other settings: of cells that share label, models and text only
    -- the newest counts. Earlier versions gave NLA pairs of one name the same label: the paths tell those cells apart.
    SELECT sweep, label, cell_key, finished, run_id FROM runs WHERE sweep NOT IN (SELECT sweep FROM sweeps)
    QUALIFY row_number() OVER (
        PARTITION BY sweep, label, av, ar, checkpoint, model, text_source, vectors, layer
        ORDER BY status = 'finished' DESC, finished DESC, run_id DESC
    ) = 1
), members AS (
    SELECT sweep, place, label, cell_key FROM asked
    UNION ALL SELECT sweep, row_number() OVER (PARTITION BY sweep ORDER BY finished, run_id) - 1, label, cell_key FROM unrecorded
)
SELECT m.sweep, m.place, m.label, coalesce(l.cell, n.cell) AS cell, coalesce(n.status, 'not run') AS status, l.run_id, l.finished, l.temperature,
       step_in(m.label, l.step) AS step, n.sweep AS run_by, m.cell_key
FROM members AS m LEFT JOIN newest AS n USING (cell_key) LEFT JOIN v_latest AS l USING (cell_key);
COMMENT ON VIEW v_sweep_cells IS 'The cells of the newest version of each sweep, in its order, whichever sweep computed them; for sweeps that were not recorded, the cells of their runs.';
COMMENT ON COLUMN v_sweep_cells.status IS 'How the newest run of the cell ended: finished, failed or stopped; not run: the cell has no run.';
COMMENT ON COLUMN v_sweep_cells.run_id IS 'Newest finished run of the cell; NULL while there is none.';
COMMENT ON COLUMN v_sweep_cells.finished IS 'When that run ended, UTC.';
COMMENT ON COLUMN v_sweep_cells.run_by IS 'Sweep that requested the newest run of the cell.';

-- The quantile q of a sorted list, linearly interpolated as in NumPy.
CREATE MACRO sorted_quantile(numbers, q) AS
    numbers[floor((len(numbers) - 1) * q)::BIGINT + 1] + ((len(numbers) - 1) * q - floor((len(numbers) - 1) * q))
    * (numbers[ceil((len(numbers) - 1) * q)::BIGINT + 1] - numbers[floor((len(numbers) - 1) * q)::BIGINT + 1]);

-- The two quantiles that bound an interval. DuckDB's own function takes only constant levels, but is twice as fast as sorting.
CREATE MACRO outer_quantiles(numbers, level) AS
    CASE WHEN level = 0.95 THEN list_aggregate(numbers, 'quantile_cont', [0.025, 0.975])
    ELSE [sorted_quantile(list_sort(numbers), (1 - level) / 2), sorted_quantile(list_sort(numbers), (1 + level) / 2)] END;

-- The two quantiles of the difference of two lists of shared replicates.
CREATE MACRO paired_quantiles(replicates, others, level) AS
    outer_quantiles(list_transform(replicates, lambda x, i: x::DOUBLE - others[i]::DOUBLE), level);

-- One end of an interval, equal to that of stats.interval_ends: side is -1 for the lower end, 1 for the upper end.
CREATE MACRO interval_end(estimate, quantiles, reach, side) AS
    estimate + 'ASYMMETRY'::DOUBLE * ((quantiles[1] + quantiles[2]) / 2 - estimate) + side * reach * (quantiles[2] - quantiles[1]) / 2;

CREATE VIEW v_pairs AS
WITH measured AS MATERIALIZED (
    SELECT runs.cell, runs.label, runs.temperature, runs.sweep, runs.cell_key, runs.run_id, runs.activations_key, runs.num_activations,
           runs.num_documents, runs.effective_documents, runs.interval_reach, runs.baseline_kind, c.level, c.k, c.fve, c.baseline,
           len(c.replicates) AS num_replicates, runs.scoring_kind, spec->'$.scoring.seed' AS seed,
           spec->>'$.scoring.selection' AS selection, spec->'$.scoring.failed_error' AS failed_error
    FROM v_latest AS runs JOIN run_curves AS c USING (run_id) WHERE c.replicates IS NOT NULL
)
SELECT a.* EXCLUDE (scoring_kind, seed, selection, failed_error), b.cell AS other_cell, b.label AS other_label,
       b.temperature AS other_temperature, b.sweep AS other_sweep, b.run_id AS other_run_id, b.fve AS other_fve,
       a.fve - b.fve AS difference
FROM measured AS a JOIN measured AS b
USING (activations_key, num_activations, k, level, num_replicates, seed, selection, failed_error, scoring_kind, baseline_kind)
-- The same baseline, measured on two machines, may differ in its last bits.
WHERE a.cell_key <> b.cell_key AND abs(a.baseline - b.baseline) <= 1e-9 * a.baseline;
COMMENT ON VIEW v_pairs IS 'Pairs of cells that can be compared, one row per pair (in either order) and K: v_compare without its intervals, which take a tenth of a millisecond each to compute.';
COMMENT ON COLUMN v_pairs.num_replicates IS 'Bootstrap replicates that both runs share.';
COMMENT ON COLUMN v_pairs.other_cell IS 'The cell that is subtracted.';
COMMENT ON COLUMN v_pairs.other_label IS 'Label of the other cell in its sweep.';
COMMENT ON COLUMN v_pairs.other_temperature IS 'Sampling temperature of the other cell.';
COMMENT ON COLUMN v_pairs.other_sweep IS 'Sweep of the other run.';
COMMENT ON COLUMN v_pairs.other_run_id IS 'The other run.';
COMMENT ON COLUMN v_pairs.other_fve IS 'FVE of the other cell at this K.';
COMMENT ON COLUMN v_pairs.difference IS 'fve - other_fve.';

CREATE VIEW v_compare AS
WITH replicated AS (
    SELECT p.*, paired_quantiles(c.replicates, d.replicates, p.level) AS quantiles
    FROM v_pairs AS p JOIN run_curves AS c ON c.run_id = p.run_id AND c.k = p.k
    JOIN run_curves AS d ON d.run_id = p.other_run_id AND d.k = p.k
)
SELECT cell, other_cell, label, other_label, k, difference, interval_end(difference, quantiles, interval_reach, -1) AS difference_low,
       interval_end(difference, quantiles, interval_reach, 1) AS difference_high,
       fve, other_fve, level, temperature, other_temperature, baseline, baseline_kind, num_activations, num_documents,
       effective_documents, num_replicates, sweep, other_sweep, run_id, other_run_id, activations_key
FROM replicated;
COMMENT ON VIEW v_compare IS 'Paired differences of FVE: one row per pair of cells over the same activations (in either order) and K (powers of two and the largest), from the newest finished runs. Bootstrap over documents with shared replicates, so that the variation of documents, which both cells share, cancels; the numbers equal those of ksweep.analysis.compare and `ksweep diff`. Cells that differ in baseline, selection, failed_error, seed or level are left out because their FVEs do not mean the same; runs recorded before replicates were kept are left out too (`ksweep diff` compares those). Name the cells in a large registry: it has many pairs.';
COMMENT ON COLUMN v_compare.difference_low IS 'Lower end of the interval of difference; NULL for fewer than two documents.';
COMMENT ON COLUMN v_compare.difference_high IS 'Upper end of the interval of difference.';

CREATE VIEW v_gain AS
WITH doubled AS (
    SELECT runs.cell, runs.label, c.k, d.k AS doubled_k, d.fve - c.fve AS gain, c.fve, d.fve AS doubled_fve, c.level,
           d.shuffled_fve - c.shuffled_fve AS shuffled_gain, runs.interval_reach, runs.temperature, runs.sweep, runs.cell_key, runs.run_id,
           paired_quantiles(d.replicates, c.replicates, c.level) AS quantiles
    FROM v_latest AS runs JOIN run_curves AS c USING (run_id) JOIN run_curves AS d ON d.run_id = c.run_id AND d.k = 2 * c.k
    WHERE len(c.replicates) = len(d.replicates)
)
SELECT cell, label, k, doubled_k, gain, interval_end(gain, quantiles, interval_reach, -1) AS gain_low,
       interval_end(gain, quantiles, interval_reach, 1) AS gain_high, level, fve, doubled_fve, shuffled_gain,
       temperature, sweep, cell_key, run_id
FROM doubled;
COMMENT ON VIEW v_gain IS 'Gain in FVE from doubling K, paired within the cell: one row per cell and K whose double was measured too (powers of two), from runs that keep their replicates.';
COMMENT ON COLUMN v_gain.doubled_k IS 'Twice k.';
COMMENT ON COLUMN v_gain.gain IS 'FVE at doubled_k minus FVE at k.';
COMMENT ON COLUMN v_gain.gain_low IS 'Lower end of the interval of gain, from the bootstrap over documents.';
COMMENT ON COLUMN v_gain.gain_high IS 'Upper end of the interval of gain.';
COMMENT ON COLUMN v_gain.doubled_fve IS 'FVE at doubled_k.';
COMMENT ON COLUMN v_gain.shuffled_gain IS 'The same gain for draws of another activation: what selection alone brings.';

CREATE VIEW v_throughput AS
SELECT host, device, num_ranks, sweep, cell, label, num_draws_sampled, num_tokens_sampled, tokens_per_second,
       tokens_per_second / num_ranks AS tokens_per_second_per_rank, mean_tokens,
       list_sum(map_values(seconds)) AS total_seconds,
       coalesce(seconds['drawing'], 0) + coalesce(seconds['waiting'], 0) AS drawing_seconds,
       num_draws_sampled / nullif(coalesce(seconds['drawing'], 0) + coalesce(seconds['waiting'], 0), 0) AS draws_per_second,
       seconds, git_commit, packages['torch'] AS torch_version, started, finished, cell_key, run_id
FROM runs WHERE status = 'finished' AND num_draws_sampled > 0;
COMMENT ON VIEW v_throughput IS 'Speed of finished runs that sampled draws, with machine and device.';
COMMENT ON COLUMN v_throughput.tokens_per_second_per_rank IS 'tokens_per_second / num_ranks.';
COMMENT ON COLUMN v_throughput.total_seconds IS 'Wall-clock seconds of all phases.';
COMMENT ON COLUMN v_throughput.drawing_seconds IS 'Wall-clock seconds of sampling draws, and of waiting for the last rank to finish its own.';
COMMENT ON COLUMN v_throughput.draws_per_second IS 'Draws sampled per second of drawing_seconds, all ranks together.';
COMMENT ON COLUMN v_throughput.torch_version IS 'Version of torch.';

CREATE VIEW reference_quantities AS
SELECT runs.cell, runs.label, c.quantity, c.role, c.k, c.value, c.low, c.high, c.bca_low, c.bca_high, c.std, c.bias, c.spread,
       c.num_activations, runs.temperature, runs.sweep, runs.cell_key, c.run_id
FROM run_reference AS c JOIN v_latest AS runs USING (run_id);
COMMENT ON VIEW reference_quantities IS 'One row per cell, quantity of the reference sweep, role and K, from the newest finished run of each cell.';

CREATE VIEW v_token_roles AS
WITH counted AS (
    SELECT cell, label, run_id, sweep, 'evaluated' AS tokens, selected_token_roles AS roles FROM v_latest
    UNION ALL SELECT cell, label, run_id, sweep, 'all', token_roles FROM v_latest
)
SELECT cell, label, tokens, r.key AS role, r.value AS num_tokens,
       CASE WHEN r.key <> 'pad' THEN r.value / nullif(roles['total'] - roles['pad'], 0) END AS share, sweep, run_id
FROM (SELECT *, unnest(map_entries(roles)) AS r FROM counted)
WHERE r.key <> 'total';
COMMENT ON VIEW v_token_roles IS 'Number of tokens by role, from the newest finished run of each cell; cells whose chat format is unknown are left out.';
COMMENT ON COLUMN v_token_roles.tokens IS 'evaluated: the evaluated positions. all: every token of the rows of text that were read.';
COMMENT ON COLUMN v_token_roles.role IS 'Role of the tokens: user, assistant, system, special, other, pad.';
COMMENT ON COLUMN v_token_roles.num_tokens IS 'Number of tokens with the role.';
COMMENT ON COLUMN v_token_roles.share IS 'Fraction of all tokens but padding; NULL for pad.';

CREATE VIEW v_temperature AS
WITH siblings AS (
    SELECT run_id, av, ar, checkpoint, model,
           -- Specs of earlier versions lack fields that were added since.
           md5(concat(checkpoint, spec->>'$.autoencoder.ar_dtype', coalesce(json_merge_patch('{}', spec->'$.autoencoder.prompting'), '{}'),
               json_merge_patch(spec, '{"sampling": {"temperature": null}, "scoring": {"groups": null, "metrics": null},
                                        "autoencoder": {"checkpoint": null, "ar_dtype": null, "prompting": null}}'))) AS setting
    FROM v_latest
)
SELECT s.setting, c.k, c.temperature, c.fve, c.fve_low, c.fve_high,
       rank() OVER (PARTITION BY s.setting, c.k ORDER BY c.fve DESC) AS place,
       c.shuffled_fve, c.num_activations, c.num_documents, c.effective_documents, c.baseline, c.baseline_kind, c.level, c.num_replicates,
       s.av, s.ar, s.checkpoint, s.model, c.layer, c.cell, c.label, c.sweep, c.run_id
FROM curves AS c JOIN siblings AS s USING (run_id);
COMMENT ON VIEW v_temperature IS 'FVE by temperature: cells that differ in nothing else share a setting. Choosing the best temperature and measuring it on the same activations overestimates its FVE (winner''s curse): look at the intervals.';
COMMENT ON COLUMN v_temperature.num_replicates IS 'Bootstrap replicates behind the interval; NULL in imported runs.';
COMMENT ON COLUMN v_temperature.setting IS 'Fingerprint of the spec without its temperature.';
COMMENT ON COLUMN v_temperature.place IS 'Rank of the temperature by FVE at this K within its setting, 1 is best.';

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
COMMENT ON COLUMN v_failures.ranks IS 'Every rank of the job''s start in which the run failed, from attempts: host, device, gpu, phase, status, error_class, message, traceback, last_log_lines.';
COMMENT ON COLUMN v_failures.superseded IS 'Whether a later run of the same cell has finished.';

CREATE VIEW v_draw_failures AS
SELECT cell, label, f.key AS cause, f.value AS num_failed_draws, f.value / (num_activations * num_draws) AS failure_rate,
       temperature, sweep, run_id
FROM (SELECT *, unnest(map_entries(failures)) AS f FROM v_latest);
COMMENT ON VIEW v_draw_failures IS 'Number of failed draws by cell and cause, from the newest finished run of each cell.';
COMMENT ON COLUMN v_draw_failures.cause IS 'Why the draws failed: the values of draws.parse.';
COMMENT ON COLUMN v_draw_failures.num_failed_draws IS 'Draws that failed for this cause.';
COMMENT ON COLUMN v_draw_failures.failure_rate IS 'Fraction of all draws of the cell that failed for this cause.';
