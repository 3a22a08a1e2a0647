"""Old result files into the registry and the chart, and runs of ours out of it, on real files and a real DuckDB."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ksweep.cli import main
from ksweep.registry.database import connect
from ksweep.registry.run_record import REFERENCE_SCHEMA, read_run, write_run
from ksweep.registry.tae_export import export_landed, export_run, write_json
from ksweep.registry.tae_import import import_files, read_reference_json
from ksweep.stats.tae_metrics import ReferenceSums, reference_intervals, reference_rows, selected
from ksweep.utils.errors import DataError, RequestError
from tests.registry.landed_runs import curve_of, publish_draws, record_of

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "reference_json"
HEADLINE = PUBLISHED / "gemma3_k_sweep_full1024.json"

KEYS = set(
    """
    k avg_mse variance_recovery mse_for_new_variance mse_variance_recovery r_squared original_mean original_variance
    residual_variance_mean_over_hidden mean_variance_mean_over_hidden total_positions variance_recovery_bias
    variance_recovery_bias_corrected variance_recovery_std variance_recovery_ci_lower variance_recovery_ci_upper
    variance_recovery_bca_ci_lower variance_recovery_bca_ci_upper mse_std mse_ci_lower mse_ci_upper r_squared_std
    r_squared_ci_lower r_squared_ci_upper mse_values activation_norms
    """.split()  # noqa: SIM905 - as the table of tae_reference.md lists them
)


def entry(k: int = 1, **changes: object) -> dict[str, object]:
    """An entry as the mode that samples for each K wrote it, for d = 4: var 2 per dimension, residual variance 0.5, error 0.6."""
    plain = {
        "k": k, "avg_mse": 0.6, "variance_recovery": 0.75, "r_squared": 0.9, "residual_variance_mean_over_hidden": 0.5,
        "original_variance": 30.0, "variance_recovery_std": 0.01, "variance_recovery_ci_lower": 0.7,
        "variance_recovery_ci_upper": 0.8, "total_positions": 100,
    }  # fmt: skip
    return plain | changes


def written(folder: Path, *entries: dict[str, object], text: str | None = None, **top: object) -> Path:
    path = folder / "old results.json"
    path.write_text(text or json.dumps({"checkpoint_path": "run_L45_e45/x.pt", "eval_config": {}, "results_by_k": entries} | top))
    return path


# Import


def test_the_headline_curve_is_read_as_published() -> None:
    run = read_reference_json(HEADLINE)
    assert run.curve["k"].to_pylist() == [1, 2, 4, 8, 16, 32]
    assert run.curve["fve"].to_pylist() == [0.7503, 0.7600, 0.7655, 0.7697, 0.7735, 0.7772]
    assert run.curve["fve_low"][0].as_py() == 0.6326 and run.curve["fve_high"][5].as_py() == 0.8615
    assert run.curve["error"].to_pylist() == [30900, None, None, None, None, 27542]
    assert set(run.curve["num_activations"].to_pylist()) == {1024}
    # Total variance per dimension as published: 121k.
    assert run.curve["baseline"][0].as_py() == pytest.approx(121_000, rel=0.002)
    record = run.record
    assert record.layer == 45 and record.num_draws == 32 and record.num_activations == 1024
    assert record.spec["autoencoder"]["checkpoint"].endswith("_final.pt") and record.spec["sampling"]["temperature"] == 1.0
    assert record.spec["scoring"]["ks"] == [1, 2, 4, 8, 16, 32] and record.spec["kind"] == "reference JSON"


def test_k_without_the_metric_are_left_out_and_named() -> None:
    run = read_reference_json(HEADLINE, "mse_variance_recovery")
    assert dict(zip(run.curve["k"].to_pylist(), run.curve["fve"].to_pylist(), strict=True)) == {1: 0.7448, 32: 0.7726}
    assert any(note.startswith("K = 2, 4, 8, 16 left out") for note in run.notes)


def test_every_published_file_is_read_and_without_a_bootstrap_there_is_no_interval() -> None:
    paths = sorted(PUBLISHED.glob("*.json"))
    runs = {path.stem: read_reference_json(path) for path in paths}
    assert len(paths) == 10 and len({r.record.run_id for r in runs.values()}) == 10
    assert runs["gemma3_k_sweep_256_NOBOOT"].curve["fve_low"].null_count == 2
    assert runs["gemma3_k_sweep_50000_NOBOOT"].record.num_activations == 41_900
    assert all(r.curve["fve_low"].null_count == 0 for name, r in runs.items() if "full" in name)


def test_bca_intervals_are_kept_among_the_quantities() -> None:
    rows = [r for r in read_reference_json(HEADLINE).reference.to_pylist() if r["quantity"] == "variance_recovery"]
    assert (rows[0]["bca_low"], rows[0]["bca_high"]) == (0.6391, 0.8975) and rows[1]["bca_low"] is None


def test_the_same_content_is_the_same_run_and_another_metric_is_another(tmp_path: Path) -> None:
    copy = tmp_path / HEADLINE.name
    copy.write_bytes(HEADLINE.read_bytes())
    assert read_reference_json(copy).record.run_id == read_reference_json(HEADLINE).record.run_id
    assert read_reference_json(copy, "mse_variance_recovery").record.run_id != read_reference_json(copy).record.run_id


def test_the_honest_number_is_computed_where_an_early_file_lacks_it(tmp_path: Path) -> None:
    # Variance per dimension: 0.5 / (1 - 0.75) = 2; recovery with the bias: 1 - 0.6 / 2.
    path = written(tmp_path, entry())
    assert read_reference_json(path, "mse_variance_recovery").curve["fve"].to_pylist() == [pytest.approx(0.7)]
    curve = read_reference_json(path).curve.to_pylist()[0]
    assert curve["baseline"] == pytest.approx(2) and curve["num_draws"] == 1 and curve["baseline_kind"] == "distance from mean"


def test_the_streaming_mode_is_known_by_its_mislabelled_variance(tmp_path: Path) -> None:
    plain = {
        "residual_variance_mean_over_hidden": 0.6, "mse_for_new_variance": 2.4, "mse_variance_recovery": 0.7,
        "variance_recovery_ci_lower": 0.0, "variance_recovery_ci_upper": 0.0,
    }  # fmt: skip
    run = read_reference_json(written(tmp_path, entry(4, **plain, mse_values=[0.5] * 7), entry(1, **plain, mse_values=[0.5] * 7)))
    rows = run.curve.to_pylist()
    assert [(r["k"], r["num_draws"], r["num_activations"]) for r in rows] == [(1, 4, 7), (4, 4, 7)]
    assert rows[0]["baseline"] == pytest.approx(2) and rows[0]["fve_low"] is None and run.record.d_model == 4
    # Without the honest number there is no way to tell the variance: unknown, not guessed.
    del plain["mse_variance_recovery"]
    assert read_reference_json(written(tmp_path, entry(1, **plain))).curve["baseline"].to_pylist() == [None]


def test_trailing_commas_and_nan_are_read_as_the_reference_tools_do(tmp_path: Path) -> None:
    text = json.dumps({"results_by_k": [entry(variance_recovery_ci_lower=float("nan"))]}).replace("}]", "},]")
    row = read_reference_json(written(tmp_path, text=text)).curve.to_pylist()[0]
    assert row["fve"] == 0.75 and row["fve_low"] is None


def test_a_k_that_stands_there_twice_is_told(tmp_path: Path) -> None:
    run = read_reference_json(written(tmp_path, entry(1), entry(1, variance_recovery=0.5)))
    assert run.curve["fve"].to_pylist() == [0.75] and any("twice" in note for note in run.notes)


def test_role_statistics_are_kept(tmp_path: Path) -> None:
    roles = {"mse_by_role": {"user": {"avg_mse": 0.4, "count": 40, "std": 0.1}}}
    roles["variance_recovery_by_role"] = {"user": {"variance_recovery": 0.8, "total_variance": 8.0, "residual_variance": 1.6}}
    rows = read_reference_json(written(tmp_path, entry(**roles))).reference.to_pylist()
    found = {r["quantity"]: r["value"] for r in rows if r["role"] == "user"}
    assert found == {"avg_mse": 0.4, "variance_recovery": 0.8, "total_variance": 8.0, "residual_variance": 1.6}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "results_by_k"),
        ('{"results_by_k": []}', "results_by_k"),
        ('{"results_by_k": [{"k": 0}]}', "k=0"),
        ('{"results_by_k": [{"variance_recovery": 0.5}]}', "k=None"),
        ('{"results_by_k": [{"k": 1, "total_positions": 3}]}', "no K of .* has variance_recovery"),
        ('{"results_by_k": [{"k": 1, "variance_recovery": 0.5}]}', "neither mse_values nor total_positions"),
        ('{"results_by_k": [{"k": 1, "variance_recovery": "x"}]}', "variance_recovery=x; expected a number"),
        ('{"results_by_k": [{"k": 1, "mse_ci_lower": "a"}]}', "mse_ci_lower=a; expected a number"),
        ('{"results_by_k": [{"k": 1, "total_positions": -5}]}', "total_positions=-5; expected a whole number of at least 1"),
        ('{"results_by_k": [{"k": 1, "mse_values": 5}]}', "mse_values=5; expected a list"),
        ('{"results_by_k": [{"k": 1, "mse_by_role": [1]}]}', "mse_by_role=.*; expected for each role an object"),
        ('{"results_by_k": [{"k": 1, "variance_recovery_by_role": {"user": 3}}]}', "expected for each role an object"),
        ('{"results_by_k": [{"k": 1}], "eval_config": [1]}', "eval_config of .* is a list"),
    ],
)
def test_what_is_no_result_file_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_reference_json(written(tmp_path, text=text))
    assert "old results.json" in str(caught.value)


def test_a_missing_file_or_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_reference_json(tmp_path / "nowhere.json")
    with pytest.raises(RequestError, match="variance_recovery, mse_variance_recovery"):
        read_reference_json(HEADLINE, "fve")  # type: ignore[arg-type]


@pytest.mark.slow
def test_old_and_new_curves_share_a_table_and_a_chart(tmp_path: Path) -> None:
    from ksweep.analysis.charts import fve_by_k

    write_run(tmp_path, record_of("new"), curve_of(0.75))
    arrivals = import_files(tmp_path, sorted(PUBLISHED.glob("*full*.json")))
    assert len(arrivals) == 6 and all(a.landed for a in arrivals)
    assert not any(a.landed for a in import_files(tmp_path, [HEADLINE]))  # a second time changes nothing
    with connect(tmp_path) as connection:
        found = connection.sql("SELECT metric, count(DISTINCT cell), count(*) FROM curves GROUP BY 1 ORDER BY 1").fetchall()
        assert found == [("fve", 1, 4), ("variance_recovery", 6, 36)]
        best = connection.sql("SELECT max(fve) FROM curves WHERE label = 'gemma3_k_sweep_full1024'").fetchall()
        assert best == [(0.7772,)]
        bca = "SELECT bca_low FROM reference_quantities WHERE quantity = 'variance_recovery' AND label LIKE '%1024' AND k = 1"
        assert connection.sql(bca).fetchall() == [(0.6391,)]
        chart = fve_by_k(connection.sql("FROM curves")).to_json()
    assert "gemma3_k_sweep_full8192" in chart and "variance_recovery of the reference sweep" in chart


# Export


def measured(
    num_activations: int = 30, num_draws: int = 4
) -> tuple[ReferenceSums, list[dict[str, object]], np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    activations = generator.normal(size=(num_activations, 5)) * 3 + 2
    draws = activations[:, None] + generator.normal(size=(num_activations, num_draws, 5)) + 0.3
    chunks = [selected(activations, draws, (1, 2, 3, 4), "prefix", ["user"] * 18 + ["assistant"] * 12)]
    sums = ReferenceSums((1, 2, 3, 4))
    sums.add(chunks[0])
    return sums, reference_rows(sums, reference_intervals(sums, chunks, num_replicates=50)), activations, draws


def landed_with(folder: Path, **spec: object) -> Path:
    record = record_of("run", draws_key="key", num_activations=3, num_documents=3)
    object.__setattr__(record, "spec", dict(record.spec) | spec)
    return write_run(folder, record, curve_of())


def test_every_key_of_the_reference_is_there_with_its_value(tmp_path: Path) -> None:
    sums, rows, activations, _ = measured()
    run = read_run(landed_with(tmp_path, autoencoder={"checkpoint": "x.pt", "dtype": "bfloat16"}))
    document = export_landed(
        run, reference=rows, mse_values={1: [0.5, 0.25]}, activation_norms=np.linalg.norm(activations, axis=1)[:2]
    )
    assert set(document) == {"checkpoint_path", "eval_config", "results_by_k", "summary", "ksweep"}
    assert document["checkpoint_path"] == "x.pt" and document["eval_config"]["k_values"] == [1, 2, 3, 4]
    for result, found in zip(document["results_by_k"], sums.quantities(), strict=True):
        assert set(result) >= KEYS and len(KEYS) == 26
        for name in (
            "avg_mse",
            "variance_recovery",
            "mse_variance_recovery",
            "r_squared",
            "mse_for_new_variance",
            "original_mean",
        ):
            assert result[name] == pytest.approx(getattr(found, name))
        assert result["original_variance"] == pytest.approx(found.total_variance)
        assert result["residual_variance_mean_over_hidden"] == result["mean_variance_mean_over_hidden"] == result["avg_mse"]
        bias = result["variance_recovery_bias"]
        assert result["variance_recovery_bias_corrected"] == pytest.approx(found.variance_recovery - bias)
        assert result["variance_recovery_ci_lower"] < result["variance_recovery"] < result["variance_recovery_ci_upper"]
        assert result["mse_ci_lower"] < result["avg_mse"] < result["mse_ci_upper"]
        assert result["mse_by_role"]["user"]["count"] == 18 and "std" in result["mse_by_role"]["assistant"]
        by_role = {role: part.quantities()[result["k"] - 1].variance_recovery for role, part in sums.by_role.items()}
        assert result["variance_recovery_by_role"]["user"]["variance_recovery"] == pytest.approx(by_role["user"])
    assert document["results_by_k"][0]["mse_values"] == [0.5, 0.25] and document["results_by_k"][1]["mse_values"] == []
    summary = document["summary"]
    assert summary["k_values"] == [1.0, 2.0, 3.0, 4.0]
    assert summary["new_variance_recovery_values"] == [r["mse_variance_recovery"] for r in document["results_by_k"]]
    assert "constant bias" in document["ksweep"]["misleading"]["variance_recovery"]


def test_errors_of_single_activations_are_chosen_as_the_quantities_are(tmp_path: Path) -> None:
    _, rows, _, _ = measured()
    # Best of the first two: 0.5 and 0.25; over every choice of two: (0.25 + 0.25 + 0.5) / 3 and the same.
    publish_draws(tmp_path, "key", [[0.5, 1.0, 0.25], [0.25, 0.5, 1.0]])
    for run_id, reference, expected in (("with", rows, [0.5, 0.25]), ("without", None, [1 / 3, 1 / 3])):
        record = record_of(run_id, draws_key="key", num_activations=2, num_draws=3)
        table = None if reference is None else pa.Table.from_pylist(reference, schema=REFERENCE_SCHEMA)
        write_run(tmp_path, record, curve_of(num_draws=3), reference=table)
        document = export_run(tmp_path, run_id)
        assert document["results_by_k"][1]["mse_values"] == pytest.approx(expected)
        assert document["ksweep"]["selection"] == ("order_statistics" if reference is None else "prefix")


@pytest.mark.parametrize(("num_activations", "rows"), [(12, 4), (13, None)])
def test_old_settings_of_an_exported_file_count_rows_as_the_reference_does(
    tmp_path: Path, num_activations: int, rows: int | None
) -> None:
    spec = {"num_activations": num_activations, "positions_per_document": 3}
    old = export_landed(read_run(landed_with(tmp_path, activations=spec)))["eval_config"]
    assert (old["max_val_samples"], old["num_positions"]) == (rows, 3)


def test_what_was_not_measured_is_null_and_named_never_zero(tmp_path: Path) -> None:
    document = export_landed(read_run(landed_with(tmp_path)))
    result = document["results_by_k"][0]
    assert result["variance_recovery"] is None and result["variance_recovery_ci_lower"] is None and result["mse_values"] == []
    assert {"variance_recovery", "variance_recovery_ci_lower", "mse_values"} <= set(document["ksweep"]["unknown"])
    # FVE 0.3 of 100 activations: 1 - 0.7 * 99 / 100.
    assert result["mse_variance_recovery"] == pytest.approx(0.307) and "scaled" in document["ksweep"]["misleading"]["avg_mse"]


def test_an_exported_file_can_be_imported_again(tmp_path: Path) -> None:
    sums, rows, _, _ = measured()
    path = tmp_path / "again.json"
    write_json(path, export_landed(read_run(landed_with(tmp_path)), reference=rows))
    curve = read_reference_json(path).curve
    assert curve["fve"].to_pylist() == pytest.approx([q.variance_recovery for q in sums.quantities()])
    total = sums.quantities()[0].total_variance / 5
    assert curve["baseline"].to_pylist() == pytest.approx([total] * 4) and curve["num_draws"].to_pylist() == [4] * 4


@pytest.mark.parametrize(("selection", "best_of_two"), [("prefix", [0.5, 0.3, 0.2]), ("order_statistics", [0.5, 0.35, 0.2])])
def test_a_landed_run_is_exported_with_the_best_error_of_each_activation(
    tmp_path: Path, selection: str, best_of_two: list[float]
) -> None:
    # Best of 2 of (0.6, 0.3, 0.3, 0.4) over all pairs: (0.3 * 5 + 0.4) / 6; of the first two: 0.3.
    publish_draws(tmp_path, "key", [[0.5, 0.5, 0.5, 0.5], [0.6, 0.3, 0.3, 0.4], [0.2, 0.2, 0.2, 0.2]])
    landed_with(tmp_path, scoring={"selection": selection})
    document = export_run(tmp_path, "run")
    best_of_two[1] = 0.3 if selection == "prefix" else (0.3 * 5 + 0.4) / 6
    assert document["results_by_k"][1]["mse_values"] == pytest.approx(best_of_two)
    assert document["ksweep"]["selection"] == selection


def test_a_run_that_is_not_there_or_failed_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="ksweep ls"):
        export_run(tmp_path, "nobody")
    write_run(tmp_path, record_of("bad", status="failed", error_type="RunError"))
    with pytest.raises(RequestError, match="failed and has no results"):
        export_run(tmp_path, "bad")


def test_reference_rows_fit_the_table() -> None:
    table = pa.Table.from_pylist(measured()[1], schema=REFERENCE_SCHEMA)
    assert set(table["quantity"].to_pylist()) >= {"variance_recovery", "r_squared"} and set(table["role"].to_pylist()) == {
        None, "user", "assistant",
    }  # fmt: skip
    by_name = {r["quantity"]: r for r in table.to_pylist() if r["role"] is None and r["k"] == 1}
    assert by_name["variance_recovery"]["bca_low"] is not None and by_name["avg_mse"]["spread"] is not None


@pytest.mark.slow
def test_the_commands_bring_a_file_in_and_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ksweep(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["ksweep", *arguments, "--registry", str(tmp_path / "registry")])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    code, out, _ = ksweep("import-json", str(HEADLINE))
    assert code == 0 and "1 new" in out
    assert "already in the registry" in ksweep("import-json", str(HEADLINE))[1]
    document = json.loads(ksweep("export", "gemma3_k_sweep_full1024", "--json")[1])
    assert [r["variance_recovery"] for r in document["results_by_k"]][-1] == 0.7772
    assert document["results_by_k"][0]["variance_recovery_bca_ci_lower"] == 0.6391
    assert json.loads(ksweep("export", "imported", "--json")[1]) == document
    code, _, err = ksweep("export", "nobody", "--json")
    assert code == 2 and err.startswith("error: no run, cell, label or sweep 'nobody'")
