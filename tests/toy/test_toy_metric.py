"""A metric that is plugged in by name, without a line of ksweep: computed with the cell, later, and never twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ksweep import Resources, Sweep
from ksweep.activations.store import ActivationStore
from ksweep.cli import app
from ksweep.config.spec import replace_at
from ksweep.evaluation.identity import cell_keys
from tests.tiny_models import TinyPair
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell
from tests.toy.metric import Letters

TOY = "tests.toy.metric:Letters"
SCORES = "SELECT metric, name, activation, draw, value FROM draw_scores WHERE metric <> 'reconstruction' ORDER BY ALL"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return talking_pair(tmp_path_factory.mktemp("pair"), 60)


def sweep_in(folder: Path, pair: TinyPair, *metrics: str) -> Sweep:
    cell = replace_at(tiny_cell(pair, num_replicates=20), "scoring.metrics", metrics)
    resources = Resources(cluster="inprocess", gpus=0)
    folders = {name: str(folder / name) for name in ("registry", "vector_cache")}
    return Sweep(name="toy", cell=cell, resources=resources, **folders)


@pytest.mark.slow
def test_toy_metric_by_name_in_a_spec_and_by_command_gives_the_values_of_its_texts(pair: TinyPair, tmp_path: Path) -> None:
    with_cell = sweep_in(tmp_path / "with", pair, TOY, "text")
    assert run(with_cell) == 0
    draws = ask(with_cell, "SELECT activation, draw, explanation FROM texts ORDER BY ALL")
    [(key,)] = ask(with_cell, "SELECT activations_key FROM runs")
    norms = np.linalg.norm(ActivationStore(with_cell.vector_cache, key, {}).open(40).vectors(), axis=1)
    in_sql = {row[:4]: row[4] for row in ask(with_cell, SCORES)}
    assert len(draws) == 320 and len(in_sql) == 320 * (2 + 4)
    for activation, draw, text in draws:
        share = None if not text else sum(c == "e" for c in text) / len(text)
        assert in_sql["letters", "share_of_e", activation, draw] == pytest.approx(share)
        assert in_sql["letters", "norm", activation, draw] == (
            None if text is None else pytest.approx(norms[activation], rel=1e-6)
        )

    later = sweep_in(tmp_path / "later", pair)
    assert run(later) == 0 and ask(later, SCORES) == []
    command = ["scores", "compute", TOY, "toy", "--registry", later.registry, "--vector-cache", later.vector_cache]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0 and "letters of 320 draws computed" in first.output, first.output
    assert {row[:4]: row[4] for row in ask(later, SCORES)} == {k: v for k, v in in_sql.items() if k[0] == "letters"}
    again = CliRunner().invoke(app, command)
    assert "letters of 0 draws computed, all were stored already" in again.output
    listed = CliRunner().invoke(app, ["scores", "ls", "--registry", later.registry, "--json"])
    assert '"name": "share_of_e", "better": "higher"' in listed.output


def test_a_cell_without_metrics_keeps_its_key_and_metrics_change_neither_draws_nor_scores(pair: TinyPair, tmp_path: Path) -> None:
    cell = sweep_in(tmp_path, pair).cell
    plain, with_metric = cell_keys(cell), cell_keys(replace_at(cell, "scoring.metrics", (TOY,)))
    assert (plain.draws, plain.scores) == (with_metric.draws, with_metric.scores) and plain.cell != with_metric.cell


def test_another_digest_of_a_metric_is_another_cell(pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = sweep_in(tmp_path, pair, TOY).cell
    keys = []
    for digest in ("v1", "v2", "v1"):
        monkeypatch.setattr(Letters, "digest", digest, raising=False)
        keys.append(cell_keys(cell).cell)
    assert keys[0] == keys[2] != keys[1]


def test_a_metric_that_does_not_exist_is_refused_while_planning(
    pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = sweep_in(tmp_path, pair, "tests.toy.metric:Words")
    assert run(wrong, "--dry-run") == 2
    assert "scoring.metrics=tests.toy.metric:Words" in capsys.readouterr().err
