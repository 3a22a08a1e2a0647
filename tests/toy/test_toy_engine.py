"""A sweep that draws with an engine of one's own, named in the spec."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksweep import Resources, Sweep
from ksweep.inference.backend import load_engine
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell
from tests.toy.engine import SENTENCES

TABLE = "tests.toy.engine:TableEngine"


@pytest.mark.slow
def test_a_sweep_over_engines_draws_with_each_and_keeps_their_draws_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = Sweep(
        name="engines",
        cell=tiny_cell(talking_pair(tmp_path, num_rows=30), num_replicates=50),
        resources=Resources(cluster="inprocess", gpus=0),
        registry=str(tmp_path / "registry"),
        vector_cache=str(tmp_path / "vector_cache"),
    )
    # 1. Each engine draws; the run record says which.
    engines = f"sampling.engine=[builtin,naive,{TABLE}]"
    assert run(sweep, engines) == 0
    assert "computed 3 of 3 cells" in capsys.readouterr().out
    used = ask(sweep, "SELECT draws_key, label, engine['sampler'], engine['engine'] FROM runs ORDER BY label")
    keys = {label.removeprefix("engine="): key for key, label, _, _ in used}
    assert [row[2:] for row in used] == [("slots", None), ("plain", "naive"), ("a table", "table")]
    # 2. The two that sample the model's distribution agree; the third says what it always says.
    texts = {name: ask(sweep, f"SELECT activation, draw, text FROM draws WHERE draws_key = '{key}' ORDER BY 1, 2")
             for name, key in keys.items()}  # fmt: skip
    assert len(set(keys.values())) == 3 and [len(rows) for rows in texts.values()] == [320] * 3
    assert sum(a != b for a, b in zip(texts["builtin"], texts["naive"], strict=True)) <= 1, "a tie that rounding decides"
    said = {text for _, _, text in texts[TABLE]}
    assert len(said) == 3 and all(any(sentence in text for sentence in SENTENCES) for text in said)
    # 3. What is stored is not drawn again.
    pulled = load_engine(TABLE).batches_pulled  # type: ignore[attr-defined]
    assert run(sweep, engines) == 0
    assert load_engine(TABLE).batches_pulled == pulled > 0  # type: ignore[attr-defined]


@pytest.mark.slow
def test_an_engine_that_leaves_out_a_draw_fails_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(
        name="forgetful", cell=tiny_cell(talking_pair(tmp_path, num_rows=30), num_replicates=50),
        resources=Resources(cluster="inprocess", gpus=0), registry=str(tmp_path / "registry"), vector_cache=str(tmp_path / "v"),
    )  # fmt: skip
    assert run(sweep, "sampling.engine=tests.toy.engine:Forgetful", "activations.num_activations=20", "sampling.num_draws=2") == 1
    assert "sampling.engine=tests.toy.engine:Forgetful ended without 1 of the draws" in capsys.readouterr().err
