"""What the draws of a cell come to, and how it is landed; and the record of a run that came to nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa

from ksweep.autoencoder.family import family_of
from ksweep.config.spec import Cell, cell_from_dict
from ksweep.evaluation.breakdown import Breakdown, break_down
from ksweep.evaluation.distributed import Ranks
from ksweep.evaluation.identity import CellKeys
from ksweep.evaluation.summary import RETRIEVAL_POOL, Summary, summarise
from ksweep.evaluation.tae_summary import StoredDraws, TaeSummary, reference_quantities
from ksweep.registry import activation_metadata
from ksweep.registry.draws import DrawsStore
from ksweep.utils.errors import DataError
from ksweep.utils.provenance import provenance

if TYPE_CHECKING:
    from ksweep.activations.chat_roles import Role
    from ksweep.activations.store import ActivationTable
    from ksweep.evaluation.cell_run import CellRun
    from ksweep.evaluation.context import RunContext


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What the draws of a cell have come to."""

    summary: Summary
    reference: TaeSummary
    """The reference sweep's own numbers; nothing for an NLA pair."""
    tokens: dict[str, Any]
    """token_stats and selected_token_stats of the run record."""
    norms: np.ndarray
    """Length of each activation."""
    d_model: int
    breakdown: Breakdown


def measure(
    cell: Cell, vectors: ActivationTable, store: DrawsStore, draws: pa.Table, empty: np.ndarray | None, registry: Path
) -> Measured:
    """Every statistic of a cell; no model is needed. What is known of its activations is kept in the registry."""
    targets = vectors.vectors(0, len(vectors))
    kind, roles = cell.autoencoder.scoring_kind, vectors.column("role").tolist()
    pool = np.arange(min(len(targets), RETRIEVAL_POOL))
    firsts = store.reconstructions(pool, np.zeros_like(pool), targets.shape[1])
    reference = TaeSummary()
    norms = np.linalg.norm(targets.astype(np.float64), axis=1)
    try:
        summary = summarise(draws, targets, cell.scoring, cell.ks, empty, firsts, kind)
        known = activation_metadata.write_metadata(registry, vectors, kind)
        breakdown = break_down(draws, known, summary.baseline, cell.scoring, cell.ks, vectors.column("window").tolist())
        if kind == "raw":
            errors = draws["error"].to_numpy().reshape(len(targets), -1)
            stored = StoredDraws(store=store, activations=targets, errors=errors, roles=roles)
            reference = reference_quantities(stored, cell.ks, cell.scoring.reference_replicates)
    except ValueError as error:  # what the statistics refuse is what was asked for: equal vectors, too few of them
        raise DataError(str(error)) from error
    return Measured(
        summary=summary, reference=reference, tokens=_token_stats(vectors, roles),
        norms=norms, d_model=targets.shape[1], breakdown=breakdown,
    )  # fmt: skip


def _token_stats(vectors: ActivationTable, roles: list[str | None]) -> dict[str, Any]:
    """Roles over all tokens that were looked at and over the evaluated positions; None where no chat format tells them."""
    from ksweep.activations.chat_roles import count_roles, role_proportions

    found: dict[str, Any] = {"token_stats": None, "selected_token_stats": None}
    known = [cast("Role", role) for role in roles if role is not None]
    if (counts := vectors.role_counts()) is not None:
        said = {"counts": counts, "proportions": role_proportions(counts)}
        found["token_stats"] = said | {"total_sequences": vectors.num_source_rows()}
    if known:
        counts = count_roles(known)
        said = {"counts": counts, "proportions": role_proportions(counts)}
        found["selected_token_stats"] = said | {"total_positions": len(roles)}
    return found


def land(run: CellRun, context: RunContext, ranks: Ranks, found: Measured, draws: pa.Table, engine: dict[str, str]) -> str:
    """Land the run of a cell; its id."""
    from ksweep.registry import run_record

    cell, keys, clock, covered = run.cell, run.keys, run.clock, run.covered
    new = ~covered.reshape(-1)
    tokens = run.num_new_tokens(draws)
    summary, reference = found.summary, found.reference
    counts, first = summary.counts, summary.curve[0]
    here = provenance()
    record = run_record.RunRecord(
        **identity_fields(cell, keys),
        **request_fields(context.sweep, context.resources, {**here, **context.origin}),
        engine=engine,
        status="finished",
        job=ranks.job or None,
        start=ranks.start,
        started=clock.started,
        finished=datetime.now(UTC),
        seconds=clock.seconds,
        host=here["host"],
        device=ranks.device_name,
        num_ranks=ranks.world_size,
        num_activations=first["num_activations"],
        num_documents=first["num_documents"],
        effective_documents=first["effective_documents"],
        d_model=found.d_model,
        num_draws=first["num_draws"],
        num_draws_sampled=int(new.sum()),
        num_draws_reused=int(covered.sum()),
        num_tokens_sampled=tokens,
        # Rank 0 may have waited for another rank's last unit: that is drawing time of the job too.
        tokens_per_second=tokens / sum(clock.seconds.get(phase, 0.0) for phase in ("drawing", "waiting")) if tokens else None,
        failures=counts["failures"],
        failure_rate=counts["failure_rate"],
        cut_off_rate=None if family_of(cell.autoencoder).texts_have_fixed_length else counts["cut_off_rate"],
        cjk_fraction=counts["cjk_fraction"],
        distinct_text_fraction=counts["distinct_text_fraction"],
        mean_tokens=counts["mean_tokens"],
        draws_bytes=run.store.bytes_on_disk(),
        fve_over_successes=first["fve_over_successes"],
        baseline=first["baseline"],
        baseline_kind=first["baseline_kind"],
        baseline_num_activations=summary.baseline.num_activations,
        baseline_from_mean=None if summary.from_mean is None else summary.from_mean.value,
        **found.tokens,
        notes=tuple(dict.fromkeys((*run.notes, *run.store.notes, *reference.notes))),
    )
    raw = cell.autoencoder.scoring_kind == "raw"
    run_record.write_run(
        context.registry,
        record,
        pa.Table.from_pylist(summary.curve),
        pa.Table.from_pylist(summary.controls),
        reference=pa.Table.from_pylist(reference.rows, schema=run_record.REFERENCE_SCHEMA) if reference.rows else None,
        norms=pa.table({"activation": np.arange(len(found.norms)), "norm": found.norms}) if raw else None,
        metrics=pa.Table.from_pylist(found.breakdown.metrics),
        examples=found.breakdown.examples,
        activations=found.breakdown.activations,
    )
    return record.run_id


def request_fields(sweep: str, resources: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """Who asked, for what, and with which code."""
    return {
        "sweep": sweep,
        "resources": resources,
        "git_commit": origin.get("git_commit"),
        "git_dirty": origin.get("git_dirty"),
        "argv": tuple(origin.get("argv", ())),
        "packages": origin.get("packages", {}),
    }


def identity_fields(cell: Cell, keys: CellKeys) -> dict[str, Any]:
    """What was measured, under a new run id."""
    from ksweep.registry.run_record import new_run_id

    return {
        "run_id": new_run_id(keys.cell),
        "cell": keys.name,
        "label": keys.label,
        "cell_key": keys.cell,
        "draws_key": keys.draws,
        "activations_key": keys.activations,
        "spec": asdict(cell),
        "layer": keys.layer,
    }


def names_in(argument: dict[str, Any]) -> dict[Cell, tuple[str, str]]:
    """Label and title of each cell of a job; none in jobs of earlier versions."""
    names = argument.get("names", ())
    return {cell_from_dict(cell): (label, title) for cell, (label, title) in zip(argument["cells"], names, strict=False)}
