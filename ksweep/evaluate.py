"""One cell from start to finish: what every rank of a job runs. Read it like a method section."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa

from ksweep import evaluated
from ksweep.breakdown import Breakdown, break_down
from ksweep.draws import DrawsStore
from ksweep.errors import DataError, RunError
from ksweep.explain import UnitWork
from ksweep.keys import Keys, cell_keys, complete, inspect_file, inspect_pair
from ksweep.provenance import provenance
from ksweep.ranks import Ranks, Stopped, share
from ksweep.reference import Quantities, StoredDraws, reference_quantities
from ksweep.spec import Autoencoder, Cell, cell_from_dict
from ksweep.summary import RETRIEVAL_POOL, SUMMARISED, Summary, summarise

if TYPE_CHECKING:
    from ksweep.activations.roles import Role
    from ksweep.activations.store import ActivationTable
    from ksweep.autoencoder.protocol import Reconstructor, Verbalizer

log = logging.getLogger(__name__)

LISTING_SECONDS = 90.0
"""NFS remembers the listing of a directory for up to 60 s (acdirmax), whatever other nodes do in it meanwhile."""


@dataclass(frozen=True)
class Place:
    """Where results go and how large batches may be; never part of any identity."""

    registry: Path
    vector_cache: Path
    batch_size: int | None = None
    """Rows at once; None: as many as memory allows."""
    sweep: str = ""
    resources: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    """Provenance of the launcher: its commit and command."""
    order: int = 0
    """Seed of the order in which a job takes the missing units: another for each job, the same for its ranks."""


class Models:
    """AV and AR of a job, loaded when first needed and kept while the cells of one autoencoder follow one another."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        """`devices` are torch device names; a model is spread over them."""
        self.devices = devices
        self._of: Autoencoder | None = None
        self._av: Verbalizer | None = None
        self._ar: Reconstructor | None = None

    def _turn_to(self, autoencoder: Autoencoder) -> None:
        if autoencoder != self._of:
            self._of, self._av, self._ar = autoencoder, None, None
            gc.collect()  # a model that is spread holds itself in cycles, and would keep its memory while the next one is placed

    def verbalizer(self, autoencoder: Autoencoder) -> Verbalizer:
        """The AV, ready on the device."""
        self._turn_to(autoencoder)
        if self._av is None:
            self._av = self._load_verbalizer(autoencoder)
        return self._av

    def reconstructor(self, autoencoder: Autoencoder) -> Reconstructor:
        """The AR, ready on the device; a talkative autoencoder's stands on its AV's model where that is the same."""
        self._turn_to(autoencoder)
        if self._ar is None:
            self._ar = self._load_reconstructor(autoencoder)
        return self._ar

    def _load_verbalizer(self, autoencoder: Autoencoder) -> Verbalizer:
        from ksweep.autoencoder import nla, tae

        if autoencoder.checkpoint is not None:
            return tae.load_verbalizer(inspect_file(autoencoder), dtype=autoencoder.dtype, device=self.devices)
        return nla.load_verbalizer(inspect_pair(autoencoder)[0], dtype=autoencoder.dtype, device=self.devices)

    def _load_reconstructor(self, autoencoder: Autoencoder) -> Reconstructor:
        from ksweep.autoencoder import nla, tae

        if autoencoder.checkpoint is None:
            return nla.load_reconstructor(inspect_pair(autoencoder)[1], dtype=autoencoder.dtype, device=self.devices)
        decoder = self._av if isinstance(self._av, tae.TaeVerbalizer) else None
        info = inspect_file(autoencoder) if decoder is None else decoder.info
        return tae.load_reconstructor(
            info, dtype=autoencoder.dtype, device=self.devices, sharing=decoder, encoder_prompt=autoencoder.encoder_prompt
        )


def run_job(argument: dict[str, Any], ranks: Ranks) -> list[str]:
    """Every cell of a job, one after another; the entry point of each rank. Returns the runs that were landed (rank 0)."""
    place = Place(
        registry=Path(argument["registry"]),
        vector_cache=Path(argument["vector_cache"]),
        batch_size=argument["batch_size"],
        sweep=argument["sweep"],
        resources=argument["resources"],
        origin=argument["origin"],
        order=argument.get("order", 0),
    )
    models = Models(ranks.devices)
    landed = [evaluate(cell_from_dict(value), place, ranks, models) for value in argument["cells"]]
    return [run for run in landed if run is not None]


def evaluate(cell: Cell, place: Place, ranks: Ranks, models: Models) -> str | None:
    """Measure one cell; rank 0 lands the run and returns its id. How a cell failed is told by who sees the end of every rank."""
    clock = Clock()
    cell = complete(cell)
    keys = cell_keys(cell)
    ranks.begin_cell(keys.cell, clock.seconds)
    vectors = _activations(cell, keys, place, ranks, clock)
    if vectors.key != keys.activations:
        raise DataError(f"text or model of {keys.name} changed while it was begun: run again to use them as they are now")
    store = DrawsStore(place.registry / "draws", keys.draws)
    before = _sample(cell, keys, vectors, store, place, ranks, models, clock)
    if ranks.rank != 0:
        return None
    with clock("statistics"):
        ranks.report(f"{keys.label}: statistics", 0, 0)
        draws = _all_draws(store, (len(vectors), cell.sampling.effective_num_draws), ranks)
        if draws is None:
            raise RunError(
                f"draws of {keys.name} are missing right after they were taken: is {store.path} being changed by someone?"
            )
        found = _measure(cell, vectors, store, draws, _empty_text(cell, store, models))
        evaluated.describe(place.registry, vectors, cell.autoencoder.scoring_kind)
        for note in found.reference.notes:
            log.warning("%s: %s", keys.name, note)
    return _land(cell, keys, place, ranks, clock, found, draws, before)


def _activations(cell: Cell, keys: Keys, place: Place, ranks: Ranks, clock: Clock) -> ActivationTable:
    from ksweep.activations.fill import ensure

    def progress(done: int, total: int) -> None:
        ranks.report("activations", done, total)
        if ranks.should_stop():
            raise Stopped(f"stopped with {done} of {total} activations extracted")

    with clock("activations"):
        return ensure(
            cell.activations, keys.layer, place.vector_cache, rank=ranks.rank, world_size=ranks.world_size,
            barrier=ranks.barrier, device=ranks.devices, progress=progress,
        )  # fmt: skip


def _sample(
    cell: Cell, keys: Keys, vectors: ActivationTable, store: DrawsStore, place: Place, ranks: Ranks, models: Models, clock: Clock
) -> np.ndarray:
    """Take and score the draws that are missing, shared among the ranks; returns which were there before."""
    wanted = (len(vectors), cell.sampling.effective_num_draws)
    if ranks.rank == 0:
        store.set_damaged_aside(*wanted)
    ranks.barrier()
    before, units = store.coverage(*wanted), store.missing(*wanted)
    ranks.barrier()  # nobody publishes before everyone has counted
    if ranks.rank == 0:
        store.describe(keys.identity)
    if units:
        with clock("loading"):
            ranks.report(f"{keys.label}: loading models", 0, 0)
            av, ar = models.verbalizer(cell.autoencoder), models.reconstructor(cell.autoencoder)
        with clock("drawing"):
            work = UnitWork(
                cell.sampling, keys.label, vectors, av, ar, place.batch_size, ranks, sum(u.num_draws for u in units),
                cell.autoencoder.scoring_kind,
            )  # fmt: skip
            # Cells of two jobs may share draws: in orders of their own they seldom take the same unit, and each leaves out what
            # the other has done.
            order = np.random.default_rng(place.order).permutation(len(units))
            # Cells of one job may share draws: the queue belongs to this cell and to what it found.
            mine = (units[order[index]] for index in share(ranks, f"draws/{keys.cell}/{int(before.sum())}", len(units)))
            for part, table in work.run(part for unit in mine for part in store.still_missing(unit)):
                store.publish(part, table)
    with clock("waiting"):
        ranks.barrier()
    return before


def _all_draws(store: DrawsStore, wanted: tuple[int, int], ranks: Ranks) -> pa.Table | None:
    """Every draw; what a rank on another node has just published may for a while not be listed here."""
    deadline = time.monotonic() + (LISTING_SECONDS if ranks.world_size > 1 else 0.0)
    while not store.coverage(*wanted).all() and time.monotonic() < deadline:
        if ranks.should_stop():
            raise Stopped("stopped before the draws of every rank were to be seen")
        time.sleep(1.0)
    return store.read(*wanted, SUMMARISED)


def _empty_text(cell: Cell, store: DrawsStore, models: Models) -> np.ndarray | None:
    """What the AR makes of an empty text, if it can read one; measured once per draws key."""
    controls = store.controls()
    if controls is None:
        from ksweep.autoencoder.protocol import Explanation

        ar = models.reconstructor(cell.autoencoder)
        vector = np.asarray(ar.reconstruct([Explanation("")]))[0].tolist() if ar.reads_empty_text else None
        controls = {"empty_text": vector}
        store.publish_controls(controls)
    return None if controls["empty_text"] is None else np.asarray(controls["empty_text"])


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What the draws of a cell have come to."""

    summary: Summary
    reference: Quantities
    """The reference sweep's own numbers; nothing for an NLA pair."""
    tokens: dict[str, Any]
    """token_stats and selected_token_stats of the run record."""
    norms: np.ndarray
    """Length of each activation."""
    d_model: int
    breakdown: Breakdown


