"""Integrity notes: what a check says about a run without refusing it. They are landed with the run and shown beside its numbers.

A note that is seen while something is computed which is not computed again (draws) is kept in its directory, a file a note,
so that every later run over the same draws has it too.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ksweep.utils.files import publish
from ksweep.utils.fingerprint import fingerprint

log = logging.getLogger(__name__)

NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What a system says of a directory that cannot be written to: no permission, or a mount that is read only."""
REFERENCE_QUANTITIES = "reference quantities"
"""Subject of notes on quantities of the reference sweep that are not known."""


@dataclass(frozen=True)
class Note:
    """What a check says about a run; a result that lands with it."""

    about: str
    """Subject of the check: norms, base model, layer, precision, prompt, checkpoint, text."""
    text: str
    """One plain sentence."""


def notes_of(*sources: object) -> tuple[Note, ...]:
    """The distinct notes of some objects, in their order; an object without `notes` has none."""
    return tuple(dict.fromkeys(note for source in sources for note in getattr(source, "notes", ())))


def keep(directory: Path, notes: Iterable[Note]) -> None:
    """Keep notes in the directory of what they are about. Several processes may keep the same ones at once."""
    for note in notes:
        path = directory / f"note-{fingerprint(note)[:16]}.json"
        if not path.exists():
            try:
                publish(path, json.dumps(asdict(note)).encode())
            except OSError as error:  # a cache of someone else's, where whoever computed has kept theirs
                if error.errno not in NOT_OURS:
                    raise
                log.warning("%s: %s", note.about, note.text)


def kept(directory: Path) -> tuple[Note, ...]:
    """The notes that were kept in a directory, in the order of their subjects."""
    found = []
    for path in directory.glob("note-*.json"):
        try:
            found.append(Note(**json.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError):  # set aside or cut short: a note less, and no reason to end a run
            continue
    return tuple(sorted(found, key=lambda note: (note.about, note.text)))
