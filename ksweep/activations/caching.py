"""Compute activations that are not in the store yet: their key, what is missing, and the loop that computes the rest.

plan_activations(activations, layer, root)   -> present, missing, bytes     (no torch; printed by --dry-run)
ensure(activations, layer, root)             -> ActivationTable             (called by every rank)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksweep.activations.base_model import locate_model
from ksweep.activations.chats import check_chats
from ksweep.activations.datasets import text_begins_with_bos, text_identity
from ksweep.activations.model_config import positions_limit, rows_per_unit, text_config
from ksweep.activations.positions import asks_for_roles, rule_identity
from ksweep.activations.row_order import rows_identity
from ksweep.activations.source import UnitSource
from ksweep.activations.store import ActivationStore, ActivationTable, estimate_bytes
from ksweep.activations.text_yield import not_counted, text_yield
from ksweep.config.spec import Activations
from ksweep.utils.errors import DataError, RunError, SpecError
from ksweep.utils.files import clear_leftovers, named_path
from ksweep.utils.fingerprint import fingerprint
from ksweep.utils.hub import content_digest
from ksweep.utils.notes import Note, load_notes, save_notes
from ksweep.utils.tensor_headers import check_headers

log = logging.getLogger(__name__)

EXTRACTOR_VERSION = 3
"""Raised whenever the same request would give other vectors, other positions or other provenance (2: roles; 3: other batches)."""

PATIENCE = 900.0
"""Seconds without a new shard after which a waiting rank computes a missing unit itself."""

Progress = Callable[[int, int], None]
"""Called with (activations present, activations asked for)."""


@dataclass(frozen=True)
class ActivationPlan:
    """How much of a request is in the store, and how much has to be computed."""

    key: str
    present: int
    """Activations that can be read now, at most as many as asked for."""
    missing: int
    d_model: int
    bytes_needed: int
    """Bytes on disk for the missing activations. Whole units are computed, so up to a unit more is written."""
    text_yield: str = ""
    """Note on rows that yield no activations, or that the text was not counted."""


def activations_key(activations: Activations, layer: int | None) -> tuple[str, dict[str, Any]]:
    """Return the key of a set of activations and the readable identity it is hashed from: all that changes a vector.

    Not in it: number of activations, batch size, ranks, device, paths.

    Raises:
        RequestError: a model, layer, text or vector file that does not exist or is of the wrong kind.
    """
    identity = _vectors_identity(activations) if activations.vectors is not None else _text_identity(activations, layer)
    return fingerprint(identity), identity


def plan_activations(activations: Activations, layer: int | None, root: str | Path) -> ActivationPlan:
    """Return what of a request is present and missing. Imports no torch, loads no model; of a text it reads as many rows as give
    the missing activations, within the bounds of `text_yield`.

    Raises:
        RequestError: as `activations_key`; and a text that has been read to its end gives too few (DataError).
    """
    key, identity = activations_key(activations, layer)
    store = ActivationStore(root, key, identity)
    shards = store.contiguous()
    if shards and shards[-1].is_last:
        _refuse_too_few(store, activations)
    present = min(sum(shard.rows for shard in shards), activations.num_activations)
    missing = activations.num_activations - present
    d_model, dtype = _shape(activations)
    return ActivationPlan(
        key=key,
        present=present,
        missing=missing,
        d_model=d_model,
        bytes_needed=estimate_bytes(missing, d_model, dtype),
        text_yield=_text_yield(activations) if missing and activations.vectors is None else "",
    )


def _text_yield(activations: Activations) -> str:
    """Return what is to be known of a text whose rows do not all give activations, or were not counted.

    Raises:
        DataError: the text gives too few, as the run would find.
    """
    found = text_yield(activations)
    if found is not None and found.is_whole and found.at_most < activations.num_activations:
        raise _too_few(activations, found.rows, found.skipped, found.activations)
    return not_counted(activations) if found is None else found.sentence(activations)


def ensure(
    activations: Activations,
    layer: int | None,
    root: str | Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    device: Any = "cpu",
    progress: Progress | None = None,
) -> ActivationTable:
    """Return the first `num_activations` activations and compute what is missing. Every rank calls it and `barrier` once.

    Args:
        layer: block whose output is taken; may be None for ready-made vectors only.
        root: the vector cache.
        device: where this rank runs the base model: a torch device or its name, or several.

    Raises:
        RequestError: an unusable model, layer or text; a text or file with too few activations (DataError).
        RunError: no space left.
    """
    # 1. Which store, and what could compute its units: no model is loaded yet.
    key, identity = activations_key(activations, layer)
    store = ActivationStore(root, key, identity)
    source = _source(activations, layer, device)
    # 2. Compute this rank's share of the missing units; loads the model if there are any.
    try:
        check = _SameSource(activations, identity)
        fill(store, source, activations.num_activations, rank=rank, world_size=world_size, progress=progress, check=check)
    finally:
        source.close()
    # 3. After the barrier no rank sets a shard aside any more, so every rank sees the same shards.
    barrier()
    _refuse_too_few(store, activations)
    # 4. One rank writes the summary; all open the shards.
    if rank == 0:
        named = {name: getattr(activations, name) for name in ("model", "text", "vectors")}
        store.write_manifest({name: value for name, value in named.items() if value is not None})
    return store.open(activations.num_activations)


def fill(
    store: ActivationStore,
    source: UnitSource,
    num_activations: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
    patience: float = PATIENCE,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Publish units until the first `num_activations` are present or the source ends; then compare the checksums of this share.

    Missing units are dealt to the ranks in turn. A rank learns what is missing from the store alone: ranks exchange no messages,
    a unit that another job has published meanwhile is skipped, and the units of a dead rank are taken over after `patience`
    seconds. `check` is called before each unit is published and raises if it must not be.
    """
    worker = _Filler(store, source, num_activations, rank, world_size, progress, patience, check)
    clear_leftovers(store.directory)
    store.touch()
    while True:
        worker.fill_missing()
        if not store.verify(worker.own_share()):
            return


