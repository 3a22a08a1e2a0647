"""Compute units from text: rows -> tokens -> positions -> vectors. The model is loaded when the first unit is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ksweep.activations.base_model import locate_model
from ksweep.activations.chat_roles import CHAT_FORMATS, SpokenTokens, count_roles
from ksweep.activations.chats import ChatWriter, no_known_format
from ksweep.activations.datasets import TextRow, first_row, text_format
from ksweep.activations.model_config import positions_limit, rows_per_unit, text_config
from ksweep.activations.positions import asks_for_roles, most_per_row, needs_roles, row_positions, unpadded
from ksweep.activations.row_order import ordered_rows
from ksweep.activations.source import ActivationUnit, kept_rows, refuse_unusable, to_float32
from ksweep.config.spec import Activations
from ksweep.utils.errors import DataError
from ksweep.utils.text import some_of

if TYPE_CHECKING:
    from ksweep.activations.hidden_states import BlockReader


@dataclass
class TextUnits:
    """Units of a model at one layer, run over a text, at the positions of a rule."""

    activations: Activations
    layer: int
    device: Any = "cpu"
    """Device or devices that the model runs on: torch devices or their names."""

    def __post_init__(self) -> None:
        config = text_config(locate_model(self.activations).weights)
        self.max_length = positions_limit(config, self.activations)
        self.rows_per_unit = rows_per_unit(self.activations, self.max_length)
        self._reader: BlockReader | None = None
        self._chats: ChatWriter | None = None
        self._rows: Iterator[TextRow] = iter(())
        self._next_unit: int | None = None
        self._ahead: TextRow | None = None
        self._first: TextRow | None = None
        """First row of the text that is not empty: all others must begin as it does."""

    @property
    def dtype(self) -> str:
        """Dtype of the computation and of the vectors on disk."""
        return self.activations.dtype

    @property
    def most_per_unit(self) -> int:
        """Activations in a unit if every row is long enough."""
        return self.rows_per_unit * most_per_row(self.activations, self.max_length)

    @property
    def reader(self) -> BlockReader:
        """The model, loaded on first use."""
        if self._reader is None:
            from ksweep.activations.hidden_states import BlockReader  # torch: only when something has to be computed

            self._reader = BlockReader(locate_model(self.activations), self.layer, self.activations.dtype, self.device)
        return self._reader

    def close(self) -> None:
        """Free the memory of the model."""
        if self._reader is not None:
            self._reader.close()
        self._reader, self._chats, self._next_unit = None, None, None

    def units(self, indices: Iterable[int]) -> Iterator[tuple[int, ActivationUnit]]:
        """Yield the units, each computed when it is taken. The text is streamed; a lower index starts it again.

        Raises:
            DataError: unreadable text, vectors that are not finite.
            CheckpointError: a model that cannot be loaded.
        """
        for index in indices:
            rows, is_last = self._read_unit(index)
            yield index, self._unit(rows, is_last)

    def _read_unit(self, index: int) -> tuple[list[TextRow], bool]:
        """Return the rows of a unit, and whether the text ends with it."""
        if self._next_unit is None or index < self._next_unit:
            self._rows, self._next_unit = ordered_rows(self.activations), 0
            self._ahead = next(self._rows, None)
            if text_format(self.activations) != "hub":
                self._first = self._first or first_row(self.activations)
        while True:
            rows: list[TextRow] = []
            while self._ahead is not None and len(rows) < self.rows_per_unit:
                rows.append(self._ahead)
                self._first = self._first or (self._ahead if self._ahead.holds_something else None)
                self._ahead = next(self._rows, None)
            self._next_unit += 1
            if self._next_unit > index:
                return rows, self._ahead is None

    def _written(self, rows: Sequence[TextRow]) -> Sequence[TextRow]:
        """Return the rows with the text of conversations, as the model's chat template writes them."""
        if all(row.messages is None for row in rows):
            if self.activations.positions == "prompt_end":
                raise DataError(f"activations.positions=prompt_end is for conversations, and {self.activations.text} holds none")
            return rows
        if self._chats is None:
            self._chats = ChatWriter(self.reader.tokenizer, self.activations, self.reader.path)
        return [row if row.messages is None else self._chats.write(row) for row in rows]

    def _spoken(self, row: TextRow, ids: Sequence[int], pad_id: int | None) -> SpokenTokens | None:
        """Return who says each token of a row: by the marks of its chat format or, in another, by where its messages stand.

        Raises:
            DataError: positions go by roles, and the roles of the row are not known.
        """
        template = self.reader.template
        if self._chats is not None and row.messages and (template is None or CHAT_FORMATS[template].start not in row.text):
            spoken = self._chats.spoken(row, ids)
        else:
            spoken = self.reader.spoken(ids, pad_id)
        if spoken is None and ids and needs_roles(self.activations):
            raise DataError(
                f"activations.{asks_for_roles(self.activations)} goes by the roles of tokens, and those of row {row.index} of "
                f"{self.activations.text} are not known: {no_known_format(self.activations.model)}"
            )
        return spoken

    def _tokens(self, rows: Sequence[TextRow]) -> tuple[list[list[int]], int | None]:
        """Return the token ids of rows and their padding id: None for texts; pretokenised rows are unchanged, padding and all."""
        self._refuse_mixed(rows)
        given = [row.token_ids for row in rows if row.token_ids is not None]
        if not given:
            are_chats = any(row.messages is not None for row in rows)
            return self.reader.tokenize([row.text for row in rows], self.max_length, are_chats=are_chats), None
        pad_id, num_embeddings = self.reader.filler_id, self.reader.num_embeddings
        for row, ids in zip(rows, given, strict=True):
            where = f"row {row.index} of {self.activations.text} (column {self.activations.text_column!r})"
            refuse_strange(ids, num_embeddings, where)
            self._refuse_long(ids, unpadded(ids, pad_id).stop, where)
        return [list(ids[: self.max_length]) for ids in given], pad_id

    def _refuse_mixed(self, rows: Sequence[TextRow]) -> None:
        """Raise DataError if some rows begin with BOS and others do not: they are of two kinds, e.g. chats beside plain text."""
        if self.reader.document_bos is None or self._first is None or self._first.messages is not None:
            return
        begins_with_bos = {row.index: self._begins_with_bos(row) for row in (self._first, *rows) if row.holds_something}
        with_bos, without = (
            [str(index) for index, begins in begins_with_bos.items() if begins is which] for which in (True, False)
        )
        text, bos = self.activations.text, self.reader.tokenizer.bos_token
        if with_bos and without:
            raise DataError(
                f"{text} is mixed: rows {some_of(with_bos)} begin with {bos}, which the chat template or a tokenizer has put "
                f"there, and rows {some_of(without)} do not. Make all rows alike: chat-templated, or plain text."
            )
        if with_bos and self.reader.puts_bos and self._first.token_ids is None and text_format(self.activations) == "hub":
            raise DataError(
                f"the rows of hub dataset {text} begin with {bos}, which only local text may: save it as .parquet or .jsonl and "
                "set activations.text to that file."
            )

    def _begins_with_bos(self, row: TextRow) -> bool:
        if row.token_ids is None:
            return self.reader.text_begins_with_bos(row.text)
        return self.reader.begins_with_bos(row.token_ids[unpadded(row.token_ids, self.reader.filler_id).start :])

    def _refuse_long(self, ids: Sequence[int], end: int, where: str) -> None:
        """Raise DataError if real tokens would be cut off: of a row padded on the left perhaps only padding would remain."""
        if end <= self.max_length:
            return
        if self.max_length < self.activations.max_length:
            advice = f"the model's context ends there: take text pretokenised to at most {self.max_length} tokens"
        else:
            advice = f"set activations.max_length={len(ids)}"
        raise DataError(f"{where} has {len(ids)} token ids, and activations are taken from the first {self.max_length}: {advice}")

    def _unit(self, rows: Sequence[TextRow], is_last: bool) -> ActivationUnit:
        reader = self.reader
        rows = self._written(rows)
        ids, pad_id = self._tokens(rows)
        spoken = [self._spoken(row, i, pad_id) for row, i in zip(rows, ids, strict=True)]
        roles = [None if of_row is None else of_row.roles for of_row in spoken]
        rule = replace(self.activations, max_length=self.max_length)  # the model's context may end before
        # The rule not_padding goes by token id in texts, too: it skips a padding token at the end of a text.
        ends = reader.pad_id if pad_id is None and self.activations.candidates == "not_padding" else pad_id
        positions = [
            row_positions(i, row.row_id, reader.special_ids, rule, ends, of_row) if row.holds_something else []
            for i, row, of_row in zip(ids, rows, spoken, strict=True)
        ]
        vectors = reader.begin(ids, positions, pad_id)  # a GPU computes while the CPU collects roles and windows
        places = [(r, p) for r, taken in enumerate(positions) for p in taken]
        starts = [unpadded(i, pad_id).start for i in ids]
        unit = ActivationUnit(
            vectors=vectors(),
            row_ids=[rows[r].row_id for r, _ in places],
            documents=[rows[r].document for r, _ in places],
            positions=[p for _, p in places],
            token_ids=[ids[r][p] for r, p in places],
            windows=[reader.window(ids[r][starts[r] :], p - starts[r]) for r, p in places],
            roles=[None if (of_row := roles[r]) is None else of_row[p] for r, p in places],
            num_rows=len(rows),
            num_skipped=sum(not taken for taken in positions),
            is_last=is_last,
            notes=() if self._chats is None else tuple(sorted(self._chats.notes, key=lambda note: note.text)),
            role_counts=None if None in roles else count_roles(role for of_row in roles for role in of_row or ()),
        )
        refuse_unusable(unit, f"{self.activations.text} (layer {self.layer} of {self.activations.model})")
        return unit if self.activations.max_norm is None else without_long(unit, self.activations.max_norm)


def refuse_strange(token_ids: Sequence[int], num_embeddings: int, where: str) -> None:
    """Check that the model has an embedding for every token id.

    Raises:
        DataError: it has not; the message has the first such id.
    """
    strange = next((i for i, token in enumerate(token_ids) if not 0 <= token < num_embeddings), None)
    if strange is not None:
        raise DataError(
            f"{where} has token id {token_ids[strange]} at index {strange}, and the model knows 0 to {num_embeddings - 1}: "
            "was it tokenised for another model?"
        )


def without_long(unit: ActivationUnit, max_norm: float) -> ActivationUnit:
    """Return a unit without the activations whose norm exceeds `max_norm`."""
    return kept_rows(unit, np.flatnonzero(np.linalg.norm(to_float32(unit.vectors).astype(np.float64), axis=1) <= max_norm))
