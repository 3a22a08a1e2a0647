"""Compute a cell's curve, controls and counts from its draws. Arrays in, rows out; no model, no file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ksweep import stats
from ksweep.config.spec import Scoring
from ksweep.registry.curve_rows import finite, rows_of_curve
from ksweep.stats.best_of_k import kept_ks

SUMMARISED = [
    "document", "text", "explanation", "finish", "parse", "num_tokens",
    "error", "cosine", "shuffled_error", "shuffled_activation",
]  # fmt: skip
"""Columns of the draws store that a summary needs. Reconstructions, a hundred times as large, are passed separately."""

RETRIEVAL_POOL = 2048
"""Most activations among which the retrieval control looks for the right one; the first ones where there are more."""


@dataclass(frozen=True)
class Summary:
    """Statistics of one evaluated cell."""

    curve: list[dict[str, Any]]
    """One row per K (CURVE_SCHEMA of the run record)."""
    controls: list[dict[str, Any]]
    counts: dict[str, Any]
    """Failures by cause, rates of draws, mean number of tokens."""
    baseline: stats.Baseline
    from_mean: stats.Baseline | None
    """Mean squared distance of the activations from their mean, the public code's baseline; None for a single activation."""


def summarise(
    draws: pa.Table,
    vectors: np.ndarray,
    scoring: Scoring,
    ks: tuple[int, ...],
    empty_text: np.ndarray | None,
    first_draws: np.ndarray,
    kind: stats.ScoringKind = "normalised",
) -> Summary:
    """Compute the statistics of a cell.

    Args:
        draws: every draw, ordered by activation and draw (`DrawsStore.read`).
        vectors: [activation, d_model] float32 targets.
        scoring: baseline, failure policy, interval.
        ks: values of K to report.
        empty_text: [d_model] the AR's reconstruction of an empty text; None where it cannot read one.
        first_draws: [activation, d_model] reconstruction of draw 0 of the first RETRIEVAL_POOL activations, NaN where it failed.
        kind: which error `draws` holds.
    """
    num_activations = len(vectors)
    grid = (num_activations, draws.num_rows // num_activations)
    errors = draws["error"].to_numpy().reshape(grid)
    documents = np.asarray(draws["document"].to_pylist(), dtype=object).reshape(grid)[:, 0]
    from_mean = stats.mean_distance_baseline(vectors, kind) if num_activations > 1 else None
    baseline = _baseline(scoring, vectors, documents, kind)
    curve = stats.fve_curve(
        errors, documents, baseline, ks=ks, failed_error=scoring.failed_error,
        num_replicates=scoring.num_replicates, seed=scoring.seed, level=scoring.level, selection=scoring.selection,
    )  # fmt: skip
    shuffled = _shuffled_fve(draws, grid, ks, scoring, baseline)
    cosines = draws["cosine"].to_numpy().reshape(grid)
    cosine = stats.select(cosines, errors, ks, scoring.selection, failed_value=0.0).mean(axis=0)
    return Summary(
        curve=_curve_rows(curve, shuffled, cosine),
        controls=_controls(vectors, baseline, from_mean, empty_text, first_draws) + _gain(curve),
        counts=_counts(draws, curve),
        baseline=baseline,
        from_mean=from_mean,
    )


def _baseline(scoring: Scoring, vectors: np.ndarray, documents: np.ndarray, kind: stats.ScoringKind) -> stats.Baseline:
    if scoring.stated_baseline is not None:
        return stats.stated_baseline(scoring.stated_baseline, scoring=kind)
    return stats.measured_baseline(scoring.baseline_kind, vectors, documents, kind)


def _shuffled_fve(
    draws: pa.Table, grid: tuple[int, int], ks: tuple[int, ...], scoring: Scoring, baseline: stats.Baseline
) -> np.ndarray:
    """Return the FVE when each draw is scored against an activation of another document, the best of K chosen by that error.

    The mean is over the activations that have such a partner: all but those of the first document. NaN with one document.
    """
    paired = draws["shuffled_activation"].is_valid().to_numpy().reshape(grid)[:, 0]
    if not paired.any():
        return np.full(len(ks), np.nan)
    errors = draws["shuffled_error"].to_numpy().reshape(grid)[paired]
    best = stats.best_errors(errors, ks, scoring.selection, scoring.failed_error).mean(axis=0)
    return np.asarray(1 - best / baseline.value)


def _curve_rows(curve: stats.FveCurve, shuffled: np.ndarray, cosine: np.ndarray) -> list[dict[str, Any]]:
    band_low, band_high = stats.curve_band(curve)
    kept = set(kept_ks(curve.k.tolist()))
    return [
        {
            "metric": "fve",
            **row,
            "cosine": finite(cosine[i]),
            "fve_over_successes": finite(curve.fve_over_successes[i]),
            "shuffled_fve": finite(shuffled[i]),
            "band_low": finite(band_low[i]),
            "band_high": finite(band_high[i]),
            "replicates": curve.replicates[:, i].tolist() if row["k"] in kept else None,
        }
        for i, row in enumerate(rows_of_curve(curve))
    ]


def _controls(
    vectors: np.ndarray,
    baseline: stats.Baseline,
    from_mean: stats.Baseline | None,
    empty: np.ndarray | None,
    first_draws: np.ndarray,
) -> list[dict[str, Any]]:
    n = len(vectors)
    rows: list[dict[str, Any]] = []
    if empty is not None:
        value = float(1 - stats.reconstruction_errors(empty[None], vectors, baseline.scoring).mean() / baseline.value)
        rows.append(_control("empty_text", value, n, "FVE of the reconstruction of an empty text"))
    if from_mean is not None:
        value = 1 - stats.mean_vector_error(from_mean) / baseline.value
        mean = "scaled mean" if baseline.scoring == "normalised" else "mean"
        rows.append(_control("mean_vector", value, n, f"FVE of the {mean} of the activations: the best constant"))
    pool = min(n, RETRIEVAL_POOL)
    if pool >= 2:
        successes = np.flatnonzero(~np.isnan(first_draws[:pool]).any(axis=1))
        means = stats.mean_reconstructions(first_draws[successes], successes, pool, baseline.scoring)
        retrieval = stats.retrieval(means, vectors[:pool], baseline.scoring)
        note = "share of activations whose first draw is nearer to them than to any other activation"
        rows.append(_control("retrieval_top1", retrieval.top_1_rate, pool, note))
        rows.append(_control("retrieval_chance", retrieval.chance, pool, "the same share for draws that carry no information"))
    return rows


def _gain(curve: stats.FveCurve) -> list[dict[str, Any]]:
    """Return FVE at the largest K minus FVE at K = 1, with an interval paired over documents, as the two share noise."""
    if 1 not in curve.k or len(curve.k) < 2:
        return []
    gain = stats.gain_over(curve, k=1, level=curve.level)
    low, high = float(gain.low[-1]), float(gain.high[-1])
    form = f".{stats.interval_decimals(low, high, curve.resampling.num_replicates, curve.level)}f"
    interval = "" if np.isnan([low, high]).any() else f", {curve.level:.0%} interval {low:{form}} to {high:{form}}"
    last = int(curve.k[-1])
    return [
        _control(
            "gain",
            float(gain.estimate[-1]),
            curve.num_activations,
            f"FVE at K = {last} less FVE at K = 1, paired{interval}",
            last,
        )
    ]


def _control(name: str, value: float, num_activations: int, note: str, k: int | None = None) -> dict[str, Any]:
    return {"control": name, "k": k, "value": value, "num_activations": num_activations, "note": note}


def _counts(draws: pa.Table, curve: stats.FveCurve) -> dict[str, Any]:
    parse = Counter(draws["parse"].to_pylist())
    num_draws = draws.num_rows
    explanations = draws["explanation"].drop_null()
    pairs = set(zip(draws["activation"].to_pylist(), draws["text"].to_pylist(), strict=True))
    return {
        "num_draws_total": num_draws,
        "failures": {cause: count for cause, count in sorted(parse.items()) if cause != "ok"},
        "failure_rate": (num_draws - parse["ok"]) / num_draws,
        "cut_off_rate": Counter(draws["finish"].to_pylist())["length"] / num_draws,
        "distinct_text_fraction": len(pairs) / num_draws,
        "cjk_fraction": sum(map(_mostly_cjk, explanations.to_pylist())) / max(1, len(explanations)),
        "mean_tokens": float(np.mean(draws["num_tokens"].to_numpy())),
        "num_without_success": curve.num_without_success,
    }


def _mostly_cjk(text: str) -> bool:
    """Return whether most letters are Chinese or Japanese: the known symptom of an injection that did not take effect."""
    letters = [c for c in text if c.isalpha()]
    return bool(letters) and sum("⺀" <= c <= "鿿" or "㐀" <= c <= "䶿" for c in letters) > len(letters) / 2
