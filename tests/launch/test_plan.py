"""What a plan says is to be done: counted by hand, from facts and from a real dry run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ksweep import Activations, Autoencoder, Cell, Sampling, Sweep, sweep_main
from ksweep.evaluation.identity import cell_keys
from ksweep.launch.plan import CellFacts, estimate, plan_steps
from ksweep.registry.run_record import write_run
from tests.activations.helpers import random_vectors, write_vectors
from tests.registry.landed_runs import curve_of, publish_draws, record_of
from tests.tiny_models import TinyPair, make_pair


def facts(**changes: Any) -> CellFacts:
    """40 activations of 128 bytes with 8 draws of 700 bytes each; nothing is there."""
    nothing = CellFacts(
        cell_key="c", activations_key="a", label="demo L1", finished_run=None, activations_present=0, activations_wanted=40,
        draws_present=0, draws_wanted=320, bytes_per_activation=128, bytes_per_draw=700, seconds_per_draw=None,
    )  # fmt: skip
    return replace(nothing, **changes)


def test_plan_of_a_cell_with_nothing_there_takes_everything_and_says_so() -> None:
    [step] = plan_steps([facts(seconds_per_draw=0.5)])
    assert (step.state, step.reason) == ("missing", "no draws yet")
    assert (step.draws_to_sample, step.activations_to_extract) == (320, 40)
    assert (step.draw_bytes, step.activation_bytes) == (224_000, 5120)  # 320 x 700, 40 x 128
    assert step.seconds == 160  # 320 x 0.5


def test_draws_of_earlier_versions_that_are_copied_need_room() -> None:
    [step] = plan_steps([facts(draws_present=320, bytes_to_copy=5000)])
    assert step.draw_bytes == 5000


def test_plan_without_an_earlier_run_does_not_know_the_time() -> None:
    assert plan_steps([facts()])[0].seconds is None


@pytest.mark.parametrize(
    ("present", "reason", "left"),
    [
        (0, "no draws yet", 320),
        (80, "80 of 320 draws are there", 240),
        (319, "319 of 320 draws are there", 1),
        (320, "all draws are there, statistics are not", 0),
    ],
)
def test_plan_of_a_missing_cell_gives_the_reason(present: int, reason: str, left: int) -> None:
    [step] = plan_steps([facts(draws_present=present)])
    assert (step.state, step.reason, step.draws_to_sample) == ("missing", reason, left)


def test_plan_of_a_done_cell_does_nothing_and_names_the_run() -> None:
    [step] = plan_steps([facts(finished_run="20261122-r1", activations_present=40, draws_present=320)])
    assert (step.state, step.reason) == ("done", "run 20261122-r1")
    numbers = (step.draws_to_sample, step.activations_to_extract, step.draw_bytes, step.activation_bytes, step.seconds)
    assert numbers == (0, 0, 0, 0, 0)


def test_plan_of_a_done_cell_whose_caches_were_deleted_still_does_nothing() -> None:
    [step] = plan_steps([facts(finished_run="r1")])
    assert (step.state, step.draws_to_sample, step.activations_to_extract) == ("done", 0, 0)


def test_plan_after_a_done_cell_whose_cache_was_deleted_extracts_for_the_missing_one() -> None:
    steps = plan_steps([facts(finished_run="r1"), facts(cell_key="d")])
    assert [s.activations_to_extract for s in steps] == [0, 40]


def test_plan_of_stored_draws_without_their_vectors_extracts_them_again() -> None:
    [step] = plan_steps([facts(draws_present=320)])
    assert (step.draws_to_sample, step.activations_to_extract) == (0, 40)


@pytest.mark.parametrize(
    ("present", "wanted", "extracted"),
    [
        (0, [40, 40], [40, 0]),
        (0, [20, 40, 30], [20, 20, 0]),
        (0, [40, 20, 60], [40, 0, 20]),
        (30, [20, 40, 50], [0, 10, 10]),
        (50, [20, 40], [0, 0]),
    ],
)
def test_plan_counts_shared_activations_for_the_first_cell_that_needs_them(
    present: int, wanted: list[int], extracted: list[int]
) -> None:
    steps = plan_steps([facts(activations_wanted=n, activations_present=min(n, present)) for n in wanted])
    assert [s.activations_to_extract for s in steps] == extracted
    assert sum(extracted) == max(0, max(wanted) - present)


def test_plan_counts_activations_of_other_keys_apart() -> None:
    steps = plan_steps([facts(), facts(activations_key="b"), facts()])
    assert [s.activations_to_extract for s in steps] == [40, 40, 0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return make_pair(tmp_path_factory.mktemp("tiny"), "qwen2")


@pytest.fixture
def sweep(pair: TinyPair, tmp_path: Path) -> Sweep:
    vectors = write_vectors(tmp_path / "v.parquet", random_vectors(50, pair.d_model))
    return Sweep(
        name="tiny",
        cell=Cell(
            autoencoder=Autoencoder(av=str(pair.av), ar=str(pair.ar)),
            activations=Activations(vectors=str(vectors), num_activations=40),
            sampling=Sampling(num_draws=8),
        ),
        registry=str(tmp_path / "registry"),
        vector_cache=str(tmp_path / "vector_cache"),
    )


def dry_run(sweep: Sweep, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        sweep_main(sweep, ["--dry-run", *arguments])
    assert end.value.code == 0
    return capsys.readouterr().out


def land_finished(sweep: Sweep, cell: Cell) -> None:
    Path(sweep.registry).mkdir(exist_ok=True)
    keys = cell_keys(cell)
    write_run(Path(sweep.registry), record_of("done-1", cell_key=keys.cell, draws_key=keys.draws), curve_of())


def test_dry_run_counts_draws_that_cells_share_once(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    out = dry_run(sweep, capsys, "activations.num_activations=[20,40]", "sampling.num_draws=[8,16]")
    # The rectangles 20 x 8, 20 x 16, 40 x 8, 40 x 16 of one store: together 40 x 16.
    assert "to extract: 40 activations; to sample: 640 draws" in out
    assert "4 of 4 cells to run" in out
    for reason in ("no draws yet", "160 of 320 draws are there", "480 of 640 draws are there"):
        assert reason in out


def test_dry_run_counts_each_temperature_by_itself_and_its_activations_once(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    out = dry_run(sweep, capsys, "sampling.temperature=[0,0.5,1.0]")
    assert "to extract: 40 activations; to sample: 680 draws" in out  # 40 greedy, 2 x 40 x 8


@pytest.mark.slow
def test_dry_run_as_json_is_an_object_a_cell_and_the_sums(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    land_finished(sweep, sweep.cell)
    out = dry_run(sweep, capsys, "--json", "sampling.num_draws=[8,16,24]", "cells_per_job=1")
    *cells, sums = [json.loads(line) for line in out.splitlines()]
    assert [(c["state"], c["draws_to_sample"]) for c in cells] == [("done", 0), ("missing", 640), ("missing", 320)]
    # 40 activations with 16 draws, then 8 more of each; 700 bytes a draw, no estimate of time, no GPU
    assert (sums["draws"], sums["draw_bytes"], sums["cells_of_jobs"]) == (960, 672_000, [1, 1])
    assert sums["states"] == {"done": 1, "missing": 2} and sums["seconds"] is None and sums["num_unknown"] == 2


@pytest.mark.parametrize(("per_job", "words"), [(1, "jobs: 3, 1 cell each"), (2, "jobs: 2, 1 to 2 cells each")])
def test_dry_run_says_how_many_jobs_there_will_be(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], per_job: int, words: str
) -> None:
    assert words in dry_run(sweep, capsys, "sampling.temperature=[0.5,0.7,1.0]", f"cells_per_job={per_job}")


@pytest.mark.slow
def test_a_dry_run_with_one_cell_to_be_retried_leaves_the_other_failed(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [replace(sweep.cell, sampling=replace(sweep.cell.sampling, num_draws=n)) for n in (8, 16)]
    keys = [cell_keys(cell).cell for cell in cells]
    Path(sweep.registry).mkdir()
    for key in keys:
        write_run(
            Path(sweep.registry), record_of(f"f-{key[:4]}", cell_key=key, status="failed", error_type="bug", error_message="x")
        )
    both = "sampling.num_draws=[8,16]"
    assert "0 of 2 cells to run, 2 failed" in dry_run(sweep, capsys, both)
    assert "1 of 2 cells to run, 1 failed" in dry_run(sweep, capsys, both, f"--retry-cell={keys[1]}")
    assert "2 of 2 cells to run" in dry_run(sweep, capsys, both, *(f"--retry-cell={key}" for key in keys))
    assert "2 of 2 cells to run" in dry_run(sweep, capsys, both, "--retry")


def test_json_without_a_dry_run_is_refused(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        sweep_main(sweep, ["--json"])
    assert end.value.code == 2 and "--json goes with --dry-run" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_run_after_a_finished_cell_and_deleted_draws_samples_only_for_the_other(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    land_finished(sweep, sweep.cell)
    out = dry_run(sweep, capsys, "sampling.num_draws=[8,16]")
    assert "run done-1" in out and "1 of 2 cells to run" in out
    # Nothing of the finished cell is on disk any more, so the other one samples all of its own.
    assert "to extract: 40 activations; to sample: 640 draws" in out


@pytest.mark.slow
def test_dry_run_sees_the_draws_on_disk_and_their_loss(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    key = cell_keys(sweep.cell).combined
    publish_draws(Path(sweep.registry), key, [[0.5] * 8] * 10)
    assert "80 of 320 draws are there" in dry_run(sweep, capsys)
    shutil.rmtree(Path(sweep.registry) / "draws" / key)
    assert "no draws yet" in dry_run(sweep, capsys)


def test_plan_leaves_cells_to_the_jobs_that_are_at_work_on_them() -> None:
    [running, missing] = plan_steps([facts(job=("running", "job 7: drawing 3/8")), facts(cell_key="d")])
    assert (running.state, running.reason, running.draws_to_sample) == ("running", "job 7: drawing 3/8", 0)
    assert missing.state == "missing"


def test_plan_reports_what_failed_and_repeats_it_only_when_asked() -> None:
    broken = facts(failure=("bug", "KeyError: 'x'\nmore"))
    [step] = plan_steps([broken])
    assert (step.state, step.reason, step.draws_to_sample) == ("failed", "bug: KeyError: 'x' (--retry runs it again)", 0)
    [again] = plan_steps([broken], retry=[""])
    assert (again.state, again.draws_to_sample) == ("missing", 320)


def test_plan_repeats_of_two_failed_cells_the_one_that_is_named() -> None:
    broken = [facts(cell_key=key, failure=("bug", "KeyError")) for key in ("aa11", "ab22")]
    assert [step.state for step in plan_steps(broken, retry=["ab"])] == ["failed", "missing"]
    assert [step.state for step in plan_steps(broken, retry=["ab22", "aa1"])] == ["missing", "missing"]


def test_estimate_adds_up_what_is_known_and_counts_what_is_not() -> None:
    steps = plan_steps([facts(seconds_per_draw=0.5), facts(cell_key="d"), facts(cell_key="e", finished_run="r")])
    found = estimate(steps)
    # 320 draws each; the second cell has the activations of the first; 320 x 0.5 s
    assert (found.draws, found.activations, found.draw_bytes, found.activation_bytes) == (640, 40, 448_000, 5120)
    assert (found.seconds, found.known_seconds, found.num_known, found.num_unknown) == (None, 160, 1, 1)
    assert estimate(steps[:1]).seconds == 160


@pytest.mark.parametrize("kind", ["preempted", "timeout", "node failure", "cancelled", "lost", "stopped", "disk full"])
def test_plan_repeats_freely_what_neither_request_nor_code_is_to_blame_for(kind: str) -> None:
    assert plan_steps([facts(failure=(kind, "gone"))])[0].state == "missing"


def test_plan_of_a_finished_cell_is_done_whatever_failed_since() -> None:
    assert plan_steps([facts(finished_run="r1", failure=("bug", "later"), job=("running", "again"))])[0].state == "done"


def test_an_export_to_a_directory_is_refused_before_anything_is_computed(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("")
    for target, words in ((tmp_path / "out", "is a directory"), (tmp_path / "file" / "out.json", "cannot be written")):
        for arguments in (["--dry-run"], []):
            with pytest.raises(SystemExit) as end:
                sweep_main(sweep, [*arguments, f"export_json={target}"])
            assert end.value.code == 2 and words in capsys.readouterr().err
    assert not Path(sweep.registry).exists()
