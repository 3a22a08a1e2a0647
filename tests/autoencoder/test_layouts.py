"""Pairs of EasyNLA and nla-at-home: their golden fixtures, what must be refused of them, and what must be accepted.

The tolerances and both tables are those of tests/fixtures/layouts/README.md.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ksweep import Autoencoder, stats
from ksweep.autoencoder.base import ActivationFacts
from ksweep.autoencoder.family import family_of
from ksweep.autoencoder.nla.checkpoint import inspect_half, inspect_nla
from ksweep.autoencoder.nla.loading import load_nla_tokenizer
from ksweep.autoencoder.nla.models import NlaReconstructor, NlaVerbalizer
from ksweep.autoencoder.prompting import AddAfterBlock, ReplaceEmbedding
from ksweep.config.spec import PromptingOverrides
from ksweep.evaluation.models import Models
from ksweep.inference.engine import BuiltinEngine, DecodingOptions, DrawBatch, Request
from ksweep.inference.naive_engine import NaiveEngine
from ksweep.inference.prompts import FinishReason
from ksweep.stats.fve import mean_distance_baseline
from ksweep.utils.errors import CheckpointError, DataError
from tests.layout_fixtures import CASES, LayoutCase, layout_differences, load_pair
from tests.tiny_models import FIXTURES, prefilled

MERGED, LORA, NORM_KEPT, AT_HOME, RAW = CASES.values()
GEMMA_AV, GEMMA_AR = "av/iter_0000500", "ar/iter_0000500"
KITFT = FIXTURES / "qwen2_text"


@pytest.mark.parametrize("name", CASES)
def test_arrays_of_the_fixture_are_met(name: str) -> None:
    found = list(layout_differences(name))
    print("\n", *found, sep="\n")
    assert len(found) >= 6 and [d for d in found if not d.ok] == []


@pytest.mark.parametrize("name", CASES)
def test_prompts_stop_tokens_and_read_positions_are_the_expected_ones(name: str) -> None:
    case = CASES[name]
    (av, ar), said, said_ar = load_pair(case.spec()), case.av_said(), case.expected["ar"]
    assert list(av.prompt_ids) == said["prompt_token_ids"] and av.injection_position == said["injection_position"]
    stops = case.expected["stop_token_ids"] if "stop_token_ids" in case.expected else case.expected["av"]["stop_token_ids"]
    assert av.stop_token_ids == set(stops)
    rows = ar.prompts.ids(said_ar["texts"])
    assert rows == said_ar["token_ids"]
    positions = said_ar.get("read_positions", [len(row) - 1 for row in rows])
    assert [ar.prompts.read_position(row) for row in rows] == positions


@pytest.mark.parametrize("name", ["easynla merged", "easynla lora", "nla-at-home"])
def test_answers_are_parsed_as_their_own_code_parses_them(name: str) -> None:
    av, finish = load_pair(CASES[name].spec())[0], "stop"
    for example in CASES[name].expected["parsing"]:
        answer = example["response"] if "response" in example else example["answer"]
        assert av.parse(answer, finish)[0] == example["payload"], answer  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [MERGED, LORA])
def test_fve_of_all_pairs_is_theirs_and_their_own_evaluation_reads_higher(case: LayoutCase) -> None:
    """Their evaluation leaves out pairs with 2(1 - cos) >= 2; ksweep counts every draw."""
    said, arrays = case.expected["fve"], np.load(case.directory / "expected.npz")
    reconstructions = load_ar(case.spec()).reconstruct_texts(case.expected["ar"]["texts"][:6]).numpy()
    errors = stats.reconstruction_errors(reconstructions, arrays["activations"], "normalised")
    baseline = mean_distance_baseline(arrays["activations"])
    assert np.allclose(errors, said["diagonal_mse"], atol=1e-5)
    assert baseline.value == pytest.approx(said["baseline_raw_mean"], abs=1e-5)
    assert stats.fve(errors, baseline) == pytest.approx(said["fve_all"], abs=1e-5)
    assert stats.fve(errors[errors < 2], baseline) == pytest.approx(said["fve_valid_only"], abs=1e-5) and said["valid"] == 5


@pytest.mark.parametrize("case", [AT_HOME, RAW])
def test_greedy_answers_give_the_expected_payloads(case: LayoutCase) -> None:
    """Without the closing tag the whole answer counts; special tokens are left out."""
    av = load_pair(case.spec())[0]
    ids = np.load(case.directory / "expected.npz")[f"av_greedy_ids{case.suffix}"]
    length: FinishReason = "length"
    assert [av.parse(av.decode(row.tolist()), length)[0] for row in ids] == case.av_said()["greedy_payloads"]


# --- what must be refused ---


def sidecar(half: str, **changes: Any) -> Callable[[Path], None]:
    """Set dotted keys of a sidecar ("__" for "."); ... removes one."""

    def change(root: Path) -> None:
        path = root / half / "nla_meta.yaml"
        meta = yaml.safe_load(path.read_text())
        for key, value in changes.items():
            *sections, last = key.split("__")
            section = meta
            for name in sections:
                section = section.setdefault(name, {})
            if value is ...:
                section.pop(last, None)
            else:
                section[last] = value
        path.write_text(yaml.safe_dump(meta, allow_unicode=True))

    return change


def of_json(file: str, **changes: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file; ... removes one."""

    def change(root: Path) -> None:
        values = json.loads((root / file).read_text()) | changes
        (root / file).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return change