def _measure(cell: Cell, vectors: ActivationTable, store: DrawsStore, draws: pa.Table, empty: np.ndarray | None) -> Measured:
    """Every statistic of a cell; no model is needed."""
    targets = vectors.vectors(0, len(vectors))
    kind, roles = cell.autoencoder.scoring_kind, vectors.column("role").tolist()
    pool = np.arange(min(len(targets), RETRIEVAL_POOL))
    firsts = store.reconstructions(pool, np.zeros_like(pool), targets.shape[1])
    reference = Quantities()
    norms = np.linalg.norm(targets.astype(np.float64), axis=1)
    columns = {name: vectors.column(name) for name in ("row_id", "document", "position", "role", "window")}
    try:
        summary = summarise(draws, targets, cell.scoring, cell.ks, empty, firsts, kind)
        breakdown = break_down(draws, summary.baseline, cell.scoring, cell.ks, columns, norms)
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
    from ksweep.activations.roles import count_roles, role_proportions

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


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        """Starts with the cell."""
        self.started = datetime.now(UTC)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what is inside under a phase."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began


def _land(
    cell: Cell,
    keys: Keys,
    place: Place,
    ranks: Ranks,
    clock: Clock,
    found: Measured,
    draws: pa.Table,
    before: np.ndarray,
) -> str:
    from ksweep.registry import landing

    new = ~before.reshape(-1)
    tokens = int(draws["num_tokens"].to_numpy()[new].sum())
    summary, reference = found.summary, found.reference
    counts, first = summary.counts, summary.curve[0]
    here = provenance()
    record = landing.RunRecord(
        **_identity(cell, keys),
        **_asked(place.sweep, place.resources, {**here, **place.origin}),
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
        d_model=found.d_model,
        num_draws=first["num_draws"],
        num_draws_sampled=int(new.sum()),
        num_draws_reused=int(before.sum()),
        num_tokens_sampled=tokens,
        # Rank 0 may have waited for another rank's last unit: that is drawing time of the job too.
        tokens_per_second=tokens / (clock.seconds["drawing"] + clock.seconds["waiting"]) if tokens else None,
        failures=counts["failures"],
        failure_rate=counts["failure_rate"],
        # A checkpoint's explanations all have the length that it was trained with: nothing is cut off.
        cut_off_rate=None if cell.autoencoder.checkpoint else counts["cut_off_rate"],
        cjk_fraction=counts["cjk_fraction"],
        distinct_text_fraction=counts["distinct_text_fraction"],
        mean_tokens=counts["mean_tokens"],
        draws_bytes=DrawsStore(place.registry / "draws", keys.draws).bytes_on_disk(),
        fve_over_successes=first["fve_over_successes"],
        baseline=first["baseline"],
        baseline_kind=first["baseline_kind"],
        baseline_num_activations=first["num_activations"] if first["baseline_kind"] == "evaluated set" else None,
        **found.tokens,
        notes=reference.notes,
    )
    raw = cell.autoencoder.scoring_kind == "raw"
    landing.land(
        place.registry,
        record,
        pa.Table.from_pylist([row | {"influence": found.breakdown.influence.get(row["k"])} for row in summary.curve]),
        pa.Table.from_pylist(summary.controls),
        reference=pa.Table.from_pylist(reference.rows, schema=landing.REFERENCE_SCHEMA) if reference.rows else None,
        norms=pa.table({"activation": np.arange(len(found.norms)), "norm": found.norms}) if raw else None,
        metrics=pa.Table.from_pylist(found.breakdown.metrics),
        examples=found.breakdown.examples,
        activations=found.breakdown.activations,
    )
    return record.run_id


