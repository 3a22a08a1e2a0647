"""Whole sweeps on talkative-autoencoder files: the fixtures of tests/fixtures/tae through the path a user takes."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ksweep import Autoencoder, Scoring, Sweep
from ksweep.activations import ensure
from ksweep.autoencoder.tae.checkpoint import TaeInfo, inspect_tae
from ksweep.config.spec import Activations, Cell
from ksweep.evaluation.identity import cell_keys
from ksweep.utils.errors import SpecError
from tests.activations.helpers import random_vectors, write_vectors
from tests.config.helpers import overridden
from tests.stored_rows import joined_parts
from tests.tae_sweeps import CASES, FIXTURES, NUM_ACTIVATIONS, NUM_DRAWS, WORDS, checkpoint, run, sweep_over
from tests.tiny_sweeps import ask

pytestmark = pytest.mark.usefixtures("forked_python")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = random.Random(0)
    rows = [{"text": " ".join(source.choices(WORDS, k=20)), "document": f"d{i // 3}"} for i in range(40)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def sweep(text: Path, tmp_path: Path) -> Sweep:
    """Nothing of it has run."""
    return sweep_over(text, tmp_path)


@dataclass
class Finished:
    """A sweep that has run once, and is only read from."""

    sweep: Sweep
    printed: str
    exported: Path

    def copy(self, folder: Path) -> Sweep:
        shutil.copytree(Path(self.sweep.registry).parent, folder, dirs_exist_ok=True)
        (folder / "registry" / "ksweep.duckdb").unlink()  # its views name the files of the original
        return sweep_over(Path(str(self.sweep.cell.activations.text)), folder)


Runs = Callable[[str], Finished]


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    @cache
    def finished(case: str) -> Finished:
        folder, printed = tmp_path_factory.mktemp(case), io.StringIO()
        sweep = sweep_over(text, folder)
        with redirect_stdout(printed):
            assert run(sweep, case, f"export_json={folder / 'out.json'}") == 0
        return Finished(sweep, printed.getvalue(), folder / "out.json")

    return finished


@dataclass
class Kept:
    """What a finished sweep left on disk."""

    info: TaeInfo
    vectors: np.ndarray
    errors: np.ndarray
    cosines: np.ndarray
    shuffled: np.ndarray
    """Of the activations that have a partner: all but those of the first document."""
    with_partner: np.ndarray
    others: np.ndarray
    reconstructions: np.ndarray
    """Of draw 0."""


def kept(sweep: Sweep, case: str) -> Kept:
    info = inspect_tae(checkpoint(case))
    wanted = replace(sweep.cell.activations, model=info.activations_model, layer=None)
    vectors = ensure(wanted, info.layer, Path(sweep.vector_cache)).vectors().astype(np.float64)
    rows = joined_parts(sweep.registry)
    grid = (NUM_ACTIVATIONS, NUM_DRAWS)
    names = ("error", "cosine", "shuffled_error", "shuffled_activation")
    errors, cosines, shuffled, others = (np.array([r[name] for r in rows], dtype=float).reshape(grid) for name in names)
    with_partner = ~np.isnan(others[:, 0])
    others = others[with_partner].astype(int)
    return Kept(
        info,
        vectors,
        errors,
        cosines,
        shuffled[with_partner],
        with_partner,
        others,
        np.array([r["reconstruction"] for r in rows if r["draw"] == 0]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_curve_of_a_checkpoint_is_the_raw_fve_of_its_stored_draws(undisturbed: Runs, case: str) -> None:
    sweep, printed = undisturbed(case).sweep, undisturbed(case).printed
    assert "computed 1 of 1 cells" in printed and "max_new_tokens" not in printed and "failed;" not in printed
    found = kept(sweep, case)
    firsts = found.reconstructions
    np.testing.assert_allclose(found.errors[:, 0], np.square(firsts - found.vectors).mean(axis=1), rtol=1e-5)
    lengths = np.linalg.norm(firsts, axis=1) * np.linalg.norm(found.vectors, axis=1)
    np.testing.assert_allclose(found.cosines[:, 0], (firsts * found.vectors).sum(axis=1) / lengths, atol=1e-5)
    partners = found.vectors[found.others[:, 0]]
    of_partners = np.square(firsts[found.with_partner] - partners).mean(axis=1)
    np.testing.assert_allclose(found.shuffled[:, 0], of_partners, rtol=1e-5)

    documents = [name for _, name in ask(sweep, "SELECT DISTINCT activation, document FROM draws ORDER BY activation")]
    pairs = [(i, j) for i in range(NUM_ACTIVATIONS) for j in range(i) if documents[i] != documents[j]]
    baseline = np.mean([np.square(found.vectors[i] - found.vectors[j]).mean() / 2 for i, j in pairs])
    from_mean = np.square(found.vectors - found.vectors.mean(axis=0)).mean()
    rows = ask(sweep, "SELECT fve, baseline, shuffled_fve, all_failed_rate, baseline_from_mean FROM curves ORDER BY k")
    np.testing.assert_allclose([row[1] for row in rows], baseline, rtol=1e-6)
    np.testing.assert_allclose([row[4] for row in rows], from_mean, rtol=1e-6)
    assert [row[3] for row in rows] == [0.0] * NUM_DRAWS
    for row, of in ((0, found.errors.mean(axis=1)), (NUM_DRAWS - 1, found.errors.min(axis=1))):
        assert rows[row][0] == pytest.approx(1 - of.mean() / baseline, abs=1e-6)
    assert rows[0][2] == pytest.approx(1 - found.shuffled.mean() / baseline, abs=1e-6)
    controls = dict(ask(sweep, "SELECT control, value FROM controls"))
    assert controls["mean_vector"] == pytest.approx(1 - from_mean / baseline, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_explanation_of_a_checkpoint_has_its_length_and_none_fails(undisturbed: Runs, case: str) -> None:
    sweep = undisturbed(case).sweep
    info = inspect_tae(checkpoint(case))
    assert ask(sweep, "SELECT DISTINCT num_tokens, parse FROM draws") == [(info.num_tokens, "ok")]
    recorded = "SELECT checkpoint, av, layer, d_model, max_new_tokens, model, failure_rate, cut_off_rate FROM runs"
    whole = (str(checkpoint(case)), None, info.layer, info.d_model, info.num_tokens, info.activations_model, 0.0, None)
    assert ask(sweep, recorded) == [whole]


@pytest.mark.slow
def test_prefix_selection_takes_the_best_of_the_first_k_from_the_same_draws(undisturbed: Runs, tmp_path: Path) -> None:
    sweep = undisturbed(CASES[0]).copy(tmp_path)
    assert run(sweep, CASES[0], "scoring.selection=prefix", "scoring.baseline=distance_from_mean") == 0
    assert ask(sweep, "SELECT num_draws_sampled FROM runs ORDER BY finished") == [(NUM_ACTIVATIONS * NUM_DRAWS,), (0,)]
    found = kept(sweep, CASES[0])
    baseline = np.square(found.vectors - found.vectors.mean(axis=0)).mean()
    of_prefix = "SELECT run_id FROM runs WHERE spec->>'$.scoring.selection' = 'prefix'"
    rows = ask(sweep, f"SELECT k, fve, cosine, shuffled_fve FROM curves WHERE run_id IN ({of_prefix})")
    assert len(rows) == NUM_DRAWS
    for k, fve, cosine, shuffled in rows:
        chosen = found.errors[:, :k].argmin(axis=1)
        assert fve == pytest.approx(1 - found.errors[:, :k].min(axis=1).mean() / baseline, abs=1e-6)
        assert cosine == pytest.approx(found.cosines[np.arange(NUM_ACTIVATIONS), chosen].mean(), abs=1e-9)
        assert shuffled == pytest.approx(1 - found.shuffled[:, :k].min(axis=1).mean() / baseline, abs=1e-6)


@pytest.mark.slow
def test_the_midpoint_between_padding_is_the_reference_position(sweep: Sweep) -> None:
    chosen = ("activations.positions=midpoint", "activations.candidates=not_padding", "activations.min_position=2")
    assert run(sweep, CASES[0], *chosen) == 0
    info = inspect_tae(checkpoint(CASES[0]))
    tokenizer = AutoTokenizer.from_pretrained(info.activations_model)
    lines = Path(sweep.cell.activations.text or "").read_text().splitlines()[:NUM_ACTIVATIONS]
    lengths = [len(tokenizer(json.loads(line)["text"])["input_ids"]) for line in lines]
    positions = ask(sweep, "SELECT DISTINCT activation, position FROM draws ORDER BY activation")
    assert [place for _, place in positions] == [(2 + n - 1) // 2 for n in lengths]


def test_a_run_goes_to_the_reference_schema_with_raw_errors(undisturbed: Runs) -> None:
    document, found = json.loads(undisturbed(CASES[0]).exported.read_text()), kept(undisturbed(CASES[0]).sweep, CASES[0])
    assert document["checkpoint_path"] == str(checkpoint(CASES[0])) and "avg_mse" not in document["ksweep"]["misleading"]
    last = document["results_by_k"][-1]
    np.testing.assert_allclose(last["mse_values"], found.errors.min(axis=1))
    recovered = 1 - found.errors.min(axis=1).mean() / found.vectors.var(axis=0, ddof=1).mean()
    assert last["mse_variance_recovery"] == pytest.approx(recovered, abs=1e-6)


@pytest.mark.slow
def test_an_encoder_without_a_prompt_is_measured_without_the_control_of_an_empty_text(sweep: Sweep, tmp_path: Path) -> None:
    case = CASES[0]
    (tmp_path / "base").symlink_to(FIXTURES / case / "base")
    value = torch.load(checkpoint(case), weights_only=False)
    for name in ("soft_prompt_embeddings", "soft_prompt_embeddings_postfix"):
        value["models"]["encoder"].pop(name, None)
    value["config"]["encoder_prompt"] = value["config"]["trainable_components"]["encoder"]["soft_prompt_init_text"] = None
    torch.save(value, tmp_path / "bare.pt")
    assert run(sweep, case, f"autoencoder.checkpoint={tmp_path / 'bare.pt'}") == 0
    assert len(ask(sweep, "FROM curves")) == NUM_DRAWS
    controls = {name for (name,) in ask(sweep, "SELECT control FROM run_controls")}
    assert "mean_vector" in controls and "empty_text" not in controls


@pytest.mark.slow
def test_a_stated_baseline_of_raw_vectors_may_exceed_one(undisturbed: Runs, tmp_path: Path) -> None:
    sweep = undisturbed(CASES[0]).copy(tmp_path)
    assert run(sweep, CASES[0], "scoring.baseline=12.5") == 0
    [(fve, error)] = ask(sweep, "SELECT fve, error FROM curves WHERE k = 1 AND baseline = 12.5")
    assert fve == pytest.approx(1 - error / 12.5)


def test_activations_of_another_width_are_refused_with_the_right_model(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "config.json").write_text('{"num_hidden_layers": 9, "hidden_size": 7}')
    assert run(sweep, CASES[0], f"activations.model={tmp_path / 'wide'}") == 2
    error = capsys.readouterr().err
    assert "width 7" in error and inspect_tae(checkpoint(CASES[0])).activations_model in error


def test_vectors_that_do_not_say_what_the_checkpoint_needs_are_refused_before_anything_runs(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    width = inspect_tae(checkpoint("gpt2_patch_all")).d_model
    vectors = write_vectors(tmp_path / "v.parquet", random_vectors(30, width))
    given = (f"activations.vectors={vectors}", "activations.text=null", "activations.model=null", "activations.layer=null")
    assert run(sweep, "gemma3_patch_two", *given) == 2
    assert "the token that it was taken at, which" in capsys.readouterr().err
    (tmp_path / "base").symlink_to(FIXTURES / "gpt2_patch_all" / "base")
    value = torch.load(checkpoint("gpt2_patch_all"), weights_only=False)
    value["models"]["decoder"]["activation_pos_embedder.weight"] = torch.ones(128, width)
    value["config"]["trainable_components"]["decoder"]["subtract_add_pos_embeddings"] = True
    torch.save(value, tmp_path / "positions.pt")
    assert run(sweep, "gpt2_patch_all", f"autoencoder.checkpoint={tmp_path / 'positions.pt'}", *given) == 2
    assert "its position (column n_raw_tokens), which" in capsys.readouterr().err
    assert not (tmp_path / "registry" / "landing").exists()


@pytest.mark.parametrize(("base", "noted"), [("someone/another", True), ("owner/base", False), (None, False)])
def test_vectors_of_another_model_than_the_checkpoints_are_noted(base: str | None, noted: bool, tmp_path: Path) -> None:
    info = inspect_tae(checkpoint("gpt2_patch_all"))
    assert Path(info.activations_model).name == "base"
    vectors = write_vectors(tmp_path / "v.parquet", random_vectors(30, info.d_model))
    said = {"kind": "nla_dataset", "extraction": {"base_model": base, "layer_index": info.layer}}
    Path(f"{vectors}.nla_meta.yaml").write_text(json.dumps(said))
    autoencoder = Autoencoder(checkpoint=str(checkpoint("gpt2_patch_all")))
    keys = cell_keys(
        Cell(autoencoder=autoencoder, activations=Activations(vectors=str(vectors), num_activations=30, rows="first"))
    )
    found = [note.text for note in keys.notes if note.about == "base model"]
    assert [text.startswith("Could not verify that someone/another is ") for text in found] == [True] * noted


def test_a_checkpoint_and_a_pair_each_take_the_place_of_the_other(sweep: Sweep) -> None:
    with_file = overridden(sweep, ["autoencoder.checkpoint=a.pt"])
    assert with_file.cell.autoencoder == Autoencoder(checkpoint="a.pt", dtype="float32")
    assert (with_file.cell.activations.model, with_file.cell.activations.layer) == (None, None)
    back = overridden(with_file, ["autoencoder.av=x", "autoencoder.ar=y"]).cell.autoencoder
    assert back == Autoencoder(av="x", ar="y", dtype="float32")
    given = overridden(sweep, ["autoencoder.checkpoint=[a.pt,b.pt]", "activations.model=m"])
    assert [cell.autoencoder.source for cell in given.cells()] == ["a.pt", "b.pt"]
    assert given.cell.activations.model == "m" and given.labels() == ["checkpoint=a.pt", "checkpoint=b.pt"]
    of_pairs = replace(sweep, axes={"autoencoder": (sweep.cell.autoencoder, Autoencoder(av="x", ar="y"))})
    assert {c.autoencoder.source for c in overridden(of_pairs, ["autoencoder.checkpoint=a.pt"]).cells()} == {"a.pt"}


@pytest.mark.parametrize("fields", [{}, {"av": "x"}, {"av": "x", "ar": "y", "checkpoint": "c.pt"}])
def test_an_autoencoder_that_is_neither_a_pair_nor_a_file_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(SpecError, match="either a pair"):
        Autoencoder(**fields)


def test_a_stated_baseline_above_one_is_refused_for_a_pair(sweep: Sweep) -> None:
    with pytest.raises(SpecError, match=r"scoring.baseline=12.5 must lie in \(0, 2\]"):
        cell_keys(replace(sweep.cell, scoring=Scoring(baseline=12.5)))  # raised before any file is looked for


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_pretokenised_split_goes_through_a_whole_sweep_at_the_reference_positions(
    sweep: Sweep, case: str, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    arrays = np.load(FIXTURES / case / "expected.npz")
    rows = datasets.Dataset.from_dict({"input_ids": arrays["input_ids"].tolist()})
    datasets.DatasetDict({"validation": rows}).save_to_disk(str(tmp_path / "pretokenized"))
    settings = {
        "text": tmp_path / "pretokenized" / "validation", "text_column": "input_ids", "candidates": "not_padding",
        "positions": "all", "min_position": 0, "num_activations": int(arrays["attention_mask"].sum()),
    }  # fmt: skip
    assert run(sweep, case, *(f"activations.{name}={value}" for name, value in settings.items())) == 0
    firsts = {(r["row_id"], r["position"]): r for r in joined_parts(sweep.registry) if r["draw"] == 0}
    assert set(firsts) == {(f"row:{row}", at) for row, at in np.argwhere(arrays["attention_mask"]).tolist()}
    chosen = [firsts[f"row:{row}", at] for row, at in enumerate(arrays["positions"].tolist())]
    against_reference = np.square([r["reconstruction"] for r in chosen] - arrays["activations"]).mean(axis=1)
    np.testing.assert_allclose([r["error"] for r in chosen], against_reference, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:1])
def test_k_sweep_from_the_command_line_gives_on_two_ranks_what_one_rank_gives(
    undisturbed: Runs, sweep: Sweep, case: str, tmp_path: Path
) -> None:
    """experiments/k_sweep.py as a user runs it, in processes of its own."""
    command = [
        sys.executable, str(ROOT / "experiments" / "k_sweep.py"), f"autoencoder.checkpoint={checkpoint(case)}",
        "autoencoder.dtype=float32", f"activations.text={sweep.cell.activations.text}", "activations.dtype=float32",
        f"activations.num_activations={NUM_ACTIVATIONS}", "activations.min_position=8", "activations.max_length=100",
        "activations.seed=42",
        "sampling.temperature=1.0", f"sampling.num_draws={NUM_DRAWS}", "scoring.num_replicates=50", "resources.cluster=local",
        "resources.gpus=0", "resources.tasks=2", f"registry={sweep.registry}", f"vector_cache={sweep.vector_cache}",
        "--no-charts",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=840, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and "computed 1 of 1 cells" in done.stdout, done.stderr
    one, two = undisturbed(case).sweep, sweep
    assert ask(two, "SELECT num_ranks FROM runs") == [(2,)]
    for same in (
        "SELECT cell_key, num_activations, num_draws, max_new_tokens FROM runs",
        "SELECT activation, draw, position, text, token_ids FROM draws ORDER BY activation, draw",
    ):
        assert ask(two, same) == ask(one, same)
    assert len({text for (text,) in ask(two, "SELECT text FROM draws")}) > NUM_ACTIVATIONS * NUM_DRAWS / 2
    for close in (
        "SELECT k, fve, fve_low, fve_high, error, cosine, shuffled_fve FROM curves ORDER BY k",
        "SELECT error, cosine, coalesce(shuffled_error, -1) FROM draws ORDER BY activation, draw",
        "SELECT value FROM reference_quantities ORDER BY quantity, role, k",
    ):
        found = ask(two, close)
        np.testing.assert_allclose(found, ask(one, close), rtol=1e-5, atol=1e-5)
        assert len(found) >= NUM_DRAWS
