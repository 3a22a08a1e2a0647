"""`ksweep score`: texts that exist, an AR and activations give the FVE that draws with these texts have. No AV is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

import ksweep
from ksweep import Activations, Autoencoder, Cell, Resources, Sampling, Scoring, Sweep, stats
from ksweep.activations import ensure
from ksweep.autoencoder.given_texts import cut_by_tokens
from ksweep.autoencoder.nla.family import NlaPair
from ksweep.autoencoder.own_parts import OwnParts
from ksweep.autoencoder.tae.checkpoint import inspect_tae
from ksweep.autoencoder.tae.models import load_tae_reconstructor
from ksweep.autoencoder.texts_file import read_texts_file
from ksweep.cli import app
from ksweep.evaluation.identity import cell_keys, resolve_cell
from ksweep.utils.errors import DataError, RequestError, SpecError
from tests.activations.helpers import random_vectors, write_vectors
from tests.tae_sweeps import checkpoint
from tests.tiny_models import AR_TEMPLATE, TinyPair
from tests.tiny_sweeps import WORDS, ask, run, talking_pair, tiny_cell

FIXTURE = Path(__file__).parents[1] / "fixtures" / "nla" / "qwen2_text"
CURVE = "SELECT k, fve, fve_low, fve_high, error, cosine, shuffled_fve FROM curves WHERE sweep = '{}' ORDER BY k"
DRAWS = """
    SELECT d.row_id, d.position, d.explanation FROM draws AS d JOIN runs AS r USING (draws_key, scores_key)
    WHERE r.sweep = '{}' ORDER BY d.activation, d.draw
"""
NUM_ACTIVATIONS, NUM_TEXTS = 12, 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return talking_pair(tmp_path_factory.mktemp("tiny"), num_rows=60)


@pytest.fixture(scope="module")
def drawn(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep that has sampled its draws, 8 of 40 activations, two positions a row."""
    folder = tmp_path_factory.mktemp("drawn")
    sweep = Sweep(
        name="drawn", cell=tiny_cell(pair, num_replicates=50), resources=Resources(cluster="inprocess", gpus=0),
        registry=str(folder / "registry"), vector_cache=str(folder / "vector_cache"),
    )  # fmt: skip
    assert run(sweep) == 0
    return sweep


