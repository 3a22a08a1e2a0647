"""Intervals, baselines and numbers of documents in words, with the decimals that hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


USUAL_REPLICATES = 2000
"""Bootstrap replicates of rows that do not say how many: the default of scoring.num_replicates."""


def interval_text(row: Mapping[str, Any], low: str = "fve_low", high: str = "fve_high", *, sign: str = "") -> str:
    """ "[0.48, 0.57]": an interval with the decimals that hold; empty where it is not known."""
    if row.get(low) is None or row.get(high) is None:
        return ""
    form = f"{sign}z.{decimals_of_interval(row, low, high)}f"  # z: no -0.00
    return f"[{row[low]:{form}}, {row[high]:{form}}]"


def decimals_of_interval(row: Mapping[str, Any], low: str = "fve_low", high: str = "fve_high") -> int:
    """Decimals that hold for the ends of an interval: another seed of the bootstrap changes the last one by at most one."""
    from ksweep.stats.bootstrap import interval_decimals

    return interval_decimals(row[low], row[high], row.get("num_replicates") or USUAL_REPLICATES, row.get("level") or 0.95)


def effective_text(num_documents: int | None, effective_documents: float | None) -> str:
    """ " (26.3 effective)" behind a number of documents of uneven sizes; nothing where sizes are equal or it is not known."""
    if num_documents is None or effective_documents is None or f"{effective_documents:.1f}" == f"{num_documents:.1f}":
        return ""
    return f" ({effective_documents:.1f} effective)"


def baseline_text(row: Mapping[str, Any]) -> str:
    """ "baseline 0.4420 (between documents; distance from mean: 0.4359)": its kind, and the public code's where it is another."""
    kind, from_mean = row["baseline_kind"], row.get("baseline_from_mean")
    also = "" if from_mean is None or kind == "distance from mean" else f"; distance from mean: {from_mean:.4f}"
    return f"baseline {row['baseline']:.4f} ({kind}{also})"
