"""`ksweep sql`, `show` and `diff` over real runs."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ksweep.registry.run_record import read_run, write_run
from tests.cli.conftest import Command
from tests.registry.real_runs import Real


@pytest.fixture
def ksweep(real: Real, command: Command) -> Command:
    """`ksweep WORDS` on the registry of the real runs, or on another one."""
    return lambda *words, registry=real.root: command(*words, "--registry", str(registry))


@pytest.fixture(scope="module")
def old(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs as an earlier ksweep landed them: record, curve and controls."""
    root = tmp_path_factory.mktemp("old") / "registry"
    for run_id in real.runs.values():
        landed = read_run(real.root / "landing" / run_id)
        assert landed.curve is not None
        write_run(root, landed.record, landed.curve.drop_columns(["replicates", "effective_documents"]), landed.controls)
    for store in ("draws", "scores"):
        shutil.copytree(real.root / store, root / store)
    return root


@pytest.mark.slow
def test_sql_by_name_writes_table_json_csv_and_parquet_alike(ksweep: Command, tmp_path: Path) -> None:
    code, table, _ = ksweep("sql", "@growth_with_k")
    assert code == 0 and "\x1b" not in table and table.count("tiny L1 temperature=0.5 @") == 4
    objects = [json.loads(line) for line in ksweep("sql", "@growth_with_k", "--json")[1].splitlines()]
    rows = list(csv.DictReader(io.StringIO(ksweep("sql", "@growth_with_k", "--csv")[1])))
    code, said, _ = ksweep("sql", "@growth_with_k", "--parquet", str(tmp_path / "out.parquet"))
    stored = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert code == 0 and said.endswith("12 rows\n") and objects == stored
    assert [float(row["fve"]) for row in rows] == [row["fve"] for row in stored]


def test_sql_without_a_question_lists_those_that_have_a_name(ksweep: Command) -> None:
    found = [json.loads(line) for line in ksweep("sql", "--json")[1].splitlines()]
    [row] = [row for row in found if row["name"] == "@compare"]
    assert row["question"] == "Do two cells differ, over the same activations, at each K?" and row["takes"] == "cell, other"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["@best_temprature"], "did you mean @best_temperature"),
        (["@compare", "cel=x"], "takes cell=..., other=..."),
        (["from runs", "cell=x"], "only stored questions"),
        (["from runs", "--csv", "--json"], "give one of"),
    ],
)
def test_sql_tells_what_does_not_fit(ksweep: Command, arguments: list[str], words: str) -> None:
    code, _, error = ksweep("sql", *arguments)
    assert code == 2 and words in error


@pytest.mark.slow
def test_show_tells_spec_curve_controls_groups_and_what_it_said(ksweep: Command, real: Real) -> None:
    key = real.record(1.0)["cell_key"]
    code, out, _ = ksweep("show", f"@{key[:8]}")
    assert code == 0
    for words in ("sampling.temperature", "retrieval_top1", "cut_off", "quarter 1 of 4", "explanations: worst 5 activations"):
        assert words in out, words
    best = min((d for d in real.draws(1.0) if d["error"] is not None), key=lambda d: d["error"])
    assert f"best 1: error {best['error']:.4f}" in out and f"explanation: {' '.join(best['explanation'].split())}" in out
    told = json.loads(ksweep("show", real.runs[1.0], "--json")[1])
    assert [row["fve"] for row in told["curve"]] == [pytest.approx(real.fve(1.0, k), abs=1e-9) for k in range(1, 9)]
    assert told["spec"]["sampling"]["temperature"] == 1.0 and told["run"]["run_id"] == real.runs[1.0]
    assert len(told["examples"]) == 15


@pytest.mark.slow
def test_show_of_a_failed_run_tells_the_error(ksweep: Command, real: Real) -> None:
    [row] = [json.loads(line) for line in ksweep("sql", "from v_failures", "--json")[1].splitlines()]
    code, out, _ = ksweep("show", row["run_id"])
    assert code == 0 and "DataError" in out and "Traceback" in out and "curve" not in out


@pytest.mark.slow
def test_show_of_a_run_from_before_examples_were_kept_takes_them_from_the_draws(ksweep: Command, real: Real, old: Path) -> None:
    now = json.loads(ksweep("show", real.runs[1.0], "--json")[1])["examples"]
    then = json.loads(ksweep("show", real.runs[1.0], "--json", registry=old)[1])["examples"]
    assert then == now and len(now) == 15


