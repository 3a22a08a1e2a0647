"""What the command line offers for talkative autoencoders: where the base is, whose data, which prompt, how long."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ksweep import Activations, Autoencoder, Cell, Resources, Sampling, Scoring, Sweep
from ksweep.autoencoder.tae.checkpoint import inspect_tae
from ksweep.autoencoder.tae.training_data import with_checkpoint_data
from ksweep.config.overrides import apply_overrides, parse_overrides
from ksweep.config.series import expand_series
from ksweep.config.spec import replace_at
from ksweep.evaluation.identity import cell_keys, cell_label, resolve_cell, resolve_cells
from ksweep.utils.errors import CheckpointError, SpecError
from tests.config.helpers import overridden
from tests.tiny_sweeps import ask, run

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tae"
GPT2 = next((FIXTURES / "gpt2_patch_all").glob("*.pt"))
GEMMA3 = next((FIXTURES / "gemma3_patch_two").glob("*.pt"))
BASE = FIXTURES / "gpt2_patch_all" / "base"


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Of a pair, as an experiment's file has it."""
    rows = [{"text": f"the {i} words of a row and some more of the same", "document": f"d{i // 2}"} for i in range(12)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Sweep(
        name="options",
        cell=Cell(
            autoencoder=Autoencoder(av="/nowhere/av", ar="/nowhere/ar", dtype="float32"),
            activations=Activations(
                model="/nowhere/base", text=str(tmp_path / "text.jsonl"), document_column="document", num_activations=8,
                positions="last", min_position=3, max_length=90, max_norm=1e4, dtype="float32",
            ),
            sampling=Sampling(num_draws=2, max_new_tokens=40),
            scoring=Scoring(num_replicates=20),
        ),
        resources=Resources(cluster="inprocess", gpus=0),
        registry=str(tmp_path / "registry"),
        vector_cache=str(tmp_path / "vector_cache"),
    )  # fmt: skip


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the GPT-2 file in a directory without its base, its configuration changed."""

    def make(**config: Any) -> Path:
        value = torch.load(GPT2, weights_only=False)
        value["config"] |= config
        (tmp_path / "run").mkdir(exist_ok=True)
        torch.save(value, tmp_path / "run" / "checkpoint_step1_epoch1_.pt")
        return tmp_path / "run" / "checkpoint_step1_epoch1_.pt"

    return make


# --base


@pytest.mark.slow
def test_base_says_where_the_model_of_both_halves_and_of_the_activations_is(
    sweep: Sweep, alone: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = alone(model_name="lab/tiny", orig_model_name="lab/tiny")
    assert run(sweep, f"autoencoder.checkpoint={path}", "--dry-run") == 2
    assert "lab/tiny" in (said := capsys.readouterr().err) and "Set autoencoder.base" in said
    assert run(sweep, f"autoencoder.checkpoint={path}", "--base", str(BASE)) == 0
    assert ask(sweep, "SELECT DISTINCT model FROM runs") == [(str(BASE),)]


@pytest.mark.slow
def test_base_is_autoencoder_base_and_finds_the_same_results(
    sweep: Sweep, alone: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = alone(model_name="lab/tiny", orig_model_name="lab/tiny")
    assert run(sweep, f"autoencoder.checkpoint={path}", f"--base={BASE}") == 0
    assert "computed 1 of 1 cells" in capsys.readouterr().out
    assert run(sweep, f"autoencoder.checkpoint={path}", f"autoencoder.base={BASE}") == 0
    assert "computed 0 of 1 cells" in capsys.readouterr().out


@pytest.mark.slow
def test_the_activations_own_model_is_said_apart(sweep: Sweep, alone: Callable[..., Path], tmp_path: Path) -> None:
    """Another name in orig_model_name: --base is not its place."""
    path = alone(model_name="lab/tiny-pt", orig_model_name="lab/tiny-it")
    other = shutil.copytree(BASE, tmp_path / "tiny-it")
    given = (f"autoencoder.checkpoint={path}", f"--base={BASE}")
    assert run(sweep, *given) == 2
    assert run(sweep, *given, f"activations.model={other}") == 0
    assert ask(sweep, "SELECT DISTINCT model FROM runs") == [(str(other),)]


def test_base_is_in_the_usage_and_other_options_are_refused_with_it(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(sweep, "--help") == 0
    assert "--base PATH" in (said := capsys.readouterr().out) and "--checkpoint-data" in said
    assert run(sweep, "--bass=x") == 2 and "--base PATH" in capsys.readouterr().err


# lengths


def test_a_length_that_was_asked_for_and_is_replaced_is_told_once(sweep: Sweep, caplog: pytest.LogCaptureFixture) -> None:
    def replaced(*arguments: str) -> list[str]:
        caplog.clear()
        cells = resolve_cells(overridden(sweep, [f"autoencoder.checkpoint={GPT2}", *arguments]).cells())
        assert {cell.sampling.max_new_tokens for cell in cells} == {8}
        return caplog.messages

    [told] = replaced("max_new_tokens=30", "temperature=[0.5,1]")
    assert "max_new_tokens=30 is replaced by 8" in told and str(GPT2) in told
    assert replaced() == replaced("max_new_tokens=8") == []  # the 40 were the pair's


# encoder_prompt


def test_the_text_prompt_gives_other_scores_of_the_same_draws_and_the_learned_one_keeps_its_key(sweep: Sweep) -> None:
    cell = overridden(sweep, [f"autoencoder.checkpoint={GPT2}"]).cell
    learned, text = cell_keys(cell), cell_keys(replace_at(cell, "autoencoder.encoder_prompt", "text"))
    assert learned.draws == text.draws and learned.scores != text.scores and learned.cell != text.cell
    assert "encoder_prompt" not in learned.identity["scores"] and text.identity["scores"]["encoder_prompt"] == "text"
    assert cell_label(replace_at(cell, "autoencoder.encoder_prompt", "text"), 2).endswith("T=1 encoder_prompt=text")


def test_the_references_replicates_change_the_cell_alone_and_none_keep_its_key(sweep: Sweep) -> None:
    cell = overridden(sweep, [f"autoencoder.checkpoint={GPT2}"]).cell
    without, with_them = cell_keys(cell), cell_keys(replace_at(cell, "scoring.reference_replicates", 1000))
    assert without.draws == with_them.draws and without.cell != with_them.cell
    assert cell_keys(replace_at(cell, "scoring.reference_replicates", 0)) == without


@pytest.mark.slow
def test_a_sweep_with_both_prompts_has_the_same_texts_and_other_errors(sweep: Sweep) -> None:
    assert run(sweep, f"autoencoder.checkpoint={GEMMA3}", "encoder_prompt=[learned,text]") == 0
    by_key = ask(sweep, "SELECT scores_key, list(text ORDER BY activation, draw), list(error) FROM draws GROUP BY 1")
    assert ask(sweep, "SELECT count(DISTINCT draws_key), sum(num_draws_sampled), sum(num_draws_scored) FROM runs") == [
        (1, len(by_key[0][1]), 2 * len(by_key[0][1]))
    ]
    assert len(by_key) == 2 and by_key[0][1] == by_key[1][1] and by_key[0][2] != by_key[1][2]


def test_a_text_prompt_that_the_file_does_not_say_is_refused_before_anything_runs(
    sweep: Sweep, alone: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    value = torch.load(GPT2, weights_only=False)
    for text in (None, ""):
        components = {**value["config"]["trainable_components"]}
        components["encoder"] = {**components["encoder"], "soft_prompt_init_text": text, "soft_prompt_length": 5}
        path = alone(trainable_components=components)
        assert run(sweep, f"autoencoder.checkpoint={path}", f"--base={BASE}", "encoder_prompt=text", "--dry-run") == 2
        assert "soft_prompt_init_text=None" in capsys.readouterr().err


# --checkpoint-data


def data(sweep: Sweep, *arguments: str) -> Activations:
    return apply_overrides(sweep, with_checkpoint_data(sweep, parse_overrides(arguments))).cell.activations


def test_a_checkpoint_alone_leaves_the_experiments_text(sweep: Sweep) -> None:
    changed = overridden(sweep, [f"autoencoder.checkpoint={GPT2}"]).cell.activations
    assert (changed.text, changed.positions) == (sweep.cell.activations.text, "last")


def test_checkpoint_data_is_what_the_file_was_trained_on(sweep: Sweep, alone: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run" / "tokens" / "test").mkdir(parents=True)  # relative: beside the file, if not from here
    otf = {"enabled": True, "pretokenized_path": "tokens", "min_pos": 5, "position_selection_strategy": "midpoint"}
    otf |= {"val_vectors_per_sequence": 2, "filter_large_norms": True, "max_activation_norm": 2e5}
    path = alone(dataset={"on_the_fly": otf, "val_split": "test"})
    assert data(sweep, f"autoencoder.checkpoint={path}") == Activations(
        text=str(tmp_path / "run" / "tokens" / "test"), text_column="input_ids", num_activations=8, rows="first",
        positions="midpoint", candidates="not_padding", min_position=5, positions_per_document=2, max_norm=2e5, dtype="float32",
    )  # fmt: skip
    directory = data(sweep, f"autoencoder.checkpoint={path.parent}", "activations.max_norm=null", "positions=random")
    assert (directory.max_norm, directory.positions, directory.min_position) == (None, "random", 5)


def test_checkpoint_data_that_is_silent_is_the_references_default(
    sweep: Sweep, alone: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "tokens" / "validation").mkdir(parents=True)
    path = alone(dataset={"on_the_fly": {"pretokenized_path": str(tmp_path / "tokens")}})
    found = data(sweep, f"autoencoder.checkpoint={path}")
    rule = (found.positions, found.candidates, found.min_position, found.positions_per_document, found.max_norm)
    assert rule == ("random", "not_padding", 8, 1, None) and found.text == str(tmp_path / "tokens" / "validation")


def test_checkpoint_data_beside_a_text_of_ones_own_is_only_the_rule(sweep: Sweep, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    found = data(sweep, f"autoencoder.checkpoint={GEMMA3}", f"activations.text={other}")
    assert (found.text, found.text_column, found.document_column) == (str(other), "text", "document")
    assert (found.positions, found.candidates, found.min_position, found.max_norm) == ("random", "not_padding", 8, 300_000)


@pytest.mark.slow
def test_checkpoint_data_of_a_series_is_that_of_its_files(sweep: Sweep, alone: Callable[..., Path]) -> None:
    path = alone()
    shutil.copy(path, path.with_name("checkpoint_step20_epoch2_.pt"))
    series = f"autoencoder.checkpoint={path.parent}/checkpoint_step*.pt"
    assert data(sweep, series, "activations.text=t.txt") == data(
        sweep, f"autoencoder.checkpoint={path}", "activations.text=t.txt"
    )
    assert expand_series(overridden(sweep, [series])).labels() == ["step=1", "step=20"]


@pytest.mark.slow
def test_checkpoint_data_through_a_whole_sweep(sweep: Sweep) -> None:
    text = sweep.cell.activations.text
    assert run(sweep, f"autoencoder.checkpoint={GEMMA3}", "--checkpoint-data", f"activations.text={text}") == 0
    spec = "SELECT spec->>'$.activations.candidates', spec->>'$.activations.min_position' FROM runs"
    assert ask(sweep, spec) == [("not_padding", "8")]
    assert min(place for (place,) in ask(sweep, "SELECT position FROM draws")) >= 8


@pytest.mark.slow
def test_checkpoint_data_that_is_here_is_what_a_sweep_reads(sweep: Sweep, alone: Callable[..., Path], tmp_path: Path) -> None:
    """Rows of token ids as pretokenised for training, padded left and right: the midpoints that the reference would take."""
    datasets = pytest.importorskip("datasets")
    pad = AutoTokenizer.from_pretrained(BASE).eos_token_id
    rows, middles = [], []
    for left, length in ((0, 20), (3, 15), (0, 9), (5, 19), (1, 12), (0, 24), (2, 20), (7, 17)):
        tokens = [1 + (7 * i + left) % 300 for i in range(length)]
        rows.append([pad] * left + [t + (t == pad) for t in tokens] + [pad] * (24 - left - length))
        middles.append((min(left + 4, left + length - 1) + left + length - 1) // 2)
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "tokens" / "validation")
    otf = {"pretokenized_path": str(tmp_path / "tokens"), "min_pos": 4, "position_selection_strategy": "midpoint"}
    path = alone(dataset={"on_the_fly": otf})
    assert run(sweep, f"autoencoder.checkpoint={path}", f"--base={BASE}", "--checkpoint-data") == 0
    positions = ask(sweep, "SELECT DISTINCT activation, position FROM draws ORDER BY activation")
    assert [place for _, place in positions] == middles


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "needs a talkative-autoencoder file: set autoencoder.checkpoint"),
        ((f"autoencoder.checkpoint={GPT2}",), r"tiny_seq24/validation, which is not on this machine.*activations\.text"),
        ((f"autoencoder.checkpoint={GPT2}", "activations.vectors=v.parquet"), "activations.vectors both choose the activations"),
        ((f"autoencoder.checkpoint=[{GPT2},{GEMMA3}]", "activations.text=t.txt"), "trained on different data"),
    ],
)  # fmt: skip
def test_checkpoint_data_that_cannot_be_had_is_refused_with_what_to_do(
    sweep: Sweep, arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        data(sweep, *arguments)


def test_checkpoint_data_of_a_file_that_names_none_is_refused(sweep: Sweep, alone: Callable[..., Path]) -> None:
    with pytest.raises(SpecError, match="not trained on pretokenised text"):
        data(sweep, f"autoencoder.checkpoint={alone(dataset={'on_the_fly': {'enabled': False}})}")
    with pytest.raises(CheckpointError, match="not there"):
        data(sweep, "autoencoder.checkpoint=/not there.pt")


def test_a_directory_stays_the_file_that_was_planned_with_while_training_goes_on(
    sweep: Sweep, alone: Callable[..., Path]
) -> None:
    first = alone()
    given = overridden(sweep, [f"autoencoder.checkpoint={first.parent}", f"autoencoder.base={BASE}"]).cell
    planned = resolve_cell(given)
    keys = cell_keys(planned)
    assert planned.autoencoder.checkpoint == str(first) and keys == cell_keys(given)
    value = torch.load(first, weights_only=False)
    torch.save(value | {"step": value["step"] + 1}, first.with_name("checkpoint_step9_epoch9_.pt"))
    assert cell_keys(planned) == keys
    assert cell_keys(given).draws != keys.draws


def test_the_base_of_a_file_is_beside_it_or_where_it_is_said_to_be() -> None:
    """What --base ends up as."""
    assert inspect_tae(GPT2, base=str(BASE)).base == inspect_tae(GPT2).base == BASE.resolve()
