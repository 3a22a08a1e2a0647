"""What a sweep prints: legible at 80 columns, whole and plain in a pipe, with the facts that belong beside an FVE."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from ksweep import Activations, Autoencoder, Cell, Sampling, Sweep
from ksweep.analysis.results_table import print_results, results_table, warnings
from ksweep.launch import plan_table
from ksweep.launch.plan import CellFacts, plan_steps
from ksweep.launch.plan_table import print_plan
from ksweep.registry.run_record import write_run
from ksweep.utils.console import bytes_text
from tests.registry.landed_runs import controls_of, curve_of, record_of

ESCAPE, ELLIPSIS = "\x1b", "…"


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(
        name="temp_sweep",
        cell=Cell(
            autoencoder=Autoencoder(av="demo/av", ar="demo/ar"),
            activations=Activations(vectors="v.parquet"),
            sampling=Sampling(num_draws=64),
        ),
        axes={"sampling.temperature": (0.4, 0.7)},
        registry=str(tmp_path / "registry"),
    )


def curves(*labels: str, num_draws: int = 64, **changes: Any) -> pa.Table:
    """Rows as `curves_of` gives them, nothing in them worth a warning; every number as wide as it gets."""
    plain = {
        "fve_low": -0.234, "fve_high": -0.123, "level": 0.95, "shuffled_fve": -0.512, "failure_rate": 0.2, "cut_off_rate": 0.1,
        "tokens_per_second": 12345.0, "num_draws": num_draws, "distinct_text_fraction": 0.2, "cjk_fraction": 0.5,
        "num_documents": 20, "effective_documents": 20.0, "num_activations": 1000, "baseline": 0.7335,
        "baseline_kind": "evaluated set", "temperature": 1.0,
    }  # fmt: skip
    rows = [
        plain | {"label": label, "k": k, "fve": -0.187 + k / 1000} | changes for label in labels for k in range(1, num_draws + 1)
    ]
    return pa.Table.from_pylist(rows)


def printed(sweep: Sweep, table: pa.Table, width: int) -> str:
    file = io.StringIO()
    out = Console(file=file, width=width, force_terminal=True, color_system=None)
    out.print(results_table(sweep.name, table, out))
    return file.getvalue()


def header(text: str) -> list[str]:
    """Names of the columns of K."""
    return [word for line in text.splitlines() if "cell" in line for word in line.split() if word.startswith("K=")]


@pytest.mark.parametrize("label", ["t", "temperature=0.7", "temperature=0.7, seed=0"])
def test_results_at_80_columns_show_k_1_and_the_largest_k_whole(sweep: Sweep, label: str) -> None:
    text = printed(sweep, curves(label), 80)
    assert header(text)[0] == "K=1" and header(text)[-2:] == ["K=64", "K=64"]  # the last is the control's
    assert label in text and "-0.186" in text and "-0.123" in text and "-0.512" in text
    assert ELLIPSIS not in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [80, 100, 120, 160, 240])
@pytest.mark.parametrize("num_draws", [1, 2, 3, 16, 100, 256, 1000])
def test_results_of_any_width_show_the_ends_of_the_curve(sweep: Sweep, width: int, num_draws: int) -> None:
    text = printed(sweep, curves("temperature=0.7", num_draws=num_draws), width)
    shown = [int(name.removeprefix("K=")) for name in header(text)][:-1]
    assert shown[0] == 1 and shown[-1] == num_draws and shown == sorted(set(shown))
    assert ELLIPSIS not in text


def test_results_of_a_wide_terminal_show_more_k_failures_and_speed(sweep: Sweep) -> None:
    text = printed(sweep, curves("temperature=0.7"), 240)
    assert header(text)[:-1] == ["K=1", "K=2", "K=4", "K=8", "K=16", "K=32", "K=64"]
    assert "20.0%" in text and "12,345" in text


def test_results_without_an_interval_show_the_estimate_alone(sweep: Sweep) -> None:
    text = printed(sweep, curves("t", num_draws=1, fve_low=None, fve_high=None, shuffled_fve=None), 80)
    assert "-0.186" in text and "[" not in text and "None" not in text


def test_results_of_cells_with_different_k_leave_the_missing_ones_empty(sweep: Sweep) -> None:
    both = pa.concat_tables([curves("greedy", num_draws=1), curves("hot", num_draws=8)])
    [greedy] = [line for line in printed(sweep, both, 240).splitlines() if "greedy" in line]
    assert greedy.count("-0.186") == 1 and "-0.179" not in greedy


def land_both(sweep: Sweep, **second: Any) -> list[str]:
    """Runs of the two cells of the sweep; the second with other facts."""
    Path(sweep.registry).mkdir()
    keys = []
    for i, temperature in enumerate((0.4, 0.7)):
        record = record_of(
            f"r{i}", temperature=temperature, cut_off_rate=0.0, failure_rate=0.0, distinct_text_fraction=1.0, cjk_fraction=0.0
        )
        curve = curve_of(0.3 + 0.1 * i).append_column("num_draws", pa.array([4] * 4))
        for name, value in second.items() if i else ():
            curve = curve.set_column(curve.column_names.index(name), name, pa.array([value] * 4))
        write_run(Path(sweep.registry), record, curve, controls_of())
        keys.append(record.cell_key)
    return keys


def test_show_in_a_pipe_has_no_escape_codes_and_cuts_nothing(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    long = replace(sweep, axes={"sampling.temperature": (0.4, 0.7), "autoencoder.av": (f"owner/{'long-name-' * 9}av",)})
    print_results(long, land_both(sweep), computed=2, charts=False)
    out = capsys.readouterr().out
    assert ESCAPE not in out and ELLIPSIS not in out
    for label in long.labels():
        assert len(label) > 100 and label in out
    assert all(f"K={k}" in out for k in (1, 2, 4)) and "[0.28, 0.32]" in out


def test_show_puts_every_fact_once_where_cells_share_it(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    print_results(sweep, land_both(sweep), computed=1, charts=False)
    out = capsys.readouterr().out
    fact = "95% intervals: bootstrap over 40 documents; N = 100 activations; baseline 0.7300 (evaluated set)"
    assert out.count(fact) == 1 and f": {fact}" not in out
    assert "controls: empty_text -0.400, mean_vector 0.000, retrieval_top1 0.610\n" in out
    assert "computed 1 of 2 cells" in out and "warning" not in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"baseline": 0.7335}, "baseline 0.7335"),
        ({"num_documents": 39}, "39 documents"),
        ({"num_activations": 99}, "N = 99"),
        ({"baseline_kind": "stated constant"}, "(stated constant)"),
        ({"level": 0.9}, "90% intervals"),
    ],
)
def test_show_gives_each_group_of_cells_its_own_footnote(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    print_results(sweep, land_both(sweep, **change), computed=2, charts=False)
    notes = [line for line in capsys.readouterr().out.splitlines() if "intervals: bootstrap" in line]
    assert [note.split(": ")[0] for note in notes] == ["temperature=0.4", "temperature=0.7"]
    assert words in notes[1] and words not in notes[0]


def test_warnings_at_their_thresholds_are_silent() -> None:
    assert warnings(curves("t")) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"failure_rate": 0.21}, "21% of the draws failed"),
        ({"cut_off_rate": 0.11}, "11% of the draws ran into max_new_tokens"),
        ({"distinct_text_fraction": 0.19}, "only 19% of the texts are distinct"),
        ({"cjk_fraction": 0.51}, "Chinese or Japanese"),
        ({"num_documents": 19, "effective_documents": 19.0}, "19 documents are few"),
        ({"num_documents": 80, "effective_documents": 19.4}, "80 documents (19.4 effective) are few"),
    ],
)
def test_warnings_past_a_threshold_name_the_cell_once(change: dict[str, Any], words: str) -> None:
    [line] = warnings(pa.concat_tables([curves("fine"), curves("bad", **change)]))
    assert line.startswith("bad: ") and words in line


def test_warnings_of_one_draw_do_not_ask_for_distinct_texts_and_unknown_is_no_warning() -> None:
    assert warnings(curves("t", num_draws=1, distinct_text_fraction=0.01, cjk_fraction=None)) == []


def test_show_prints_the_warnings(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    print_results(sweep, land_both(sweep, num_documents=3), computed=2, charts=False)
    assert "warning: temperature=0.7: 3 documents are few" in capsys.readouterr().out


def test_plan_in_a_pipe_is_whole_and_sums_what_is_to_be_done(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    facts = CellFacts(
        cell_key="c" * 32, activations_key="a", label=f"{'long-name-' * 9} L20 T=0.7", finished_run=None, activations_present=0,
        activations_wanted=1000, draws_present=0, draws_wanted=64_000, bytes_per_activation=2000, bytes_per_draw=700,
        seconds_per_draw=0.1,
    )  # fmt: skip
    done = replace(facts, cell_key="d" * 32, finished_run="20261122-120000-demo-abcdef")
    print_plan(sweep, plan_steps([facts, done]))
    out = capsys.readouterr().out
    assert ESCAPE not in out and ELLIPSIS not in out
    assert "temp_sweep: 1 of 2 cells to run" in out
    assert f"{facts.label} @cccccccc" in out and "run 20261122-120000-demo-abcdef" in out
    # 64,000 x 700 B + 1000 x 2000 B; 6400 s are 107 minutes.
    assert "to extract: 1,000 activations; to sample: 64,000 draws; disk about 46.8 MB" in out
    assert "(2.0 MB activations, 44.8 MB draws); time 107 min on one rank" in out


def test_plan_with_one_cell_of_unknown_time_has_no_total(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    known = CellFacts("c", "a", "x", None, 0, 10, 0, 10, 1, 1, seconds_per_draw=1.0)
    print_plan(sweep, plan_steps([known, replace(known, seconds_per_draw=None)]))
    assert (
        "time unknown on one rank (no earlier run of this pair to estimate it from; 10 s for 1 of 2 cells)"
        in capsys.readouterr().out
    )


def test_plan_on_80_columns_with_gpus_fits_and_tells_gpu_hours(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Console(width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(plan_table, "console", lambda: out)
    facts = CellFacts("c" * 32, "a", "gemma L32 T=0.7 top_p=0.95", None, 0, 10_000, 0, 640_000, 7680, 1500, seconds_per_draw=0.9)
    failed = replace(facts, cell_key="d" * 32, failure=("out of memory", "rank 3 of 8: CUDA out of memory. " * 4))
    busy = replace(facts, cell_key="e" * 32, job=("running", "job 20261122-120000-abcdef: drawing 3/8"))
    resources = replace(sweep.resources, cluster="local", gpus=8, time="24:00:00")
    print_plan(replace(sweep, resources=resources), plan_steps([facts, failed, busy]), "slurm: 8 GPUs, 24:00:00", [1])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    # 640,000 draws x 0.9 s / 3600 s; 1 job x 8 GPUs x 24 h
    for words in ("1 of 3 cells to run, 1 failed, 1 running", "160.00", "GPU-hours: 160.00; 192.0 if every job",
                  "jobs: 1, 1 cell each", "@cccccccc", "out of memory", "1.0 GB"):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_500_000, "1.5 MB"),
        (2_000_000_000, "2.0 GB"),
        (10**12, "1.0 TB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_bytes_text_counts_in_thousands(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_a_long_label_on_80_columns_is_folded_and_no_figure_is_cut(sweep: Sweep) -> None:
    assert "…" not in printed(sweep, curves("temperature=0.7, num_activations=10000"), 80)


def test_brackets_in_a_label_are_printed(sweep: Sweep) -> None:
    assert "av=[x]y" in printed(sweep, curves("av=[x]y"), 120)
