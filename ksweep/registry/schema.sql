-- The data dictionary: every table of registry/ksweep.duckdb and what each column means. views.sql and file_views.sql continue it.
--
--     select table_name, column_name, data_type, comment from duckdb_columns() where schema_name = 'main';
--
-- The database is an index over the files of the registry: it can be deleted, and `ksweep db rebuild` makes it again, row for row.
-- Keep tables of your own in another database and ATTACH this one: they would not survive here. NULL means "not known", never zero.

CREATE TABLE meta (
    key VARCHAR PRIMARY KEY,
    value VARCHAR NOT NULL
);
COMMENT ON TABLE meta IS 'One row per property of this database file.';
COMMENT ON COLUMN meta.key IS 'schema: fingerprint of the SQL that made the database. root: absolute path of the registry when it was made.';
COMMENT ON COLUMN meta.value IS 'Value of the property, as text.';

CREATE TABLE runs (
    run_id VARCHAR PRIMARY KEY,
    cell VARCHAR NOT NULL,
    label VARCHAR NOT NULL,
    sweep VARCHAR NOT NULL,
    status VARCHAR NOT NULL,
    started TIMESTAMP NOT NULL,
    finished TIMESTAMP NOT NULL,
    temperature DOUBLE,
    top_p DOUBLE,
    max_new_tokens INTEGER,
    sampling_seed BIGINT,
    num_draws INTEGER,
    num_activations BIGINT,
    num_documents BIGINT,
    effective_documents DOUBLE,
    layer INTEGER,
    d_model INTEGER,
    av VARCHAR,
    ar VARCHAR,
    checkpoint VARCHAR,
    base VARCHAR,
    step BIGINT,
    dtype VARCHAR,
    model VARCHAR,
    text_source VARCHAR,
    vectors VARCHAR,
    positions VARCHAR,
    scoring_kind VARCHAR,
    baseline DOUBLE,
    baseline_kind VARCHAR,
    baseline_from_mean DOUBLE,
    baseline_num_activations BIGINT,
    fve_over_successes DOUBLE,
    num_failed_draws BIGINT,
    failure_rate DOUBLE,
    failures MAP(VARCHAR, BIGINT),
    cut_off_rate DOUBLE,
    distinct_text_fraction DOUBLE,
    cjk_fraction DOUBLE,
    mean_tokens DOUBLE,
    draws_bytes BIGINT,
    scores_bytes BIGINT,
    num_draws_sampled BIGINT,
    num_draws_reused BIGINT,
    num_draws_scored BIGINT,
    num_tokens_sampled BIGINT,
    tokens_per_second DOUBLE,
    token_roles MAP(VARCHAR, BIGINT),
    selected_token_roles MAP(VARCHAR, BIGINT),
    notes STRUCT(about VARCHAR, text VARCHAR)[],
    seconds MAP(VARCHAR, DOUBLE),
    job VARCHAR,
    start INTEGER,
    error_class VARCHAR,
    error_type VARCHAR,
    error_message VARCHAR,
    tracebacks VARCHAR[],
    host VARCHAR,
    device VARCHAR,
    num_ranks INTEGER,
    revisions VARCHAR[],
    git_commit VARCHAR,
    git_dirty BOOLEAN,
    argv VARCHAR[],
    packages MAP(VARCHAR, VARCHAR),
    engine MAP(VARCHAR, VARCHAR),
    spec JSON NOT NULL,
    resources JSON,
    cell_key VARCHAR NOT NULL,
    draws_key VARCHAR,
    scores_key VARCHAR,
    activations_key VARCHAR,
    interval_reach DOUBLE
);
COMMENT ON TABLE runs IS 'One row per run: an evaluation of a cell that finished, failed or was stopped. All runs ever recorded; v_latest keeps the newest finished run of each cell.';
COMMENT ON COLUMN runs.run_id IS 'Name of the run''s directory under registry/landing: UTC time, first digits of cell_key, random digits.';
COMMENT ON COLUMN runs.cell IS 'Display name of the cell, unique to it.';
COMMENT ON COLUMN runs.label IS 'Label for legends: the settings in which the cell differs from the others of its sweep, e.g. temperature=0.7.';
COMMENT ON COLUMN runs.sweep IS 'Name of the sweep that requested the run.';
COMMENT ON COLUMN runs.status IS 'finished: the run has a curve. failed: it ended with an error. stopped: it was interrupted (time limit, preemption) and can be continued.';
COMMENT ON COLUMN runs.started IS 'When the run began, UTC.';
COMMENT ON COLUMN runs.finished IS 'When the run ended, whatever its status, UTC.';
COMMENT ON COLUMN runs.temperature IS 'Sampling temperature of the AV; 0 is greedy.';
COMMENT ON COLUMN runs.top_p IS 'Probability mass that sampling was restricted to; 1 keeps every token.';
COMMENT ON COLUMN runs.max_new_tokens IS 'Maximum length of an explanation, tokens; longer ones are cut off.';
COMMENT ON COLUMN runs.sampling_seed IS 'Seed of the draws.';
COMMENT ON COLUMN runs.num_draws IS 'Draws per activation; the largest K that can be reported.';
COMMENT ON COLUMN runs.num_activations IS 'Activations evaluated.';
COMMENT ON COLUMN runs.num_documents IS 'Documents that the activations come from: the clusters of the bootstrap.';
COMMENT ON COLUMN runs.effective_documents IS 'Effective number of documents: (sum n)^2 / sum n^2, n the activations of each document. The fewer they are, the wider are the intervals. NULL in runs recorded before it was kept.';
COMMENT ON COLUMN runs.layer IS 'Block of the base model whose output was verbalised, 0-based.';
COMMENT ON COLUMN runs.d_model IS 'Width of the activations, dimensions.';
COMMENT ON COLUMN runs.av IS 'Activation verbalizer (AV) as given: path or hub id.';
COMMENT ON COLUMN runs.ar IS 'Activation reconstructor (AR) as given: path or hub id.';
COMMENT ON COLUMN runs.checkpoint IS 'Talkative-autoencoder file or directory as given, used instead of av and ar. NULL for an NLA pair.';
COMMENT ON COLUMN runs.base IS 'Base model of PEFT adapters or of a checkpoint as given; NULL means the base model that the checkpoint names.';
COMMENT ON COLUMN runs.step IS 'Training step of the checkpoints: the one in the label (step=500) or else the only one that the paths of AV, AR or checkpoint state (iter_0000500).';
COMMENT ON COLUMN runs.dtype IS 'Compute precision of AV and AR.';
COMMENT ON COLUMN runs.model IS 'Language model that the activations come from, as given; NULL for ready-made vectors.';
COMMENT ON COLUMN runs.text_source IS 'Text that the activations come from, as given: file, directory or hub id.';
COMMENT ON COLUMN runs.vectors IS 'Parquet file of ready-made activations, as given; NULL when the activations were extracted from text.';
COMMENT ON COLUMN runs.positions IS 'Rule that chooses token positions: random, midpoint, last, all, stride.';
COMMENT ON COLUMN runs.scoring_kind IS 'Space in which errors and baseline are taken. normalised: activations and reconstructions scaled to norm sqrt(d), NLA pairs. raw: as they are, talkative autoencoders.';
COMMENT ON COLUMN runs.baseline IS 'The error at which FVE is 0, per dimension, in the space of the errors (scoring_kind); baseline_kind says how it was obtained.';
COMMENT ON COLUMN runs.baseline_kind IS 'between documents: half the mean squared distance between evaluated activations of different documents. distance from mean: mean squared distance of the evaluated activations from their mean, the baseline of the public code (called evaluated set in older runs). stated constant: given in the spec.';
COMMENT ON COLUMN runs.baseline_from_mean IS 'Mean squared distance of the (scaled) activations from their own mean, whichever baseline the run uses: 1 - error / baseline_from_mean is the FVE that the public code reports.';
COMMENT ON COLUMN runs.baseline_num_activations IS 'Activations that the baseline was measured on; NULL for a stated constant.';
COMMENT ON COLUMN runs.fve_over_successes IS 'FVE at K = 1 over successful draws only, fraction.';
COMMENT ON COLUMN runs.num_failed_draws IS 'Draws of the cell that gave no usable explanation, all causes.';
COMMENT ON COLUMN runs.failure_rate IS 'Fraction of the cell''s draws that gave no usable explanation.';
COMMENT ON COLUMN runs.failures IS 'Failed draws of the cell by cause: failures[''cut off''].';
COMMENT ON COLUMN runs.cut_off_rate IS 'Fraction of draws that reached max_new_tokens; NULL for a checkpoint, whose explanations all have the same length.';
COMMENT ON COLUMN runs.distinct_text_fraction IS 'Number of distinct explanations of an activation over its number of draws, mean over activations.';
COMMENT ON COLUMN runs.cjk_fraction IS 'Fraction of explanations that are mostly Chinese or Japanese: a known symptom of an injection that did not reach the AV.';
COMMENT ON COLUMN runs.mean_tokens IS 'Mean length of a draw, tokens.';
COMMENT ON COLUMN runs.draws_bytes IS 'Disk space of all draws of draws_key when the run ended, bytes; runs that share draws repeat the same number.';
COMMENT ON COLUMN runs.scores_bytes IS 'Disk space of all scores of draws_key and scores_key when the run ended, bytes. NULL in runs of earlier versions, which count scores in draws_bytes.';
COMMENT ON COLUMN runs.num_draws_sampled IS 'Draws that did not exist when this run began, over all activations: this run sampled them, or another job did in the meantime.';
COMMENT ON COLUMN runs.num_draws_reused IS 'Draws that existed before this run began, over all activations.';
COMMENT ON COLUMN runs.num_draws_scored IS 'Draws that had no scores of scores_key when this run began, newly sampled ones included. NULL in runs of earlier versions, which scored what they sampled.';
COMMENT ON COLUMN runs.num_tokens_sampled IS 'Tokens that this run sampled.';
COMMENT ON COLUMN runs.tokens_per_second IS 'Tokens sampled per second of sampling, all ranks together.';
COMMENT ON COLUMN runs.token_roles IS 'Number of tokens of each role (user, assistant, system, special, other, pad, and their total) in all rows of text that were read; NULL where the chat format is unknown.';
COMMENT ON COLUMN runs.selected_token_roles IS 'Number of tokens of each role among the evaluated positions; shares are in v_token_roles.';
COMMENT ON COLUMN runs.notes IS 'Warnings of checks that did not refuse the run, each with its subject (norms, base model, layer, precision, prompt, checkpoint, text), and reasons why a quantity is unknown that could have been measured (reference quantities). One row a note: select run_id, unnest(notes, recursive := true) from runs.';
COMMENT ON COLUMN runs.seconds IS 'Wall-clock seconds by phase: seconds[''sampling''].';
COMMENT ON COLUMN runs.job IS 'Job that the run was part of; attempts has a row for each of its ranks. NULL for imported runs and runs of older versions.';
COMMENT ON COLUMN runs.start IS 'Start of the job during which the run ended, 0-based: a requeued job starts again.';
COMMENT ON COLUMN runs.error_class IS 'Why the run did not finish: bad input, out of memory, NaN, time limit (starts that published nothing), disk full, dead rank, node failure, preempted, timeout (killed at its limit), cancelled, stopped (on request), killed, lost (gone from Slurm), failure, bug.';
COMMENT ON COLUMN runs.error_type IS 'Python type of the first error; NULL where no exception was seen.';
COMMENT ON COLUMN runs.error_message IS 'Message of the first error.';
COMMENT ON COLUMN runs.tracebacks IS 'Report of each rank that did not finish: node, GPU, class, message, traceback, last log lines, as text. The table attempts has them in columns.';
COMMENT ON COLUMN runs.host IS 'Machine of rank 0; for a failed run, machine of the rank that failed first.';
COMMENT ON COLUMN runs.device IS 'Name of the GPU, or cpu.';
COMMENT ON COLUMN runs.num_ranks IS 'Processes that shared the work.';
COMMENT ON COLUMN runs.revisions IS 'Checkpoints and models of the run that come from the model hub, with their commits: owner/name@commit/folder.';
COMMENT ON COLUMN runs.git_commit IS 'Commit of the code that ran.';
COMMENT ON COLUMN runs.git_dirty IS 'Whether its code differed from the commit: changed tracked files, or new ones that a job may import.';
COMMENT ON COLUMN runs.argv IS 'Command line that started the sweep.';
COMMENT ON COLUMN runs.packages IS 'Versions by package: packages[''torch''].';
COMMENT ON COLUMN runs.engine IS 'How this run computed the draws that it sampled, on rank 0: dtype, attention, tf32, cuda_graphs, sampler (slots, or plain where the cache does not support slots), what sampling.engine says of itself where it is not the built-in (engine, version, noise, ...), threads (CPU), batch_size (as requested; auto: as memory allows), draws_in_flight, prompts_at_once, texts_at_once (scoring). In float32 none of them changes a draw; in bfloat16 each may change which of two nearly tied tokens is taken. Empty where the run sampled nothing.';
COMMENT ON COLUMN runs.spec IS 'The cell as JSON: everything that changes its numbers. spec->>''$.sampling.temperature''.';
COMMENT ON COLUMN runs.resources IS 'Where and how the run was requested to execute, as JSON; not part of any key. In float32 it changes no number; in bfloat16 batch_size may change draws that are not stored yet: see engine.';
COMMENT ON COLUMN runs.cell_key IS 'Key of the cell: hash of everything that changes its numbers.';
COMMENT ON COLUMN runs.draws_key IS 'Key of the draws, shared by cells that differ only in AR, counts and scoring; name of a directory under registry/draws. In runs of earlier versions (scores_key is NULL) the key of draws and scores together.';
COMMENT ON COLUMN runs.scores_key IS 'Key of what the draws are worth to the AR; name of a directory under registry/scores/<draws_key>. NULL in runs of earlier versions, whose parts hold draws and scores together.';
COMMENT ON COLUMN runs.activations_key IS 'Key of the activations; name of a directory under vector_cache, but for a whitened pair, whose activations are hashed from that name and the transform.';
COMMENT ON COLUMN runs.interval_reach IS 'Factor by which intervals of this run are wider than the quantiles of their replicates, as few effective documents require: each end lies interval_reach times half the distance between the quantiles from the middle; see the macro interval_end. NULL for fewer than two documents and for runs recorded before replicates were kept.';

