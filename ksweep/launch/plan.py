"""Plan what has to be done for each cell of a sweep, and why: a pure function of facts that `preflight.py` gathers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ksweep.utils.errors import END_CLASSES

if TYPE_CHECKING:
    from ksweep.evaluation.identity import CellKeys

CellState = Literal["done", "running", "waiting", "failed", "missing"]

RETRIED_FREELY: tuple[str, ...] = tuple(name for name, row in END_CLASSES.items() if row.retried)
"""Classes of ends after which a cell is run again unasked."""


@dataclass(frozen=True)
class CellFacts:
    """What exists for a cell already, and what it needs."""

    cell_key: str
    activations_key: str
    label: str
    finished_run: str | None
    """Newest run that finished with this cell's key."""
    activations_present: int
    activations_wanted: int
    draws_present: int
    """On disk, or planned for an earlier cell of the same sweep."""
    draws_wanted: int
    bytes_per_activation: int
    bytes_per_draw: int
    seconds_per_draw: float | None
    """From past runs with the same draws key or autoencoder, their scoring included; None if there are none."""
    scores_present: int | None = None
    """Draws with scores by this cell's AR, on disk or planned for an earlier cell of the same sweep; None: all of these."""
    bytes_per_score: int = 0
    bytes_to_copy: int = 0
    """Size of draws of earlier versions that are copied into the stores of this version."""
    seconds_per_score: float | None = None
    """From past runs that only scored; None if there are none."""
    job: tuple[Literal["running", "waiting"], str] | None = None
    """State and reason of a live job with this cell."""
    failure: tuple[str, str] | None = None
    """Class and message of the newest run, if that failed."""
    title: str = ""
    """Name of the cell where it stands alone; empty: its label."""
    text_yield: str = ""
    """Note on rows that yield no activations."""
    keys: CellKeys | None = None
    """Resolved identity of the cell, for its job's job.json."""


@dataclass(frozen=True)
class Step:
    """The plan for one cell."""

    label: str
    cell_key: str
    state: CellState
    reason: str
    draws_to_sample: int
    activations_to_extract: int
    draw_bytes: int
    activation_bytes: int
    seconds: float | None
    title: str = ""
    """Name of the cell where it stands alone; its label is what tells it from the others of its sweep."""
    keys: CellKeys | None = None
    """Resolved identity of the cell, for its job's job.json."""
    draws_to_score: int = 0
    """Draws that exist and lack scores by this cell's AR. Those to sample are scored as they are drawn, and not counted here."""
    text_yield: str = ""
    """Note on rows that yield no activations."""


@dataclass(frozen=True)
class Estimate:
    """What the missing cells of a sweep need in total."""

    activations: int
    draws: int
    activation_bytes: int
    draw_bytes: int
    seconds: float | None
    """Of drawing on one rank; None where not every cell's speed is known."""
    known_seconds: float
    """Of those missing cells whose speed is known."""
    num_known: int
    num_unknown: int
    draws_to_score: int = 0
    """Draws that exist and are only to be scored."""


def estimate(steps: Sequence[Step]) -> Estimate:
    """Sum up a plan."""
    estimated = [step.seconds for step in steps if step.seconds is not None]
    missing = [step for step in steps if step.state == "missing"]
    unknown = sum(step.seconds is None for step in missing)
    return Estimate(
        activations=sum(step.activations_to_extract for step in steps),
        draws=sum(step.draws_to_sample for step in steps),
        activation_bytes=sum(step.activation_bytes for step in steps),
        draw_bytes=sum(step.draw_bytes for step in steps),
        seconds=None if unknown else sum(estimated),
        known_seconds=sum(estimated),
        num_known=len(missing) - unknown,
        num_unknown=unknown,
        draws_to_score=sum(step.draws_to_score for step in steps),
    )


def plan_steps(facts: Iterable[CellFacts], *, retry: Sequence[str] = ()) -> list[Step]:
    """Plan one step for each cell, in order. Activations and draws that two cells share count for the first that needs them.

    A failed cell whose key begins with one of `retry` counts as missing ("" begins every key).
    """
    steps: list[Step] = []
    extracted: dict[str, int] = {}
    for fact in facts:
        planned = max(extracted.get(fact.activations_key, 0), fact.activations_present)
        step = _step(fact, max(0, fact.activations_wanted - planned), fact.cell_key.startswith(tuple(retry)))
        steps.append(replace(step, title=fact.title or fact.label, keys=fact.keys, text_yield=fact.text_yield))
        if steps[-1].state == "missing":
            extracted[fact.activations_key] = max(planned, fact.activations_wanted)
    return steps


def _step(fact: CellFacts, activations: int, retry: bool) -> Step:
    if fact.finished_run is not None:
        return Step(fact.label, fact.cell_key, "done", f"run {fact.finished_run}", 0, 0, 0, 0, 0.0)
    if fact.job is not None:
        return Step(fact.label, fact.cell_key, *fact.job, 0, 0, 0, 0, 0.0)
    if fact.failure is not None and fact.failure[0] not in RETRIED_FREELY and not retry:
        reason = f"{fact.failure[0]}: {_first_line(fact.failure[1])} (--retry runs it again)"
        return Step(fact.label, fact.cell_key, "failed", reason, 0, 0, 0, 0, 0.0)
    draws = fact.draws_wanted - fact.draws_present
    only_scored = 0 if fact.scores_present is None else fact.draws_present - fact.scores_present
    return Step(
        label=fact.label,
        cell_key=fact.cell_key,
        state="missing",
        reason=_reason(fact, draws, only_scored),
        draws_to_sample=draws,
        activations_to_extract=activations,
        draw_bytes=draws * fact.bytes_per_draw + (draws + only_scored) * fact.bytes_per_score + fact.bytes_to_copy,
        activation_bytes=activations * fact.bytes_per_activation,
        seconds=_seconds(fact, draws, only_scored),
        draws_to_score=only_scored,
    )


def _seconds(fact: CellFacts, draws: int, only_scored: int) -> float | None:
    """Return the seconds of drawing and scoring; None where a speed that is needed is unknown."""
    work = [(draws, fact.seconds_per_draw), (only_scored, fact.seconds_per_score)]
    needed = [(count, speed) for count, speed in work if count]
    if not needed and fact.seconds_per_draw is None:
        return None
    return None if any(speed is None for _, speed in needed) else sum(count * (speed or 0.0) for count, speed in needed)


def _reason(fact: CellFacts, draws: int, only_scored: int) -> str:
    if draws == 0 and only_scored:
        scored = f"; {fact.scores_present:,} of these are scored" if fact.scores_present else ""
        return f"score: all {fact.draws_wanted:,} draws are there, this AR's scores are not{scored}"
    if draws == 0:
        return "all draws are there, statistics are not"
    if fact.draws_present:
        return f"{fact.draws_present:,} of {fact.draws_wanted:,} draws are there"
    return "no draws yet"


def _first_line(text: str) -> str:
    line = next(iter(text.strip().splitlines()), "")
    return line if len(line) <= 200 else f"{line[:200]} ..."
