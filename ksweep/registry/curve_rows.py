"""The one way in which runs and comparisons write a curve as rows: one for each K, columns named as in the registry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ksweep import stats


def rows_of_curve(curve: stats.FveCurve) -> list[dict[str, Any]]:
    """Return a row for each K with the columns that every table of curves has, named as in the registry."""
    return [
        {
            "k": int(k),
            "fve": float(curve.fve[i]),
            "fve_low": finite(curve.fve_low[i]),
            "fve_high": finite(curve.fve_high[i]),
            "level": curve.level,
            "error": float(curve.error[i]),
            "failure_rate": float(curve.failure_rate[i]),
            "num_activations": curve.num_activations,
            "num_documents": curve.num_documents,
            "effective_documents": curve.effective_documents,
            "num_draws": curve.num_draws,
            "baseline": curve.baseline.value,
            "baseline_kind": curve.baseline.kind,
        }
        for i, k in enumerate(curve.k)
    ]


def finite(value: Any) -> Any:
    """Return None for a float that is NaN or infinite, a plain float for another float, and any other value as it is."""
    if not isinstance(value, (float, np.floating)):
        return value
    return float(value) if math.isfinite(value) else None