CREATE TABLE run_curves (
    run_id VARCHAR NOT NULL,
    metric VARCHAR,
    k INTEGER NOT NULL,
    fve DOUBLE NOT NULL,
    fve_low DOUBLE,
    fve_high DOUBLE,
    level DOUBLE,
    error DOUBLE,
    cosine DOUBLE,
    failure_rate DOUBLE,
    fve_over_successes DOUBLE,
    num_activations BIGINT NOT NULL,
    num_documents BIGINT,
    effective_documents DOUBLE,
    num_draws INTEGER,
    baseline DOUBLE,
    baseline_kind VARCHAR,
    shuffled_fve DOUBLE,
    band_low DOUBLE,
    band_high DOUBLE,
    replicates FLOAT[]
);
COMMENT ON TABLE run_curves IS 'One row per finished run and K. Query curves (newest run of each cell) or curve_history (all runs) instead: they add names and settings.';
COMMENT ON COLUMN run_curves.run_id IS 'Run that measured the curve.';
COMMENT ON COLUMN run_curves.metric IS 'Which number the column fve holds: fve (NULL means the same) or, in imported runs, a quantity of the reference sweep: variance_recovery (ignores a constant bias) or mse_variance_recovery.';
COMMENT ON COLUMN run_curves.k IS 'K: number of draws from which the best is taken.';
COMMENT ON COLUMN run_curves.fve IS 'Fraction of variance explained by the best of k draws: 1 - error / baseline. The AR that scores also selects (oracle).';
COMMENT ON COLUMN run_curves.fve_low IS 'Lower end of the interval of fve: bootstrap over documents.';
COMMENT ON COLUMN run_curves.fve_high IS 'Upper end of the interval of fve.';
COMMENT ON COLUMN run_curves.band_low IS 'Lower end of the simultaneous band, which covers the curve at all k at once with probability level: for choosing a k after seeing the curve. NULL in runs recorded before it was kept.';
COMMENT ON COLUMN run_curves.band_high IS 'Upper end of the simultaneous band.';
COMMENT ON COLUMN run_curves.level IS 'Nominal coverage of the interval, fraction: 0.95.';
COMMENT ON COLUMN run_curves.error IS 'Expected smallest error among k draws, mean over activations. Error of a draw for NLA pairs: 2 (1 - cosine). A failed draw is never selected over a success.';
COMMENT ON COLUMN run_curves.cosine IS 'Mean cosine of the selected draw with its activation.';
COMMENT ON COLUMN run_curves.failure_rate IS 'Probability that all of k draws fail, mean over activations; at k = 1 the fraction of draws that failed.';
COMMENT ON COLUMN run_curves.fve_over_successes IS 'FVE at k over successful draws only.';
COMMENT ON COLUMN run_curves.num_draws IS 'Draws per activation from which the curve is computed: the largest possible k.';
COMMENT ON COLUMN run_curves.num_activations IS 'Activations that the means are taken over.';
COMMENT ON COLUMN run_curves.effective_documents IS 'Effective number of documents: (sum n)^2 / sum n^2, n the activations of each document.';
COMMENT ON COLUMN run_curves.num_documents IS 'Documents that the bootstrap resamples.';
COMMENT ON COLUMN run_curves.baseline IS 'The error at which FVE is 0, per dimension, in the space of the errors (scaled vectors for NLA pairs); baseline_kind says how it was obtained.';
COMMENT ON COLUMN run_curves.baseline_kind IS 'between documents: half the mean squared distance between evaluated activations of different documents. distance from mean: mean squared distance of the evaluated activations from their mean, the baseline of the public code (called evaluated set in older runs). stated constant: given in the spec.';
COMMENT ON COLUMN run_curves.shuffled_fve IS 'Control: FVE of the best of k draws of another document''s activation. Selection alone makes it grow with k.';
COMMENT ON COLUMN run_curves.replicates IS 'fve in each bootstrap replicate over documents, for powers of two and the largest k. Runs over the same activations share the replicates, so that v_compare subtracts them one by one. NULL for other k and in runs recorded before they were kept.';

