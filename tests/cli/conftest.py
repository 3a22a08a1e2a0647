"""`ksweep` as it is typed, run in this process; what only a process of its own shows is tested in one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ksweep.cli import main
from tests.registry.real_runs import real  # noqa: F401  # a fixture

Command = Callable[..., tuple[object, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `ksweep WORDS`; (exit code, standard output, standard error)."""

    def run(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["ksweep", *words])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """An empty registry."""
    folder = tmp_path / "registry"
    folder.mkdir()
    return folder
