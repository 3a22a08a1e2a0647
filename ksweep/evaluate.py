"""One cell from start to finish: what every rank of a job runs. Read it like a method section."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ksweep import stats
from ksweep.draws import SCHEMA, DrawsStore, Unit
from ksweep.errors import RunError
from ksweep.keys import Keys, cell_keys, inspect_pair
from ksweep.provenance import provenance
from ksweep.ranks import Ranks, Stopped, share
from ksweep.spec import Autoencoder, Cell, cell_from_dict
from ksweep.summary import SUMMARISED, Summary, summarise

if TYPE_CHECKING:
    from ksweep.activations.store import ActivationTable
    from ksweep.autoencoder.decoding import Draw
    from ksweep.autoencoder.protocol import Reconstructor, Verbalizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where results go and how large batches may be; never part of any identity."""

    registry: Path
    vector_cache: Path
    batch_size: int = 512
    sweep: str = ""
    resources: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    """Provenance of the launcher: its commit and command."""


class Models:
    """AV and AR of a job, loaded when first needed and kept while the cells of one autoencoder follow one another."""

    def __init__(self, device: str) -> None:
        """`device` is a torch device name."""
        self.device = device
        self._of: Autoencoder | None = None
        self._av: Verbalizer | None = None
        self._ar: Reconstructor | None = None

    def _turn_to(self, autoencoder: Autoencoder) -> None:
        if autoencoder != self._of:
            self._of, self._av, self._ar = autoencoder, None, None

    def verbalizer(self, autoencoder: Autoencoder) -> Verbalizer:
        """The AV, ready on the device."""
        from ksweep.autoencoder.nla import load_verbalizer

        self._turn_to(autoencoder)
        if self._av is None:
            info, _ = inspect_pair(autoencoder)
            self._av = load_verbalizer(info, dtype=autoencoder.dtype, device=self.device)
        return self._av

    def reconstructor(self, autoencoder: Autoencoder) -> Reconstructor:
        """The AR, ready on the device."""
        from ksweep.autoencoder.nla import load_reconstructor

        self._turn_to(autoencoder)
        if self._ar is None:
            _, info = inspect_pair(autoencoder)
            self._ar = load_reconstructor(info, dtype=autoencoder.dtype, device=self.device)
        return self._ar


def run_job(argument: dict[str, Any], ranks: Ranks) -> list[str]:
    """Every cell of a job, one after another; the entry point of each rank. Returns the runs that were landed (rank 0)."""
    place = Place(
        registry=Path(argument["registry"]),
        vector_cache=Path(argument["vector_cache"]),
        batch_size=argument["batch_size"],
        sweep=argument["sweep"],
        resources=argument["resources"],
        origin=argument["origin"],
    )
    models = Models(ranks.device)
    landed = [evaluate(cell_from_dict(value), place, ranks, models) for value in argument["cells"]]
    return [run for run in landed if run is not None]


def evaluate(cell: Cell, place: Place, ranks: Ranks, models: Models) -> str | None:
    """Measure one cell; rank 0 lands the run and returns its id. A failure is landed too, then raised."""
    clock = Clock()
    keys = cell_keys(cell)
    try:
        vectors = _activations(cell, keys, place, ranks, clock)
        store = DrawsStore(place.registry / "draws", keys.draws)
        before = _sample(cell, keys, vectors, store, place, ranks, models, clock)
        if ranks.rank != 0:
            return None
        with clock("statistics"):
            ranks.report(f"{keys.label}: statistics", 0, 0)
            draws = store.read(len(vectors), cell.sampling.effective_num_draws, SUMMARISED)
            if draws is None:
                raise RunError(
                    f"draws of {keys.name} are missing right after they were taken: is {store.path} being changed by someone?"
                )
            targets = vectors.vectors(0, len(vectors))
            summary = summarise(draws, targets, cell.scoring, cell.ks, _empty_text(cell, store, models))
        return _land(cell, keys, place, ranks, clock, summary, draws, before, targets.shape[1])
    except Stopped:
        raise
    except Exception as error:
        if ranks.rank == 0:
            _land_failure(cell, keys, place, ranks, clock, error)
        raise