CREATE TABLE run_controls (
    run_id VARCHAR NOT NULL,
    control VARCHAR NOT NULL,
    k INTEGER,
    value DOUBLE,
    num_activations BIGINT,
    note VARCHAR
);
COMMENT ON TABLE run_controls IS 'One row per run and control. Query controls (newest run of each cell) instead.';
COMMENT ON COLUMN run_controls.run_id IS 'Run that measured the control.';
COMMENT ON COLUMN run_controls.control IS 'shuffled: best of draws of another activation. empty_text, mean_vector: FVE without an explanation. retrieval_top1: how often an activation''s own draws rank it first among all activations; retrieval_chance: the same for random ranks.';
COMMENT ON COLUMN run_controls.k IS 'K of the control; NULL where the control does not depend on K.';
COMMENT ON COLUMN run_controls.value IS 'FVE; for retrieval_* a fraction of activations.';
COMMENT ON COLUMN run_controls.num_activations IS 'Activations that the mean is taken over.';
COMMENT ON COLUMN run_controls.note IS 'What the value means, in a sentence.';

CREATE TABLE run_reference (
    run_id VARCHAR NOT NULL,
    quantity VARCHAR NOT NULL,
    role VARCHAR,
    k INTEGER NOT NULL,
    value DOUBLE,
    num_activations BIGINT,
    spread DOUBLE,
    bias DOUBLE,
    std DOUBLE,
    low DOUBLE,
    high DOUBLE,
    bca_low DOUBLE,
    bca_high DOUBLE
);
COMMENT ON TABLE run_reference IS 'One row per run, quantity of the reference sweep, role and K, for talkative-autoencoder checkpoints and imported files. Query reference_quantities (newest run of each cell) instead.';
COMMENT ON COLUMN run_reference.run_id IS 'Run that measured the quantity.';
COMMENT ON COLUMN run_reference.quantity IS 'avg_mse; variance_recovery: 1 - var(residual) / var(activations), which ignores a constant bias; mse_variance_recovery: the bias counts; r_squared: its baseline is one scalar mean, which flatters; mse_for_new_variance: d times avg_mse; total_variance, residual_variance: ddof 1, summed over dimensions; original_mean.';
COMMENT ON COLUMN run_reference.role IS 'Role of the token: user, assistant, system, special, other; NULL for all activations.';
COMMENT ON COLUMN run_reference.k IS 'K: number of draws from which the best is taken.';
COMMENT ON COLUMN run_reference.value IS 'Value of the quantity, computed on raw vectors.';
COMMENT ON COLUMN run_reference.num_activations IS 'Activations that the quantity is computed over.';
COMMENT ON COLUMN run_reference.spread IS 'Standard deviation between activations (ddof 0); avg_mse only.';
COMMENT ON COLUMN run_reference.bias IS 'Mean of the bootstrap replicates minus the value.';
COMMENT ON COLUMN run_reference.std IS 'Standard deviation of the bootstrap replicates (ddof 0).';
COMMENT ON COLUMN run_reference.low IS 'Lower end of the 95 % percentile interval, resampling single activations; too narrow where activations of one document are alike.';
COMMENT ON COLUMN run_reference.high IS 'Upper end of the 95 % percentile interval, resampling single activations.';
COMMENT ON COLUMN run_reference.bca_low IS 'Lower end of the 95 % BCa interval (Efron 1987), resampling single activations.';
COMMENT ON COLUMN run_reference.bca_high IS 'Upper end of the 95 % BCa interval.';

