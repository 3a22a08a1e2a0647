"""Curves by name, and `ksweep plot`: old and new in one picture and one unit."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from ksweep.analysis.charts import fve_by_k
from ksweep.cli import main
from ksweep.registry.query import named_curves
from ksweep.registry.run_record import REFERENCE_SCHEMA, write_run
from ksweep.registry.tae_import import import_files
from ksweep.utils.errors import RequestError
from tests.registry.landed_runs import curve_of, record_of

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "reference_json"
OLD = ("gemma3_k_sweep_full1024", "gemma3_k_sweep_full8192")


@pytest.fixture
def filled(root: Path) -> Path:
    """Two published curves and a run of our own, which has an FVE and, at K = 1 and 2, the reference's quantities."""
    import_files(root, [PUBLISHED / f"{name}.json" for name in OLD])
    rows = [
        {"quantity": quantity, "role": role, "k": k, "value": value + k / 100, "low": 0.1, "high": 0.9, "num_activations": 7}
        for quantity, value in (("variance_recovery", 0.5), ("avg_mse", 3.0))
        for role in (None, "user")
        for k in (1, 2)
    ]
    reference = pa.Table.from_pylist([r if r["role"] is None else r | {"value": 9.9} for r in rows], schema=REFERENCE_SCHEMA)
    write_run(root, record_of("own", temperature=0.7, label="own"), curve_of(0.3), reference=reference)
    return root


@pytest.mark.slow
def test_named_curves_come_in_the_order_of_the_names_whether_cell_label_sweep_or_run(filled: Path) -> None:
    both = named_curves(filled, ["own", OLD[1]])
    assert list(dict.fromkeys(both["label"].to_pylist())) == ["own", OLD[1]]
    assert set(named_curves(filled, ["imported"])["label"].to_pylist()) == set(OLD)
    assert set(named_curves(filled, [])["label"].to_pylist()) == {*OLD, "own"}
    cell, run = both["cell"][0].as_py(), both["run_id"][-1].as_py()
    assert named_curves(filled, [cell])["label"][0].as_py() == "own" and named_curves(filled, [run])["label"][0].as_py() == OLD[1]


def test_named_curves_of_one_metric_put_old_and_new_into_one_unit(filled: Path) -> None:
    rows = named_curves(filled, [OLD[0], "own"], "variance_recovery").to_pylist()
    of = {label: [(r["k"], r["fve"]) for r in rows if r["label"] == label] for label in (OLD[0], "own")}
    # As published, and the values above without those of a single role.
    assert of[OLD[0]] == [(1, 0.7503), (2, 0.7600), (4, 0.7655), (8, 0.7697), (16, 0.7735), (32, 0.7772)]
    assert of["own"] == [(1, pytest.approx(0.51)), (2, pytest.approx(0.52))]
    assert (rows[0]["fve_low"], rows[0]["fve_high"]) == (0.6326, 0.8451)
    drawn = fve_by_k(rows).to_json()
    assert '"variance_recovery by number of draws"' in drawn and "FVE (" not in drawn
    assert set(named_curves(filled, [], "fve")["label"].to_pylist()) == {"own"}


@pytest.mark.parametrize(
    ("names", "metric", "words"),
    [(["own", "nobody"], None, "'nobody'"), ([], "fvx", "not one of fve, variance_recovery"), ([OLD[0]], "fve", "has fve")],
)
def test_named_curves_that_are_not_there_are_refused(filled: Path, names: list[str], metric: str | None, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        named_curves(filled, names, metric)


@pytest.mark.slow
def test_plot_writes_pictures_and_names_them(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "pictures" / "old_and_new"
    arguments = ["own", "imported", "--metric", "variance_recovery", "-o", str(target), "--registry", str(filled)]
    monkeypatch.setattr("sys.argv", ["ksweep", "plot", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert capsys.readouterr().out.split() == [f"{target}.{ending}" for ending in ("html", "png", "pdf")]
    assert target.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and OLD[1] in target.with_suffix(".html").read_text()