def tensors(file: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Edit the tensors of a safetensors file in place."""

    def change(root: Path) -> None:
        values = load_file(root / file)
        edit(values)
        save_file(values, root / file, metadata={"format": "pt"})

    return change


def first(values: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(values) if part in name)


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda values: values.pop(first(values, part))


def fill(part: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda values: [values[name].fill_(value) for name in values if part in name]


def rename(part: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda values: values.update({name.replace(part, new): values.pop(name) for name in list(values) if part in name})


def twice(values: dict[str, torch.Tensor]) -> None:
    name = first(values, "lora_B.default")
    values[name.replace(".default", "")] = values[name] + 1


def of_wrapper(values: dict[str, torch.Tensor]) -> None:
    name = first(values, "lora_B")
    values[name.replace("model.model.layers", "model.model.language_model.layers")] = values[name] + 1


def remove(*names: str) -> Callable[[Path], None]:
    return lambda root: [(root / name).unlink() for name in names] and None


def several(*changes: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda root: [change(root) for change in changes]


def swapped_tokens(half: str) -> Callable[[Path], None]:
    """Give two letters each other's ids."""

    def change(root: Path) -> None:
        path = root / half / "tokenizer.json"
        values = json.loads(path.read_text())
        vocabulary = values["model"]["vocab"]
        vocabulary["B"], vocabulary["C"] = vocabulary["C"], vocabulary["B"]
        path.write_text(json.dumps(values))

    return change


def turned_merges(half: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / half / "tokenizer.json"
        values = json.loads(path.read_text())
        values["model"]["merges"].reverse()
        path.write_text(json.dumps(values))

    return change


def run_config(**values: Any) -> Callable[[Path], Any]:
    """Write the nla_config.json of a run."""
    return lambda root: (
        (root / "av" / "nla_config.json").write_text(json.dumps(values))
        and shutil.copy(root / "av" / "nla_config.json", root / "ar")
    )


def copied_av(name: str) -> Callable[[Path], Any]:
    return lambda root: shutil.copytree(root / GEMMA_AV, root / name)


class Wrong(NamedTuple):
    """One change to a copy of a fixture, and what must be said of it."""

    name: str
    case: LayoutCase
    change: Callable[[Path], Any]
    message: str
    spec: Mapping[str, Any] = MappingProxyType({})


QWEN_AV, QWEN_AR = "av", "ar"
HEAD, CONFIG = "ar/value_head.safetensors", "ar/config.json"
AR_LORA = f"{GEMMA_AR}/ar_lora_value_head.safetensors"
AR_META = f"{GEMMA_AR}/ar_meta.json"
GEMMA_ADAPTER = f"{GEMMA_AV}/adapter_model.safetensors"
GEMMA_CONFIG = f"{GEMMA_AV}/adapter_config.json"
FULL = "full_attention"
WHITE = {"method": "whitened_zca_v1", "stats_path": "whitening_stats.npz", "stats_sha256": "0" * 64}
WRONG = [
    Wrong("token id", MERGED, sidecar(QWEN_AV, tokens__injection_token_id=535), "injection_token_id=535|marker token id is 535"),
    Wrong("left id", MERGED, sidecar(QWEN_AV, tokens__injection_left_neighbor_id=30), "between the tokens 29 and 337"),
    Wrong("right id", LORA, sidecar(GEMMA_AV, tokens__injection_right_neighbor_id=440), "between the tokens 295 and 441"),
    Wrong("kind", MERGED, sidecar(QWEN_AV, kind="other"), "kind='other'"),
    Wrong(
        "two markers", MERGED, sidecar(QWEN_AV, prompt_templates__actor="a {injection_char} b {injection_char}"), "has 2 places"
    ),
    Wrong("foreign field", LORA, sidecar(GEMMA_AV, prompt_templates__actor="a {injection_char} {topic}"), "'{topic}', a field"),
    Wrong("depth field", AT_HOME, sidecar("av", prompt_templates__av="{depth_pct} {injection_char}"), "'{depth_pct}', a field"),
    Wrong("marker field left", AT_HOME, sidecar("ar", tokens__injection_char=...), "lacks tokens.injection_char"),
    Wrong("whitened without block", MERGED, sidecar(QWEN_AV, extraction__norm="whitened_zca_v1"), "stated by both or by neither"),
    Wrong("block without norm", MERGED, sidecar(QWEN_AR, extraction__whitening=WHITE), "stated by both or by neither"),
    Wrong(
        "whitened without statistics", MERGED, sidecar(QWEN_AV, extraction__norm="whitened_zca_v1", extraction__whitening=WHITE),
        "trained on whitened activations .* Set autoencoder.whitening",
    ),
    Wrong("unknown norm", LORA, sidecar(GEMMA_AR, extraction__norm="pca_v1", extraction__whitening=WHITE), "known transform is"),
    Wrong("no layer", MERGED, sidecar(QWEN_AR, extraction__layer_index=...), "extraction.layer_index=None"),
    Wrong("width", LORA, sidecar(GEMMA_AV, extraction__d_model=32), "d_model=32, but the model .* hidden_size=48"),
    Wrong("raw mse", MERGED, sidecar(QWEN_AR, extraction__mse_scale=None), "mse_scale null"),
    Wrong("no head", MERGED, remove(HEAD), "the head of an AR"),
    Wrong("head's key", MERGED, tensors(HEAD, rename("weight", "value_head.weight")), "exactly one, named weight"),
    Wrong("NaN in the head", MERGED, tensors(HEAD, fill("weight", float("nan"))), "are NaN, infinite or larger"),
    Wrong("huge head", LORA, tensors(AR_LORA, fill("value_head", 3e38)), "are NaN, infinite or larger"),
    Wrong("AR of L blocks", MERGED, of_json(CONFIG, num_hidden_layers=2, layer_types=[FULL] * 2), "block 2|2 blocks|=2"),
    Wrong("AR of L+2 blocks", MERGED, of_json(CONFIG, num_hidden_layers=4, layer_types=[FULL] * 4), "lacks weights|=4"),
    Wrong("weight missing", MERGED, tensors("ar/model.safetensors", drop("layers.1.mlp.up_proj")), "lacks"),
    Wrong("meta of L", LORA, of_json(AR_META, ar_num_layers=2), "says 2 blocks, its sidecar layer 2, which needs 3"),
    Wrong("meta of L+2", LORA, of_json(AR_META, ar_num_layers=4), "says 4 blocks"),
    Wrong("meta of a merged AR", MERGED, of_json("ar/ar_meta.json", ar_num_layers=4), "says 4 blocks"),
    Wrong("rank", LORA, of_json(AR_META, lora_r=8), "in another shape"),
    Wrong("a rank of millions", LORA, of_json(GEMMA_CONFIG, r=3_000_000), "says rank 3000000"),
    Wrong("targets that are no pattern", LORA, of_json(AR_META, target_modules="("), "which is no pattern"),
    Wrong("scale of no module", LORA, of_json(GEMMA_CONFIG, alpha_pattern={"model.language_model.x": 1}), "alpha_pattern has"),
    Wrong("a flag of PEFT that is text", LORA, of_json(GEMMA_CONFIG, use_rslora="false"), "use_rslora='false', expected true or"),
    Wrong("key that PEFT does not know", AT_HOME, of_json("ar/adapter_config.json", gate=0.5), "has gate=0.5"),
    Wrong("two names of one tensor", LORA, tensors(AR_LORA, twice), "under two spellings: model.*lora_B"),
    Wrong("two spellings", LORA, tensors(GEMMA_ADAPTER, of_wrapper), "under two spellings: model.layers.*lora_B"),
    Wrong("targets", LORA, of_json(AR_META, target_modules=["q_proj"]), "has unexpected"),
    Wrong("lora_B missing", LORA, tensors(AR_LORA, drop("lora_B")), "it lacks"),
    Wrong("head missing", LORA, tensors(AR_LORA, drop("value_head")), "expected exactly one, named value_head.weight"),
    Wrong("AV lora_B zero", LORA, tensors(GEMMA_ADAPTER, fill("lora_B", 0)), "every lora_B is zero"),
    Wrong("AR lora_B zero", LORA, tensors(AR_LORA, fill("lora_B", 0)), "every lora_B is zero"),
    Wrong("at-home lora_B zero", AT_HOME, tensors("ar/adapter_model.safetensors", fill("lora_B", 0)), "every lora_B is zero"),
    Wrong("keys of nothing", LORA, tensors(GEMMA_ADAPTER, rename("q_proj", "query")), "has unexpected"),
    Wrong("fresh block", LORA, of_json(AR_META, ar_fresh_block=True), "ar_fresh_block=True"),
    Wrong("summary token", LORA, of_json(AR_META, summary_token_id=7), "summary_token_id=7"),
    Wrong("summary token of a merged AR", MERGED, of_json("ar/ar_meta.json", summary_token_id=0), "summary_token_id=0"),
    Wrong("unknown key of a LoRA", LORA, of_json(AR_META, read_position="mean"), "has read_position='mean'"),
    Wrong("no rsLoRA", LORA, of_json(AR_META, use_rslora=False), "has use_rslora=False"),
    Wrong("a final norm of neither kind", LORA, of_json(AR_META, final_norm_stripped=1), "final_norm_stripped=1, expected true"),
    Wrong("a flag that is text", AT_HOME, sidecar("av", training__chat_template="true"), "chat_template='true', expected"),
    Wrong("a flag that is a number", AT_HOME, sidecar("ar", training__mean_subtract=1), "training.mean_subtract=1, expected"),
    Wrong("AR as AV", MERGED, lambda _: None, "is an AR .* given as the AV", {"av": "ar"}),
    Wrong("LoRA AR as AV", LORA, lambda _: None, "is an AR .* given as the AV", {"av": GEMMA_AR}),
    Wrong("AV as AR", MERGED, lambda _: None, "the head of an AR", {"ar": "av"}),
    Wrong("at-home AV as AR", AT_HOME, lambda _: None, "given as the AR", {"ar": "av"}),
    Wrong("no base", LORA, lambda _: None, "lies over a base model that cannot be found", {"base": None}),
    Wrong("at-home without base", AT_HOME, lambda _: None, "lies over a base model that cannot be found", {"base": None}),
    Wrong("another marker", MERGED, sidecar(QWEN_AR, tokens__injection_char="㈏"), "together: marker"),
    Wrong("another layer", AT_HOME, sidecar("ar", extraction_layer_index=1), "together: layer is 2 in the AV and 1"),
    Wrong("layout of the spec", MERGED, lambda _: None, "kind='nla_dataset'", {"layout": "kitft"}),
    Wrong("stack without an adapter", MERGED, lambda _: None, "lies under an adapter", {"av_stack": ("base",)}),
    Wrong("a layer that is not its own", LORA, lambda _: None, "autoencoder.layer=1, but .* is of layer 2", {"layer": 1}),
    Wrong("unknown injection mode", AT_HOME, sidecar("av", training__injection_mode="add"), "training.injection_mode='add'"),
    Wrong(
        "layout of another trainer", LORA,
        several(sidecar(GEMMA_AR, kind="nla_model"), sidecar(GEMMA_AV, kind="nla_model", extraction__injection_scale=8.0)),
        "which EasyNLA alone writes", {"layout": "kitft"},
    ),
    Wrong("tokenizer of another model", MERGED, swapped_tokens("ar"), "tokenizers of AV and AR differ in B, C"),
    Wrong("tokenizer with other merges", AT_HOME, turned_merges("ar"), "tokenizers of AV and AR differ in .*order of merges"),
    Wrong("whitening of a raw pair", MERGED, lambda _: None, "was trained on raw activations", {"whitening": "x.npz"}),
    Wrong(
        "a scale that EasyNLA has not", LORA, lambda _: None, "injection_scale=5, but the vector is added to the output of block",
        {"prompting": PromptingOverrides(injection_scale=5)},
    ),
    Wrong("the AV in its own stack", LORA, lambda _: None, "would be applied twice", {"av_stack": (GEMMA_AV,)}),
    Wrong("the AR in the stack", AT_HOME, lambda _: None, "ar is an AR. Name what", {"av_stack": ("ar",)}),
    Wrong(
        "another layer in the stack", LORA, several(copied_av("sft"), sidecar("sft", extraction__layer_index=1)),
        "layer is 1 in .*sft, 2 in", {"av_stack": ("sft",)},
    ),
    Wrong("rank of the run", LORA, run_config(ar_lora_r=64), "has ar_lora_r=64, .* has lora_r=4"),
    Wrong(
        "targets of the run", LORA, several(of_json(AR_META, target_modules=["q_proj"]), run_config(lora_targets=["x"])),
        r"has lora_targets=\['x'\], .* target_modules="),
    Wrong("blocks of the run", MERGED, run_config(ar_num_layers=9), "has ar_num_layers=9, .* layer 2, which needs L . 1"),
    Wrong("injection as a mapping", LORA, run_config(injection={"mode": "replace"}), "expected a sentence"),
    Wrong("injection of another way", LORA, run_config(injection="replace the embedding row, scale 150"), "expected a sentence"),
    Wrong("rendered prompt of no text", LORA, run_config(actor_prompt_rendered=5), "nla_config.json has actor_prompt_rendered=5"),
    Wrong(
        "rendered prompt of other ids", MERGED,
        run_config(actor_prompt_ids=MERGED.av_said()["prompt_token_ids"], actor_prompt_rendered="foo"),
        "which differ. The tokenizer", {"prompting": PromptingOverrides()},
    ),
    Wrong("PCA-whitened AR", AT_HOME, sidecar("ar", training__pca_whiten=True), "training.pca_whiten=True"),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=[wrong.name for wrong in WRONG])
def test_wrong_files_are_refused_by_name(wrong: Wrong, tmp_path: Path) -> None:
    root = shutil.copytree(wrong.case.directory, tmp_path / "pair")
    wrong.change(root)
    changes = {key: str(root / value) if key in ("av", "ar") else value for key, value in wrong.spec.items()}
    changes |= {"av_stack": tuple(str(root / name) for name in wrong.spec["av_stack"])} if "av_stack" in wrong.spec else {}
    with pytest.raises((CheckpointError, DataError), match=wrong.message):  # before a job is submitted
        family_of(wrong.case.spec(root, **changes)).draws_identity()


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "NaN or infinite"), (0.0, "nothing but zeros")], ids=["NaN", "zeros"]
)
def test_vectors_without_a_direction_are_refused(value: float, message: str) -> None:
    av = load_pair(MERGED.spec())[0]
    with pytest.raises(DataError, match=message):
        av.prompts(torch.full((2, 48), value))
    with pytest.raises(DataError, match=r"takes vectors of shape \[activation, 48\]"):
        av.prompts(torch.ones(2, 47))


