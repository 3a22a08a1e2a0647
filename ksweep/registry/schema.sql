-- The data dictionary: every table of registry/ksweep.duckdb and what each column means. views.sql continues it.
--
--     select table_name, column_name, data_type, comment from duckdb_columns() where schema_name = 'main';
--
-- The database is an index over landing files: it can be deleted, and `rebuild` makes it again, row for row. Add own tables to a
-- database of your own (ATTACH this one); they would not survive here. NULL is "not known", never zero.

CREATE TABLE meta (
    key VARCHAR PRIMARY KEY,
    value VARCHAR NOT NULL
);
COMMENT ON TABLE meta IS 'What this database is: one row per fact.';
COMMENT ON COLUMN meta.key IS 'schema: fingerprint of the SQL that made it; root: absolute path of the registry when it was made.';
COMMENT ON COLUMN meta.value IS 'The fact, as text.';

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
    dtype VARCHAR,
    model VARCHAR,
    text_source VARCHAR,
    vectors VARCHAR,
    positions VARCHAR,
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
    num_draws_sampled BIGINT,
    num_draws_reused BIGINT,
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
    git_commit VARCHAR,
    git_dirty BOOLEAN,
    argv VARCHAR[],
    packages MAP(VARCHAR, VARCHAR),
    engine MAP(VARCHAR, VARCHAR),
    spec JSON NOT NULL,
    resources JSON,
    cell_key VARCHAR NOT NULL,
    draws_key VARCHAR,
    activations_key VARCHAR,
    interval_reach DOUBLE
);
COMMENT ON TABLE runs IS 'One row per run: a cell that was evaluated once, or the attempt that failed. All runs ever landed; v_latest keeps the newest finished one of each cell.';
COMMENT ON COLUMN runs.run_id IS 'Name of the landing directory: UTC time, first digits of cell_key, random digits.';
COMMENT ON COLUMN runs.cell IS 'Display name of the cell, unique to it.';
COMMENT ON COLUMN runs.label IS 'What tells the cell from the others of its sweep, for legends: temperature=0.7.';
COMMENT ON COLUMN runs.sweep IS 'Name of the sweep that asked for the run.';
COMMENT ON COLUMN runs.status IS 'finished: there is a curve. failed: it ended with an error. stopped: it was told to stop (time limit, preemption) and can be carried on.';
COMMENT ON COLUMN runs.started IS 'When the run began, UTC.';
COMMENT ON COLUMN runs.finished IS 'When the run ended, whatever its status, UTC.';
COMMENT ON COLUMN runs.temperature IS 'Sampling temperature of the AV; 0 is greedy.';
COMMENT ON COLUMN runs.top_p IS 'Probability mass that sampling was restricted to; 1 keeps every token.';
COMMENT ON COLUMN runs.max_new_tokens IS 'Longest explanation allowed, tokens; longer ones are cut off.';
COMMENT ON COLUMN runs.sampling_seed IS 'Seed of the draws.';
COMMENT ON COLUMN runs.num_draws IS 'Explanations drawn per activation; the largest K that can be reported.';
COMMENT ON COLUMN runs.num_activations IS 'Activations evaluated.';
COMMENT ON COLUMN runs.num_documents IS 'Documents the activations come from: the clusters of the bootstrap.';
COMMENT ON COLUMN runs.effective_documents IS 'Documents of equal size that would say as much, (sum n)^2 / sum n^2 with n the activations of each: what intervals are widened by. NULL in runs landed before it was kept.';
COMMENT ON COLUMN runs.layer IS 'Block of the base model whose output was verbalised, 0-based.';
COMMENT ON COLUMN runs.d_model IS 'Width of the activations, dimensions.';
COMMENT ON COLUMN runs.av IS 'Activation verbalizer as given: path or hub id.';
COMMENT ON COLUMN runs.ar IS 'Activation reconstructor as given: path or hub id.';
COMMENT ON COLUMN runs.checkpoint IS 'Talkative-autoencoder file or directory as given, in place of av and ar; errors and baseline are then of raw vectors. NULL for a pair.';
COMMENT ON COLUMN runs.base IS 'Base model of PEFT adapters or of a checkpoint as given; NULL: the one that they name.';
COMMENT ON COLUMN runs.dtype IS 'Compute precision of AV and AR.';
COMMENT ON COLUMN runs.model IS 'Language model that the activations come from, as given; NULL for ready-made vectors.';
COMMENT ON COLUMN runs.text_source IS 'Text that the activations come from, as given: file, directory or hub id.';
COMMENT ON COLUMN runs.vectors IS 'Parquet file of ready-made activations, as given; NULL when they were extracted.';
COMMENT ON COLUMN runs.positions IS 'Rule for the token positions: random, midpoint, last, all, stride.';
COMMENT ON COLUMN runs.baseline IS 'The error at FVE = 0, per dimension, of the (scaled) activations; baseline_kind says what it is.';
COMMENT ON COLUMN runs.baseline_kind IS 'between documents: half the mean squared distance between evaluated activations of different documents. distance from mean: mean squared distance from the mean of the evaluated activations, the public code''s (in older runs: evaluated set). stated constant: given in the spec.';
COMMENT ON COLUMN runs.baseline_from_mean IS 'Mean squared distance of the (scaled) activations from their own mean, whatever the baseline is: 1 - error / baseline_from_mean is the FVE that the public code reports.';
COMMENT ON COLUMN runs.baseline_num_activations IS 'Activations the baseline was measured on; NULL for a stated constant.';
COMMENT ON COLUMN runs.fve_over_successes IS 'FVE at K = 1 when failed draws are left out, fraction.';
COMMENT ON COLUMN runs.num_failed_draws IS 'Draws of the cell without a usable explanation, all causes.';
COMMENT ON COLUMN runs.failure_rate IS 'Draws of the cell without a usable explanation, fraction.';
COMMENT ON COLUMN runs.failures IS 'Failed draws of the cell by cause: failures[''cut off''].';
COMMENT ON COLUMN runs.cut_off_rate IS 'Draws that ended at max_new_tokens, fraction; NULL for a checkpoint, whose explanations all have one length.';
COMMENT ON COLUMN runs.distinct_text_fraction IS 'Distinct explanations of an activation over its draws, mean over activations, fraction.';
COMMENT ON COLUMN runs.cjk_fraction IS 'Explanations that are mostly Chinese or Japanese, fraction: the known symptom of an injection that did not arrive.';
COMMENT ON COLUMN runs.mean_tokens IS 'Mean length of a draw, tokens.';
COMMENT ON COLUMN runs.draws_bytes IS 'Bytes that all draws of draws_key took on disk when the run ended; runs that share draws say the same bytes.';
COMMENT ON COLUMN runs.num_draws_sampled IS 'Draws that were not there when this run began, over all activations: it sampled them, or a job beside it did meanwhile.';
COMMENT ON COLUMN runs.num_draws_reused IS 'Draws that were there before this run, over all activations.';
COMMENT ON COLUMN runs.num_tokens_sampled IS 'Tokens that this run sampled.';
COMMENT ON COLUMN runs.tokens_per_second IS 'Tokens sampled per second of sampling, all ranks together.';
COMMENT ON COLUMN runs.token_roles IS 'Tokens by role (user, assistant, system, special, other, pad, and their total) in all rows of text that were looked at; NULL where no chat format is known.';
COMMENT ON COLUMN runs.selected_token_roles IS 'The same over the evaluated positions. Shares: v_token_roles.';
COMMENT ON COLUMN runs.notes IS 'What checks say about the run without refusing it, each with its subject (norms, base model, layer, precision, prompt, checkpoint, text), and why something is not known that could have been (reference quantities). One row a note: select run_id, unnest(notes, recursive := true) from runs.';
COMMENT ON COLUMN runs.seconds IS 'Wall-clock seconds by phase: seconds[''sampling''].';
COMMENT ON COLUMN runs.job IS 'Job that the run was part of; what each of its ranks left: attempts. NULL for imported runs and those of older versions.';
COMMENT ON COLUMN runs.start IS 'Start of the job in which the run ended, 0-based.';
COMMENT ON COLUMN runs.error_class IS 'Why it did not finish: bad input, out of memory, NaN, time limit (starts that published nothing), disk full, dead rank, node failure, preempted, timeout (killed at its limit), cancelled, stopped (asked to), killed, lost (gone from Slurm), failure, bug.';
COMMENT ON COLUMN runs.error_type IS 'Python type of the error that came first; NULL where no exception was seen.';
COMMENT ON COLUMN runs.error_message IS 'What the error said.';
COMMENT ON COLUMN runs.tracebacks IS 'What each rank that did not finish left: node, GPU, class, message, traceback, last log lines. In columns: attempts.';
COMMENT ON COLUMN runs.host IS 'Machine of rank 0; of a failed run that of the rank that failed first.';
COMMENT ON COLUMN runs.device IS 'What it computed on: name of the GPU, or cpu.';
COMMENT ON COLUMN runs.num_ranks IS 'Processes that shared the work.';
COMMENT ON COLUMN runs.git_commit IS 'Commit of the code that ran.';
COMMENT ON COLUMN runs.git_dirty IS 'Whether tracked files differed from the commit.';
COMMENT ON COLUMN runs.argv IS 'Command line that started the sweep.';
COMMENT ON COLUMN runs.packages IS 'Versions by package: packages[''torch''].';
COMMENT ON COLUMN runs.engine IS 'How the draws that this run sampled were computed on rank 0: dtype, attention, tf32, cuda_graphs, sampler (slots, or plain where a cache does not lie in them), threads (CPU), batch_size (asked; auto: as memory allows), draws_in_flight, prompts_at_once, texts_at_once (scored). In float32 none of them changes a draw; in bfloat16 each may change which of two nearly tied tokens is taken. Empty where all draws were there.';
COMMENT ON COLUMN runs.spec IS 'The cell as JSON, everything that changes its numbers: spec->>''$.sampling.temperature''.';
COMMENT ON COLUMN runs.resources IS 'Where and how it was asked to run, as JSON; no part of any identity. In float32 it changes no number; in bfloat16 batch_size may change draws that are not stored yet: see engine.';
COMMENT ON COLUMN runs.cell_key IS 'Identity of the cell: hash of all that changes its numbers.';
COMMENT ON COLUMN runs.draws_key IS 'Identity of the draws, shared by cells that differ only in counts and scoring; directory under registry/draws.';
COMMENT ON COLUMN runs.activations_key IS 'Identity of the activations; directory under vector_cache.';
COMMENT ON COLUMN runs.interval_reach IS 'How far intervals of this run reach beyond the quantiles of their replicates, for few effective documents: an end lies interval_reach times half the distance of the quantiles from the middle; see the macro interval_end. NULL for fewer than two documents and for runs landed before replicates were kept.';

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
COMMENT ON TABLE run_curves IS 'One row per finished run and K, as landed. Ask curves (newest run of each cell) or curve_history (all runs) instead: they carry the names.';
COMMENT ON COLUMN run_curves.run_id IS 'Run that measured it.';
COMMENT ON COLUMN run_curves.metric IS 'What the column fve holds: fve (NULL: likewise), or in imported runs the number of the reference sweep, variance_recovery (blind to a constant bias) or mse_variance_recovery.';
COMMENT ON COLUMN run_curves.k IS 'Draws that the best is taken from.';
COMMENT ON COLUMN run_curves.fve IS 'Fraction of variance explained by the best of k draws: 1 - error / baseline. The AR that scores also selects (oracle).';
COMMENT ON COLUMN run_curves.fve_low IS 'Lower end of the interval of fve: bootstrap over documents.';
COMMENT ON COLUMN run_curves.fve_high IS 'Upper end of the interval of fve.';
COMMENT ON COLUMN run_curves.band_low IS 'Lower end of the band that covers the whole curve, all k at once, with probability level: for whoever picks a k after seeing the curve. NULL in runs landed before it was kept.';
COMMENT ON COLUMN run_curves.band_high IS 'Upper end of the band for all k at once.';
COMMENT ON COLUMN run_curves.level IS 'Coverage that the interval aims at, fraction: 0.95.';
COMMENT ON COLUMN run_curves.error IS 'Mean over activations of the expected smallest error among k draws; NLA pairs: 2 (1 - cosine) per draw; a failed draw is never selected over a success.';
COMMENT ON COLUMN run_curves.cosine IS 'Mean cosine of the selected draw with its activation.';
COMMENT ON COLUMN run_curves.failure_rate IS 'Chance that all of k draws fail, mean over activations, fraction; at k = 1 the failure rate of draws.';
COMMENT ON COLUMN run_curves.fve_over_successes IS 'FVE when activations count only with their successful draws.';
COMMENT ON COLUMN run_curves.num_draws IS 'Draws per activation that the curve is read off: the largest k possible.';
COMMENT ON COLUMN run_curves.num_activations IS 'Activations averaged over.';
COMMENT ON COLUMN run_curves.effective_documents IS 'Documents of equal size that would say as much: (sum n)^2 / sum n^2, n the activations of each.';
COMMENT ON COLUMN run_curves.num_documents IS 'Documents resampled by the bootstrap.';
COMMENT ON COLUMN run_curves.baseline IS 'The error at FVE = 0, per dimension, of the (scaled) activations; baseline_kind says what it is.';
COMMENT ON COLUMN run_curves.baseline_kind IS 'between documents: half the mean squared distance between evaluated activations of different documents. distance from mean: mean squared distance from the mean of the evaluated activations, the public code''s (in older runs: evaluated set). stated constant: given in the spec.';
COMMENT ON COLUMN run_curves.shuffled_fve IS 'Control: FVE of the best of k draws of another activation. Selection alone also climbs with k.';
COMMENT ON COLUMN run_curves.replicates IS 'fve in each bootstrap replicate over documents, for powers of two and the largest k: runs over the same activations share the replicates, so differences are taken element by element (v_compare). NULL for other k and in runs landed before they were kept.';

