"""ksweep verify: what is damaged, which cells depend on it, and what a repair costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ksweep import Resources, Sweep
from ksweep.cli import app
from ksweep.utils.errors import StoreError
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell

CURVE = "SELECT k, fve, error FROM curves ORDER BY k"


def sweep_in(folder: Path, pair: Any) -> Sweep:
    return Sweep(
        name="tiny", cell=tiny_cell(pair, num_replicates=50), resources=Resources(cluster="inprocess", gpus=0),
        registry=str(folder / "registry"), vector_cache=str(folder / "vector_cache"),
    )  # fmt: skip


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """A finished sweep of one cell."""
    sweep = sweep_in(tmp_path, talking_pair(tmp_path, num_rows=60))
    assert run(sweep) == 0
    return sweep


def verify(sweep: Sweep, *options: str) -> tuple[bool, list[dict[str, Any]]]:
    """Whether all is well, and the rows that the command prints."""
    arguments = ["verify", "--registry", sweep.registry, "--vector-cache", sweep.vector_cache, "--json", *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, StoreError), result.exception
    return result.exception is None, [json.loads(line) for line in result.stdout.splitlines()]


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


@pytest.mark.slow
def test_damage_of_every_kind_is_listed_with_its_cells_and_a_repair_makes_the_next_run_give_the_same_curve(sweep: Sweep) -> None:
    registry, [cell] = Path(sweep.registry), ask(sweep, "SELECT cell FROM runs")
    before = ask(sweep, CURVE)
    assert verify(sweep) == (True, [])
    [draws, scores, shard, record] = (
        sorted(Path(root).glob(pattern))[0]
        for root, pattern in (
            (registry, "draws/[!_]*/part-*"), (registry, "scores/[!_]*/*/part-*"), (sweep.vector_cache, "*/shard-*.arrow"),
            (registry, "landing/*/record.json"),
        )
    )  # fmt: skip
    whole = record.read_text()
    flip(draws, 0.3)
    flip(scores, 0.3)
    flip(shard, 0.5)
    record.write_text(whole.replace('"baseline": 0.', '"baseline": 1.'))
    well, rows = verify(sweep)
    assert not well and [row["what"] for row in rows] == ["draws", "scores", "run record", "activations"]
    assert [row["path"] for row in rows] == [str(draws), str(scores), str(record.parent), str(shard.parent)]
    assert "digest does not match" in rows[2]["reason"] and "sampled and scored again" in rows[0]["repair"]
    assert verify(sweep)[1] == rows, "it changes nothing"
    record.write_text(whole)
    assert [row["cells"] for row in verify(sweep)[1][:2]] == [list(cell)] * 2
    assert verify(sweep, "--repair")[0] and verify(sweep) == (True, [])
    assert not draws.exists() and not scores.exists()
    assert run(sweep) == 0, "the finished cell is computed again, as some of its draws were set aside"
    assert verify(sweep) == (True, []) and ask(sweep, "SELECT num_draws_sampled FROM runs ORDER BY finished")[-1][0] > 0
    assert ask(sweep, CURVE) == [pytest.approx(row, abs=1e-6) for row in before]
    assert run(sweep, "--dry-run") == 0 and len(ask(sweep, "FROM runs")) == 2