def test_text_that_pushes_the_marker_out_of_the_ar_prompt_is_refused() -> None:
    ar = load_pair(AT_HOME.spec())[1]
    with pytest.raises(DataError, match="was trained on 512 at most"):
        ar.reconstruct_texts(["word " * 600])


# --- what must be accepted ---

RIGHT = {
    "stage of any value": (MERGED, sidecar(QWEN_AR, stage="rl")),
    "unknown keys that inform": (LORA, sidecar(GEMMA_AV, notes="x", wandb={"run": "y"})),
    "scale of another width": (AT_HOME, sidecar("ar", extraction__mse_scale=59.87)),
    "targets as a list": (
        LORA,
        of_json(AR_META, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    ),
    "a whole number as JSON may have it": (LORA, of_json(AR_META, lora_alpha=8.0)),
    "no ar_meta beside a merged AR": (MERGED, remove("ar/ar_meta.json")),
    "a scale that is never used": (MERGED, sidecar(QWEN_AV, extraction__injection_scale=150.0)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_unusual_files_give_the_same_pair(name: str, tmp_path: Path) -> None:
    case, change = RIGHT[name]
    root = shutil.copytree(case.directory, tmp_path / "pair")
    change(root)
    expected = np.load(case.directory / "expected.npz")
    av, ar = load_pair(case.spec(root))
    vectors = torch.tensor(expected["activations"])
    assert np.abs(prefilled(av, vectors).logits.numpy() - expected["av_next_token_logits"]).max() < 1e-3
    texts = case.expected["ar"]["texts"]
    assert np.allclose(ar.reconstruct_texts(texts).numpy(), expected["ar_reconstructions"], atol=1e-3)


def test_sidecar_of_a_run_may_lie_above_its_checkpoints(tmp_path: Path) -> None:
    root = shutil.copytree(LORA.directory, tmp_path / "pair")
    for half in (GEMMA_AV, GEMMA_AR):
        shutil.move(root / half / "nla_meta.yaml", root / half / ".." / "nla_meta.yaml")
    family = family_of(LORA.spec(root))
    assert family.layer == 2
    before = family.draws_identity()["av"]
    (root / "av" / "nla_meta.yaml").write_text((root / "av" / "nla_meta.yaml").read_text() + "notes: changed\n")
    assert family_of(LORA.spec(root)).draws_identity()["av"] != before


def test_layout_is_part_of_the_keys_but_for_that_of_kitft() -> None:
    family = family_of(MERGED.spec())
    assert family.draws_identity()["av_layout"] == family.scores_identity()["ar_layout"] == "easynla"
    assert family_of(AT_HOME.spec()).draws_identity()["av_layout"] == "nla-at-home"


def test_anchor_beside_an_adapter_is_neither_loaded_nor_part_of_its_digest(tmp_path: Path) -> None:
    """EasyNLA keeps the frozen SFT adapter of its KL term in `reference/`, inside the checkpoint of RL."""
    root = shutil.copytree(LORA.directory, tmp_path / "pair")
    before = family_of(LORA.spec(root)).draws_identity()
    shutil.copytree(root / GEMMA_AV, root / GEMMA_AV / "reference")
    assert family_of(LORA.spec(root)).draws_identity() == before


@pytest.mark.parametrize("case", [LORA, AT_HOME])
def test_what_training_leaves_beside_an_adapter_is_not_part_of_its_digest(case: LayoutCase, tmp_path: Path) -> None:
    """The hub never downloads it; and what lies below an entry of a stack is another checkpoint."""
    root = shutil.copytree(case.directory, tmp_path / "pair")
    shutil.copytree(root / case.av, root / "sft")
    spec = case.spec(root, av_stack=(str(root / "sft"),))
    family = family_of(spec)
    before = family.draws_identity(), family.scores_identity()
    for directory in (case.av, case.ar, "sft"):
        for name in ("optim_latest.pt", "run_config.yaml"):
            (root / directory / name).write_text("state: 1")
    for name in ("critic", "reference"):
        shutil.copytree(root / case.av, root / "sft" / name)
    assert (family_of(spec).draws_identity(), family_of(spec).scores_identity()) == before


def test_halves_of_two_layouts_are_noted_with_the_field_that_states_one(tmp_path: Path) -> None:
    root = shutil.copytree(LORA.directory, tmp_path / "pair")
    sidecar(GEMMA_AV, kind="nla_model", extraction__injection_scale=150.0)(root)
    family = family_of(LORA.spec(root))
    facts = ActivationFacts(source="v", model=None, model_directory=None, layer=2, d_model=48)
    [note] = [note.text for note in family.check_activations(facts) if "autoencoder.layout" in note.text]
    assert "av/iter_0000500 is read by the rules of kitft" in note and "by those of easynla" in note


OF_OTHERS = {
    "a merged AR with its ar_meta.json": (MERGED, "ar", {"kind": "nla_model"}, {}, "ar_meta.json, .*autoencoder.layout=easynla"),
    "a prompt that begins the answer": (
        RAW, "av", {"training__method": "my_sft"}, {"prompting": PromptingOverrides(opening_tag="")},
        "prompt ends in <explanation>.* set autoencoder.layout=nla-at-home",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_OTHERS)
def test_files_that_speak_for_another_layout_are_noted(name: str, tmp_path: Path) -> None:
    case, role, changes, stated, message = OF_OTHERS[name]
    root = shutil.copytree(case.directory, tmp_path / "pair")
    half = getattr(case, role)
    sidecar(half, **changes)(root)
    info = inspect_half(case.spec(root, **stated), role)  # type: ignore[arg-type]
    assert info.layout == "kitft" and any(re.search(message, note.text) for note in info.notes)
    named = inspect_half(case.spec(root, **stated, layout="nla-at-home" if case is RAW else "easynla"), role)  # type: ignore[arg-type]
    assert not any(re.search(message, note.text) for note in named.notes)


@pytest.mark.parametrize("role", ["av", "ar"])
def test_refusals_of_files_of_nla_at_home_name_their_layout(role: str, tmp_path: Path) -> None:
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    sidecar(role, training__method="my_method")(root)
    with pytest.raises(CheckpointError, match=r"set autoencoder\.layout=nla-at-home"):
        inspect_half(AT_HOME.spec(root), role)  # type: ignore[arg-type]


def test_injection_of_each_layout_is_data() -> None:
    assert inspect_half(MERGED.spec(), "av").av_prompting.injection == AddAfterBlock(1)
    assert inspect_half(AT_HOME.spec(), "av").av_prompting.injection == ReplaceEmbedding(12.0)
    assert inspect_half(RAW.spec(), "av").av_prompting.injection == ReplaceEmbedding(1.5, multiplies=True)
    replaced = MERGED.spec(prompting=PromptingOverrides(injection="replace_embedding", injection_scale=3.0))
    assert inspect_half(replaced, "av").av_prompting.injection == ReplaceEmbedding(3.0)


# --- stacks of adapters ---


def low_rank(seed: int, name: str, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + len(name))
    return torch.randn(like.shape, generator=generator) * 0.05


def second_adapter(root: Path) -> Path:
    """Another adapter over the same modules, as RL on top of SFT leaves it."""
    rl = shutil.copytree(root / GEMMA_AV, root / "rl" / "iter_000100")
    tensors("rl/iter_000100/adapter_model.safetensors", lambda values: [
        value.copy_(low_rank(1, name, value)) for name, value in values.items()
    ])(root)  # fmt: skip
    of_json("rl/iter_000100/adapter_config.json", base_model_name_or_path="/cluster/runs/merged_sft")(root)
    return rl


@pytest.mark.slow
def test_stack_of_two_adapters_is_the_sum_of_both(tmp_path: Path) -> None:
    """W + s1 B1 A1 + s2 B2 A2, whether the SFT adapter is stacked or was merged into full weights; the order does not matter."""
    root = shutil.copytree(LORA.directory, tmp_path / "pair")
    rl, sft, base = second_adapter(root), root / GEMMA_AV, root / "base"
    stacked = load_av(LORA.spec(root, av=str(rl), av_stack=(str(sft),)))
    scale, name = 8 / 4**0.5, "model.layers.1.self_attn.q_proj.weight"
    expected = load_file(base / "model.safetensors")[name].float()
    for directory in (sft, rl):
        lora = load_file(directory / "adapter_model.safetensors")
        a, b = (lora[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
        expected = expected + scale * b @ a
    assert torch.allclose(stacked.model.state_dict()[name], expected, atol=1e-6)
    turned = load_av(LORA.spec(root, av=str(sft), av_stack=(str(rl),)))
    assert torch.allclose(turned.model.state_dict()[name], expected, atol=1e-6)

    merged = root / "merged"
    shutil.copytree(base, merged)
    load_av(LORA.spec(root)).model.save_pretrained(merged)
    over_merged = load_av(LORA.spec(root, av=str(rl), av_stack=(str(merged),)))
    assert torch.allclose(over_merged.model.state_dict()[name], expected, atol=1e-6)
    alone = load_av(LORA.spec(root, av=str(rl)))
    assert not torch.allclose(alone.model.state_dict()[name], expected, atol=1e-3)


def load_av(spec: Autoencoder) -> NlaVerbalizer:
    av = family_of(spec).load_verbalizer(("cpu",))
    assert isinstance(av, NlaVerbalizer)
    return av


def load_ar(spec: Autoencoder) -> NlaReconstructor:
    ar = family_of(spec).load_reconstructor(("cpu",))
    assert isinstance(ar, NlaReconstructor)
    return ar


def test_stack_is_part_of_the_digest_and_a_missing_base_is_asked_for(tmp_path: Path) -> None:
    root = shutil.copytree(LORA.directory, tmp_path / "pair")
    rl, sft = second_adapter(root), root / GEMMA_AV
    alone = family_of(LORA.spec(root, av=str(rl))).draws_identity()
    stacked = family_of(LORA.spec(root, av=str(rl), av_stack=(str(sft),))).draws_identity()
    assert alone["av"] != stacked["av"]
    with pytest.raises(CheckpointError, match=r"name that in autoencoder\.av_stack"):
        family_of(LORA.spec(root, av=str(rl), base=None)).draws_identity()
    with pytest.raises(CheckpointError, match="only the first entry may be a whole model"):
        family_of(LORA.spec(root, av=str(rl), av_stack=(str(sft), str(root / "base")))).draws_identity()


def test_ar_over_a_base_takes_that_of_the_adapter_beside_it(tmp_path: Path) -> None:
    root = shutil.copytree(LORA.directory, tmp_path / "pair")
    of_json(f"{GEMMA_AV}/adapter_config.json", base_model_name_or_path=str(root / "base"))(root)
    assert inspect_half(LORA.spec(root), "ar").base == family_of(LORA.spec(root, base=None)).pair[1].base  # type: ignore[attr-defined]


def test_ar_over_a_base_takes_the_one_that_its_own_sidecar_names(tmp_path: Path) -> None:
    """The AV's adapter of RL may lie over a merged SFT model, which its directory's sidecar says or does not say."""
    root = shutil.copytree(LORA.directory, tmp_path / "pair")
    merged = shutil.copytree(root / "base", root / "merged")
    tensors("merged/model.safetensors", fill("layers.1.mlp", 0.01))(root)
    of_json(f"{GEMMA_AV}/adapter_config.json", base_model_name_or_path=str(merged))(root)
    sidecar(GEMMA_AR, extraction__base_model=str(root / "base"))(root)
    sidecar(GEMMA_AV, extraction__base_model=str(root / "base"))(root)
    spec, facts = LORA.spec(root, base=None), ActivationFacts(source="v", model=None, model_directory=None, layer=2, d_model=48)
    family = family_of(spec)
    assert family.scores_identity() == family_of(LORA.spec(root)).scores_identity()
    assert any("whose weights differ" in note.text for note in family.check_activations(facts))
    shutil.copy(root / GEMMA_AV / "nla_meta.yaml", merged)
    assert family_of(spec).scores_identity() == family.scores_identity()
    assert not any("whose weights differ" in note.text for note in family_of(spec).check_activations(facts))
    with pytest.raises(CheckpointError, match=r"merged, which is an AV by its nla_meta.yaml. Set autoencoder.base"):
        family_of(LORA.spec(root, base=str(merged))).scores_identity()


def test_ars_over_the_bases_of_two_avs_are_two_models(tmp_path: Path) -> None:
    root = shutil.copytree(LORA.directory, tmp_path / "pair")
    shutil.copytree(root / "base", root / "base2")
    tensors("base2/model.safetensors", fill("layers.1.mlp", 0.01))(root)
    shutil.copytree(root / GEMMA_AV, root / "av2")
    of_json(f"{GEMMA_AV}/adapter_config.json", base_model_name_or_path=str(root / "base"))(root)
    of_json("av2/adapter_config.json", base_model_name_or_path=str(root / "base2"))(root)
    models, first, second = Models(("cpu",)), LORA.spec(root, base=None), LORA.spec(root, base=None, av=str(root / "av2"))
    ar = models.reconstructor(first)
    assert models.reconstructor(first) is ar and models.reconstructor(second) is not ar


def test_head_alone_never_lies_over_the_av(tmp_path: Path) -> None:
    """Beside an AV of full weights, which has a tokenizer where the head has none."""
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    path = head_ar(root, "value_head+frozen", {"weight": torch.eye(48)})
    shutil.copytree(root / "base", root / "full")
    shutil.copy(root / "av" / "nla_meta.yaml", root / "full")
    sidecar("full", training__method="full_ft_sft")(root)
    of_json("av/adapter_config.json", base_model_name_or_path=str(root / "base"))(root)
    for av in ("full", "av"):
        with pytest.raises(CheckpointError, match=r"holds a head alone .* Set autoencoder\.base"):
            family_of(AT_HOME.spec(root, av=str(root / av), ar=str(path), base=None)).scores_identity()


@pytest.mark.parametrize("has_head", [True, False])
def test_marker_of_an_ar_with_a_head_is_not_compared(has_head: bool, tmp_path: Path) -> None:
    """Its trainer writes one marker for all models, and the AR never sees it."""
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    path = head_ar(root, "value_head+frozen", {"weight": torch.eye(48)}) if has_head else root / "ar"
    ids = json.loads((root / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    sidecar(path.name, tokens={"injection_char": "~", "injection_token_id": ids["~"]})(root)
    family = family_of(AT_HOME.spec(root, ar=str(path)))
    if has_head:
        assert family.scores_identity()
    else:
        with pytest.raises(CheckpointError, match="together: marker"):
            family.scores_identity()


def test_marker_of_the_spec_is_that_of_the_av_alone() -> None:
    spec = AT_HOME.spec(prompting=PromptingOverrides(marker="㈎"))
    av, ar = family_of(spec).pair  # type: ignore[attr-defined]
    assert av.sidecar.marker_id is None and ar.ar_prompting.marker_id == 536


def test_ar_without_a_tokenizer_takes_that_of_the_av_or_of_the_base(tmp_path: Path) -> None:
    """`critic_latest` of an RL run: merged weights and head, nothing else."""
    root = shutil.copytree(MERGED.directory, tmp_path / "pair")
    for path in (root / "ar").iterdir():
        if path.name not in ("config.json", "model.safetensors", "value_head.safetensors", "nla_meta.yaml"):
            path.unlink()
    texts, expected = MERGED.expected["ar"]["texts"], np.load(MERGED.directory / "expected.npz")["ar_reconstructions"]
    beside = MERGED.spec(root, base=None)
    assert np.allclose(load_ar(beside).reconstruct_texts(texts).numpy(), expected, atol=1e-3)
    assert family_of(beside).scores_identity() == family_of(MERGED.spec(root)).scores_identity()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        inspect_half(beside, "ar")


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_what_is_taken_from_the_base_is_in_the_digest(name: str, tmp_path: Path) -> None:
    root = shutil.copytree(MERGED.directory, tmp_path / "pair")
    for path in (root / "av").iterdir():
        if "token" in path.name or path.name in ("chat_template.jinja", "merges.txt", "vocab.json"):
            path.unlink()
    before = family_of(MERGED.spec(root)).draws_identity()
    with (root / "base" / name).open("a") as file:
        file.write(" ")
    assert family_of(MERGED.spec(root)).draws_identity() != before


@pytest.mark.parametrize("named", [False, True])
def test_prompt_of_a_template_that_writes_the_date_is_the_same_tomorrow(named: bool, tmp_path: Path) -> None:
    root = shutil.copytree(MERGED.directory, tmp_path / "pair")
    template, config = root / "av" / "chat_template.jinja", root / "av" / "tokenizer_config.json"
    text = "{{ strftime_now('%d %b %Y') }}\n" + template.read_text()
    template.write_text(text)
    if named:  # as one of several
        template.unlink()
        both = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": text}]
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": both}))
    av = load_av(MERGED.spec(root))
    assert av.tokenizer.decode(av.prompt_ids).startswith("26 Jul 2024")
    assert ("av_template_date" in family_of(MERGED.spec(root)).draws_identity()) is named


# --- nla_config.json ---


def test_rendered_prompt_of_nla_config_decides_about_thinking(tmp_path: Path) -> None:
    root = shutil.copytree(MERGED.directory, tmp_path / "pair")
    ids = MERGED.av_said()["prompt_token_ids"]
    config = {
        "base_model": "tiny-fixture/qwen3-base",
        "layer": 2,
        "d_model": 48,
        "injection_char": "㈎",
        "injection_token_id": 536,
    }
    (root / "nla_config.json").write_text(json.dumps(config | {"actor_prompt_ids": ids, "injection": "after block 1"}))
    plain = MERGED.spec(root, prompting=PromptingOverrides())
    assert list(load_av(plain).prompt_ids) == ids
    (root / "nla_config.json").write_text(json.dumps(config | {"actor_prompt_ids": ids[:-1]}))
    with pytest.raises(CheckpointError, match="states a prompt of 72 tokens"):
        load_av(plain)
    (root / "nla_config.json").write_text(json.dumps(config | {"layer": 3}))
    with pytest.raises(CheckpointError, match=r"has layer=3, .* has extraction\.layer_index=2"):
        load_av(plain)


def test_prefill_follows_the_prompt_that_nla_config_states(tmp_path: Path) -> None:
    """The ids still say that thinking is off, whether the beginning of the answer is among them or not."""
    root = shutil.copytree(MERGED.directory, tmp_path / "pair")
    ids, spec = MERGED.av_said()["prompt_token_ids"], MERGED.spec(root, prompting=PromptingOverrides(prefill="- "))
    before = family_of(spec).draws_identity()
    begun = load_nla_tokenizer(inspect_half(spec, "av")).encode("- ", add_special_tokens=False)
    for stated in (ids, [*ids, *begun]):
        (root / "nla_config.json").write_text(json.dumps({"actor_prompt_ids": stated}))
        av = load_av(spec)
        assert list(av.prompt_ids) == [*ids, *begun] and not any("enable_thinking" in note.text for note in av.info.notes)
    assert family_of(spec).draws_identity().keys() - before.keys() == {"av_prompt"}
    (root / "nla_config.json").write_text(json.dumps({"actor_prompt_ids": []}))
    with pytest.raises(CheckpointError, match=r"actor_prompt_ids=\[\], expected a list of token ids"):
        inspect_half(spec, "av")


def test_rendered_text_of_nla_config_stands_for_its_ids(tmp_path: Path) -> None:
    root = shutil.copytree(MERGED.directory, tmp_path / "pair")
    said, plain = MERGED.av_said(), MERGED.spec(root, prompting=PromptingOverrides())
    config = {"actor_prompt_rendered": said["prompt_text"], "injection": "output of the second block, norm-matched"}
    (root / "nla_config.json").write_text(json.dumps(config))
    av = load_av(plain)
    assert list(av.prompt_ids) == said["prompt_token_ids"]
    assert any("describes the injection as 'output of the second block" in note.text for note in av.info.notes)
    (root / "nla_config.json").write_text(json.dumps({"critic_prompt_template": "Another: {explanation}"}))
    with pytest.raises(CheckpointError, match="has critic_prompt_template='Another"):
        load_ar(plain)


def test_nla_config_stands_for_a_missing_ar_meta(tmp_path: Path) -> None:
    """The one trainer that writes it uses alpha 16: the LoRA of the fixture, alpha 8, is scaled down to match."""
    root = shutil.copytree(LORA.directory, tmp_path / "pair")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    (root / AR_META).unlink()
    (root / "nla_config.json").write_text(json.dumps({"ar_lora_r": 4, "ar_num_layers": 3, "lora_targets": targets}))
    tensors(AR_LORA, lambda values: [value.mul_(0.5) for name, value in values.items() if "lora_B" in name])(root)
    texts, expected = LORA.expected["ar"]["texts"], np.load(LORA.directory / "expected.npz")["ar_reconstructions"]
    assert np.allclose(load_ar(LORA.spec(root)).reconstruct_texts(texts).numpy(), expected, atol=1e-3)


# --- ARs of nla-at-home with heads, and pairs for all layers ---


def plain_hidden(base: Path, ids: list[int], layer: int) -> torch.Tensor:
    """The output of block `layer` at the last token, by plain transformers over the whole base."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.inference_mode():
        hidden: torch.Tensor = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0, -1]
    return hidden


def head_ar(root: Path, method: str, heads: Mapping[str, torch.Tensor], **changes: Any) -> Path:
    """An AR of heads over the fixture's base, with nothing else in its directory."""
    path = root / "heads"
    path.mkdir()
    shutil.copy(root / "ar" / "nla_meta.yaml", path)
    single = list(heads) == ["weight"]
    save_file(dict(heads), path / ("value_head.safetensors" if single else "value_heads.safetensors"))
    template = "A description: <text>{explanation}</text> <vector>"
    sidecar("heads", training__method=method, prompt_templates__ar=template, tokens=..., **changes)(root)
    return path


TEXT = "a few words about barges"


def test_head_over_a_frozen_base_reads_the_last_token_without_normalising(tmp_path: Path) -> None:
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    weight = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
    path = head_ar(root, "value_head+frozen", {"weight": weight.bfloat16()})
    ar = load_ar(AT_HOME.spec(root, ar=str(path)))
    [ids] = ar.prompts.ids([TEXT])
    expected = weight.bfloat16().float() @ plain_hidden(root / "base", ids, 2)
    assert torch.allclose(ar.reconstruct_texts([TEXT])[0], expected, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"holds a head alone .* Set autoencoder\.base"):
        inspect_half(AT_HOME.spec(root, ar=str(path), base=None), "ar")


def test_head_beside_a_tuned_model_reads_that_model(tmp_path: Path) -> None:
    """A tuned backbone in one file was taken for a frozen one by its trainer's own reader."""
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    path = head_ar(root, "value_head+frozen", {"weight": torch.eye(48)})
    frozen = load_ar(AT_HOME.spec(root, ar=str(path))).reconstruct_texts([TEXT])
    sidecar("heads", training__method="value_head+finetune", training__backbone_layers=3)(root)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "base" / name, path)
    config = json.loads((path / "config.json").read_text())
    types = {"layer_types": config["layer_types"][:3]} if "layer_types" in config else {}
    of_json("heads/config.json", num_hidden_layers=3, **types)(root)
    weights = load_file(root / "base" / "model.safetensors")
    unused = ("model.norm.weight", "lm_head.weight")
    kept = {name: value for name, value in weights.items() if "layers.3." not in name and name not in unused}
    kept["model.layers.0.mlp.down_proj.weight"] *= 2
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    assert inspect_half(AT_HOME.spec(root, ar=str(path)), "ar").notes == ()
    sidecar("heads", training__method="value_head+frozen")(root)
    [note] = inspect_half(AT_HOME.spec(root, ar=str(path)), "ar").notes
    assert "trained over a frozen base (value_head+frozen), and holds a whole model" in note.text
    sidecar("heads", training__method="value_head+finetune")(root)
    tuned = load_ar(AT_HOME.spec(root, ar=str(path)))
    assert tuned.info.base is None and not torch.allclose(tuned.reconstruct_texts([TEXT]), frozen, atol=1e-3)
    # Its trainer cuts the model and leaves the depth of the base in config.json (train_ar_truncated.py).
    (path / "config.json").write_text(json.dumps(config))
    uncut = load_ar(AT_HOME.spec(root, ar=str(path)))
    assert torch.equal(uncut.reconstruct_texts([TEXT]), tuned.reconstruct_texts([TEXT]))
    save_file(
        kept | {"model.layers.3.mlp.up_proj.weight": weights["model.layers.3.mlp.up_proj.weight"]}, path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"unexpected .*layers\.3\.mlp\.up_proj"):
        inspect_half(AT_HOME.spec(root, ar=str(path)), "ar")


def copy_to(source: str, *targets: str) -> Callable[[Path], None]:
    return lambda root: [shutil.copy(root / source, root / target) for target in targets] and None


FROZEN, TUNED, LORA_SL, ALL_LAYERS = (
    "value_head+frozen", "value_head+finetune", "lora_sl", "per_layer_value_heads+frozen_backbone",
)  # fmt: skip
WEIGHTS, HEADS = "model.safetensors", "value_heads.safetensors"
FILES = [
    (TUNED, (), "leaves value_head.safetensors and a tuned model .* but it lacks a tuned model .* Download it again"),
    (TUNED, (copy_to(f"base/{WEIGHTS}", "heads/pytorch_model.bin"),), "lacks a tuned model .* Save its weights as safetensors"),
    (FROZEN, (copy_to(f"base/{WEIGHTS}", "heads/pytorch_model.bin"),), "holds a model as .bin, which would not be read"),
    (LORA_SL, (copy_to("ar/adapter_config.json", "heads"),), "also holds value_head.safetensors"),
    (FROZEN, (copy_to("ar/adapter_config.json", "heads"), remove("heads/value_head.safetensors")), "lacks value_head.safetenso"),
    (ALL_LAYERS, (), "lacks value_heads.safetensors and also holds value_head.safetensors"),
    (None, (copy_to(f"base/{WEIGHTS}", "heads"), copy_to("heads/value_head.safetensors", f"heads/{HEADS}")),
     "value_heads.safetensors beside a whole model"),
    (FROZEN, (sidecar("heads", training__backbone_layers=4),), "training.backbone_layers=4, expected L . 1 with the stated L"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "changes", "message"), FILES)
def test_files_of_an_ar_are_those_of_its_training_method(
    method: Any, changes: tuple[Callable[[Path], None], ...], message: str, tmp_path: Path
) -> None:
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    path = head_ar(root, method, {"weight": torch.eye(48)})
    for change in changes:
        change(root)
    with pytest.raises(CheckpointError, match=message):
        inspect_half(AT_HOME.spec(root, ar=str(path), layout="nla-at-home"), "ar")


@pytest.mark.parametrize("changes", [{"tokens": ...}, {"prompt_templates__ar": "A text: <text>{explanation}</text> <vector>"}])
def test_ar_without_a_head_needs_a_marker_to_be_read_at(changes: dict[str, Any], tmp_path: Path) -> None:
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    sidecar("ar", **{"prompt_templates__ar": "Of <text>{explanation}</text>"} | changes)(root)
    with pytest.raises(
        CheckpointError, match="has no head, so it is read at the marker of its prompt, and its sidecar gives none"
    ):
        inspect_half(AT_HOME.spec(root), "ar")
    assert inspect_half(AT_HOME.spec(root, prompting=PromptingOverrides(ar_readout=-1)), "ar").ar_prompting.marker is None


def universal(root: Path, **training: Any) -> None:
    """Make AV and AR those of all layers, as train_universal_av.py and train_universal_ar.py write them."""
    template = "At depth {depth_pct}%: <concept>{injection_char}</concept>\n\n<explanation>"
    common = {"variant": "universal", "extraction_layer_index": ..., "n_layers": 4}
    sidecar("av", prompt_templates={"av": template}, **common)(root)
    changes = {f"training__{name}": value for name, value in training.items()}
    sidecar("ar", prompt_templates=..., **common, **changes)(root)


@pytest.mark.parametrize(
    ("listed", "layer", "percent"),
    [(..., 0, 4), (..., 1, 25), (..., 2, 47), (..., 3, 71), ([10, 40, 70], 2, 40), ([70, 30], 2, 70)],
)
def test_pair_for_all_layers_is_told_the_listed_depth_nearest_to_its_layer(
    listed: Any, layer: int, percent: int, tmp_path: Path
) -> None:
    """100 L / 4 blocks is 0, 25, 50, 75; of 47 and 55 the nearer to 50 is 47, of 71 and 80 the nearer to 75 is 71."""
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    universal(root)
    for half in ("av", "ar"):
        sidecar(half, depth_percentages=listed)(root)
    family = family_of(AT_HOME.spec(root, layer=layer))
    assert family.layer == layer
    av, ar = inspect_half(family.autoencoder, "av"), inspect_half(family.autoencoder, "ar")
    assert av.av_prompting.message.startswith(f"At depth {percent}%: <concept>㈎")
    before = f"Summary of the following text from depth {percent}%: <text>"
    assert ar.ar_prompting.affixes == (before, "</text> <summary>㈎") and ar.num_layers == layer + 1


@pytest.mark.parametrize(("stated", "percent"), [({"n_layers": 4}, 47), ({"n_layers": 8}, 25), ({}, 47)])
def test_cut_ar_is_told_the_depth_in_the_whole_model(stated: dict[str, int], percent: int, tmp_path: Path) -> None:
    """3 of 4 blocks, L = 2: 100 L / 4 is 50, of 8 blocks 25; without n_layers the AV's 4 blocks count."""
    root = shutil.copytree(KITFT, tmp_path / "pair")
    before = family_of(Autoencoder(av=str(root / "nla-av"), ar=str(root / "nla-ar"))).scores_identity()
    template = "Depth {depth_pct}% <text>{explanation}</text>"
    sidecar("nla-ar", variant="universal", prompt_templates__ar=template, tokens__critic_suffix_ids=..., **stated)(root)
    spec = Autoencoder(av=str(root / "nla-av"), ar=str(root / "nla-ar"))
    if stated.get("n_layers") == 8:
        with pytest.raises(CheckpointError, match="n_layers=8, but its model has 4 blocks"):
            family_of(spec).scores_identity()
        assert "Depth 25%" in inspect_half(spec, "ar").ar_prompting.template
        return
    pair = family_of(spec).pair  # type: ignore[attr-defined]
    assert f"Depth {percent}%" in pair[1].ar_prompting.template
    assert family_of(spec).scores_identity()["ar_depth"] == percent and "ar_depth" not in before
    if not stated:
        with pytest.raises(CheckpointError, match=r"holds its first 3 blocks alone\. Add n_layers"):
            inspect_half(spec, "ar")


def test_number_of_blocks_of_a_pair_for_all_layers_is_that_of_its_base(tmp_path: Path) -> None:
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    universal(root)
    for half in ("av", "ar"):
        sidecar(half, n_layers=40)(root)
        with pytest.raises(CheckpointError, match="n_layers=40, but its model has 4 blocks"):
            inspect_half(AT_HOME.spec(root, layer=2), half)  # type: ignore[arg-type]


def test_heads_for_all_layers_take_the_layer_of_the_spec_without_a_variant(tmp_path: Path) -> None:
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    path = head_ar(root, ALL_LAYERS, {f"value_head.{i}.weight": torch.eye(48) for i in range(3)}, extraction_layer_index=...)
    family = family_of(AT_HOME.spec(root, ar=str(path), layer=2))
    assert family.layer == 2 and family.scores_identity()["ar_layer"] == 2
    assert inspect_half(AT_HOME.spec(root, ar=str(path), layer=1), "ar").layer == 1
    with pytest.raises(CheckpointError, match=r"trained for all layers: set autoencoder\.layer"):
        inspect_half(AT_HOME.spec(root, ar=str(path)), "ar")


def test_layer_of_the_spec_is_not_another_than_that_of_the_depth(tmp_path: Path) -> None:
    root = shutil.copytree(KITFT, tmp_path / "pair")
    sidecar("nla-ar", **dict.fromkeys(("extraction_layer_index", "critic", "extraction__layer_index"), ...))(root)
    with pytest.raises(CheckpointError, match=r"autoencoder\.layer=1, but .* is of layer 2 by its depth"):
        inspect_nla(root / "nla-ar", "ar", layer=1)


def test_layer_of_a_pair_for_all_layers_is_in_the_keys_of_draws_and_scores(tmp_path: Path) -> None:
    """Over ready-made vectors nothing else tells one layer from another."""
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    universal(root)
    first, second = (family_of(AT_HOME.spec(root, layer=layer)) for layer in (1, 2))
    assert first.draws_identity() != second.draws_identity() and first.scores_identity() != second.scores_identity()


def test_depth_is_filled_into_the_template_of_any_layout(tmp_path: Path) -> None:
    av = shutil.copytree(KITFT / "nla-av", tmp_path / "av")
    template = "From depth {depth_pct}%: <concept>{injection_char}</concept> Answer within <explanation> tags."
    sidecar("av", variant="universal", depth_percentages=[10, 40, 70], prompt_templates__av=template)(tmp_path)
    assert inspect_nla(av, "av").av_prompting.message.startswith("From depth ")
    assert "{" not in inspect_nla(av, "av").av_prompting.message
    sidecar("av", variant="matryoshka")(tmp_path)
    with pytest.raises(CheckpointError, match="variant='matryoshka'"):
        inspect_nla(av, "av")


def test_pair_for_all_layers_needs_a_layer_that_it_was_trained_for(tmp_path: Path) -> None:
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    universal(root, min_layer=2)
    with pytest.raises(CheckpointError, match=r"trained for all layers: set autoencoder\.layer"):
        family_of(AT_HOME.spec(root)).draws_identity()
    with pytest.raises(CheckpointError, match="trained for layers from 2 on"):
        family_of(AT_HOME.spec(root, layer=1)).scores_identity()
    sidecar("ar", extraction_layer_index=1)(root)
    with pytest.raises(CheckpointError, match="from 2 on, and its sidecar states 1"):
        inspect_half(AT_HOME.spec(root), "ar")


def test_subtracted_mean_of_the_layer_is_added_to_what_the_ar_gives(tmp_path: Path) -> None:
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    universal(root, mean_subtract=True)
    spec = AT_HOME.spec(root, layer=2)
    with pytest.raises(CheckpointError, match=r"layer_means\.pt is not beside it"):  # before a job is submitted
        inspect_half(spec, "ar")
    mean = torch.arange(48).float()
    torch.save({1: mean * 2, 2: mean}, root / "ar" / "layer_means.pt")
    with_mean = load_ar(spec).reconstruct_texts([TEXT])
    sidecar("ar", training__mean_subtract=False)(root)
    assert torch.allclose(with_mean, load_ar(spec).reconstruct_texts([TEXT]) + mean, atol=1e-5)
    sidecar("ar", training__mean_subtract=True)(root)
    torch.save({3: mean}, root / "ar" / "layer_means.pt")
    with pytest.raises(CheckpointError, match="holds no finite vector of 48 numbers for layer 2"):
        inspect_half(spec, "ar")


@pytest.mark.parametrize("key", ["value_head.{}.weight", "{}"])
def test_one_head_of_many_is_that_of_the_layer(key: str, tmp_path: Path) -> None:
    root = shutil.copytree(AT_HOME.directory, tmp_path / "pair")
    universal(root)
    generator = torch.Generator().manual_seed(0)
    heads = {key.format(i): torch.randn(48, 48, generator=generator) for i in range(3)}
    path = head_ar(root, "per_layer_value_heads+frozen_backbone", heads)
    ar = load_ar(AT_HOME.spec(root, ar=str(path), layer=1))
    [ids] = ar.prompts.ids([TEXT])
    expected = heads[key.format(1)] @ plain_hidden(root / "base", ids, 1)
    assert torch.allclose(ar.reconstruct_texts([TEXT])[0], expected, atol=1e-4)
    with pytest.raises(CheckpointError, match="has no head of layer 3"):
        load_ar(AT_HOME.spec(root, ar=str(path), layer=3))


# --- drawing ---


def test_draws_with_a_vector_behind_block_1_equal_those_of_the_naive_loop() -> None:
    """Blocks 0 and 1 are shared by all prompts up to the marker; nothing is added while tokens follow."""
    av = load_pair(MERGED.spec())[0]
    vectors = torch.tensor(np.load(MERGED.directory / "expected.npz")["activations"])
    requests = [Request(row=row, activation_key=row + 7, draw=k) for row in range(len(vectors)) for k in range(3)]
    batch = DrawBatch(vectors=vectors, requests=requests, temperature=1.0, seed=0)
    drawn = [
        {
            (d.request.row, d.request.draw): d.token_ids
            for _, d in engine.generate(av, [batch], DecodingOptions(max_new_tokens=12))
        }
        for engine in (BuiltinEngine(), NaiveEngine())
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 18 and len(set(drawn[0].values())) > 9