@pytest.mark.slow
def test_diff_is_paired_at_every_k_over_documents(ksweep: Command, real: Real) -> None:
    found = json.loads(ksweep("diff", real.runs[1.0], real.runs[0.5], "--json")[1])
    assert found["spec"] == [{"name": "sampling.temperature", "a": 1.0, "b": 0.5}]
    assert found["same"] == {"cell": False, "draws": False, "scores": False, "activations": True}
    assert [row["k"] for row in found["numbers"]] == list(range(1, 9))
    documents, baseline = real.documents(), real.between()
    names, generator = np.unique(documents), np.random.default_rng(1)
    for row in found["numbers"]:
        difference = real.best_of(0.5, row["k"]) - real.best_of(1.0, row["k"])
        assert row["difference"] == pytest.approx(difference.mean() / baseline, abs=1e-9)
        sums = np.array([[difference[documents == n].sum(), (documents == n).sum()] for n in names])
        drawn = sums[generator.integers(len(names), size=(4000, len(names)))].sum(axis=1)
        spread = np.std(drawn[:, 0] / drawn[:, 1]) / baseline
        # 95 % of few documents: somewhat more than 1.96 standard deviations to each side, and never twice that.
        assert 1.0 < (row["high"] - row["low"]) / (2 * 1.96 * spread) < 2.0
    _, out, _ = ksweep("diff", real.runs[1.0], real.runs[0.5])
    assert "paired over the 40 activations that both runs share" in out and "sampling.temperature" in out


@pytest.mark.parametrize(
    ("question", "printed"),
    [
        ("select 0.25 as low, 0.75 as high", "0.25  0.75"),  # decimals, not floats: as they are
        ("select 0.5::double as below, 0.25::double as low", "0.5000  0.2500"),  # no interval
        ("select -0.001::double as x_low, 0.9::double as x_high, 2000 as num_replicates", "0.0  0.9"),  # and no -0.0
        ("select min(finished) as low, max(finished) as high from runs", "2026"),
    ],
)
def test_sql_prints_ends_of_intervals_with_the_decimals_that_hold_and_leaves_the_rest(
    ksweep: Command, question: str, printed: str
) -> None:
    code, out, _ = ksweep("sql", question)
    assert code == 0 and " ".join(printed.split()) in " ".join(out.split())


def test_diff_of_a_run_with_itself_is_nothing(ksweep: Command, real: Real) -> None:
    found = json.loads(ksweep("diff", real.runs[0.7], real.runs[0.7], "--json")[1])
    assert found["spec"] == found["counts"] == found["provenance"] == found["numbers"] == []
    assert "of one run" in found["note"]


@pytest.mark.slow
def test_diff_without_the_baseline_of_each_activation_or_without_draws_says_so(
    ksweep: Command, real: Real, old: Path, tmp_path: Path
) -> None:
    now = json.loads(ksweep("diff", real.runs[1.0], real.runs[0.5], "--json")[1])["numbers"]
    found = json.loads(ksweep("diff", real.runs[1.0], real.runs[0.5], "--json", registry=old)[1])
    assert "treat the baseline as a constant" in found["note"]
    assert [row["difference"] for row in found["numbers"]] == pytest.approx([row["difference"] for row in now], abs=1e-9)
    draws = (old / "draws").rename(tmp_path / "draws")
    found = json.loads(ksweep("diff", real.runs[1.0], real.runs[0.5], "--json", registry=old)[1])
    shutil.rmtree(old / "draws", ignore_errors=True)  # diff leaves an empty directory
    draws.rename(old / "draws")
    assert "no paired interval" in found["note"] and found["numbers"][0]["low"] is None
    assert found["numbers"][0]["difference"] == pytest.approx(now[0]["difference"], abs=1e-9)


def test_a_name_of_nothing_or_of_several_is_told(ksweep: Command) -> None:
    assert ksweep("show", "nobody")[0] == 2 and "no run, cell, label or sweep 'nobody'" in ksweep("show", "nobody")[2]
    code, _, error = ksweep("diff", "tiny", "2026")
    assert code == 2 and "runs are called" in error


TEXTS = (
    "=cmd|'/C calc'!A1", "+1", "-1+2", "@SUM(A1)", "\tx", "\rx", "plain", "a=b", "'quoted", 'with "quotes", and\nlines\r', "",
)  # fmt: skip


@pytest.mark.parametrize("for_spreadsheet", [False, True])
def test_csv_is_exact_unless_it_is_for_a_spreadsheet(registry: Path, command: Command, for_spreadsheet: bool) -> None:
    values = ", ".join(f"({i}, {-1.5 * i}, '{text.replace(chr(39), chr(39) * 2)}')" for i, text in enumerate(TEXTS))
    question = f'select i, n, t as "=t", [t] as l from (values {values}) as _(i, n, t) order by i'
    option = ["--for-spreadsheet"] if for_spreadsheet else []
    code, out, _ = command("sql", question, "--csv", *option, "--registry", str(registry))
    [head, *rows] = csv.reader(io.StringIO(out, newline=""))
    begin = "'" if for_spreadsheet else ""
    assert code == 0 and head == ["i", "n", f"{begin}=t", "l"]
    assert [float(row[1]) for row in rows] == [-1.5 * i for i in range(len(TEXTS))]  # numbers stay numbers
    assert [row[2] for row in rows] == [f"{begin if 0 <= i < 6 else ''}{text}" for i, text in enumerate(TEXTS)]
    assert [json.loads(row[3]) for row in rows] == [[text] for text in TEXTS]


def test_an_option_for_spreadsheets_without_csv_is_refused(registry: Path, command: Command) -> None:
    code, _, err = command("sql", "select 1", "--for-spreadsheet", "--registry", str(registry))
    assert code == 2 and "--csv" in err