@dataclass
class _Filler:
    """A rank that fills its share of a store."""

    store: ActivationStore
    source: UnitSource
    num_activations: int
    rank: int
    world_size: int
    progress: Progress | None
    patience: float
    check: Callable[[], None]

    def fill_missing(self) -> None:
        """Compute the missing units of this rank, and wait for those of others."""
        waited, published, was_beaten = 0.0, -1, False
        while missing := self.store.missing_units(self.num_activations, self.source.most_per_unit):
            # 1. A new shard, from any rank or job, restarts the wait.
            now = self._report()
            if now != published:
                waited, published = 0.0, now
            # 2. With no unit of its own missing, this rank waits for the others.
            own = [unit for unit in missing if unit % self.world_size == self.rank]
            if not own and waited < self.patience:
                pause = min(2.0, 0.05 + waited / 10)
                time.sleep(pause)
                waited += pause
                continue
            # 3. It computes its own units, or after its patience the first that is missing. Two jobs that both began at the front
            #    would compute every unit twice, so the one that was beaten to a unit continues in the middle of its share.
            if not own:
                log.warning(
                    "%d units are missing and none came for %.0f s: computing unit %d here", len(missing), waited, missing[0]
                )
            was_beaten = self._compute(own[len(own) // 2 if was_beaten else 0 :] or missing[:1])
        self._report()

    def _compute(self, units: list[int]) -> bool:
        """Publish units one by one until another job turns out to compute the same ones; return whether that happened.

        Units that another process has published meanwhile are skipped.
        """
        for index, unit in self.source.units(unit for unit in units if not self.store.has(unit)):
            self.check()
            save_notes(self.store.directory, unit.notes)
            shard, first = self.store.publish_unit(index, unit, self.source.dtype)
            self._report()
            if shard.is_last or not first:
                return not first
        return False

    def own_share(self) -> list[int]:
        """Return this rank's units among those needed; it compares their checksums and computes damaged ones again."""
        rows, own = 0, []
        for shard in self.store.contiguous():
            if rows >= self.num_activations:
                break
            rows += shard.rows
            if shard.unit % self.world_size == self.rank:
                own.append(shard.unit)
        return own

    def _report(self) -> int:
        """Report progress and return the number of shards."""
        shards = self.store.shards()
        if self.progress is not None:
            self.progress(min(sum(shard.rows for shard in shards.values()), self.num_activations), self.num_activations)
        return len(shards)


class _SameSource:
    """Check that the text or vector file still has the content that the key was made from: filling a store can take hours."""

    def __init__(self, activations: Activations, identity: dict[str, Any]) -> None:
        self.activations = activations
        self.source = activations.vectors or activations.text or ""
        self.digest = identity.get("vectors") or identity.get("text", {}).get("digest")
        self._seen: list[tuple[str, int, int]] | None = None

    def __call__(self) -> None:
        files = self._files()
        if self.digest is None or not files:  # a hub data set has its commit; a file may go once read
            return
        now = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]
        if now != self._seen and self._content() != self.digest:
            raise DataError(
                f"{self.source} has changed since this run began: the activations stored so far are of the old content, and none "
                "of the new was mixed in. Run again to use it as it is now."
            )
        self._seen = now

    def _files(self) -> list[Path]:
        path = named_path(self.source, DataError)
        if self.activations.vectors is not None and not path.is_file():
            from ksweep.activations.vector_files import vector_paths

            try:
                return list(vector_paths(self.source))
            except DataError:
                return []
        return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())

    def _content(self) -> str:
        if self.activations.vectors is None:
            return content_digest(Path(self.source).expanduser())
        from ksweep.activations.vector_files import open_vectors

        with open_vectors(self.source, self.activations.vector_column) as file:
            return file.digest()


