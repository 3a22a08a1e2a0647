"""FVE of groups of activations as rows, for runs and for comparisons alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ksweep import stats
from ksweep.config.spec import Scoring
from ksweep.registry import activation_metadata
from ksweep.utils.text import natural_sorted


def group_rows(
    errors: np.ndarray, metadata: pa.Table, baseline: stats.Baseline, scoring: Scoring, ks: Sequence[int], by: str | None
) -> Iterator[dict[str, Any]]:
    """Yield a row for each group, baseline and K, with the columns of the registry's `metrics`.

    Args:
        errors: [activation, draw], NaN where the draw failed.
        metadata: documents, groups and distances of the activations (`activation_metadata.METADATA_SCHEMA`).
        baseline: of all activations.
        scoring: selection, failure policy, bootstrap.
        ks: values of K.
        by: role, position, norm, document or a further grouping of the metadata; None takes all activations as one group.
    """
    groups = ["all"] * len(metadata) if by is None else metadata[activation_metadata.group_column(by)].to_pylist()
    best = stats.best_errors(errors, ks, scoring.selection, scoring.failed_error)
    curves = stats.group_curves(
        best, stats.all_failed_rates(errors, ks, scoring.selection), ks, metadata["document"].to_pylist(), groups, baseline,
        _own_baseline(metadata, baseline, by), num_replicates=scoring.num_replicates, seed=scoring.seed, level=scoring.level,
    )  # fmt: skip
    places = natural_sorted({name for name in groups if name is not None})
    failed = np.isnan(errors).mean(axis=1)
    for curve in curves:
        inside = np.array([name == curve.group for name in groups])
        for i, k in enumerate(curve.k.tolist()):
            column = best[inside, i]
            yield {
                "breakdown": by or "all", "part": curve.group, "place": places.index(curve.group), "against": curve.against,
                "k": k, "fve": float(curve.fve[i]), "fve_low": float(curve.fve_low[i]), "fve_high": float(curve.fve_high[i]),
                "level": curve.level, "error": float(curve.error[i]), "median_error": float(np.median(column)),
                "worst_share": stats.worst_share(column), "baseline": curve.baseline, "baseline_kind": curve.baseline_kind,
                "failure_rate": float(failed[inside].mean()), "all_failed_rate": float(curve.failure_rate[i]),
                "num_activations": curve.num_activations, "num_documents": curve.num_documents,
                "effective_documents": curve.effective_documents,
            }  # fmt: skip


def _own_baseline(metadata: pa.Table, baseline: stats.Baseline, by: str | None) -> stats.Baseline | None:
    """Return baseline contributions within groups, of the overall baseline's kind; None for groups by document (too small)."""
    if by is None:
        return None
    kind = "between documents" if baseline.kind == "stated constant" else baseline.kind
    return activation_metadata.baseline_of(metadata, kind, baseline.scoring, by)