def _activations(cell: Cell, keys: Keys, place: Place, ranks: Ranks, clock: Clock) -> ActivationTable:
    from ksweep.activations.fill import ensure

    def progress(done: int, total: int) -> None:
        ranks.report("activations", done, total)
        if ranks.should_stop():
            raise Stopped(f"stopped with {done} of {total} activations extracted")

    with clock("activations"):
        return ensure(
            cell.activations, keys.layer, place.vector_cache, rank=ranks.rank, world_size=ranks.world_size,
            barrier=ranks.barrier, device=ranks.device, progress=progress,
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
    if units:
        with clock("loading"):
            ranks.report(f"{keys.label}: loading models", 0, 0)
            av, ar = models.verbalizer(cell.autoencoder), models.reconstructor(cell.autoencoder)
        if ranks.rank == 0:
            store.describe(keys.identity)
        with clock("drawing"):
            work = UnitWork(cell, keys, vectors, av, ar, place.batch_size, ranks, sum(u.num_draws for u in units))
            for index in share(ranks, f"draws/{keys.draws}/{int(before.sum())}", len(units)):
                store.publish(units[index], work.run(units[index]))
    with clock("waiting"):
        ranks.barrier()
    return before


@dataclass
class UnitWork:
    """Draws and scores units of one cell on one rank."""

    cell: Cell
    keys: Keys
    vectors: ActivationTable
    av: Verbalizer
    ar: Reconstructor
    batch_size: int
    ranks: Ranks
    total: int
    done: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    targets_of_others: np.ndarray | None = None

    def run(self, unit: Unit) -> pa.Table:
        """One unit as rows of the draws store."""
        import torch

        targets = self.vectors.vectors(unit.first_row, unit.last_row)
        draws = self._draw(unit, torch.from_numpy(targets.copy()))
        texts = [self.av.decode(d.text_token_ids) for d in draws]
        parsed = [self.av.parse(text, d.finish) for text, d in zip(texts, draws, strict=True)]
        owners = np.array([d.request.row for d in draws])
        good = np.array([i for i, (explanation, _) in enumerate(parsed) if explanation is not None], dtype=int)
        reconstructions = np.asarray(self.ar.reconstruct([parsed[i][0] or "" for i in good], self.batch_size), dtype=np.float64)
        scores = self._score(unit, targets, owners, good, reconstructions)
        return self._table(unit, draws, texts, parsed, scores)

    def _draw(self, unit: Unit, vectors: Any) -> list[Draw]:
        from ksweep.autoencoder.decoding import Request, draw

        keys = self.vectors.column("activation_key", unit.first_row, unit.last_row)
        requests = [
            Request(row=row, activation_key=int(keys[row]), draw=k)
            for row in range(unit.last_row - unit.first_row)
            for k in range(unit.first_draw, unit.last_draw)
        ]
        sampling, found = self.cell.sampling, []
        for one in draw(
            self.av, vectors, requests, temperature=sampling.temperature, top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens, seed=sampling.seed, batch_size=self.batch_size,
            should_stop=self.ranks.should_stop,
        ):  # fmt: skip
            found.append(one)
            self.done += 1
            self.tokens += len(one.token_ids)
            self._report()
        if len(found) < len(requests):
            raise Stopped(f"stopped in the middle of a unit: its {len(found)} finished draws are taken again")
        return sorted(found, key=lambda d: (d.request.row, d.request.draw))

    def _report(self) -> None:
        rate = self.tokens / max(1e-9, time.monotonic() - self.began)
        self.ranks.report(f"{self.keys.label}: drawing", self.done, self.total, tokens_per_second=rate)

    def _score(
        self, unit: Unit, targets: np.ndarray, owners: np.ndarray, good: np.ndarray, reconstructions: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Error, cosine, norm; the error against another activation; and the sum of scaled reconstructions per activation."""
        n = len(owners)
        scores = {name: np.full(n, np.nan) for name in ("error", "cosine", "norm", "shuffled_error")}
        others = self._others()[unit.first_row : unit.last_row]
        scores["shuffled_activation"] = others[owners]
        sums = np.zeros_like(targets, dtype=np.float32)
        if len(good):
            mine = owners[good]
            scores["error"][good] = stats.reconstruction_errors(reconstructions, targets[mine])
            scores["cosine"][good] = 1 - scores["error"][good] / 2
            scores["norm"][good] = np.linalg.norm(reconstructions, axis=1)
            scores["shuffled_error"][good] = stats.reconstruction_errors(reconstructions, self.vectors.take(others)[mine])
            np.add.at(sums, mine, stats.unit_scaled(reconstructions).astype(np.float32))
        scores["reconstruction_sum"] = sums
        return scores

    def _others(self) -> np.ndarray:
        """For each activation another one, of another document where there is one: the target of the shuffled control."""
        if self.targets_of_others is None:
            n = len(self.vectors)
            documents = np.asarray(self.vectors.column("document", 0, n), dtype=object)
            self.targets_of_others = stats.derangement(n, seed=0, documents=documents) if n > 1 else np.zeros(1, dtype=int)
        return self.targets_of_others

    def _table(
        self, unit: Unit, draws: list[Draw], texts: list[str], parsed: list[Any], scores: dict[str, np.ndarray]
    ) -> pa.Table:
        owners = [d.request.row for d in draws]
        rows = {name: self.vectors.column(name, unit.first_row, unit.last_row) for name in ("row_id", "document", "position")}
        rows["context"] = self.vectors.column("window", unit.first_row, unit.last_row)
        first = {row: i for i, row in reversed(list(enumerate(owners)))}
        sums = [scores["reconstruction_sum"][row] if first[row] == i else None for i, row in enumerate(owners)]
        columns = {
            "activation": [unit.first_row + row for row in owners],
            "draw": [d.request.draw for d in draws],
            **{name: [values[row] for row in owners] for name, values in rows.items()},
            "token_ids": [list(d.token_ids) for d in draws],
            "num_tokens": [len(d.token_ids) for d in draws],
            "text": texts,
            "explanation": [explanation for explanation, _ in parsed],
            "finish": [d.finish for d in draws],
            "parse": [outcome for _, outcome in parsed],
            **{name: _nullable(scores[name]) for name in ("error", "cosine", "norm", "shuffled_error")},
            "log_probability": [d.log_probability for d in draws],
            "shuffled_activation": scores["shuffled_activation"],
            "reconstruction_sum": sums,
        }
        return pa.table({f.name: pa.array(columns[f.name], type=f.type) for f in SCHEMA}, schema=SCHEMA)


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def _empty_text(cell: Cell, store: DrawsStore, models: Models) -> np.ndarray:
    """What the AR makes of an empty text; measured once per draws key."""
    controls = store.controls()
    if controls is None:
        vector = np.asarray(models.reconstructor(cell.autoencoder).reconstruct([""]))[0]
        controls = {"empty_text": [float(x) for x in vector]}
        store.publish_controls(controls)
    return np.asarray(controls["empty_text"])


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
    summary: Summary,
    draws: pa.Table,
    before: np.ndarray,
    d_model: int,
) -> str:
    from ksweep.registry import landing

    new = ~before.reshape(-1)
    tokens = int(draws["num_tokens"].to_numpy()[new].sum())
    counts, first = summary.counts, summary.curve[0]
    record = landing.RunRecord(
        **_common(cell, keys, place, ranks, clock),
        status="finished",
        num_activations=first["num_activations"],
        num_documents=first["num_documents"],
        d_model=d_model,
        num_draws=first["num_draws"],
        num_draws_sampled=int(new.sum()),
        num_draws_reused=int(before.sum()),
        num_tokens_sampled=tokens,
        # Rank 0 may have waited for another rank's last unit: that is drawing time of the job too.
        tokens_per_second=tokens / (clock.seconds["drawing"] + clock.seconds["waiting"]) if tokens else None,
        failures=counts["failures"],
        failure_rate=counts["failure_rate"],
        cut_off_rate=counts["cut_off_rate"],
        cjk_fraction=counts["cjk_fraction"],
        distinct_text_fraction=counts["distinct_text_fraction"],
        mean_tokens=counts["mean_tokens"],
        fve_over_successes=first["fve_over_successes"],
        baseline=first["baseline"],
        baseline_kind=first["baseline_kind"],
        baseline_num_activations=first["num_activations"] if first["baseline_kind"] == "evaluated set" else None,
    )
    landing.land(place.registry, record, pa.Table.from_pylist(summary.curve), pa.Table.from_pylist(summary.controls))
    return record.run_id


def _land_failure(cell: Cell, keys: Keys, place: Place, ranks: Ranks, clock: Clock, error: Exception) -> None:
    import traceback

    from ksweep.registry import landing

    record = landing.RunRecord(
        **_common(cell, keys, place, ranks, clock),
        status="failed",
        error_type=type(error).__name__,
        error_message=str(error),
        tracebacks=(traceback.format_exc(),),
    )
    try:
        landing.land(place.registry, record)
    except OSError:  # on a full disk the terminal record of the rank is all there can be
        log.exception("the failure of %s could not be landed", keys.name)


def _common(cell: Cell, keys: Keys, place: Place, ranks: Ranks, clock: Clock) -> dict[str, Any]:
    """What a record says however the run ended."""
    from ksweep.registry import landing

    here = {**provenance(), **place.origin}
    return {
        "run_id": landing.new_run_id(keys.cell),
        "cell": keys.name,
        "label": keys.label,
        "cell_key": keys.cell,
        "draws_key": keys.draws,
        "activations_key": keys.activations,
        "sweep": place.sweep,
        "spec": asdict(cell),
        "resources": place.resources,
        "started": clock.started,
        "finished": datetime.now(UTC),
        "seconds": clock.seconds,
        "host": provenance()["host"],
        "device": _device_name(ranks.device),
        "num_ranks": ranks.world_size,
        "git_commit": here["git_commit"],
        "git_dirty": here["git_dirty"],
        "argv": tuple(here["argv"]),
        "packages": here["packages"],
        "layer": keys.layer,
    }


def _device_name(device: str) -> str:
    """The GPU's own name, or the processor's."""
    import platform

    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    return f"cpu ({platform.machine()})"
