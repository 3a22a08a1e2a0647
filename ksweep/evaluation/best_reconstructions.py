"""Reconstruct the best draw of each activation of a finished run again, as vectors for steering.

What was said is stored, what the AR made of it is not: the AR of the run's spec, whose digest must still be the recorded one,
reads the texts again. Where the reconstruction of a best draw is stored (talkative autoencoders) the stored one is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ksweep.autoencoder.base import Explanation, Family
from ksweep.autoencoder.family import family_of
from ksweep.config.spec import Cell, cell_from_dict
from ksweep.evaluation.identity import scores_identity
from ksweep.evaluation.models import Models
from ksweep.registry.activation_metadata import read_metadata
from ksweep.registry.cell_draws import CellDraws
from ksweep.registry.run_record import RunRecord, read_run
from ksweep.registry.scores import RECONSTRUCTION
from ksweep.utils.errors import CheckpointError, RequestError

READ_COLUMNS = ("row_id", "document", "position", "context", "token_ids", "finish", "explanation", "error", "cosine")


@dataclass(frozen=True, eq=False)
class BestReconstructions:
    """A vector for each activation that has a draw which did not fail."""

    vectors: np.ndarray
    """[activation, d_model] float32, as the AR gives them."""
    scaled: np.ndarray | None
    """The same directions with the norms of the activations; None where those are not known."""
    rows: pa.Table
    """A row for each vector, with the columns that files of vectors have, and the draw, its explanation and its error."""
    num_failed: int
    """Activations that are left out: all of their draws failed."""
    num_stored: int
    """Vectors that were stored and not computed again."""


def best_reconstructions(registry: Path, run_id: str, devices: tuple[str, ...] = ("cpu",)) -> BestReconstructions:
    """Return the reconstruction of each activation's best draw of a finished run.

    Raises:
        RequestError: no such finished run, one of an earlier version, or draws that are no longer whole.
        CheckpointError: the AR is gone, or is not the one that scored the draws.
    """
    # 1. Find the best draw of each activation: that of the smallest error, of equal ones the first.
    record, cell = _finished(registry, run_id)
    family = family_of(cell.autoencoder)
    _check_ar(record, cell, family)
    store = CellDraws(registry, str(record.draws_key), str(record.scores_key))
    best = _best_draws(store, record)
    # 2. Take reconstructions that are stored, and compute the others.
    vectors = store.reconstructions(best["activation"].to_numpy(), best["draw"].to_numpy(), int(record.d_model or 0))
    missing = np.flatnonzero(np.isnan(vectors).any(axis=1)) if family.has_reference_quantities else np.arange(len(best))
    if len(missing):
        explanations = _explanations(best.take(pa.array(missing)))
        ar = Models(devices).reconstructor(cell.autoencoder)
        vectors[missing] = np.asarray(ar.reconstruct(explanations), dtype=np.float32)
    # 3. Scale them to the activations that they stand for.
    norms = _norms(registry, record, family, best["activation"].to_numpy())
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    scaled = None if norms is None else (vectors * (norms / np.where(lengths > 0, lengths, 1))[:, None]).astype(np.float32)
    return BestReconstructions(
        vectors, scaled, _rows(best, record), int(record.num_activations or 0) - len(best), len(best) - len(missing)
    )


def _finished(registry: Path, run_id: str) -> tuple[RunRecord, Cell]:
    path = registry / "landing" / run_id
    if not path.is_dir():
        raise RequestError(f"no run {run_id!r} in {path.parent}: `ksweep ls` lists the runs")
    record = read_run(path).record
    if record.status != "finished" or None in (record.draws_key, record.scores_key, record.num_activations, record.d_model):
        raise RequestError(
            f"run {run_id} is {record.status}{'' if record.status != 'finished' else ' and of an earlier version'}: run its "
            "sweep's command again, which takes the draws that are stored"
        )
    return record, cell_from_dict(record.spec)


def _check_ar(record: RunRecord, cell: Cell, family: Family) -> None:
    if family.space is not None:
        raise RequestError(
            f"{cell.autoencoder.source} reconstructs whitened vectors, which are no directions of the model: nothing is exported"
        )
    if RECONSTRUCTION.key(scores_identity(cell, family)) != record.scores_key:
        raise CheckpointError(
            f"the AR of {record.cell} ({cell.autoencoder.ar or cell.autoencoder.checkpoint}) is not the one that scored its "
            "draws: another digest, precision or prompt. Put the recorded checkpoint back, or run the sweep again with this one"
        )


def _best_draws(store: CellDraws, record: RunRecord) -> pa.Table:
    table = store.read(int(record.num_activations or 0), int(record.num_draws or 0), READ_COLUMNS)
    if table is None:
        raise RequestError(
            f"the draws of {record.cell} are no longer whole: run its sweep's command again, which computes what is missing"
        )
    errors = table["error"].to_numpy(zero_copy_only=False).astype(np.float64).reshape(int(record.num_activations or 0), -1)
    succeeded = np.flatnonzero(~np.isnan(errors).all(axis=1))
    first = np.nanargmin(errors[succeeded], axis=1)
    return table.take(pa.array(succeeded * errors.shape[1] + first))


def _explanations(best: pa.Table) -> list[Explanation]:
    ids, ends = best["token_ids"].to_pylist(), best["finish"].to_pylist()
    sampled = [tuple((tokens or [])[:-1] if end == "stop" else tokens or []) for tokens, end in zip(ids, ends, strict=True)]
    texts, positions = best["explanation"].to_pylist(), best["position"].to_pylist()
    return [Explanation(text, tokens, None, position) for text, tokens, position in zip(texts, sampled, positions, strict=True)]


def _norms(registry: Path, record: RunRecord, family: Family, activations: np.ndarray) -> np.ndarray | None:
    """Return the norms of the activations."""
    table = read_metadata(registry, str(record.activations_key), family.scoring_kind, int(record.num_activations or 0))
    return None if table is None else np.asarray(table["norm"].to_numpy(), dtype=np.float64)[activations]


def _rows(best: pa.Table, record: RunRecord) -> pa.Table:
    positions = [None if position is None else position + 1 for position in best["position"].to_pylist()]
    return pa.table({
        "activation": best["activation"], "row_id": best["row_id"], "doc_id": best["document"], "position": best["position"],
        "n_raw_tokens": pa.array(positions, pa.int32()), "detokenized_text_truncated": best["context"],
        "activation_layer": pa.array([record.layer] * len(best), pa.int32()), "draw": best["draw"],
        "explanation": best["explanation"], "error": best["error"], "cosine": best["cosine"],
    })  # fmt: skip