CREATE TABLE run_controls (
    run_id VARCHAR NOT NULL,
    control VARCHAR NOT NULL,
    k INTEGER,
    value DOUBLE,
    num_activations BIGINT,
    note VARCHAR
);
COMMENT ON TABLE run_controls IS 'One row per run and control, as landed. Ask controls (newest run of each cell) instead.';
COMMENT ON COLUMN run_controls.run_id IS 'Run that measured it.';
COMMENT ON COLUMN run_controls.control IS 'shuffled: draws of another activation. empty_text, mean_vector: what is reached without an explanation. retrieval_top1: how often own draws rank an activation first among others; retrieval_chance: by chance.';
COMMENT ON COLUMN run_controls.k IS 'Draws the control takes the best of; NULL where K plays no part.';
COMMENT ON COLUMN run_controls.value IS 'FVE; for retrieval_* a fraction of activations.';
COMMENT ON COLUMN run_controls.num_activations IS 'Activations averaged over.';
COMMENT ON COLUMN run_controls.note IS 'What the value is, in words.';

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
COMMENT ON TABLE run_reference IS 'The reference sweep''s own quantities of runs over talkative-autoencoder checkpoints and of imported files, one row per quantity, role and K. Ask reference_quantities (newest run of each cell) instead.';
COMMENT ON COLUMN run_reference.run_id IS 'Run that measured it.';
COMMENT ON COLUMN run_reference.quantity IS 'avg_mse; variance_recovery: 1 - var(residual) / var(activations), blind to a constant bias; mse_variance_recovery: the bias counts; r_squared: baseline is one scalar mean, flattering; mse_for_new_variance: d times avg_mse; total_variance, residual_variance: ddof 1, summed over dimensions; original_mean.';
COMMENT ON COLUMN run_reference.role IS 'Role of the token: user, assistant, system, special, other; NULL for all activations.';
COMMENT ON COLUMN run_reference.k IS 'Draws that the best is taken from.';
COMMENT ON COLUMN run_reference.value IS 'The quantity, in the raw space.';
COMMENT ON COLUMN run_reference.num_activations IS 'Activations it is taken over.';
COMMENT ON COLUMN run_reference.spread IS 'Standard deviation between activations (ddof 0); avg_mse only.';
COMMENT ON COLUMN run_reference.bias IS 'Mean of the bootstrap replicates less the value.';
COMMENT ON COLUMN run_reference.std IS 'Standard deviation of the bootstrap replicates (ddof 0).';
COMMENT ON COLUMN run_reference.low IS 'Lower end of the 95 % percentile interval over single activations; too narrow where those of a document are alike.';
COMMENT ON COLUMN run_reference.high IS 'Upper end of the 95 % percentile interval over single activations.';
COMMENT ON COLUMN run_reference.bca_low IS 'Lower end of the 95 % BCa interval over single activations.';
COMMENT ON COLUMN run_reference.bca_high IS 'Upper end of the 95 % BCa interval over single activations.';

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
COMMENT ON TABLE attempts IS 'One row per start of a job and rank: where it ran, how far it came, why it ended. Of every job that was started, once it is over, whatever its end; runs.job and runs.start lead here.';
COMMENT ON COLUMN attempts.job IS 'Name of the directory under logs: UTC time of submission and random digits.';
COMMENT ON COLUMN attempts.start IS 'Which start of the job: 0, and one more each time that it came back into the queue.';
COMMENT ON COLUMN attempts.rank IS 'Process of the job, 0-based.';
COMMENT ON COLUMN attempts.num_ranks IS 'Processes that shared the work of the job.';
COMMENT ON COLUMN attempts.sweep IS 'Name of the sweep that asked for the job.';
COMMENT ON COLUMN attempts.cells IS 'Labels of the cells that the job was given.';
COMMENT ON COLUMN attempts.label IS 'Label of the cell that the rank was at when it was last heard of; NULL before the first.';
COMMENT ON COLUMN attempts.cell_key IS 'Identity of that cell.';
COMMENT ON COLUMN attempts.slurm_id IS 'Number that Slurm knows the job by, 41 or 41_2; NULL for a job of one machine.';
COMMENT ON COLUMN attempts.host IS 'Machine of the rank; NULL for a rank that was never heard of.';
COMMENT ON COLUMN attempts.device IS 'What it computed on: name of the GPU, or cpu.';
COMMENT ON COLUMN attempts.gpu IS 'Which GPU of its machine, with the UUID that nvidia-smi -L shows; NULL on a CPU.';
COMMENT ON COLUMN attempts.began IS 'First heartbeat of the rank in this start, UTC.';
COMMENT ON COLUMN attempts.ended IS 'When it said how it ended, or else was last heard of, UTC.';
COMMENT ON COLUMN attempts.phase IS 'What it was at when last heard of.';
COMMENT ON COLUMN attempts.done IS 'Units done in that phase.';
COMMENT ON COLUMN attempts.total IS 'Units of that phase; 0 where they are not counted.';
COMMENT ON COLUMN attempts.status IS 'finished; failed; stopped: asked to, or because another rank ended; gone: it left no word.';
COMMENT ON COLUMN attempts.error_class IS 'Why this rank did not finish, as runs.error_class; NULL where it only ended with the others.';
COMMENT ON COLUMN attempts.error_type IS 'Python type of its error.';
COMMENT ON COLUMN attempts.message IS 'What it said of its end; of a rank that left no word, what is known of the job.';
COMMENT ON COLUMN attempts.traceback IS 'Its traceback.';
COMMENT ON COLUMN attempts.last_log_lines IS 'Last lines that it wrote to standard error in this start, its traceback left out.';
COMMENT ON COLUMN attempts.requeued IS 'Why the job was put back into the queue after this start: time limit, preempted, asked to stop, by Slurm; NULL: it was not.';
COMMENT ON COLUMN attempts.why IS 'Why this start of the job ended, the same for all its ranks.';

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
COMMENT ON TABLE run_metrics IS 'One row per run, group of activations, baseline (against) and K, as landed. Ask metrics (newest run of each cell) instead.';
COMMENT ON COLUMN run_metrics.run_id IS 'Run that measured it.';
COMMENT ON COLUMN run_metrics.breakdown IS 'What the groups are by: role (of the token), position (in its row of text, tokens), norm (quarters by the length of the activation), or all (one group).';
COMMENT ON COLUMN run_metrics.part IS 'Which group: user, 32 to 63, quarter 1 of 4 (the smallest norms).';
COMMENT ON COLUMN run_metrics.place IS 'Place of the group within its breakdown, 0-based, for sorting.';
COMMENT ON COLUMN run_metrics.against IS 'Which baseline: overall (that of all activations; groups weighted by their sizes average to the whole) or own (of the activations of the group alone; knowing the group explains nothing). NULL in older runs: the mean over the group of the distances from the mean of all activations.';
COMMENT ON COLUMN run_metrics.k IS 'Draws that the best is taken from: powers of two and the largest k of the run.';
COMMENT ON COLUMN run_metrics.fve IS 'Fraction of variance explained within the group: 1 - mean error of the group / baseline.';
COMMENT ON COLUMN run_metrics.fve_low IS 'Lower end of the interval of fve: the bootstrap over documents of the whole run; NULL for a group of one document.';
COMMENT ON COLUMN run_metrics.fve_high IS 'Upper end of the interval of fve.';
COMMENT ON COLUMN run_metrics.level IS 'Coverage that the interval aims at, fraction: 0.95.';
COMMENT ON COLUMN run_metrics.error IS 'Mean over the group of the expected smallest error among k draws.';
COMMENT ON COLUMN run_metrics.median_error IS 'Median over the group of the expected smallest error among k draws: beside the mean it shows a heavy tail.';
COMMENT ON COLUMN run_metrics.worst_share IS 'Part of the summed error that the worst 1 % of the activations have (at least one activation), fraction.';
COMMENT ON COLUMN run_metrics.baseline IS 'The error at fve = 0; against says of which activations.';
COMMENT ON COLUMN run_metrics.baseline_kind IS 'between documents, distance from mean or stated constant, as of the run.';
COMMENT ON COLUMN run_metrics.failure_rate IS 'Draws of the group without a usable explanation, fraction.';
COMMENT ON COLUMN run_metrics.all_failed_rate IS 'Chance that all of k draws fail, mean over the group, fraction.';
COMMENT ON COLUMN run_metrics.num_activations IS 'Activations in the group.';
COMMENT ON COLUMN run_metrics.num_documents IS 'Documents they come from.';
COMMENT ON COLUMN run_metrics.effective_documents IS 'Documents of equal size that would say as much: (sum n)^2 / sum n^2, n the activations of the group in each.';

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
COMMENT ON TABLE run_examples IS 'What a run said: the best draw of the activations it is best, middling and worst at, up to five each, as landed. Ask examples (newest run of each cell) instead.';
COMMENT ON COLUMN run_examples.run_id IS 'Run that they are of.';
COMMENT ON COLUMN run_examples.rank IS 'best, median or worst: where the activation stands by the error of its best draw. Activations all of whose draws failed are the worst.';
COMMENT ON COLUMN run_examples.number IS 'Counts within rank from 1: the best of the best, the worst of the worst; median in rising order of error.';
COMMENT ON COLUMN run_examples.activation IS 'Index of the activation, 0-based.';
COMMENT ON COLUMN run_examples.draw IS 'Index of its best draw, 0-based.';
COMMENT ON COLUMN run_examples.error IS 'Error of that draw; NULL when all draws of the activation failed.';
COMMENT ON COLUMN run_examples.cosine IS 'Cosine of the reconstruction with its activation; NULL likewise.';
COMMENT ON COLUMN run_examples.explanation IS 'The explanation; NULL likewise.';
COMMENT ON COLUMN run_examples.text IS 'What the AV wrote, tags included.';
COMMENT ON COLUMN run_examples.parse IS 'ok, or why no explanation was found in text.';
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
COMMENT ON TABLE sweeps IS 'One row per asking of a sweep that differs from the one before: its question and, in sweep_cells, its cells, whoever computed them. Ask v_sweeps for what a sweep is now.';
COMMENT ON COLUMN sweeps.sweep_id IS 'File under registry/sweeps: hash of the name, number, hash of what was asked.';
COMMENT ON COLUMN sweeps.sweep IS 'Name of the sweep.';
COMMENT ON COLUMN sweeps.question IS 'The question that it is to answer; empty where its file has none.';
COMMENT ON COLUMN sweeps.num_cells IS 'Cells that were asked for.';
COMMENT ON COLUMN sweeps.number IS 'Askings of the sweep before this one.';
COMMENT ON COLUMN sweeps.asked IS 'When it was first asked so, UTC.';
COMMENT ON COLUMN sweeps.argv IS 'Command line that asked.';
COMMENT ON COLUMN sweeps.git_commit IS 'Commit of the code that asked.';
COMMENT ON COLUMN sweeps.git_dirty IS 'Whether tracked files differed from the commit.';

