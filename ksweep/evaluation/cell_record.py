"""Write the run record of an evaluated cell, with its curve, controls and tables."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ksweep.autoencoder.family import family_of
from ksweep.config.spec import Cell
from ksweep.evaluation.cell_statistics import CellStatistics
from ksweep.evaluation.distributed import Ranks
from ksweep.evaluation.identity import CellKeys
from ksweep.registry import run_record
from ksweep.utils.provenance import provenance

if TYPE_CHECKING:
    from ksweep.evaluation.cell_run import CellRun
    from ksweep.evaluation.context import RunContext


def record_cell(
    run: CellRun, context: RunContext, ranks: Ranks, statistics: CellStatistics, draws: pa.Table, engine: dict[str, str]
) -> str:
    """Write the run record of a finished cell and its tables, and return the run's id.

    Args:
        run: the cell, with its clock.
        context: where results go.
        ranks: the ranks that computed it.
        statistics: what is recorded.
        draws: every draw of the cell.
        engine: how this rank computed its draws; empty where it drew none.
    """
    record = _finished_record(run, context, ranks, statistics, run.num_new_tokens(draws), engine)
    summary, reference, breakdown = statistics.summary, statistics.reference, statistics.breakdown
    norms = pa.table({"activation": np.arange(len(statistics.norms)), "norm": statistics.norms})
    run_record.write_run(
        context.registry,
        record,
        pa.Table.from_pylist(summary.curve),
        pa.Table.from_pylist(summary.controls),
        reference=pa.Table.from_pylist(reference.rows, schema=run_record.REFERENCE_SCHEMA) if reference.rows else None,
        norms=norms if family_of(run.cell.autoencoder).has_reference_quantities else None,
        metrics=pa.Table.from_pylist(breakdown.metrics),
        examples=breakdown.examples,
        activations=breakdown.activations,
    )
    return record.run_id


def _finished_record(
    run: CellRun, context: RunContext, ranks: Ranks, statistics: CellStatistics, num_tokens: int, engine: dict[str, str]
) -> run_record.RunRecord:
    here = provenance()
    return run_record.RunRecord(
        **identity_fields(run.cell, run.keys),
        **request_fields(context.sweep, context.resources, {**here, **context.origin}),
        **_execution_fields(run, ranks, num_tokens),
        **_statistics_fields(run.cell, statistics),
        host=here["host"],
        engine=engine,
        status="finished",
        notes=tuple(dict.fromkeys((*run.notes, *run.store.notes, *statistics.reference.notes))),
    )


def identity_fields(cell: Cell, keys: CellKeys) -> dict[str, Any]:
    """Return the fields of a run record that say what was evaluated, with a new run id."""
    return {
        "run_id": run_record.new_run_id(keys.cell),
        "cell": keys.name,
        "label": keys.label,
        "cell_key": keys.cell,
        "draws_key": keys.draws,
        "scores_key": keys.scores,
        "activations_key": keys.activations,
        "spec": _spec_fields(cell),
        "layer": keys.layer,
        "revisions": keys.revisions,
    }


def _spec_fields(cell: Cell) -> dict[str, Any]:
    """Return a spec as a dictionary. Of given texts it has no temperature, seed or engine: nothing was sampled with any."""
    spec = asdict(cell)
    if family_of(cell.autoencoder).draws_are_given:
        spec["sampling"] = {"num_draws": cell.sampling.num_draws}
    return spec


def request_fields(sweep: str, resources: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a run record that say which command asked for it, and with which code."""
    return {
        "sweep": sweep,
        "resources": resources,
        "git_commit": origin.get("git_commit"),
        "git_dirty": origin.get("git_dirty"),
        "argv": tuple(origin.get("argv", ())),
        "packages": origin.get("packages", {}),
    }


def _execution_fields(run: CellRun, ranks: Ranks, num_tokens: int) -> dict[str, Any]:
    """Return the fields that say where and how long a cell was computed, and how much was new."""
    # Rank 0 may have waited for another rank's last unit: that is drawing time of the job too.
    seconds = sum(run.clock.seconds.get(phase, 0.0) for phase in ("drawing", "waiting"))
    draws_bytes, scores_bytes = run.store.bytes_on_disk()
    return {
        "job": ranks.job or None,
        "start": ranks.start,
        "started": run.clock.started,
        "finished": datetime.now(UTC),
        "seconds": run.clock.seconds,
        "device": ranks.device_name,
        "num_ranks": ranks.world_size,
        "num_draws_sampled": int((~run.covered).sum()),
        "num_draws_reused": int(run.covered.sum()),
        "num_draws_scored": run.num_unscored,
        "num_tokens_sampled": num_tokens,
        "tokens_per_second": num_tokens / seconds if num_tokens else None,
        "draws_bytes": draws_bytes,
        "scores_bytes": scores_bytes,
    }


def _statistics_fields(cell: Cell, statistics: CellStatistics) -> dict[str, Any]:
    """Return the fields that summarise a cell's numbers; its curve is a table of its own."""
    summary, first = statistics.summary, statistics.summary.curve[0]
    from_counts = ("failures", "failure_rate", "cut_off_rate", "cjk_fraction", "distinct_text_fraction", "mean_tokens")
    from_curve = (
        "num_activations", "num_documents", "effective_documents", "num_draws", "fve_over_successes", "baseline", "baseline_kind",
    )  # fmt: skip
    never_cut_off = {"cut_off_rate": None} if family_of(cell.autoencoder).texts_have_fixed_length else {}
    return {
        **{name: first[name] for name in from_curve},
        **{name: summary.counts[name] for name in from_counts},
        **never_cut_off,
        **statistics.tokens,
        "d_model": statistics.d_model,
        "scoring_kind": summary.baseline.scoring,
        "baseline_num_activations": summary.baseline.num_activations,
        "baseline_from_mean": None if summary.from_mean is None else summary.from_mean.value,
    }