CREATE TABLE attempts (
    job VARCHAR NOT NULL,
    start INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    num_ranks INTEGER NOT NULL,
    sweep VARCHAR NOT NULL,
    cells VARCHAR[] NOT NULL,
    label VARCHAR,
    cell_key VARCHAR,
    slurm_id VARCHAR,
    host VARCHAR,
    device VARCHAR,
    gpu VARCHAR,
    began TIMESTAMP,
    ended TIMESTAMP,
    phase VARCHAR,
    done BIGINT,
    total BIGINT,
    status VARCHAR NOT NULL,
    error_class VARCHAR,
    error_type VARCHAR,
    message VARCHAR,
    traceback VARCHAR,
    last_log_lines VARCHAR,
    requeued VARCHAR,
    why VARCHAR NOT NULL,
    PRIMARY KEY (job, start, rank)
);
COMMENT ON TABLE attempts IS 'One row per job, start of the job and rank: where the rank ran, its progress, and why it ended. Every job that was started has its rows once it is over, however it ended; runs.job and runs.start refer to them.';
COMMENT ON COLUMN attempts.job IS 'Name of the job''s directory under logs: UTC time of submission and random digits.';
COMMENT ON COLUMN attempts.start IS 'Start of the job, 0-based: each requeue adds one.';
COMMENT ON COLUMN attempts.rank IS 'Rank of the process within the job, 0-based.';
COMMENT ON COLUMN attempts.num_ranks IS 'Processes that shared the job''s work.';
COMMENT ON COLUMN attempts.sweep IS 'Name of the sweep that requested the job.';
COMMENT ON COLUMN attempts.cells IS 'Labels of the cells in the job.';
COMMENT ON COLUMN attempts.label IS 'Label of the cell that the rank was working on at its last heartbeat; NULL before its first cell.';
COMMENT ON COLUMN attempts.cell_key IS 'Identity of that cell.';
COMMENT ON COLUMN attempts.slurm_id IS 'Slurm job id, 41 or 41_2; NULL for a job on this machine.';
COMMENT ON COLUMN attempts.host IS 'Machine of the rank; NULL for a rank that never sent a heartbeat.';
COMMENT ON COLUMN attempts.device IS 'Name of the GPU, or cpu.';
COMMENT ON COLUMN attempts.gpu IS 'Index of the GPU on its machine, with the UUID that nvidia-smi -L prints; NULL on a CPU.';
COMMENT ON COLUMN attempts.began IS 'First heartbeat of the rank in this start, UTC.';
COMMENT ON COLUMN attempts.ended IS 'When the rank reported its end, else its last heartbeat, UTC.';
COMMENT ON COLUMN attempts.phase IS 'Phase of work at the last heartbeat.';
COMMENT ON COLUMN attempts.done IS 'Items done in that phase.';
COMMENT ON COLUMN attempts.total IS 'Items in that phase; 0 where they are not counted.';
COMMENT ON COLUMN attempts.status IS 'finished; failed; stopped: on request, or because another rank ended; gone: the rank disappeared without a report.';
COMMENT ON COLUMN attempts.error_class IS 'Why the rank did not finish, with the classes of runs.error_class; NULL where it only ended with the others.';
COMMENT ON COLUMN attempts.error_type IS 'Python type of the rank''s error.';
COMMENT ON COLUMN attempts.message IS 'The rank''s own report of its end; for a rank that disappeared, what is known of the job.';
COMMENT ON COLUMN attempts.traceback IS 'Traceback of the rank''s error.';
COMMENT ON COLUMN attempts.last_log_lines IS 'Last lines that the rank wrote to standard error in this start, without the traceback.';
COMMENT ON COLUMN attempts.requeued IS 'Why the job was requeued after this start: time limit, preempted, asked to stop, by Slurm; NULL: it was not requeued.';
COMMENT ON COLUMN attempts.why IS 'Why this start of the job ended; the same for all its ranks.';