@pytest.fixture(autouse=True)
def no_av(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there are draws to compare with, an AV cannot be loaded."""
    if "drawn" in request.fixturenames:
        request.getfixturevalue("drawn")

    def refuse(self: Any, devices: Any) -> Any:
        raise AssertionError("an AV was loaded")

    monkeypatch.setattr(NlaPair, "load_verbalizer", refuse)
    monkeypatch.setattr(OwnParts, "load_verbalizer", refuse)


def given(sweep: Sweep, pair: TinyPair, texts: Path, name: str, **changes: Any) -> Sweep:
    """A sweep over the same activations whose texts are given."""
    cell = replace(
        sweep.cell, sampling=Sampling(), autoencoder=Autoencoder(texts=str(texts), ar=str(pair.ar), dtype="float32", **changes)
    )
    return replace(sweep, name=name, cell=cell)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def exported(sweep: Sweep, path: Path) -> Path:
    names = ("row_id", "position", "explanation")
    return write_rows(path, [dict(zip(names, row, strict=True)) for row in ask(sweep, DRAWS.format("drawn"))])


@pytest.fixture(scope="module")
def vectors(pair: TinyPair) -> np.ndarray:
    return random_vectors(NUM_ACTIVATIONS, pair.d_model)


@pytest.fixture(scope="module")
def rows(vectors: np.ndarray) -> list[dict[str, Any]]:
    """Three texts of each of twelve vectors, with groups, document and vector; the rows of an activation are not neighbours."""
    random = np.random.default_rng(1)
    return [
        {
            "row_id": f"a{i}", "document": f"d{i // 2}", "language": ("en", "fr")[i % 2],
            "activation_vector": vectors[i].tolist(), "text": " ".join(random.choice(WORDS, 3 + 4 * (k + 1))),
        }
        for k in range(NUM_TEXTS) for i in range(NUM_ACTIVATIONS)
    ]  # fmt: skip


def over_vectors(rows: list[dict[str, Any]], pair: TinyPair, folder: Path, **autoencoder: Any) -> Sweep:
    """A sweep whose file of texts holds the activations as well."""
    path = write_rows(folder / "teacher.parquet", rows)
    return Sweep(
        name="teacher",
        cell=Cell(
            autoencoder=Autoencoder(texts=str(path), ar=str(pair.ar), dtype="float32", **autoencoder),
            activations=Activations(vectors=str(path), row_id_column="row_id", num_activations=NUM_ACTIVATIONS, rows="first"),
            scoring=Scoring(num_replicates=50),
        ),
        resources=Resources(cluster="inprocess", gpus=0), registry=str(folder / "registry"), vector_cache=str(folder / "cache"),
    )  # fmt: skip


def reconstruct(ar: Path, texts: list[str]) -> np.ndarray:
    """What the AR gives for each text: transformers alone, one text at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(ar), AutoModel.from_pretrained(ar, dtype=torch.float32)
    model.norm = torch.nn.Identity()
    head = load_file(ar / "value_head.safetensors")["weight"].float()
    out = []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(AR_TEMPLATE.format(explanation=text), return_tensors="pt").input_ids
            out.append((head @ model(ids).last_hidden_state[0, -1]).numpy())
    return np.array(out, dtype=np.float64)


# --- the numbers ---


@pytest.mark.slow
def test_exported_explanations_scored_again_give_the_curve_of_the_sweep_that_drew_them(
    drawn: Sweep, pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = given(drawn, pair, exported(drawn, tmp_path / "again.jsonl"), "again")
    assert run(again, "--dry-run") == 0
    assert "score: all 320 draws are there" in capsys.readouterr().out
    assert run(again) == 0
    np.testing.assert_allclose(
        np.array(ask(again, CURVE.format("again")), float), np.array(ask(drawn, CURVE.format("drawn")), float), atol=1e-6
    )
    counts = "SELECT num_failed_draws, num_draws, num_activations, failure_rate FROM runs WHERE sweep = '{}'"
    assert ask(again, counts.format("again")) == ask(drawn, counts.format("drawn"))
    assert ask(again, DRAWS.format("again")) == ask(drawn, DRAWS.format("drawn"))
    capsys.readouterr()
    assert run(given(drawn, pair, exported(drawn, tmp_path / "other.parquet"), "parquet")) == 0
    assert "computed 0 of 1 cells" in capsys.readouterr().out, "the same texts in another file are the same cell"


@pytest.mark.slow
def test_fve_is_that_of_texts_reconstructed_with_transformers(
    rows: list[dict[str, Any]], vectors: np.ndarray, pair: TinyPair, tmp_path: Path
) -> None:
    results = ksweep.run(over_vectors(rows, pair, tmp_path))
    targets = np.tile(vectors, (NUM_TEXTS, 1)).astype(np.float64)
    errors = stats.reconstruction_errors(reconstruct(pair.ar, [row["text"] for row in rows]), targets, "normalised")
    errors = errors.reshape(NUM_TEXTS, NUM_ACTIVATIONS).T
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    apart = [2 - 2 * unit[i] @ unit[j] for i in range(12) for j in range(12) if i // 2 != j // 2]
    baseline = np.mean(apart) / 2
    best_of_two = np.mean([errors[:, list(two)].min(axis=1) for two in ((0, 1), (0, 2), (1, 2))], axis=0)
    expected = [1 - errors.mean() / baseline, 1 - best_of_two.mean() / baseline, 1 - errors.min(axis=1).mean() / baseline]
    np.testing.assert_allclose(results.curves["fve"].to_numpy(), expected, atol=2e-6)
    assert results.curves["num_documents"].to_pylist() == [6] * 3 and set(results.curves["temperature"].to_pylist()) == {None}


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["first", "last"])
def test_truncated_texts_have_the_fve_of_texts_that_were_cut_by_hand(
    rows: list[dict[str, Any]], pair: TinyPair, tmp_path: Path, kept: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.ar)

    def cut(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return str(tokenizer.decode(ids[:6] if kept == "first" else ids[-6:])).strip()

    (tmp_path / "hand").mkdir()
    by_hand = ksweep.run(over_vectors([row | {"text": cut(row["text"])} for row in rows], pair, tmp_path / "hand"))
    sweep = over_vectors(rows, pair, tmp_path, max_text_tokens=6, kept_tokens=kept)
    results = ksweep.run(replace(sweep, axes={"autoencoder.max_text_tokens": (6, None)}))
    curves = results.curves.to_pylist()
    label = "6 tokens" if kept == "first" else "last 6 tokens"
    assert list(dict.fromkeys(row["label"] for row in curves)) == [label, "all"]
    expected = by_hand.curves["fve"].to_pylist()
    assert [row["fve"] for row in curves if row["label"] == label] == pytest.approx(expected, abs=1e-6)
    assert [row["fve"] for row in curves if row["label"] == "all"] != pytest.approx(expected, abs=1e-3)
    assert max(results.draws["num_tokens"].to_pylist()) > 6
    assert {row["num_tokens"] for row in results.draws.to_pylist() if row["label"] == label} == {6}
    assert len(ask(sweep, "SELECT DISTINCT job FROM runs")) == 1, "one job loads the AR once"


def test_a_text_is_cut_between_tokens_and_a_character_of_several_is_whole_or_gone() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE / "nla-ar")
    text = "the cat \U0001f600 sat"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for limit in range(1, len(ids) + 2):
        for first in (True, False):
            [cut] = cut_by_tokens(tokenizer, [f"  {text}\n"], limit, first)
            assert (text.startswith if first else text.endswith)(cut.text) and cut.num_tokens == min(limit, len(ids))
            assert len(tokenizer(cut.text, add_special_tokens=False).input_ids) <= limit


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gpt2_patch_all", "gemma3_patch_two"])
def test_the_encoder_of_a_talkative_autoencoder_reads_the_tokens_of_given_texts(case: str, tmp_path: Path) -> None:
    info = inspect_tae(str(checkpoint(case)))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": " ".join(WORDS), "document": f"d{i}"}) for i in range(6)))
    words = [" ".join(WORDS[i : i + 5]) for i in range(6)]
    path = write_rows(tmp_path / "texts.jsonl", [{"row_id": f"row:{i}", "text": text} for i, text in enumerate(words)])
    activations = Activations(
        rows="first", text=str(tmp_path / "text.jsonl"), num_activations=6, min_position=4, max_length=60, dtype="float32"
    )
    results = ksweep.run(Sweep(
        name="encoder", resources=Resources(cluster="inprocess", gpus=0),
        cell=Cell(
            autoencoder=Autoencoder(texts=str(path), checkpoint=str(checkpoint(case)), dtype="float32"), activations=activations,
            scoring=Scoring(num_replicates=50, baseline=1.0),
        ),
        registry=str(tmp_path / "registry"), vector_cache=str(tmp_path / "cache"),
    ))  # fmt: skip
    table = ensure(replace(activations, model=info.activations_model), info.layer, tmp_path / "cache")
    tokenizer, encoder = AutoTokenizer.from_pretrained(info.base), load_tae_reconstructor(info, dtype="float32")
    tokens, positions = table.column("token_id").tolist(), table.column("position").tolist()
    for i, row in enumerate(results.draws.to_pylist()):
        ids = tokenizer(words[i], add_special_tokens=False, return_tensors="pt").input_ids
        vector = encoder.reconstruct_tokens(ids, [tokens[i]], [positions[i]]).numpy()[0]
        assert row["error"] == pytest.approx(float(np.mean((vector - table.row(i)) ** 2)), rel=1e-4)


@pytest.mark.slow
def test_an_ar_of_ones_own_reads_given_texts_and_its_tokens_are_words(
    rows: list[dict[str, Any]], vectors: np.ndarray, pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "counting_ar.py").write_text(
        "import torch\nclass CountingAr:\n    layer, d_model, reads_empty_text = 1, 32, False\n"
        "    def __init__(self, dtype, devices): pass\n    def reconstruct(self, explanations, batch_size=64):\n"
        "        return torch.tensor([[1.0] + [len(e.text.split())] * 31 for e in explanations])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sweep = over_vectors(rows, pair, tmp_path, max_text_tokens=2)
    results = ksweep.run(
        replace(sweep, cell=replace(sweep.cell, autoencoder=replace(sweep.cell.autoencoder, ar="counting_ar:CountingAr")))
    )
    expected = np.array([1.0] + [2.0] * 31)
    cosines = vectors @ expected / np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected)
    for row in results.draws.to_pylist():
        assert row["num_tokens"] == 2 and row["error"] == pytest.approx(2 - 2 * cosines[row["activation"]], rel=1e-5)


# --- which texts belong to which activations ---


@pytest.mark.slow
def test_activations_with_too_few_texts_are_failures_and_named_and_others_are_counted(
    rows: list[dict[str, Any]], pair: TinyPair, tmp_path: Path
) -> None:
    vectors = write_rows(tmp_path / "v.parquet", rows)
    texts = [row for row in rows if row["row_id"] not in ("a3", "a7") and (row["row_id"] != "a1" or row in rows[:12])]
    texts += [{"row_id": "elsewhere", "text": "b"}] * 2 + [rows[0] | {"text": None}]
    path = write_rows(tmp_path / "texts.jsonl", [{"row_id": row["row_id"], "text": row["text"]} for row in texts])
    sweep = over_vectors(rows, pair, tmp_path, **{})
    cell = replace(
        sweep.cell, autoencoder=replace(sweep.cell.autoencoder, texts=str(path)), sampling=Sampling(num_draws=3),
        activations=replace(sweep.cell.activations, vectors=str(vectors)),
    )  # fmt: skip
    results = ksweep.run(replace(sweep, cell=cell))
    failed = [(row["row_id"], row["draw"]) for row in results.draws.to_pylist() if row["error"] is None]
    assert sorted(failed) == [("a1", 1), ("a1", 2), *(("a3", k) for k in range(3)), *(("a7", k) for k in range(3))]
    [notes] = results.curves.slice(0, 1)["notes"].to_pylist()
    text = " ".join(note["text"] for note in notes)
    assert "2 of 12 activations have no text and count as failures: a3, a7." in text
    assert "1 activations have fewer than 3 texts" in text and "2 texts of 1 activations that are not evaluated" in text
    assert ksweep.plan(replace(sweep, cell=replace(cell, sampling=Sampling()))).resolved.cells[0].sampling.num_draws == 1


@pytest.mark.slow
def test_rows_without_names_are_activations_of_their_own(rows: list[dict[str, Any]], pair: TinyPair, tmp_path: Path) -> None:
    unnamed = [{name: value for name, value in row.items() if name != "row_id"} for row in rows[:NUM_ACTIVATIONS]]
    sweep = over_vectors(unnamed, pair, tmp_path)
    sweep = replace(sweep, cell=replace(sweep.cell, activations=replace(sweep.cell.activations, row_id_column=None)))
    (tmp_path / "named").mkdir()
    named = ksweep.run(over_vectors(rows[:NUM_ACTIVATIONS], pair, tmp_path / "named"))
    assert ksweep.run(sweep).curves["fve"].to_pylist() == pytest.approx(named.curves["fve"].to_pylist(), abs=1e-9)


def test_different_vectors_of_one_activation_are_refused_by_their_rows(
    rows: list[dict[str, Any]], pair: TinyPair, tmp_path: Path
) -> None:
    other = [float(x) + 1 for x in rows[0]["activation_vector"]]
    with pytest.raises(RequestError, match=r"rows 1 and 13 .* both of activation 'a1' .* different vectors"):
        ksweep.run(over_vectors([*rows[:13], rows[13] | {"activation_vector": other}, *rows[14:]], pair, tmp_path))


@pytest.mark.slow
def test_groups_are_columns_of_the_texts(rows: list[dict[str, Any]], pair: TinyPair, tmp_path: Path) -> None:
    sweep = over_vectors(rows, pair, tmp_path)
    sweep = replace(sweep, cell=replace(sweep.cell, scoring=replace(sweep.cell.scoring, groups=("language",))))
    draws = ksweep.run(sweep).draws.to_pylist()
    stored = ask(sweep, "SELECT part, error FROM metrics WHERE breakdown = 'language' AND k = 1 AND against = 'overall'")
    for language, error in stored:
        own = [row["error"] for row in draws if (int(row["row_id"][1:]) % 2 == 0) == (language == "en")]
        assert error == pytest.approx(np.mean(own), rel=1e-9)
    assert len(stored) == 2
    mixed = [row | {"language": f"{i % 5}"} for i, row in enumerate(rows)]
    with pytest.raises(RequestError, match=r"scoring.groups has 'language', and .* for texts of one activation"):
        ksweep.run(
            replace(over_vectors(mixed, pair, tmp_path), cell=replace(sweep.cell, scoring=replace(sweep.cell.scoring, seed=1)))
        )


def test_other_groups_in_a_file_of_texts_are_another_cell_and_their_order_is_not(
    drawn: Sweep, pair: TinyPair, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in exported(drawn, tmp_path / "texts.jsonl").read_text().splitlines()]
    rows = [row | {"kind": ("plain", "poem")[int(row["row_id"][-1]) % 2], "remark": str(i)} for i, row in enumerate(rows)]
    other = [row | {"kind": "poem"} for row in rows]
    apart = sorted(rows, key=lambda row: row["kind"])  # the texts of an activation stay in order

    def key(name: str, rows: list[dict[str, Any]], *groups: str) -> str:
        sweep = given(drawn, pair, write_rows(tmp_path / f"{name}.jsonl", rows), name)
        cell = replace(sweep.cell, scoring=replace(sweep.cell.scoring, groups=groups))
        return cell_keys(resolve_cell(cell)).cell

    first = key("first", rows, "kind")
    assert key("apart", apart, "kind") == first != key("other", other, "kind")
    assert key("first", rows) == key("other", other), "nobody asks for the groups"


# --- the command ---


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["score", *map(str, arguments)])


@pytest.mark.slow
def test_the_command_runs_a_sweep_by_length_with_charts_and_a_report(
    rows: list[dict[str, Any]], pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_rows(tmp_path / "teacher.parquet", rows)
    settings = ("autoencoder.dtype=float32", "cluster=inprocess", "gpus=0", "num_replicates=50")
    done = command(path, "--ar", pair.ar, "--truncate", "tokens=2,8", "--groups", "language", *settings)
    assert done.exit_code == 0, done.output
    assert all(f"{label} " in done.output for label in ("2 tokens", "8 tokens", "all"))
    assert (tmp_path / "registry/charts/teacher/fve_by_k.html").exists()
    page = ksweep.results("teacher").report()
    assert "How much of the activations do the texts of teacher.parquet hold?" in page.read_text()
    assert command(path, "--ar", pair.ar, "--name", "other", "--dry-run", *settings).exit_code == 0
    assert (
        "computed 0 of 3" in command(path, "--ar", pair.ar, "--truncate", "tokens=2,8", "--groups", "language", *settings).output
    )


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda row: {"text": row["text"], "style": "x"}, (), "no column 'row_id', which names .*; it has text, style"),
        (lambda row: {"row_id": "a", "said": "x"}, (), "no column 'text' of texts; it has row_id, said"),
        (lambda row: {"row_id": "a", "text": 3}, (), "row 0 of .* has a int in column 'text'"),
        (lambda row: {"row_id": None, "text": "x"}, (), "row 0 of .* has no row_id"),
        (lambda row: {"row_id": "a", "position": 2.5, "text": "x"}, (), "row 0 of .* has 2.5 in column 'position'"),
        (lambda row: row, (), "vectors are read from Parquet alone"),
        (lambda row: {"row_id": "a", "text": "x"}, (), "no column 'activation_vector': give the activations as --text"),
        (lambda row: {"row_id": "a", "text": "x"}, ("--vectors",), "none of the 2 activations .*: its texts are of a"),
        (lambda row: {"row_id": "row:1", "text": "x"}, ("--vectors", "num_draws=20"), "no activation of .* more than 12 texts"),
        (lambda row: {"row_id": "row:1", "text": "x"}, ("--vectors", "temperature=0.5"), "temperature=0.5 is for the draws"),
        (lambda row: {"row_id": "row:1", "text": "x"}, ("--truncate", "words=3"), "'words=3' is not understood: expected"),
        (lambda row: {"row_id": "row:1", "text": "x"}, ("--vectors", "--ar"), "is an AV|role"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_carried_out_are_refused_with_what_to_do(
    change: Any, arguments: tuple[str, ...], message: str, rows: list[dict[str, Any]], pair: TinyPair, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = write_rows(tmp_path / "texts.jsonl", [change(row) for row in rows[:12]])
    vectors = write_vectors(tmp_path / "v.parquet", random_vectors(12, pair.d_model))
    values = {"--vectors": ["--vectors", str(vectors), "num_activations=2"], "--ar": ["--ar", str(pair.av)]}
    ar = [] if "--ar" in arguments else ["--ar", str(pair.ar)]
    done = command(path, *ar, *(word for a in arguments for word in values.get(a, [a])), "cluster=inprocess", "gpus=0", "layer=1")
    assert done.exit_code in (1, 2)
    assert re.search(message, done.output + done.stderr), done.output


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"texts": "t.jsonl", "ar": "a", "av": "b"}, "leave one of the two out"),
        ({"texts": "t.jsonl"}, "texts .* are read by autoencoder.ar or the encoder"),
        ({"av": "a", "ar": "b", "max_text_tokens": 3}, "are of given texts"),
        ({"texts": "t.jsonl", "ar": "b", "max_text_tokens": 0}, "max_text_tokens=0 must be"),
    ],
)
def test_specs_that_contradict_themselves_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Autoencoder(**fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"row_id": "a", "text": "x"}\n{"row_id": \n', "line 2 of .* is not JSON"),
        ("[1]\n", "line 1 of .* is a list"),
    ],
)
def test_files_that_are_damaged_are_refused_by_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_texts_file(str(tmp_path / "texts.jsonl"))
    with pytest.raises(DataError, match=r"no file of texts at 'nowhere.jsonl'"):
        read_texts_file("nowhere.jsonl")
