"""What a user sees of an exception: one sentence and an exit code, whichever main it ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
import torch

import ksweep.cli
from ksweep import Activations, Autoencoder, Cell, RequestError, Sweep, sweep_main
from ksweep.utils.command_exit import exit_code_of
from ksweep.utils.errors import RunError, SpecError, StoreError

Main = Callable[[Exception], int]

SWEEP = Sweep(name="s", cell=Cell(autoencoder=Autoencoder(av="av", ar="ar"), activations=Activations(vectors="v.parquet")))


@pytest.fixture(params=["ksweep", "a sweep file"])
def main(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Main:
    """Runs a main whose work raises; returns the exit code."""
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path / "home"))

    def end(error: Exception) -> int:
        def fail(*_: object, **__: object) -> int:
            raise error

        monkeypatch.setattr(ksweep.cli, "app", fail)
        monkeypatch.setattr("ksweep.launch.sweep_main._main", fail)
        with pytest.raises(SystemExit) as exit_:
            if request.param == "ksweep":
                ksweep.cli.main()
            else:
                sweep_main(SWEEP, [])
        assert isinstance(exit_.value.code, int)
        return exit_.value.code

    return end


def raised(error: Exception) -> None:
    raise error


def caught(act: Callable[[], object]) -> Exception:
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("it raises nothing")


CIRCUMSTANCES: list[tuple[Callable[[], object], int, str]] = [
    (lambda: raised(RequestError("no such column")), 2, "no such column"),
    (lambda: raised(SpecError("seed=-1")), 2, "seed=-1"),
    (lambda: raised(RunError("rank 3 is dead")), 1, "rank 3 is dead"),
    (lambda: raised(StoreError("a part is damaged")), 1, "a part is damaged"),
    (lambda: raised(OSError(errno.EIO, "Input/output error", "/data/part")), 1, "/data/part: Input/output error"),
    (
        lambda: raised(OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b")),
        1,
        "/a -> /b: Invalid cross-device link",
    ),
    (lambda: raised(PermissionError(errno.EACCES, "Permission denied", "/root/x")), 1, "/root/x: Permission denied"),
    (lambda: raised(OSError("cannot load library")), 1, "OSError: cannot load library"),
    (lambda: raised(MemoryError()), 1, "out of memory (MemoryError)"),
    (lambda: raised(torch.OutOfMemoryError("CUDA out of memory")), 1, "out of memory (CUDA out of memory)"),
    (lambda: raised(OverflowError("int too big to convert")), 1, "OverflowError: int too big to convert"),
    (lambda: b"\xff".decode(), 1, "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff"),
    (lambda: "\udcff".encode(), 1, "UnicodeEncodeError: 'utf-8' codec can't encode character"),
    (lambda: duckdb.execute("SELECT 1::TINYINT + 300::TINYINT"), 1, "ConversionException: Conversion Error"),
    (lambda: duckdb.connect("/proc/no/such.duckdb"), 1, "IOException: IO Error"),
    (lambda: pa.array([1], pa.int8()).cast(pa.date32()), 1, "Arrow"),
    (lambda: pa.ipc.open_file(b"no Arrow file"), 1, "ArrowInvalid: "),
]


@pytest.mark.parametrize(("act", "code", "words"), CIRCUMSTANCES, ids=[words for _, _, words in CIRCUMSTANCES])
def test_a_circumstance_ends_either_main_with_one_sentence(
    main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path, act: Callable[[], object], code: int, words: str
) -> None:
    assert main(caught(act)) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert not (tmp_path / "home").exists(), "no traceback is kept of what is no bug"


@pytest.mark.parametrize(
    "error", [TypeError("no len()"), KeyError("layer"), AssertionError(), RecursionError("too deep"), ValueError()]
)
def test_a_bug_ends_either_main_with_the_path_of_its_traceback(
    main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path, error: Exception
) -> None:
    assert main(error) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"unexpected {type(error).__name__}" in line and f"{__file__}:" in line and "Traceback" not in line
    report = Path(line.rpartition(" is in ")[2])
    assert report.parent == tmp_path / "home" / "tracebacks" and report.stat().st_mode & 0o077 == 0
    text = report.read_text()
    assert "Traceback (most recent call last)" in text and "in fail" in text and text.startswith("ksweep ")


def test_a_bug_with_a_home_that_cannot_be_written_leaves_its_traceback_among_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert exit_code_of(lambda: [][0]) == 1
    report = Path(capsys.readouterr().err.strip().rpartition(" is in ")[2])
    assert report.parent == tmp_path and "IndexError" in report.read_text()


def test_control_characters_of_a_message_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise RequestError("column '\x1b]0;owned\x07\x9b2J'\n\ta second line")

    assert exit_code_of(fail) == 2
    assert capsys.readouterr().err == "error: column '\\x1b]0;owned\\x07\\x9b2J'\n\ta second line\n"


def test_an_exception_whose_text_cannot_be_written_ends_in_a_sentence_too(capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(RuntimeError):
        def __str__(self) -> str:
            return str(10**5000)

    def fail() -> int:
        raise Odd

    assert exit_code_of(fail) == 1 and "unexpected Odd" in capsys.readouterr().err


def test_a_reader_that_closes_the_pipe_ends_a_command_without_a_word() -> None:
    code = "import sys; from ksweep.utils.command_exit import exit_code_of\n"
    code += "def out():\n  while True: print('x' * 10000)\nsys.exit(exit_code_of(out))"
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 1


def test_interrupting_a_sweep_says_that_finished_units_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("ksweep.launch.sweep_main._main", interrupt)
    with pytest.raises(SystemExit) as end:
        sweep_main(SWEEP, [])
    assert end.value.code == 1 and "finished units are kept" in capsys.readouterr().err
