"""The reference sweep's own quantities of whole runs, against its formulas written out over reconstructions of every draw."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ksweep import Activations, Autoencoder, Scoring, Sweep
from ksweep.activations import ensure
from ksweep.autoencoder.base import Explanation
from ksweep.autoencoder.tae.checkpoint import inspect_tae
from ksweep.autoencoder.tae.models import load_tae_reconstructor
from ksweep.cli import main
from ksweep.config.spec import replace_at
from ksweep.evaluation.identity import cell_keys
from ksweep.utils.errors import SpecError
from tests.stored_rows import make_earlier
from tests.tae_sweeps import CASES, WORDS, checkpoint, run, sweep_over
from tests.tiny_sweeps import ask

GEMMA = "gemma3_patch_two"
N = 48
REPLICATES = 60


KS = (1, 2, 4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations in Gemma's format, of which GPT-2's tokenizer knows nothing."""
    source, path = random.Random(0), tmp_path_factory.mktemp("text") / "text.jsonl"

    def said(who: str) -> str:
        return f"<start_of_turn>{who}\n{' '.join(source.choices(WORDS, k=8))}<end_of_turn>\n"

    rows = [{"text": said("user") + said("model"), "document": f"d{i // 3}"} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def sweep_in(folder: Path, text: Path) -> Sweep:
    sweep = sweep_over(text, folder)
    return replace(sweep, cell=replace_at(sweep.cell, "activations.num_activations", N))


@pytest.fixture
def sweep(text: Path, tmp_path: Path) -> Sweep:
    """Nothing of it has run."""
    return sweep_in(tmp_path, text)


Runs = Callable[[str], Sweep]


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A sweep that has run once, with intervals and out.json beside its registry, and is only read from."""

    @cache
    def finished(case: str) -> Sweep:
        folder = tmp_path_factory.mktemp(case)
        settings = (f"scoring.ks={list(KS)}", f"scoring.reference_replicates={REPLICATES}", f"export_json={folder / 'out.json'}")
        assert run(sweep_in(folder, text), case, *settings) == 0
        return sweep_in(folder, text)

    return finished


def exported(sweep: Sweep) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((Path(sweep.registry).parent / "out.json").read_text())
    return document


@dataclass
class Everything:
    """What a sweep has left, and every draw reconstructed anew."""

    activations: np.ndarray
    reconstructions: np.ndarray
    """[activation, draw, d]"""
    roles: list[str | None]

    def best_of_first(self, k: int) -> np.ndarray:
        errors = np.square(self.reconstructions[:, :k] - self.activations[:, None]).mean(axis=2)
        return self.reconstructions[np.arange(len(errors)), errors.argmin(axis=1)]


def everything(sweep: Sweep, case: str) -> Everything:
    info = inspect_tae(checkpoint(case))
    table = ensure(
        replace(sweep.cell.activations, model=info.activations_model, layer=None), info.layer, Path(sweep.vector_cache)
    )
    draws = ask(sweep, "SELECT text, token_ids, activation, position FROM draws ORDER BY activation, draw")
    current = table.column("token_id")
    made = load_tae_reconstructor(info, dtype="float32").reconstruct(
        [Explanation(text, tuple(ids), int(current[row]), position) for text, ids, row, position in draws]
    )
    reconstructions = np.asarray(made, dtype=np.float64).reshape(len(table), -1, info.d_model)
    return Everything(table.vectors().astype(np.float64), reconstructions, table.column("role").tolist())


def plain(a: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """The table of formulas of the reference, over vectors [activation, d] and what was chosen for them."""
    residual = a - made
    total, rest = np.var(a, axis=0, ddof=1).sum(), np.var(residual, axis=0, ddof=1).sum()
    new = np.var(residual, axis=0).sum() + np.square(residual.mean(axis=0)).sum()
    return {
        "avg_mse": np.square(residual).mean(axis=1).mean(),
        "variance_recovery": 1 - rest / total,
        "mse_variance_recovery": 1 - new / total,
        "r_squared": 1 - np.square(residual).sum() / np.square(a - a.mean()).sum(),
        "mse_for_new_variance": new,
        "total_variance": total,
        "residual_variance": rest,
        "original_mean": a.mean(),
    }


def plain_bca(replicates: list[float], a: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    """Bias-corrected and accelerated 95 % interval with every vector left out in turn (Efron 1987)."""
    normal, estimate = NormalDist(), plain(a, made)["variance_recovery"]
    left_out = np.array([plain(np.delete(a, i, 0), np.delete(made, i, 0))["variance_recovery"] for i in range(len(a))])
    apart = left_out.mean() - left_out
    acceleration = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    z0 = normal.inv_cdf(float(np.mean(np.array(replicates) < estimate)))
    z = [z0 + normal.inv_cdf(tail) for tail in (0.025, 0.975)]
    low, high = np.percentile(replicates, [100 * normal.cdf(z0 + x / (1 - acceleration * x)) for x in z])
    return float(low), float(high)


def landed(sweep: Sweep, columns: str = "value", where: str = "role IS NULL") -> dict[tuple[str, int], Any]:
    rows = ask(sweep, f"SELECT quantity, k, {columns} FROM reference_quantities WHERE {where}")
    assert len({row[:2] for row in rows}) == len(rows)
    return {row[:2]: row[2] if len(row) == 3 else row[2:] for row in rows}


def agree(found: dict[tuple[str, int], Any], of: Everything, ks: tuple[int, ...], rows: Any = slice(None)) -> None:
    assert {k for _, k in found} == set(ks)
    for (quantity, k), value in found.items():
        assert value == pytest.approx(plain(of.activations[rows], of.best_of_first(k)[rows])[quantity], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_quantities_of_a_run_are_the_formulas_over_reconstructions_of_every_draw(undisturbed: Runs, case: str) -> None:
    sweep = undisturbed(case)
    of, found = everything(sweep, case), landed(sweep)
    assert len(found) == 3 * 8
    agree(found, of, KS)
    spread = landed(sweep, "spread", "role IS NULL AND quantity = 'avg_mse'")
    for (_, k), value in spread.items():
        own = np.square(of.activations - of.best_of_first(k)).mean(axis=1)
        assert value == pytest.approx(own.std(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_draws_taken_in_two_runs_give_the_quantities_of_all(sweep: Sweep, case: str) -> None:
    assert run(sweep, case) == 0
    ks = (1, 4, 5, 7, 16, 17, 20)
    assert run(sweep, case, "sampling.num_draws=20", f"scoring.ks={list(ks)}", "activations.num_activations=40") == 0
    assert run(sweep, case, "sampling.num_draws=20", f"scoring.ks={list(ks)}") == 0
    assert ask(sweep, "SELECT num_draws_reused FROM runs ORDER BY finished") == [(0,), (40 * 4,), (40 * 20 + 8 * 4,)]
    of = everything(sweep, case)
    winners = np.square(of.reconstructions - of.activations[:, None]).sum(axis=2).argmin(axis=1)
    assert min((winners < 4).sum(), ((winners >= 4) & (winners < 16)).sum(), (winners >= 16).sum()) > 0  # of every unit
    run_id = ask(sweep, "SELECT run_id FROM runs ORDER BY finished DESC LIMIT 1")[0][0]
    agree(landed(sweep, where=f"role IS NULL AND run_id = '{run_id}'"), of, ks)
    # Of 20 draws in units of 4, 12 and 4, far fewer reconstructions are kept than draws.
    parts = [pq.read_table(p, partitioning=None)["reconstruction"] for p in Path(sweep.registry).glob("scores/*/*/part-0*")]
    assert sum(len(p) - p.null_count for p in parts) < 0.5 * sum(map(len, parts))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_intervals_are_those_of_a_plain_bootstrap_over_vectors(undisturbed: Runs, case: str) -> None:
    sweep = undisturbed(case)
    of = everything(sweep, case)
    for k in (1, 4):
        made = of.best_of_first(k)
        np.random.seed(42)
        chosen = [np.random.choice(N, N, replace=True) for _ in range(REPLICATES)]
        again = [plain(of.activations[rows], made[rows]) for rows in chosen]
        for quantity in ("variance_recovery", "avg_mse", "r_squared"):
            values = np.array([one[quantity] for one in again])
            low, high, std, bias = landed(sweep, "low, high, std, bias", "role IS NULL")[quantity, k]
            assert (low, high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), rel=1e-6)
            assert std == pytest.approx(values.std(), rel=1e-5)
            assert bias == pytest.approx(values.mean() - plain(of.activations, made)[quantity], rel=1e-4, abs=1e-9)
        bca = landed(sweep, "bca_low, bca_high", "role IS NULL")["variance_recovery", k]
        assert bca == pytest.approx(plain_bca([one["variance_recovery"] for one in again], of.activations, made), rel=1e-6)


@pytest.mark.slow
def test_quantities_by_role_are_the_formulas_over_the_vectors_of_a_role(undisturbed: Runs) -> None:
    sweep = undisturbed(GEMMA)
    of = everything(sweep, GEMMA)
    counts = {role: of.roles.count(role) for role in set(of.roles)}
    assert counts["user"] > 10 and counts["assistant"] > 10 and 0 < counts["other"] <= 10
    for role, count in counts.items():
        found, rows = landed(sweep, where=f"role = '{role}'"), np.array(of.roles) == role
        agree(found, of, KS, rows)
        reported = {"avg_mse", "variance_recovery", "total_variance", "residual_variance"} if count > 10 else {"avg_mse"}
        assert {quantity for quantity, _ in found} == reported
        said = landed(sweep, "num_activations, spread", f"role = '{role}' AND quantity = 'avg_mse'")
        own = np.square(of.activations - of.best_of_first(4)).mean(axis=1)[rows]
        assert said["avg_mse", 4] == (count, pytest.approx(own.std(), rel=1e-6))


@pytest.mark.slow
def test_with_prefix_selection_the_honest_recovery_is_the_fve_but_for_one_vector(sweep: Sweep) -> None:
    assert run(sweep, CASES[0], "scoring.selection=prefix", "scoring.baseline=distance_from_mean") == 0
    assert ask(sweep, "SELECT count(*) FROM reference_quantities WHERE low IS NOT NULL OR std IS NOT NULL") == [(0,)]
    recovery = landed(sweep)
    for k, fve in ask(sweep, "SELECT k, fve FROM curves ORDER BY k"):
        assert recovery["mse_variance_recovery", k] == pytest.approx(1 - (1 - fve) * (N - 1) / N, abs=1e-9)


@pytest.mark.slow
def test_tokens_are_counted_by_role_where_the_chat_format_is_known(undisturbed: Runs) -> None:
    sweep = undisturbed(GEMMA)
    of = everything(sweep, GEMMA)
    counted = dict(ask(sweep, "SELECT role, num_tokens FROM v_token_roles WHERE tokens = 'evaluated' AND num_tokens > 0"))
    assert counted == {role: of.roles.count(role) for role in set(of.roles)}
    shares = dict(ask(sweep, "SELECT role, share FROM v_token_roles WHERE tokens = 'all' AND role <> 'pad'"))
    assert sum(shares.values()) == pytest.approx(1) and shares["user"] > 0.2 and shares["system"] == 0
    result = exported(sweep)["results_by_k"][0]
    assert result["selected_token_stats"]["total_positions"] == N and result["token_stats"]["total_sequences"] == 60
    assert result["selected_token_stats"]["counts"]["user"] == counted["user"]
    assert result["token_stats"]["counts"]["total"] > 60 * 16 and "model_type" in result["token_stats"]
    assert set(result["variance_recovery_by_role"]) < set(result["mse_by_role"]) == set(counted)


@pytest.mark.slow
def test_tokens_of_a_format_that_nobody_knows_are_unknown(undisturbed: Runs) -> None:
    sweep = undisturbed("gpt2_patch_all")
    assert ask(sweep, "SELECT token_roles, selected_token_roles FROM runs") == [(None, None)]
    assert ask(sweep, "SELECT count(*) FROM v_token_roles") == [(0,)]
    assert ask(sweep, "SELECT count(*) FROM reference_quantities WHERE role IS NOT NULL") == [(0,)]
    result = exported(sweep)["results_by_k"][0]
    assert not {"token_stats", "selected_token_stats", "mse_by_role"} & set(result)


@pytest.mark.slow
def test_an_exported_run_imported_again_has_the_same_recovery(
    undisturbed: Runs, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(Path(undisturbed(GEMMA).registry), tmp_path / "registry", ignore=shutil.ignore_patterns("ksweep.duckdb"))
    shutil.copytree(undisturbed(GEMMA).vector_cache, tmp_path / "vector_cache")
    sweep = sweep_in(tmp_path, text)

    def ksweep(*arguments: str) -> int | str | None:
        monkeypatch.setattr("sys.argv", ["ksweep", *arguments, "--registry", sweep.registry])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    out = tmp_path / "out.json"
    run_id = ask(sweep, "SELECT run_id FROM runs")[0][0]
    assert ksweep("export", run_id, "--json", "-o", str(out)) == 0
    document, of, found = json.loads(out.read_text()), everything(sweep, GEMMA), landed(sweep)
    assert document["ksweep"]["unknown"] == [] and document["eval_config"]["do_bootstrap"] is True
    for result in document["results_by_k"]:
        assert len(result) == 26 + 4
        np.testing.assert_allclose(result["activation_norms"], np.linalg.norm(of.activations, axis=1))
        chosen = of.best_of_first(result["k"])
        np.testing.assert_allclose(result["mse_values"], np.square(of.activations - chosen).mean(axis=1), rtol=1e-5)
        assert np.mean(result["mse_values"]) == pytest.approx(result["avg_mse"], rel=1e-9)
    assert ksweep("import-json", str(out)) == 0
    again = dict(ask(sweep, "SELECT k, fve FROM curves WHERE metric = 'variance_recovery'"))
    assert again == {k: value for (quantity, k), value in found.items() if quantity == "variance_recovery"}
    rows = "SELECT quantity, k, value, low, bca_high, std FROM reference_quantities WHERE sweep"
    some = "(role = 'user' OR (role IS NULL AND quantity IN ('r_squared', 'avg_mse')))"
    imported, own = (set(ask(sweep, f"{rows} {is_} 'imported' AND {some}")) for is_ in ("=", "<>"))
    assert imported == own and len(own) == 3 * (4 + 2)
    roles = ask(sweep, "SELECT token_roles, selected_token_roles FROM runs")
    assert roles[0] == roles[1] and roles[0][0] is not None


def without_later_reconstructions(sweep: Sweep) -> None:
    """The registry as it was when draws and scores lay in one part and draw 0 alone had its reconstruction."""
    make_earlier(sweep.registry, lambda row: row | {"reconstruction": row["reconstruction"] if row["draw"] == 0 else None})


@pytest.mark.slow
def test_draws_without_their_reconstructions_leave_the_residual_variance_unknown(
    sweep: Sweep, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(sweep, GEMMA) == 0
    before = landed(sweep)
    without_later_reconstructions(sweep)
    out = tmp_path / "out.json"
    changed = ("scoring.seed=1", f"scoring.reference_replicates={REPLICATES}", f"export_json={out}")
    assert run(sweep, GEMMA, *changed) == 0
    of_second = "role IS NULL AND run_id = (SELECT run_id FROM runs ORDER BY finished DESC LIMIT 1)"
    after = landed(sweep, where=of_second)
    assert {q for q, _ in before} - {q for q, _ in after} == {"variance_recovery", "residual_variance"}
    for key, value in after.items():
        assert value == pytest.approx(before[key], rel=1e-9)
    [(found,)] = ask(sweep, "SELECT notes FROM runs ORDER BY finished DESC LIMIT 1")
    notes = [note["text"] for note in found]
    assert {note["about"] for note in found} == {"reference quantities"}
    assert "variance_recovery is not known" in notes[0] and "no intervals over single vectors" in notes[1]
    assert notes[0] in caplog.text
    document = json.loads(out.read_text())
    assert document["results_by_k"][-1]["variance_recovery"] is None
    assert "variance_recovery" in document["ksweep"]["unknown"] and document["ksweep"]["notes"] == notes


@pytest.mark.slow
def test_a_greedy_run_needs_nothing_but_its_one_draw(sweep: Sweep) -> None:
    assert run(sweep, GEMMA, "sampling.temperature=0") == 0
    agree(landed(sweep), everything(sweep, GEMMA), (1,))


@pytest.mark.parametrize(
    ("fields", "num_activations", "words"),
    [
        ({"av": "a", "ar": "b"}, 3, "only a checkpoint has"),
        ({"checkpoint": "c.pt"}, 2, "at least 3 activations"),
    ],
)
def test_replicates_that_cannot_be_are_refused(sweep: Sweep, fields: dict[str, str], num_activations: int, words: str) -> None:
    few = Activations(model="m", text="t.txt", num_activations=num_activations)
    with pytest.raises(SpecError, match=words):
        cell = replace(sweep.cell, autoencoder=Autoencoder(**fields), activations=few, scoring=Scoring(reference_replicates=100))
        cell_keys(cell)  # raised before any file is looked for


@pytest.mark.parametrize("number", [1, -1, True, 2.5])
def test_a_number_of_replicates_without_a_spread_is_refused(number: Any) -> None:
    with pytest.raises(SpecError, match="reference_replicates"):
        Scoring(reference_replicates=number)


def test_replicates_change_the_cell_and_not_its_draws(sweep: Sweep) -> None:
    file = Autoencoder(checkpoint=str(checkpoint(GEMMA)), dtype="float32")
    cell = replace(sweep.cell, autoencoder=file, activations=replace(sweep.cell.activations, model=None, layer=None))
    none, some = cell_keys(cell), cell_keys(replace_at(cell, "scoring.reference_replicates", 1000))
    assert none.draws == some.draws and none.cell != some.cell
    assert cell_keys(replace_at(cell, "scoring.reference_replicates", 0)).cell == none.cell