CREATE TABLE run_metrics (
    run_id VARCHAR NOT NULL,
    breakdown VARCHAR NOT NULL,
    part VARCHAR NOT NULL,
    place INTEGER NOT NULL,
    against VARCHAR,
    k INTEGER NOT NULL,
    fve DOUBLE,
    fve_low DOUBLE,
    fve_high DOUBLE,
    level DOUBLE,
    error DOUBLE,
    median_error DOUBLE,
    worst_share DOUBLE,
    baseline DOUBLE,
    baseline_kind VARCHAR,
    failure_rate DOUBLE,
    all_failed_rate DOUBLE,
    num_activations BIGINT NOT NULL,
    num_documents BIGINT,
    effective_documents DOUBLE
);
COMMENT ON TABLE run_metrics IS 'One row per run, group of activations, baseline (against) and K. Query metrics (newest run of each cell) instead.';
COMMENT ON COLUMN run_metrics.run_id IS 'Run that measured the group.';
COMMENT ON COLUMN run_metrics.breakdown IS 'How activations are grouped: role (of the token), position (in its row of text, tokens), norm (quarters by the activation''s norm), or all (one group).';
COMMENT ON COLUMN run_metrics.part IS 'Name of the group: user, 32 to 63, quarter 1 of 4 (the smallest norms).';
COMMENT ON COLUMN run_metrics.place IS 'Sort order of the group within its breakdown, 0-based.';
COMMENT ON COLUMN run_metrics.against IS 'Which baseline: overall (of all activations; groups weighted by their sizes average to the whole FVE) or own (of the activations of the group alone; knowing the group explains nothing). NULL in older runs: the mean over the group of the distances from the mean of all activations.';
COMMENT ON COLUMN run_metrics.k IS 'K: powers of two and the largest K of the run.';
COMMENT ON COLUMN run_metrics.fve IS 'Fraction of variance explained within the group: 1 - mean error of the group / baseline.';
COMMENT ON COLUMN run_metrics.fve_low IS 'Lower end of the interval of fve, from the run''s bootstrap over documents; NULL for a group of one document.';
COMMENT ON COLUMN run_metrics.fve_high IS 'Upper end of the interval of fve.';
COMMENT ON COLUMN run_metrics.level IS 'Nominal coverage of the interval, fraction: 0.95.';
COMMENT ON COLUMN run_metrics.error IS 'Expected smallest error among k draws, mean over the group.';
COMMENT ON COLUMN run_metrics.median_error IS 'Expected smallest error among k draws, median over the group; a median far below the mean shows a heavy tail.';
COMMENT ON COLUMN run_metrics.worst_share IS 'Fraction of the summed error that the worst 1 % of the group''s activations hold (at least one activation).';
COMMENT ON COLUMN run_metrics.baseline IS 'The error at which fve is 0; against says over which activations.';
COMMENT ON COLUMN run_metrics.baseline_kind IS 'between documents, distance from mean or stated constant, as in the run.';
COMMENT ON COLUMN run_metrics.failure_rate IS 'Fraction of the group''s draws that gave no usable explanation.';
COMMENT ON COLUMN run_metrics.all_failed_rate IS 'Probability that all of k draws fail, mean over the group.';
COMMENT ON COLUMN run_metrics.num_activations IS 'Activations in the group.';
COMMENT ON COLUMN run_metrics.num_documents IS 'Documents of the group''s activations.';
COMMENT ON COLUMN run_metrics.effective_documents IS 'Effective number of documents: (sum n)^2 / sum n^2, n the group''s activations in each document.';

