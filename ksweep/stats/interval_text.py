"""Intervals, baselines and numbers of documents as text, with as many decimals as are reproducible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

USUAL_REPLICATES = 2000
"""Bootstrap replicates assumed for rows without num_replicates: the default of scoring.num_replicates."""


def interval_text(row: Mapping[str, Any], low: str = "fve_low", high: str = "fve_high", *, sign: str = "") -> str:
    """Return "[0.48, 0.57]", with reproducible decimals; empty if the interval is unknown."""
    if row.get(low) is None or row.get(high) is None:
        return ""
    form = f"{sign}z.{decimals_of_interval(row, low, high)}f"  # z: no -0.00
    return f"[{row[low]:{form}}, {row[high]:{form}}]"


def decimals_of_interval(row: Mapping[str, Any], low: str = "fve_low", high: str = "fve_high") -> int:
    """Return how many decimals of an interval are reproducible: another bootstrap seed changes the last one by at most 1."""
    from ksweep.stats.bootstrap import interval_decimals

    return interval_decimals(row[low], row[high], row.get("num_replicates") or USUAL_REPLICATES, row.get("level") or 0.95)


def effective_text(num_documents: int | None, effective_documents: float | None) -> str:
    """Return " (26.3 effective)" for documents of uneven sizes; empty if sizes are equal or unknown."""
    if num_documents is None or effective_documents is None or f"{effective_documents:.1f}" == f"{num_documents:.1f}":
        return ""
    return f" ({effective_documents:.1f} effective)"


def baseline_text(row: Mapping[str, Any]) -> str:
    """Return "baseline 0.4420 (between documents; distance from mean: 0.4359)"; the latter is the baseline of the public code."""
    kind, from_mean = row["baseline_kind"], row.get("baseline_from_mean")
    also = "" if from_mean is None or kind == "distance from mean" else f"; distance from mean: {from_mean:.4f}"
    return f"baseline {row['baseline']:.4f} ({kind}{also})"