CREATE TABLE sweep_cells (
    sweep_id VARCHAR NOT NULL,
    sweep VARCHAR NOT NULL,
    place INTEGER NOT NULL,
    label VARCHAR NOT NULL,
    cell_key VARCHAR NOT NULL,
    PRIMARY KEY (sweep_id, place)
);
COMMENT ON TABLE sweep_cells IS 'One row per asking of a sweep and cell. Ask v_sweep_cells for the cells of a sweep as it is now.';
COMMENT ON COLUMN sweep_cells.sweep_id IS 'Asking that the cell belongs to.';
COMMENT ON COLUMN sweep_cells.sweep IS 'Name of the sweep.';
COMMENT ON COLUMN sweep_cells.place IS 'Place of the cell in the sweep, 0-based.';
COMMENT ON COLUMN sweep_cells.label IS 'What tells the cell from the others of this sweep: temperature=0.7. The run that computed it may bear another one.';
COMMENT ON COLUMN sweep_cells.cell_key IS 'Identity of the cell: hash of all that changes its numbers.';

CREATE TABLE quarantine (
    run_id VARCHAR PRIMARY KEY,
    reason VARCHAR NOT NULL,
    signature VARCHAR NOT NULL
);
COMMENT ON TABLE quarantine IS 'Landing directories that were not believed, and why. They are looked at again when they change.';
COMMENT ON COLUMN quarantine.run_id IS 'Name of the directory under registry/landing, or attempts/<job>, sweeps/<id>.';
COMMENT ON COLUMN quarantine.reason IS 'What is wrong, with the name of the file.';
COMMENT ON COLUMN quarantine.signature IS 'Names, sizes and times of its files when it was looked at.';
