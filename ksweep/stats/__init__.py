"""From errors of draws to a curve with honest error bars. NumPy only: no files, no models.

    baseline = evaluated_set_baseline(vectors)              # the error at which FVE is 0
    errors = reconstruction_errors(reconstructions, vectors[:, None])   # [activation, draw]; NaN = failed
    curve = fve_curve(errors, documents, baseline)          # FVE for every K, intervals over documents
    hotter = fve_curve(hot_errors, documents, baseline)
    paired_difference(hotter, curve)                        # same replicates: what both share cancels
    gain_over(curve, k=1)                                   # what best-of-K buys over one draw
    donors = derangement(len(vectors), seed=0, documents=documents)
    control = fve_curve(errors_of_donors_draws, documents, baseline)    # selection alone climbs with K too

`fve`: error, baseline and their ratio. `best_of_k`: order statistics. `bootstrap`: intervals. `controls`:
what to hold the curve against.
"""

from ksweep.stats.best_of_k import (
    best_of_k_errors,
    best_of_k_errors_over_successes,
    best_of_k_failure_rates,
    best_of_k_select,
    best_of_k_weights,
)
from ksweep.stats.bootstrap import FveCurve, Interval, fve_curve, gain_over, paired_difference
from ksweep.stats.controls import (
    Retrieval,
    derangement,
    mean_reconstructions,
    mean_vector_error,
    retrieval,
)
from ksweep.stats.fve import (
    ORTHOGONAL_ERROR,
    Baseline,
    ScoringKind,
    cosines,
    evaluated_set_baseline,
    fve,
    reconstruction_errors,
    stated_baseline,
    unit_scaled,
)
from ksweep.stats.reference import prefix_of_k_errors, prefix_of_k_select

__all__ = [
    "ORTHOGONAL_ERROR",
    "Baseline",
    "FveCurve",
    "Interval",
    "Retrieval",
    "ScoringKind",
    "best_of_k_errors",
    "best_of_k_errors_over_successes",
    "best_of_k_failure_rates",
    "best_of_k_select",
    "best_of_k_weights",
    "cosines",
    "derangement",
    "evaluated_set_baseline",
    "fve",
    "fve_curve",
    "gain_over",
    "mean_reconstructions",
    "mean_vector_error",
    "paired_difference",
    "prefix_of_k_errors",
    "prefix_of_k_select",
    "reconstruction_errors",
    "retrieval",
    "stated_baseline",
    "unit_scaled",
]