CREATE TABLE run_examples (
    run_id VARCHAR NOT NULL,
    rank VARCHAR NOT NULL,
    number INTEGER NOT NULL,
    activation BIGINT NOT NULL,
    draw INTEGER NOT NULL,
    error DOUBLE,
    cosine DOUBLE,
    explanation VARCHAR,
    text VARCHAR,
    parse VARCHAR,
    context VARCHAR,
    document VARCHAR,
    position INTEGER
);
COMMENT ON TABLE run_examples IS 'The best draw of up to five activations each where the run is best, middling and worst. Query examples (newest run of each cell) instead.';
COMMENT ON COLUMN run_examples.run_id IS 'Run that the example is from.';
COMMENT ON COLUMN run_examples.rank IS 'best, median or worst: rank of the activation by the error of its best draw. Activations whose draws all failed are the worst.';
COMMENT ON COLUMN run_examples.number IS 'Number within rank, from 1: the best of the best first, the worst of the worst first, median by rising error.';
COMMENT ON COLUMN run_examples.activation IS 'Index of the activation, 0-based.';
COMMENT ON COLUMN run_examples.draw IS 'Index of its best draw, 0-based.';
COMMENT ON COLUMN run_examples.error IS 'Error of that draw; NULL when all draws of the activation failed.';
COMMENT ON COLUMN run_examples.cosine IS 'Cosine between the draw''s reconstruction and the activation; NULL when all draws of the activation failed.';
COMMENT ON COLUMN run_examples.explanation IS 'The explanation; NULL when all draws of the activation failed.';
COMMENT ON COLUMN run_examples.text IS 'Full text that the AV generated, tags included.';
COMMENT ON COLUMN run_examples.parse IS 'ok, or the reason why no explanation was found in text.';
COMMENT ON COLUMN run_examples.context IS 'Text around the position of the activation.';
COMMENT ON COLUMN run_examples.document IS 'Document that the activation comes from.';
COMMENT ON COLUMN run_examples.position IS 'Token position of the activation in its row of text, 0-based.';