def _asked(sweep: str, resources: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """Who asked, for what, with which code."""
    return {
        "sweep": sweep,
        "resources": resources,
        "git_commit": origin.get("git_commit"),
        "git_dirty": origin.get("git_dirty"),
        "argv": tuple(origin.get("argv", ())),
        "packages": origin.get("packages", {}),
    }


def _identity(cell: Cell, keys: Keys) -> dict[str, Any]:
    """What was measured, under a new run id."""
    from ksweep.registry.landing import new_run_id

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


def land_unfinished(argument: dict[str, Any], cell: int | None, name: str, **told: Any) -> None:
    """Land the run of a job that ended before its time; it says nothing itself, because no rank knows how the others ended.

    Args:
        argument: what the job was given.
        cell: which of its cells it was at; None for the first that neither finished nor failed since the job was started.
        name: end of the run id: two who find the same job make one run.
        told: fields of the record: status, class, every rank's words.
    """
    from ksweep.registry import landing

    registry = Path(argument["registry"])
    cell = _cell_at_hand(argument, told["started"]) if cell is None else cell
    if cell is None:
        return
    origin = argument.get("origin", {})
    known = cell_from_dict(argument["cells"][cell])
    keys = cell_keys(known)
    identity = _identity(known, keys) | {"run_id": f"{told['finished']:%Y%m%dT%H%M%S}-{keys.cell[:8]}-{name}"}
    if (registry / "landing" / identity["run_id"]).exists():
        return
    record = landing.RunRecord(**identity, **_asked(argument["sweep"], argument["resources"], origin), **told)
    landing.land(registry, record)


def _cell_at_hand(argument: dict[str, Any], started: datetime) -> int | None:
    """Of a job that did not say which cell it was at; None where an older version of it has landed its failure itself."""
    from ksweep.registry.questions import runs_since

    said = runs_since(Path(argument["registry"]), started)
    keys = [cell_keys(cell).cell for cell in map(cell_from_dict, argument["cells"])]
    if any(said.get(key) == "failed" for key in keys):
        return None
    return next((n for n, key in enumerate(keys) if key not in said), len(keys) - 1)
