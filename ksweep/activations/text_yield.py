"""Say before anything runs how many activations a text gives, from tokens alone: no model is loaded, and no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from ksweep.activations.base_model import locate_model
from ksweep.activations.datasets import TextRow, first_row, read_documents, text_format
from ksweep.activations.model_config import positions_limit, text_config
from ksweep.activations.positions import most_per_row, needs_roles, row_positions
from ksweep.config.spec import Activations
from ksweep.utils.planning_pass import once_per_pass

MOST_ROWS = 4096
"""Rows that are tokenised at most while planning."""
MOST_CHARACTERS = 4_000_000
"""Characters that are tokenised at most: one to two seconds."""
ROWS_AT_ONCE = 64
CHARACTERS_PER_TOKEN = 16
"""A text is cut to so many characters for each token that is needed, and read whole where that gave too few tokens."""


@dataclass(frozen=True)
class TextYield:
    """How many activations the rows of a text give that were read while planning."""

    rows: int
    skipped: int
    """Rows without an allowed position."""
    activations: int
    """At least so many; exactly where the whole text was read."""
    at_most: int
    """No more than that, whatever is special in these rows."""
    is_whole: bool
    """Whether these are all rows of the text."""

    def sentence(self, activations: Activations) -> str:
        """Return what a plan says of rows that give nothing, and of a text whose end it has not seen; else empty."""
        if self.is_whole:
            return ""
        said = [unseen_end(activations)]
        if self.skipped:
            estimated = activations.num_activations * self.rows / max(1, self.activations)
            said.append(
                f"{activations.text}: {self.skipped:,} of the first {self.rows:,} rows have no allowed position; "
                f"{activations.num_activations:,} activations need about {estimated:,.0f} rows"
            )
        return "; ".join(filter(None, said))


def unseen_end(activations: Activations) -> str:
    """Return what a plan says of a text source of the user's whose end it has not seen; empty if that does not matter."""
    if activations.rows != "random" or text_format(activations) != "own":
        return ""
    return (
        f"{activations.text}: rows=random reads it to its end before the first activation; of one without an end take "
        "activations.rows=first"
    )


@once_per_pass
def text_yield(activations: Activations) -> TextYield | None:
    """Return what a text gives: rows are read until they give `num_activations`, or the text or what a plan may read has ended.

    None where that cannot be known while planning, which `not_counted` explains.

    Raises:
        RequestError: an unreadable text or model configuration.
    """
    model = locate_model(activations)
    tokenize = _tokenizer(model.tokenizer, _modified(model.tokenizer / "tokenizer.json"))
    if tokenize is None or _uncounted(activations):
        return None
    limit = positions_limit(text_config(model.weights), activations)
    return _count(read_documents(activations), _RowCounter(activations, limit, *tokenize))


def not_counted(activations: Activations) -> str:
    """Return what a plan says of a text for which `text_yield` returns None."""
    why = _uncounted(activations) or "the base model has no readable tokenizer.json"
    said = (
        f"{activations.text}: the plan did not count the activations that it gives ({why}); if they are fewer than "
        f"{activations.num_activations:,}, the run ends with an error that says how many there are"
    )
    return "; ".join(filter(None, (said, unseen_end(activations))))


def _uncounted(activations: Activations) -> str:
    """Return why rows of this kind are not counted; empty for rows of text."""
    if text_format(activations) == "hub":
        return "rows of the hub are read by the run"
    first = first_row(activations)
    if first is not None and not first.text:
        return "conversations are written by the run" if first.messages else "rows of token ids are read by the run"
    return "who says each token is found by the run" if needs_roles(activations) else ""


@dataclass
class _RowCounter:
    """Counts the activations of rows."""

    activations: Activations
    limit: int
    """Tokens that rows are cut to."""
    encode: Callable[[list[str]], list[list[int]]]
    special: frozenset[int]

    def __call__(self, rows: Sequence[TextRow]) -> Iterator[tuple[int, int]]:
        """Yield for each row how many activations it gives, and how many at most."""
        most = most_per_row(self.activations, self.limit)
        enough = CHARACTERS_PER_TOKEN * (self.activations.min_position + most)
        cut = self.encode([row.text[:enough] for row in rows])
        for row, ids in zip(rows, cut, strict=True):
            if len(row.text) > enough and len(ids) < self.activations.min_position + most:
                [ids] = self.encode([row.text])
            ids = ids[: self.limit]
            # A tokenizer may add a token that its file does not tell of: hence one more, and no token is special.
            yield self._number(ids, row, self.special), self._number([*ids, -1][: self.limit], row, frozenset())

    def _number(self, ids: Sequence[int], row: TextRow, special: frozenset[int]) -> int:
        return len(row_positions(ids, row.row_id, special, self.activations))


def _count(rows: Iterator[TextRow], count: _RowCounter) -> TextYield:
    read = skipped = least = most = characters = 0
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        for fewest, at_most in count(batch):
            read, skipped, least, most = read + 1, skipped + (fewest == 0), least + fewest, most + at_most
        characters += sum(len(row.text) for row in batch)
        if least >= count.activations.num_activations or read >= MOST_ROWS or characters >= MOST_CHARACTERS:
            return TextYield(read, skipped, least, most, next(rows, None) is None)
    return TextYield(read, skipped, least, most, True)


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


@cache
def _tokenizer(directory: Path, _modified: int) -> tuple[Callable[[list[str]], list[list[int]]], frozenset[int]] | None:
    """Return a function from texts to token ids, and the ids of special tokens; None without a readable tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        tokenizer: Any = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception:  # the library raises a bare Exception, also for no file
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    # Not encode_batch: its threads would be there when a job's process is forked off.
    return lambda texts: [tokenizer.encode(text).ids for text in texts], special