CREATE TABLE sweeps (
    sweep_id VARCHAR PRIMARY KEY,
    sweep VARCHAR NOT NULL,
    question VARCHAR NOT NULL,
    num_cells INTEGER NOT NULL,
    number INTEGER NOT NULL,
    asked TIMESTAMP NOT NULL,
    argv VARCHAR[] NOT NULL,
    git_commit VARCHAR,
    git_dirty BOOLEAN
);
COMMENT ON TABLE sweeps IS 'One row per version of a sweep: its question and, in sweep_cells, its cells, whichever sweep computed them. A sweep that is run again with the same question and cells adds no row. Query v_sweeps for the newest version.';
COMMENT ON COLUMN sweeps.sweep_id IS 'Name of the file under registry/sweeps: hash of the sweep''s name, version number, hash of question and cells.';
COMMENT ON COLUMN sweeps.sweep IS 'Name of the sweep.';
COMMENT ON COLUMN sweeps.question IS 'The question that the sweep answers; empty where its file states none.';
COMMENT ON COLUMN sweeps.num_cells IS 'Cells of the sweep.';
COMMENT ON COLUMN sweeps.number IS 'Version number of the sweep, 0-based.';
COMMENT ON COLUMN sweeps.asked IS 'When this version was first requested, UTC.';
COMMENT ON COLUMN sweeps.argv IS 'Command line that requested it.';
COMMENT ON COLUMN sweeps.git_commit IS 'Commit of the code that requested it.';
COMMENT ON COLUMN sweeps.git_dirty IS 'Whether its code differed from the commit: changed tracked files, or new ones that a job may import.';

