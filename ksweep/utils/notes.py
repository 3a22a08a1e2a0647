"""Integrity notes: findings of checks that do not stop a run. They are recorded with it and shown beside its numbers.

A note on results that are not computed again (draws) is saved in their directory, one file per note, so that every later run over
the same draws has it, too.
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
"""Error numbers of a directory that this process may not write to: no permission, or a read-only mount."""
REFERENCE_QUANTITIES = "reference quantities"
"""Subject of notes on quantities of the reference sweep that could not be computed."""


@dataclass(frozen=True)
class Note:
    """A finding of a check, recorded with the run."""

    about: str
    """Subject of the check: norms, base model, layer, precision, prompt, checkpoint, text."""
    text: str
    """The finding, as a sentence."""


def notes_of(*sources: object) -> tuple[Note, ...]:
    """Return the distinct notes of several objects, in order; an object without `notes` has none."""
    return tuple(dict.fromkeys(note for source in sources for note in getattr(source, "notes", ())))


def save_notes(directory: Path, notes: Iterable[Note]) -> None:
    """Save notes in the directory of the results that they are about. Several processes may save the same notes at once."""
    for note in notes:
        path = directory / f"note-{fingerprint(note)[:16]}.json"
        if not path.exists():
            try:
                publish(path, json.dumps(asdict(note)).encode())
            except OSError as error:  # a read-only cache: the process that computed has saved its notes
                if error.errno not in NOT_OURS:
                    raise
                log.warning("%s: %s", note.about, note.text)


def load_notes(directory: Path) -> tuple[Note, ...]:
    """Return the notes saved in a directory, sorted by subject."""
    notes = []
    for path in directory.glob("note-*.json"):
        try:
            notes.append(Note(**json.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError):  # set aside or cut short: a missing note is no reason to end a run
            continue
    return tuple(sorted(notes, key=lambda note: (note.about, note.text)))