def _refuse_too_few(store: ActivationStore, activations: Activations) -> None:
    shards = store.contiguous()
    num_available = sum(shard.rows for shard in shards)
    if num_available >= activations.num_activations:
        return
    if not shards or not shards[-1].is_last:
        raise RunError(
            f"{store.directory} lost shards while it was being filled: {num_available} of {activations.num_activations} "
            "activations are there. Is someone else removing files? Run again to have the rest computed."
        )
    notes = load_notes(store.directory)
    raise _too_few(activations, sum(s.source_rows for s in shards), sum(s.skipped_rows for s in shards), num_available, notes)


def _too_few(activations: Activations, rows: int, skipped: int, num_available: int, notes: Sequence[Note] = ()) -> DataError:
    """Return the error for a text whose rows, some of them skipped, give too few activations."""
    more = {"random": "raise activations.positions_per_document, ", "last": "set activations.positions=random or all, "}
    low = activations.min_position
    advice = f"lower activations.min_position (now {low}: rows of fewer tokens give none), or give more text"
    if by_roles := asks_for_roles(activations):
        advice += (
            f". activations.{by_roles} takes tokens of messages alone: the roles of the text may have other names, or it may be "
            "in no chat format"
        )
    advice += "".join(f". {note.text}" for note in notes[:3])
    if activations.positions in ("turn_ends", "prompt_end"):
        advice += f". A row of max_length={activations.max_length} tokens may have been cut, and its end is not taken"
    asked = f"activations.num_activations={activations.num_activations}, but"
    if num_available == 0:
        return DataError(f"{asked} no row of {activations.text} ({rows} rows) has an allowed position: {advice}.")
    return DataError(
        f"{asked} {activations.text} gives {num_available} ({rows} rows, {skipped} of them without an allowed position): "
        f"set activations.num_activations={num_available}, {more.get(activations.positions, '')}{advice}."
    )


def _source(activations: Activations, layer: int | None, device: Any) -> UnitSource:
    if activations.vectors is not None:
        from ksweep.activations.vector_source import VectorUnits

        return VectorUnits(activations)
    from ksweep.activations.text_source import TextUnits

    return TextUnits(activations, _layer(layer), device)


def _layer(layer: int | None) -> int:
    if layer is None:
        raise SpecError("activations.layer is not known: set it, or give an autoencoder whose sidecar says its layer")
    return layer


def _text_identity(activations: Activations, layer: int | None) -> dict[str, Any]:
    layer = _layer(layer)
    model = locate_model(activations)
    max_length = positions_limit(text_config(model.weights, layer), activations)
    for path in (model.weights, *([] if model.adapter is None else [model.adapter])):
        check_headers(path)
    identity = {
        "kind": "text",
        "extractor": {"version": EXTRACTOR_VERSION, "rows_per_unit": rows_per_unit(activations, max_length)},
        "text": text_identity(activations),
        "model": model.digest(),
        "layer": layer,
        **rows_identity(activations),
        "positions": rule_identity(activations),
        "max_length": max_length,
        "dtype": activations.dtype,
    }
    identity |= check_chats(activations, model.tokenizer)
    if text_begins_with_bos(activations, model.tokenizer):  # EXTRACTOR_VERSION 3 gave such text a second one
        identity["bos"] = "once"
    return identity


def _vectors_identity(activations: Activations) -> dict[str, Any]:
    from ksweep.activations.vector_files import VECTOR_COLUMN, open_vectors
    from ksweep.activations.vector_source import DOCUMENT_COLUMNS, VECTOR_ROWS_PER_UNIT, document_column, rows_by_activation

    source, column = activations.vectors or "", activations.vector_column
    with open_vectors(source, column) as file:
        rows, unnamed = file.num_rows, activations.row_id_column is None
        identity: dict[str, Any] = {
            "kind": "vectors",
            "extractor": {"version": EXTRACTOR_VERSION, "rows_per_unit": VECTOR_ROWS_PER_UNIT},
            "vectors": file.digest(),
            "d_model": file.d_model,
        }
        # What follows is left out where it is as in the public files, whose keys are those of earlier versions.
        if file.column != VECTOR_COLUMN:
            identity["vector_column"] = file.column
        if not file.is_whole:
            identity["range"] = [file.start, file.stop]
    if activations.row_id_column is not None:
        rows = rows_by_activation(source, activations.row_id_column, column).num_activations
        identity["row_id_column"] = activations.row_id_column
    if rows < activations.num_activations:
        raise DataError(
            f"activations.num_activations={activations.num_activations}, but {source} has {rows} "
            f"{'rows' if unnamed else 'activations'}: set activations.num_activations={rows}, or take a larger file"
        )
    documents = document_column(source, activations.document_column, column)
    if documents not in (None, DOCUMENT_COLUMNS[0]):
        identity["document_column"] = documents
    return identity | rows_identity(activations)


def _shape(activations: Activations) -> tuple[int, str]:
    """Return width and stored dtype, from file headers and config.json alone."""
    if activations.vectors is not None:
        from ksweep.activations.vector_source import vectors_shape

        return vectors_shape(activations.vectors, activations.vector_column)[1], "float32"
    return int(text_config(locate_model(activations).weights)["hidden_size"]), activations.dtype
