"""From errors of draws to a curve with honest error bars. NumPy and SciPy's quantiles: no files, no models.

    baseline = between_documents_baseline(vectors, documents)   # the error at which FVE is 0
    errors = reconstruction_errors(reconstructions, vectors[:, None])   # [activation, draw]; NaN = failed
    curve = fve_curve(errors, documents, baseline)          # FVE for every K, intervals over documents
    hotter = fve_curve(hot_errors, documents, baseline)
    paired_difference(hotter, curve)                        # same replicates: shared variation cancels
    gain_over(curve, k=1)                                   # gain of best-of-K over one draw
    donors = derangement(len(vectors), seed=0, documents=documents)
    control = fve_curve(errors_of_donors_draws, documents, baseline)    # selection alone also grows with K

    low, high = difference_band(hotter, curve)          # holds for all K at once
    held_out_best([errors, hot_errors], documents, baseline, k=16)      # the better one, without the winner's curse

`fve`: error, baseline and their ratio. `best_of_k`: order statistics. `choosing`: chosen by one score, reported in another.
`bootstrap`: intervals. `bands`: all K at once, gains per doubling, and why there is no extrapolation beyond N. `selection`: the
best of several settings. `groups`: FVE within groups, and heavy tails. `controls`: what to compare the curve with.
"""

from ksweep.stats.bands import (
    curve_band,
    difference_at_own_best,
    difference_band,
    effective_subsets,
    few_subsets,
    gain_per_doubling,
    mean_gain_per_doubling,
    simultaneous_band,
    tokens_drawn,
)
from ksweep.stats.best_of_k import (
    Selection,
    all_failed_rates,
    best_errors,
    best_errors_over_successes,
    best_of_k_errors,
    best_of_k_errors_over_successes,
    best_of_k_failure_rates,
    best_of_k_select,
    best_of_k_weights,
    select,
)
from ksweep.stats.bootstrap import (
    FveCurve,
    Interval,
    fve_curve,
    gain_over,
    interval_decimals,
    interval_ends,
    interval_reach,
    paired_difference,
)
from ksweep.stats.choosing import ChosenMean, chosen_curve, chosen_mean
from ksweep.stats.controls import (
    Retrieval,
    derangement,
    mean_reconstructions,
    mean_vector_error,
    retrieval,
)
from ksweep.stats.documents import effective_documents
from ksweep.stats.fve import (
    MEASURED_KINDS,
    ORTHOGONAL_ERROR,
    Baseline,
    BaselineKind,
    ScoringKind,
    between_documents_baseline,
    cosines,
    fve,
    mean_distance_baseline,
    measured_baseline,
    reconstruction_errors,
    stated_baseline,
    unit_scaled,
)
from ksweep.stats.groups import GroupCurve, Tails, group_curves, quantile_groups, tails, within_group_distances, worst_share
from ksweep.stats.selection import HeldOutBest, halves, held_out_best

__all__ = [
    "MEASURED_KINDS",
    "ORTHOGONAL_ERROR",
    "Baseline",
    "BaselineKind",
    "ChosenMean",
    "FveCurve",
    "GroupCurve",
    "HeldOutBest",
    "Interval",
    "Retrieval",
    "ScoringKind",
    "Selection",
    "Tails",
    "all_failed_rates",
    "best_errors",
    "best_errors_over_successes",
    "best_of_k_errors",
    "best_of_k_errors_over_successes",
    "best_of_k_failure_rates",
    "best_of_k_select",
    "best_of_k_weights",
    "between_documents_baseline",
    "chosen_curve",
    "chosen_mean",
    "cosines",
    "curve_band",
    "derangement",
    "difference_at_own_best",
    "difference_band",
    "effective_documents",
    "effective_subsets",
    "few_subsets",
    "fve",
    "fve_curve",
    "gain_over",
    "gain_per_doubling",
    "group_curves",
    "halves",
    "held_out_best",
    "interval_decimals",
    "interval_ends",
    "interval_reach",
    "mean_distance_baseline",
    "mean_gain_per_doubling",
    "mean_reconstructions",
    "mean_vector_error",
    "measured_baseline",
    "paired_difference",
    "quantile_groups",
    "reconstruction_errors",
    "retrieval",
    "select",
    "simultaneous_band",
    "stated_baseline",
    "tails",
    "tokens_drawn",
    "unit_scaled",
    "within_group_distances",
    "worst_share",
]