CREATE TABLE sweep_cells (
    sweep_id VARCHAR NOT NULL,
    sweep VARCHAR NOT NULL,
    place INTEGER NOT NULL,
    label VARCHAR NOT NULL,
    cell_key VARCHAR NOT NULL,
    PRIMARY KEY (sweep_id, place)
);
COMMENT ON TABLE sweep_cells IS 'One row per version of a sweep and cell. Query v_sweep_cells for the cells of the newest version.';
COMMENT ON COLUMN sweep_cells.sweep_id IS 'Version of the sweep that the cell belongs to.';
COMMENT ON COLUMN sweep_cells.sweep IS 'Name of the sweep.';
COMMENT ON COLUMN sweep_cells.place IS 'Order of the cell in the sweep, 0-based.';
COMMENT ON COLUMN sweep_cells.label IS 'Label of the cell in this sweep: the settings in which it differs from the others, e.g. temperature=0.7. The run that computed the cell may have another label.';
COMMENT ON COLUMN sweep_cells.cell_key IS 'Key of the cell: hash of everything that changes its numbers.';

CREATE TABLE quarantine (
    run_id VARCHAR PRIMARY KEY,
    reason VARCHAR NOT NULL,
    signature VARCHAR NOT NULL
);
COMMENT ON TABLE quarantine IS 'One row per landing directory or file that failed its checks and was not read. It is read again when its files change.';
COMMENT ON COLUMN quarantine.run_id IS 'Name of the directory under registry/landing, or attempts/<job>, sweeps/<id>.';
COMMENT ON COLUMN quarantine.reason IS 'Which check failed, with the name of the file.';
COMMENT ON COLUMN quarantine.signature IS 'Names, sizes and modification times of the files when they were checked.';
