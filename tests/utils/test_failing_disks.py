"""A disk or a system that refuses while a file is written: a sentence, exit code 1, and the file as it was or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ksweep.cli.output import write_parquet
from ksweep.registry import attempts
from ksweep.registry.run_record import read_run, write_run
from ksweep.utils.command_exit import exit_code_of
from ksweep.utils.files import publish, publish_once
from tests.registry.landed_runs import controls_of, curve_of, record_of

CALLS = ("open", "fsync", "replace", "rename", "link", "mkdir")
REASONS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EROFS, errno.EACCES)
WRITERS: dict[str, Callable[[Path], object]] = {
    "publish": lambda place: publish(place / "folder" / "file.json", b"new"),
    "publish_once": lambda place: publish_once(place / "folder" / "once.json", b"new"),
    "a run": lambda place: write_run(place / "registry", record_of("r1"), curve_of(), controls_of()),
    "attempts": lambda place: attempts.write_attempts(
        place / "registry",
        [
            attempts.Attempt(
                job="20261122-120000-abcdef", start=0, rank=0, num_ranks=1, sweep="s", cells=(), status="failed", why=""
            )
        ],
    ),
    "an answer": lambda place: write_parquet(place / "answer.parquet", pa.table({"a": [1]})),
}


def files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("call", CALLS)
def test_a_refused_write_ends_in_a_sentence_and_leaves_no_half_file(
    writer: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path / "home"))
    WRITERS[writer](tmp_path / "whole")
    whole, real, refused = files(tmp_path / "whole"), getattr(os, call), 0
    for reason in REASONS:
        place = tmp_path / f"{call}-{reason}"
        publish(place / "folder" / "file.json", b"old")

        def refuse(*given: Any, at: Path = place, code: int = reason, **named: Any) -> Any:
            nonlocal refused
            if call == "fsync" or str(given[0]).startswith(str(at)):
                refused += 1
                raise OSError(code, os.strerror(code), str(given[0]) if call != "fsync" else None)
            return real(*given, **named)

        before = files(place)
        with monkeypatch.context() as patched:
            patched.setattr(os, call, refuse)
            was, code = refused, exit_code_of(lambda at=place: WRITERS[writer](at) and None)  # type: ignore[misc]
        said = capsys.readouterr().err
        if refused == was:
            assert code == 0  # it does without this call
            continue
        if code == 0:  # it has another way
            assert files(place).keys() == before.keys() | whole.keys()
            continue
        assert code == 1 and said.startswith("error: ") and said.count("\n") == 1 and "bug" not in said
        assert os.strerror(reason) in said
        assert files(place) == before, "nothing is lost and nothing is half"
        WRITERS[writer](place)
        assert files(place).keys() == before.keys() | whole.keys()
    if writer == "a run":
        assert read_run(tmp_path / "whole" / "registry" / "landing" / "r1").record.status == "finished"
