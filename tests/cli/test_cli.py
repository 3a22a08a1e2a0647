"""`ksweep ...` as it is typed: answers on standard output, complaints on standard error, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ksweep.cli import main
from ksweep.registry.run_record import write_run
from tests.registry.landed_runs import controls_of, curve_of, publish_draws, record_of

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[object, str, str]]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """Two finished runs and a failed one."""
    path = tmp_path / "registry"
    path.mkdir()
    write_run(path, record_of("r0", temperature=0.4, minutes=0), curve_of(0.3), controls_of())
    write_run(path, record_of("r1", temperature=0.7, minutes=5, num_draws_sampled=400, tokens_per_second=99.6), curve_of(0.5))
    write_run(path, record_of("r2", temperature=1.0, minutes=2, status="failed", error_type="RunError", error_message="x"))
    return path


@pytest.fixture
def ksweep(registry: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process; (exit code, standard output, standard error)."""
    monkeypatch.chdir(registry.parent)

    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["ksweep", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


def objects(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


def test_sql_prints_a_table_without_escape_codes(ksweep: Command) -> None:
    code, out, err = ksweep("sql", "select k, fve from curves where temperature = 0.7 and k in (1, 4) order by k")
    assert (code, err) == (0, "") and "\x1b" not in out
    assert [line.split() for line in out.splitlines()] == [["k", "fve"], ["1", "0.5000"], ["4", "0.5300"]]


def test_sql_as_json_prints_an_object_a_line_with_nulls(ksweep: Command) -> None:
    code, out, _ = ksweep("sql", "select run_id, tokens_per_second as speed, finished from runs order by run_id", "--json")
    assert code == 0
    assert objects(out) == [
        {"run_id": "r0", "speed": None, "finished": "2026-11-22 12:00:00"},
        {"run_id": "r1", "speed": 99.6, "finished": "2026-11-22 12:05:00"},
        {"run_id": "r2", "speed": None, "finished": "2026-11-22 12:02:00"},
    ]


def test_sql_without_rows_prints_the_columns_or_nothing(ksweep: Command) -> None:
    code, out, _ = ksweep("sql", "select run_id, label from runs where false")
    assert code == 0 and "run_id" in out and "label" in out
    assert ksweep("sql", "select run_id from runs where false", "--json") == (0, "", "")


def test_sql_reads_the_draws_as_they_are_on_disk(ksweep: Command, registry: Path) -> None:
    publish_draws(registry, record_of("x", temperature=0.7).draws_key or "", [[0.5, None], [0.25, 0.75]])
    question = "select activation, draw, error, explanation from draws order by activation, draw"
    assert [tuple(o.values()) for o in objects(ksweep("sql", question, "--json")[1])] == [
        (0, 0, 0.5, "0.0"),
        (0, 1, None, None),
        (1, 0, 0.25, "1.0"),
        (1, 1, 0.75, "1.1"),
    ]


def test_ls_lists_runs_newest_first_with_their_best(ksweep: Command) -> None:
    code, out, _ = ksweep("ls", "--json")
    assert code == 0
    found = [(o["run"], o["state"], o["fve"], o["tokens_per_second"]) for o in objects(out)]
    assert found == [("r1", "finished", 0.53, 100.0), ("r2", "failed", None, None), ("r0", "finished", 0.33, None)]


def test_ls_as_a_table_is_whole(ksweep: Command) -> None:
    code, out, _ = ksweep("ls")
    assert code == 0 and "…" not in out
    for words in ("r1", "finished", "failed", "RunError: x", "temp_sweep", "0.530 K=4", record_of("x", temperature=0.7).cell):
        assert words in out


def test_rebuild_makes_the_database_from_the_landing_files_alone(ksweep: Command, registry: Path) -> None:
    before = ksweep("sql", "select * from curves order by cell, k", "--json")[1]
    for path in registry.glob("ksweep.duckdb*"):
        path.unlink()
    code, out, err = ksweep("db", "rebuild")
    assert (code, err) == (0, "") and "ksweep.duckdb: 3 runs, 3 new, 0 removed" in out
    assert ksweep("sql", "select * from curves order by cell, k", "--json")[1] == before


def test_rebuild_names_a_landing_file_that_it_does_not_believe(ksweep: Command, registry: Path) -> None:
    next(registry.glob("landing/*r0*/curve.parquet")).write_bytes(b"PAR1 no")
    code, out, err = ksweep("db", "rebuild")
    assert code == 0 and "2 runs" in out
    assert err.startswith("not believed: ") and "r0" in err and err.count("\n") == 1


def test_ingest_takes_in_what_is_new_and_then_nothing(ksweep: Command) -> None:
    assert "3 runs, 3 new" in ksweep("db", "ingest")[1]
    assert "3 runs, 0 new" in ksweep("db", "ingest")[1]


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("selec 1", "selec"),
        ("select nothing from curves", "nothing"),
        ("select * from curvs", "curvs"),
        ("drop view curves", "read-only"),
        ("select 'a'::int", "Could not convert"),
    ],
)
def test_a_wrong_question_exits_with_two_and_says_why(ksweep: Command, question: str, words: str) -> None:
    code, out, err = ksweep("sql", question)
    assert (code, out) == (2, "")
    assert err.startswith("error: DuckDB does not accept that") and words in err and "Traceback" not in err


@pytest.mark.parametrize("command", [["ls"], ["sql", "select 1"], ["db", "rebuild"], ["db", "ingest"]])
def test_a_registry_that_is_not_there_exits_with_two_and_is_named(ksweep: Command, command: list[str]) -> None:
    code, out, err = ksweep(*command, "--registry", "nowhere")
    assert (code, out) == (2, "") and "nowhere" in err and "Traceback" not in err
    assert not Path("nowhere").exists()


def test_a_command_that_does_not_exist_exits_with_two(ksweep: Command) -> None:
    code, out, err = ksweep("sqll")
    assert (code, out) == (2, "") and "sqll" in err


def test_a_real_process_answers_in_a_pipe_and_loads_no_torch(registry: Path) -> None:
    script = "import sys\nfrom ksweep.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", script, "sql", "select count(*) as n from runs", "--json", "--registry", str(registry)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, '{"n": 3}\n', "")


@pytest.mark.parametrize("words", [["--help"], ["ls", "--help"], ["nonsense"]])
def test_help_and_a_mistyped_word_load_nothing_heavy(words: list[str]) -> None:
    heavy = ("torch", "duckdb", "pyarrow", "altair", "numpy", "transformers", "submitit", "psutil")
    script = (
        (
            "import sys\nfrom ksweep.cli import main\ntry:\n    main()\n"
            f"finally:\n    assert not {heavy} & sys.modules.keys(), {heavy} & sys.modules.keys()"
        )
        .replace("('", "{'")
        .replace("')", "'}")
    )
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == (2 if words == ["nonsense"] else 0) and "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["[/INST] hi", "[bold]hi[/bold] :smile:", "x" * 400])
def test_sql_prints_text_of_models_as_it_is(ksweep: Command, text: str) -> None:
    code, out, _ = ksweep("sql", f"select '{text}' as x")
    assert code == 0 and text in out


def test_sql_in_a_pipe_cuts_nothing(ksweep: Command) -> None:
    assert "…" not in ksweep("sql", "select * from runs")[1]


def test_an_empty_question_exits_with_two(ksweep: Command) -> None:
    assert ksweep("sql", "")[0] == 2


def test_sql_as_json_turns_nan_into_null(ksweep: Command) -> None:
    assert json.loads(ksweep("sql", "--json", "select 'nan'::double as x")[1]) == {"x": None}
