"""`ksweep sql`, `ls` and `db`: answers on standard output, errors on standard error, exit codes; what a process loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ksweep.registry.run_record import write_run
from tests.cli.conftest import Command
from tests.registry.landed_runs import controls_of, curve_of, publish_draws, record_of

ROOT = Path(__file__).parents[2]


def three_runs(registry: Path) -> Path:
    """Two finished runs and a failed one."""
    registry.mkdir(exist_ok=True)
    write_run(registry, record_of("r0", temperature=0.4, minutes=0), curve_of(0.3), controls_of())
    write_run(registry, record_of("r1", temperature=0.7, minutes=5, num_draws_sampled=400, tokens_per_second=99.6), curve_of(0.5))
    write_run(registry, record_of("r2", temperature=1.0, minutes=2, status="failed", error_type="RunError", error_message="x"))
    return registry


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry that is only read."""
    return three_runs(tmp_path_factory.mktemp("shared") / "registry")


@pytest.fixture
def ksweep(shared: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`ksweep WORDS` beside the shared registry."""
    monkeypatch.chdir(shared.parent)
    return command


def objects(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.slow
def test_sql_prints_a_table_without_escape_codes(ksweep: Command) -> None:
    code, out, err = ksweep("sql", "select k, fve from curves where temperature = 0.7 and k in (1, 4) order by k")
    assert (code, err) == (0, "") and "\x1b" not in out
    assert [line.split() for line in out.splitlines()] == [["k", "fve"], ["1", "0.5000"], ["4", "0.5300"]]
    assert "…" not in ksweep("sql", "select * from runs")[1], "a pipe cuts nothing"
    texts = ["[/INST] hi", "[bold]hi[/bold] :smile:", "x" * 400]  # what a model may say is no markup
    out = ksweep("sql", "select " + ", ".join(f"'{text}' as x{i}" for i, text in enumerate(texts)))[1]
    assert all(text in out for text in texts)


def test_sql_as_json_prints_an_object_a_line_with_nulls(ksweep: Command) -> None:
    code, out, _ = ksweep("sql", "select run_id, tokens_per_second as speed, finished from runs order by run_id", "--json")
    assert code == 0
    assert objects(out) == [
        {"run_id": "r0", "speed": None, "finished": "2026-11-22 12:00:00"},
        {"run_id": "r1", "speed": 99.6, "finished": "2026-11-22 12:05:00"},
        {"run_id": "r2", "speed": None, "finished": "2026-11-22 12:02:00"},
    ]
    assert objects(ksweep("sql", "--json", "select 'nan'::double as x, 'inf'::double as y")[1]) == [{"x": None, "y": None}]


def test_sql_without_rows_prints_the_columns_or_nothing(ksweep: Command) -> None:
    code, out, _ = ksweep("sql", "select run_id, label from runs where false")
    assert code == 0 and "run_id" in out and "label" in out
    assert ksweep("sql", "select run_id from runs where false", "--json") == (0, "", "")


def test_ls_lists_runs_newest_first_with_their_best(ksweep: Command) -> None:
    code, out, _ = ksweep("ls", "--json")
    assert code == 0
    rows = [(o["run"], o["state"], o["fve"], o["tokens_per_second"]) for o in objects(out)]
    assert rows == [("r1", "finished", 0.53, 100.0), ("r2", "failed", None, None), ("r0", "finished", 0.33, None)]
    code, out, _ = ksweep("ls")
    assert code == 0 and "…" not in out
    for words in ("r1", "finished", "failed", "RunError: x", "temp_sweep", "0.530 K=4", record_of("x", temperature=0.7).cell):
        assert words in out


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("", "error: "),
        ("selec 1", "error: DuckDB does not accept that"),
        ("select nothing from curves", "nothing"),
        ("select * from curvs", "curvs"),
        ("drop view curves", "read-only"),
        ("select 'a'::int", "Could not convert"),
    ],
)
def test_a_wrong_question_exits_with_two_and_says_why(ksweep: Command, question: str, words: str) -> None:
    code, out, err = ksweep("sql", question)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and words in err and "Traceback" not in err


@pytest.mark.parametrize("words", [["ls"], ["sql", "select 1"], ["db", "rebuild"], ["db", "ingest"]])
def test_a_registry_that_is_not_there_exits_with_two_and_is_named(ksweep: Command, words: list[str]) -> None:
    code, out, err = ksweep(*words, "--registry", "nowhere")
    assert (code, out) == (2, "") and "nowhere" in err and "Traceback" not in err
    assert not Path("nowhere").exists()


@pytest.mark.slow
def test_ingest_takes_in_what_is_new_and_rebuild_needs_the_landing_files_alone(
    registry: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(three_runs(registry).parent)
    assert "3 runs, 3 new" in command("db", "ingest")[1]
    assert "3 runs, 0 new" in command("db", "ingest")[1]
    before = command("sql", "select * from curves order by cell, k", "--json")[1]
    for path in registry.glob("ksweep.duckdb*"):
        path.unlink()
    code, out, err = command("db", "rebuild")
    assert (code, err) == (0, "") and "ksweep.duckdb: 3 runs, 3 new, 0 removed" in out
    assert command("sql", "select * from curves order by cell, k", "--json")[1] == before

    publish_draws(registry, record_of("x", temperature=0.7).draws_key or "", [[0.5, None], [0.25, 0.75]])
    question = "select activation, draw, error, explanation from draws order by activation, draw"
    assert [tuple(o.values()) for o in objects(command("sql", question, "--json")[1])] == [
        (0, 0, 0.5, "0.0"),
        (0, 1, None, None),
        (1, 0, 0.25, "1.0"),
        (1, 1, 0.75, "1.1"),
    ]

    next(registry.glob("landing/*r0*/curve.parquet")).write_bytes(b"PAR1 no")
    code, out, err = command("db", "rebuild")
    assert code == 0 and "2 runs" in out
    assert err.startswith("not believed: ") and "r0" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_real_process_answers_in_a_pipe_and_loads_no_torch(shared: Path) -> None:
    script = "import sys\nfrom ksweep.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    words = [sys.executable, "-c", script, "sql", "select count(*) as n from runs", "--json", "--registry", str(shared)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, '{"n": 3}\n', "")


@pytest.mark.slow
def test_help_and_a_mistyped_word_load_nothing_heavy() -> None:
    """One process for all of them: what the first loads is there for the others."""
    script = """
import sys
from ksweep.cli import main

def run(*words):
    sys.argv = ["ksweep", *words]
    main()

for words in (["--help"], ["ls", "--help"]):
    try:
        run(*words)
    except SystemExit as end:
        assert not end.code
try:
    run("nonsense")
finally:
    heavy = {"torch", "duckdb", "pyarrow", "altair", "numpy", "transformers", "submitit", "psutil"} & sys.modules.keys()
    assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "nonsense" in done.stderr


@pytest.mark.parametrize(
    "words", [("ls", "--registry", ""), ("db", "ingest", "--registry", " "), ("cache", "ls", "--vector-cache", "")]
)
def test_a_directory_without_a_name_is_refused_and_nothing_is_written_here(
    command: Command, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*words)
    assert code == 2 and "it is empty" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"[" * 100_000, "not valid JSON"), (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"), (b"\xff{", "can't decode byte 0xff")],
    ids=["brackets", "digits", "bytes"],
)
def test_a_result_file_that_no_reader_can_take_is_refused_in_a_sentence(
    command: Command, registry: Path, tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "result.json").write_bytes(content)
    code, _, err = command("import-json", str(tmp_path / "result.json"), "--registry", str(registry))
    assert code == 2 and words in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_runs_that_do_not_say_over_which_activations_they_ran_are_not_paired(command: Command, registry: Path) -> None:
    for name, temperature in (("r0", 0.5), ("r1", 1.0)):
        write_run(registry, record_of(name, temperature=temperature), curve_of(), controls_of())
    code, _, err = command("diff", "r0", "r1", "--registry", str(registry))
    assert code == 2 and "does not say over which activations it ran" in err
