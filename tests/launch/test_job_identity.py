"""Identity is computed once, by the launcher: job.json carries it, and ranks and records take it from there."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ksweep import Cell, Resources, Sweep, replace_at
from ksweep.autoencoder.nla import checkpoint as nla
from ksweep.evaluation import identity, prepare
from ksweep.evaluation.context import RunContext, cell_keys_from_dict
from ksweep.evaluation.distributed import Solo
from ksweep.evaluation.evaluate import run_job
from ksweep.evaluation.identity import CellKeys, resolve_cells, sweep_keys
from ksweep.launch.job import Job, all_jobs
from ksweep.launch.job_spec import create_job_for_cells
from ksweep.launch.plan import Step
from ksweep.launch.rank_records import Outcome
from ksweep.launch.reconcile import finalize_ended_jobs
from ksweep.utils.errors import CheckpointError
from tests.tiny_models import TinyPair, edit_weights
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell


@pytest.fixture
def pair(tmp_path: Path) -> TinyPair:
    return talking_pair(tmp_path, num_rows=60)


@pytest.fixture
def sweep(pair: TinyPair, tmp_path: Path) -> Sweep:
    (tmp_path / "registry").mkdir()
    return Sweep(
        name="tiny", cell=tiny_cell(pair, num_replicates=20), resources=Resources(cluster="inprocess", gpus=0),
        registry=str(tmp_path / "registry"), vector_cache=str(tmp_path / "vector_cache"),
    )  # fmt: skip


def planned_job(sweep: Sweep) -> tuple[Job, list[CellKeys]]:
    cells = resolve_cells(sweep.cells())
    keys = sweep_keys(sweep, cells)
    steps = [Step(key.label, key.cell, "missing", "", 1, 1, 1, 1, None, keys=key) for key in keys]
    return create_job_for_cells(sweep, list(zip(cells, steps, strict=True)), "local"), keys


def test_job_json_carries_the_keys_of_its_cells_as_the_launcher_computed_them(sweep: Sweep) -> None:
    job, keys = planned_job(replace(sweep, axes={"sampling.temperature": (0.7, 1.3)}))
    context = RunContext.from_argument(job.spec()["argument"])
    assert list(context.keys.values()) == keys and [key.label for key in keys] == ["temperature=0.7", "temperature=1.3"]


def test_keys_that_another_version_wrote_are_read_as_far_as_they_go(sweep: Sweep) -> None:
    written = json.loads(json.dumps(asdict(planned_job(sweep)[1][0])))
    known = cell_keys_from_dict(written)
    assert known is not None and cell_keys_from_dict(written | {"of_tomorrow": 1}) == known
    del written["draws"]
    assert cell_keys_from_dict(written) is None, "a rank computes them itself"


@pytest.mark.slow
def test_a_run_derives_no_key_after_the_launcher(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Cell] = []
    monkeypatch.setattr(prepare, "cell_keys", lambda cell: calls.append(cell) or identity.cell_keys(cell))
    assert run(sweep) == 0 and calls == []
    # A job.json of an earlier version: names, no keys.
    spec = all_jobs(Path(sweep.registry).parent / "logs")[0].spec()
    argument = spec["argument"] | {"keys": [], "names": [["a label", "a title"]]}
    assert run_job(argument, Solo()) != [] and len(calls) == 1
    found = ask(sweep, "SELECT label, cell_key, draws_key FROM runs ORDER BY finished")
    assert found[1][0] == "a label" and found[0][1:] == found[1][1:]


@pytest.mark.parametrize("role", ["av", "ar"])
def test_a_rank_refuses_a_checkpoint_that_changed_after_planning(sweep: Sweep, pair: TinyPair, role: str) -> None:
    job, _ = planned_job(sweep)
    edit_weights(getattr(pair, role), change=lambda state: state["model.embed_tokens.weight"][0].add_(1e-3))
    with pytest.raises(CheckpointError, match=rf"has changed since this job was planned \({role}: another digest\)"):
        run_job(job.spec()["argument"], Solo())


@pytest.mark.slow
@pytest.mark.parametrize("keys_written", [True, False])
def test_a_failed_job_whose_checkpoint_has_moved_is_recorded(sweep: Sweep, pair: TinyPair, *, keys_written: bool) -> None:
    job, [keys] = planned_job(sweep)
    if not keys_written:  # as earlier versions wrote it
        spec = job.spec()
        spec["argument"] |= {"keys": [], "names": [[keys.label, keys.title]]}
        (job.path / "job.json").write_text(json.dumps(spec))
    job.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="x"))
    shutil.move(pair.av, pair.av.with_name("elsewhere"))
    finalize_ended_jobs(job.path.parent)
    [found] = ask(sweep, "SELECT status, error_class, cell_key, label, cell, draws_key, layer FROM runs")
    stored = (keys.draws, keys.layer) if keys_written else (None, None)
    assert found == ("failed", "bug", keys.cell, keys.label, keys.name, *stored)


@pytest.mark.slow
def test_a_dry_run_of_three_cells_inspects_each_checkpoint_once(
    sweep: Sweep, pair: TinyPair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inspected: Counter[Path] = Counter()
    read = nla.read_nla_sidecar

    def counting(path: Path, *arguments: Any, **options: Any) -> Any:
        inspected[path] += 1
        return read(path, *arguments, **options)

    monkeypatch.setattr(nla, "read_nla_sidecar", counting)
    assert run(replace(sweep, axes={"sampling.temperature": (0.4, 0.8, 1.2)}), "--dry-run") == 0
    assert inspected == {pair.av.resolve(): 1, pair.ar.resolve(): 1}
    # Two AR directories beside one AV: the AV is still inspected once.
    shutil.copytree(pair.ar, tmp_path / "other")
    inspected.clear()
    assert (
        run(
            replace_at(replace(sweep, axes={"autoencoder.ar": (str(pair.ar), str(tmp_path / "other"))}), "name", "two"),
            "--dry-run",
        )
        == 0
    )
    assert inspected == {pair.av.resolve(): 1, pair.ar.resolve(): 1, (tmp_path / "other").resolve(): 1}
    # The next pass reads the files again: they may have changed.
    assert run(sweep, "--dry-run") == 0 and inspected[pair.av.resolve()] == 2


def test_a_dry_run_changes_no_file_but_the_index_and_says_what_the_next_run_would_do(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    job, _ = planned_job(sweep)
    job.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="x"))
    root = Path(sweep.registry).parent

    def tree() -> dict[Path, tuple[int, bytes]]:
        files = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("ksweep.duckdb"))
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    assert ask(sweep, "FROM runs") == []  # makes the index
    before = tree()
    assert run(sweep, "--dry-run") == 0 and "failed  bug: x (--retry runs it again)" in capsys.readouterr().out
    assert tree() == before and job.final_status() is None
