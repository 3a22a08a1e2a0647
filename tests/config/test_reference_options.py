"""Old names, each with its new one; what is warned about, what is refused, and the wrapper in a real process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ksweep import Activations, Autoencoder, Cell, Resources, Sampling, Scoring, Sweep, connect
from ksweep.config import reference_options
from ksweep.config.overrides import apply_overrides
from ksweep.config.reference_options import (
    OPTIONS,
    from_environment,
    options_document,
    read_config,
    translate,
    translate_checkpoint_config,
    translate_config,
)
from ksweep.config.resources import parse_time_limit
from ksweep.config.sweep import known_keys
from ksweep.utils.errors import SpecError
from tests.config.helpers import overridden

ROOT = Path(__file__).parents[2]

EXPECTED = {
    "num_gpus=8": ["resources.gpus=8"],
    "time=24:00:00": ['resources.time="24:00:00"'],
    "job_name=gemma": ["name=gemma"],
    "nodes=2": ["resources.nodes=2"],
    "nice=5000": ["resources.qos=preemptable", "resources.nice=5000"],
    "nice=true": ["resources.qos=preemptable", "resources.nice=true"],
    "nice=false": [],
    "force_direct=true": ["resources.cluster=local"],
    "force_direct=false": [],
    "partition=h100": ["resources.partition=h100"],
    "eval.checkpoint_path=/c/x.pt": ["autoencoder.checkpoint=/c/x.pt"],
    "eval.k_values=[4,1,2,2]": ["scoring.ks=[1,2,4]", "sampling.num_draws=4"],
    "eval.constant_k_mode=true": ["scoring.selection=prefix"],
    "eval.constant_k_mode=false": ["scoring.selection=order_statistics"],
    "eval.max_val_samples=1000": ["activations.num_activations=1000", "activations.rows=first"],
    "eval.max_val_samples=1e5": ["activations.num_activations=100000", "activations.rows=first"],
    "eval.temperature=0.7": ["sampling.temperature=0.7"],
    "eval.max_generation_batch_size=64": ["resources.batch_size=64"],
    "eval.num_positions=3": ["activations.positions_per_document=3"],
    "eval.min_pos=8": ["activations.min_position=8", "activations.candidates=not_padding"],
    "eval.position_selection_strategy=midpoint": ["activations.positions=midpoint", "activations.candidates=not_padding"],
    "eval.do_bootstrap=true": ["scoring.reference_replicates=1000"],
    "eval.do_bootstrap=false": ["scoring.reference_replicates=0"],
    "eval.cache_dir=vector_cache_8gpu": ["vector_cache=vector_cache_8gpu"],
    "eval.output_file=a.json": ["export_json=eval_results/a.json"],
    "eval.output_dir=./out": ["export_json=./out/k_sweep_results.json"],
    "eval.use_bf16=true": ["autoencoder.dtype=bfloat16"],
    "eval.use_bf16=false": ["autoencoder.dtype=float32"],
    "eval.use_hard_encoder_string=true": ["autoencoder.encoder_prompt=text"],
    "seed=3": ["sampling.seed=3", "activations.seed=3"],
    "eval.max_val_samples=null": [],
}


@pytest.mark.parametrize(("old", "new"), EXPECTED.items())
def test_an_old_option_becomes_its_new_one(old: str, new: list[str]) -> None:
    assert translate([old])[0] == new


def test_every_option_is_tried_and_has_a_name_or_a_reason() -> None:
    tried = {argument.partition("=")[0] for argument in EXPECTED}
    for option in OPTIONS:
        assert option.note and (option.keys or option.kind != "translated"), option.name
        if option.kind == "translated" and option.table != "checkpoint":
            assert option.name in tried


def test_every_new_key_is_a_field_of_the_spec() -> None:
    assert {key for option in OPTIONS for key in option.keys} <= set(known_keys())


VALUES: dict[str, dict[str, Any]] = {
    "num_gpus=3": {"resources.gpus": 3},
    "time=1-02:30:00": {"resources.time": "1-02:30:00"},
    "job_name=k27b": {"name": "k27b"},
    "nodes=2": {"resources.nodes": 2},
    "nice=500": {"resources.qos": "preemptable", "resources.nice": 500},
    "force_direct=true": {"resources.cluster": "local"},
    "partition=h100": {"resources.partition": "h100"},
    "eval.checkpoint_path=/c/run/checkpoint_step9_epoch1_.pt": {
        "autoencoder.checkpoint": "/c/run/checkpoint_step9_epoch1_.pt", "autoencoder.av": None, "autoencoder.ar": None,
    },
    "eval.k_values=[1,2,4,8,16,32]": {"scoring.ks": (1, 2, 4, 8, 16, 32), "sampling.num_draws": 32},
    "eval.constant_k_mode=true": {"scoring.selection": "prefix"},
    "eval.max_val_samples=100000": {"activations.num_activations": 100_000, "activations.rows": "first"},
    "eval.max_batches=5": {},
    "eval.temperature=0.9": {"sampling.temperature": 0.9},
    "eval.max_generation_batch_size=12": {"resources.batch_size": 12},
    "eval.vector_extraction_batch_size=16": {},
    "eval.dataloader_batch_size=128": {},
    "eval.dataloader_fwd_pass_batch_size=16": {},
    "eval.num_positions=3": {"activations.positions_per_document": 3},
    "eval.min_pos=7": {"activations.min_position": 7, "activations.candidates": "not_padding"},
    "eval.position_selection_strategy=midpoint": {"activations.positions": "midpoint", "activations.candidates": "not_padding"},
    "eval.do_bootstrap=true": {"scoring.reference_replicates": 1000},
    "eval.load_store=true": {},
    "eval.cache_dir=vector_cache_8gpu": {"vector_cache": "vector_cache_8gpu"},
    "eval.output_dir=./eval_results": {"export_json": "./eval_results/k_sweep_results.json"},
    "eval.output_file=full.json": {"export_json": "eval_results/full.json"},
    "eval.use_bf16=false": {"autoencoder.dtype": "float32"},
    "eval.use_hard_encoder_string=true": {"autoencoder.encoder_prompt": "text"},
    "eval.compute_variance_by_role=true": {},
    "eval.batch_size=8": {},
    "eval.generation_batch_size=32": {},
    "seed=7": {"sampling.seed": 7, "activations.seed": 7},
    "data.num_workers=4": {},
}  # fmt: skip
"""Every option of the submission script and of the evaluation, with what the sweep has afterwards; nothing where it warns."""

IN_CHECKPOINT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model_name": ({"model_name": "g-pt", "orig_model_name": "g-it"}, {"autoencoder.base": "g-pt", "activations.model": "g-it"}),
    "orig_model_name": ({"orig_model_name": "g-it"}, {"activations.model": "g-it"}),
    "tokenizer_name": ({"tokenizer_name": "g-it"}, {}),
    "layer_l": ({"layer_l": 45}, {"activations.layer": 45}),
    "t_text": ({"t_text": 8}, {"sampling.max_new_tokens": 8}),
    "attn_implementation": ({"attn_implementation": "eager"}, {}),
    "use_bf16": ({"use_bf16": False}, {"activations.dtype": "float32"}),
    "dataset.on_the_fly.enabled": ({"dataset": {"on_the_fly": {"enabled": True}}}, {}),
    "dataset.on_the_fly.pretokenized_path": (
        {"dataset": {"on_the_fly": {"pretokenized_path": "data/x"}}},
        {"activations.text": "data/x/validation", "activations.text_column": "input_ids", "activations.min_position": 8},
    ),
    "dataset.val_split": (
        {"dataset": {"val_split": "test", "on_the_fly": {"pretokenized_path": "data/x"}}}, {"activations.text": "data/x/test"},
    ),
    "dataset.on_the_fly.min_pos": (
        {"dataset": {"on_the_fly": {"min_pos": 3}}}, {"activations.min_position": 3, "activations.candidates": "not_padding"},
    ),
    "dataset.on_the_fly.position_selection_strategy": (
        {"dataset": {"on_the_fly": {"position_selection_strategy": "midpoint"}}}, {"activations.positions": "midpoint"},
    ),
    "dataset.on_the_fly.val_vectors_per_sequence": (
        {"dataset": {"on_the_fly": {"val_vectors_per_sequence": 4}}}, {"activations.positions_per_document": 4},
    ),
    "dataset.on_the_fly.shuffle_after_generation": ({"dataset": {"on_the_fly": {"shuffle_after_generation": True}}}, {}),
    "dataset.on_the_fly.filter_large_norms": (
        {"dataset": {"on_the_fly": {"filter_large_norms": True}}}, {"activations.max_norm": 300_000.0},
    ),
    "dataset.on_the_fly.max_activation_norm": (
        {"dataset": {"on_the_fly": {"filter_large_norms": True, "max_activation_norm": 2e5}}}, {"activations.max_norm": 2e5},
    ),
    "dataset.activation_dir": ({"dataset": {"activation_dir": "data/acts"}}, {}),
    "dataset.val_activation_dir": ({"dataset": {"val_activation_dir": "data/acts"}}, {}),
}  # fmt: skip


@pytest.fixture
def of_pair() -> Sweep:
    cell = Cell(
        autoencoder=Autoencoder(av="av", ar="ar"), activations=Activations(model="m", text="t.txt", layer=3),
        sampling=Sampling(max_new_tokens=40, num_draws=64), scoring=Scoring(num_replicates=9),
    )  # fmt: skip
    return Sweep(name="s", cell=cell, resources=Resources(cells_per_job=7))


def value_at(spec: Any, key: str) -> Any:
    for name in key.split("."):
        spec = getattr(spec, name)
    return spec


def expect(changed: Sweep, before: Sweep, expected: dict[str, Any]) -> None:
    """The fields have the values, and no other field has changed (but for what a checkpoint puts an end to)."""
    assert {key: value_at(changed, key) for key in expected} == expected
    of_a_pair = {"activations.model", "activations.layer", "sampling.max_new_tokens"}
    ended = of_a_pair if changed.cell.autoencoder.checkpoint else set()
    others = set(known_keys()) - set(expected) - ended
    assert {key: value_at(changed, key) for key in others} == {key: value_at(before, key) for key in others}


@pytest.mark.parametrize(("argument", "expected"), VALUES.items(), ids=VALUES)
def test_every_old_option_has_its_value_in_the_sweep(of_pair: Sweep, argument: str, expected: dict[str, Any]) -> None:
    for spelling in (argument, f"+{argument}"):
        of_checkpoint = "hard_encoder" in argument or "do_bootstrap" in argument
        also = ["eval.checkpoint_path=c.pt"] if of_checkpoint else []
        new, warnings = translate([*also, spelling])
        name = argument.partition("=")[0]
        assert expected or (new == [] and warnings[0].startswith(name) and "is left out" in warnings[0])
        changed = overridden(of_pair, new)
        before = overridden(of_pair, ["autoencoder.checkpoint=c.pt"]) if also else of_pair
        expect(flat(changed), flat(before), expected)


@pytest.mark.parametrize("name", IN_CHECKPOINT)
def test_every_option_of_a_checkpoints_config_has_its_value_in_the_sweep(of_pair: Sweep, name: str) -> None:
    config, expected = IN_CHECKPOINT[name]
    changed = apply_overrides(of_pair, translate_checkpoint_config(config))
    assert {key: value_at(flat(changed), key) for key in expected} == expected
    assert expected or changed == of_pair


def flat(sweep: Sweep) -> Any:
    """Groups of the cell and plain fields side by side, as keys name them."""
    groups = {group: getattr(sweep.cell, group) for group in ("autoencoder", "activations", "sampling", "scoring")}
    return SimpleNamespace(**{f.name: getattr(sweep, f.name) for f in fields(sweep)}, **groups)


def test_every_option_of_the_references_tables_is_tried() -> None:
    tried = {argument.partition("=")[0] for argument in VALUES} | IN_CHECKPOINT.keys()
    assert tried == {option.name for option in OPTIONS}


@pytest.mark.parametrize("argument", ["eval.batch_size=8", "+eval.generation_batch_size=16", "data.num_workers=4"])
def test_an_option_that_never_had_an_effect_is_accepted_and_said_so(argument: str) -> None:
    new, warnings = translate([argument])
    assert new == [] and "never had an effect" in warnings[0] and argument.lstrip("+").partition("=")[0] in warnings[0]


def test_what_only_the_checkpoints_config_decided_says_what_to_set_instead() -> None:
    new, warnings = translate(["dataset.on_the_fly.min_pos=3", "model_name=gpt2", "dataset.seq_len=512"])
    assert new == []
    assert "set activations.min_position and activations.candidates" in warnings[0] and "autoencoder.base" in warnings[1]
    assert "`dataset` settings never had an effect" in warnings[2]


def test_an_option_that_is_not_needed_says_why() -> None:
    (new, warnings) = translate(["eval.load_store=true", "eval.max_batches=5", "eval.max_batches=null"])
    assert new == [] and "always stored" in warnings[0] and len(warnings) == 1
    assert "activations.num_activations" in translate(["eval.max_batches=5"])[1][0]


def test_options_that_depend_on_each_other_may_come_in_any_order() -> None:
    for order in (1, -1):
        arguments = ["eval.max_val_samples=100", "eval.num_positions=4", "eval.output_file=a.json", "eval.output_dir=out"][
            ::order
        ]
        new = translate(arguments)[0]
        assert "activations.num_activations=400" in new and "export_json=out/a.json" in new


@pytest.mark.parametrize(
    "argument", ["+eval.k_values=[1,2]", "++eval.k_values=[1,2]", "'eval.k_values=[1, 2]'", "eval.eval.k_values=[2,1]"]
)
def test_hydra_spellings_are_understood(argument: str) -> None:
    assert translate([argument])[0] == ["scoring.ks=[1,2]", "sampling.num_draws=2"]


def test_new_names_and_dashed_options_pass_through_and_come_last() -> None:
    new, warnings = translate(
        ["sampling.num_draws=64", "--dry-run", "eval.k_values=[1,2]", "cluster=slurm", "--config-name=gpt2"]
    )
    assert new == ["scoring.ks=[1,2]", "sampling.num_draws=2", "sampling.num_draws=64", "--dry-run", "cluster=slurm"]
    assert "--config-name=gpt2 never had an effect" in warnings[0]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("eval.k_vales=[1]", "did you mean eval.k_values"),
        ("k_values=[1]", "did you mean eval.k_values"),
        ("num_gpu=8", "did you mean num_gpus"),
        ("eval.temprature=1", "did you mean eval.temperature"),
        ("sampling.num_drawz=1", "did you mean sampling.num_draws"),
        ("frobnicate=1", "docs/options.md"),
        ("eval.k_values", "neither an option nor key=value"),
        ("eval.k_values=[]", "whole numbers of at least 1"),
        ("eval.k_values=[0,1]", "whole numbers of at least 1"),
        ("eval.k_values=[1.5]", "expected a whole number"),
        ("eval.k_values=[1", "cannot be read"),
        ("eval.checkpoint_path=", None),
        ('eval.checkpoint_path=""', "is empty"),
        ("eval.use_bf16=perhaps", "expected true or false"),
        ("eval.position_selection_strategy=last", "random, midpoint"),
        ("time=soon", "not a Slurm time limit"),
        ("eval.output_dir=${hydra.cwd}", "write the value itself"),
        ("~eval.k_values", "leave it out"),
        ("eval=nowhere", "no file conf/eval/nowhere.yaml"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_hint(argument: str, words: str | None) -> None:
    if words is None:  # Hydra's way of saying null
        assert translate([argument]) == ([], [])
        return
    with pytest.raises(SpecError, match=words):
        translate([argument])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("24:00:00", 1440), ("0:00:30", 1), ("2-12", 3600), ("1-00:30", 1470), ("1-0:0:1", 1441)],
)
def test_slurm_time_limits(text: str, expected: int) -> None:
    assert parse_time_limit(text) == expected


OLD_FILE = """
defaults: [_self_]
eval:
  checkpoint_path: null
  k_values: [1, 2, 4]
  max_val_samples: 100
  max_batches: 5
  temperature: 1.0
  max_generation_batch_size: 32
  load_store: true
  cache_dir: vector_cache_gemma3
  output_dir: ./eval_results
  output_file: gemma3_quick.json
  batch_size: 8
dataset:
  on_the_fly: {enabled: true, pretokenized_path: data/SimpleStories}
data: {num_workers: 4}
"""


def test_a_file_of_the_old_shape_is_read(tmp_path: Path) -> None:
    path = tmp_path / "quick.yaml"
    path.write_text(OLD_FILE)
    settings, warnings = read_config(path)
    assert settings == {
        "scoring.ks": [1, 2, 4], "sampling.num_draws": 4, "activations.num_activations": 100, "activations.rows": "first",
        "sampling.temperature": 1.0,
        "resources.batch_size": 32, "vector_cache": "vector_cache_gemma3", "export_json": "./eval_results/gemma3_quick.json",
    }  # fmt: skip
    assert [text.split()[0] for text in warnings] == [
        "eval.max_batches", "eval.load_store", "eval.batch_size", "dataset.on_the_fly.enabled",
        "dataset.on_the_fly.pretokenized_path", "data.num_workers", "`defaults`",
    ]  # fmt: skip


def test_a_named_old_file_lies_under_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "gemma2_k_sweep_8gpu_cache copy.yaml").write_text(OLD_FILE)
    new, _ = translate(["eval.k_values=[1,8]", "+eval=gemma2_k_sweep_8gpu_cache copy", "eval.temperature=0.5"], tmp_path)
    assert "scoring.ks=[1,8]" in new and "sampling.num_draws=8" in new and "sampling.temperature=0.5" in new


def test_a_named_old_file_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text(OLD_FILE)
    with pytest.raises(SpecError, match=r"slow.yaml \(there are: quick\)"):
        translate(["+eval=slow"], tmp_path)


def test_of_a_setting_given_twice_the_outer_one_wins() -> None:
    assert translate_config({"eval": {"temperature": 0.5, "eval": {"temperature": 1.0, "min_pos": None}}})[0] == {
        "sampling.temperature": 0.5
    }


@pytest.mark.parametrize("text", ["sampling: {num_draws: 3}", "- 1", "eval: 3", "a: [1", ""])
def test_a_file_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"x\.yaml"):
        read_config(path)


def test_the_config_inside_a_checkpoint_says_what_was_explained() -> None:
    otf = {"enabled": True, "pretokenized_path": "data/wild", "min_pos": 8, "position_selection_strategy": "random"}
    otf |= {"val_vectors_per_sequence": 4, "filter_large_norms": True, "max_activation_norm": 2e5}
    config = {
        "model_name": "gemma-pt", "orig_model_name": "gemma-it", "tokenizer_name": "gemma-it", "layer_l": 45, "t_text": 8,
        "learning_rate": 1e-4, "dataset": {"on_the_fly": otf, "val_split": "test"}, "attn_implementation": "eager",
    }  # fmt: skip
    assert translate_checkpoint_config(config) == {
        "autoencoder.base": "gemma-pt", "activations.model": "gemma-it", "activations.layer": 45, "sampling.max_new_tokens": 8,
        "activations.text": "data/wild/test", "activations.text_column": "input_ids",
        "activations.min_position": 8, "activations.positions": "random", "activations.candidates": "not_padding",
        "activations.positions_per_document": 4, "activations.max_norm": 2e5,
    }  # fmt: skip
    alone = translate_checkpoint_config({"model_name": "gpt2", "orig_model_name": None})
    assert alone == {"autoencoder.base": "gpt2", "activations.model": "gpt2"}
    bare = translate_checkpoint_config({"dataset": {"on_the_fly": {"pretokenized_path": "data/wild"}}})
    assert bare["activations.text"] == "data/wild/validation" and bare["activations.min_position"] == 8
    unfiltered = {"dataset": {"on_the_fly": {"filter_large_norms": False, "max_activation_norm": 5.0}}}
    assert translate_checkpoint_config(unfiltered) == {}
    silent = {"dataset": {"on_the_fly": {"filter_large_norms": True}}}
    assert translate_checkpoint_config(silent) == {"activations.max_norm": 300_000.0}  # its default


def test_translated_arguments_are_what_a_sweep_takes() -> None:
    cell = Cell(autoencoder=Autoencoder(av="av", ar="ar"), activations=Activations(model="m", text="t.txt"))
    old = [
        "eval.k_values=[1,4]",
        "num_gpus=2",
        "nice=7",
        "time=2-0",
        "eval.temperature=0.5",
        'eval.cache_dir="a: b, c"',
        "seed=9",
    ]
    changed = overridden(Sweep(name="s", cell=cell), translate(old)[0])
    assert changed.cell.ks == (1, 4) and changed.cell.sampling.temperature == 0.5 and changed.cell.activations.seed == 9
    assert changed.resources.gpus == 2 and changed.resources.minutes == 2880 and changed.vector_cache == "a: b, c"
    assert changed.resources.qos == "preemptable" and changed.resources.nice == 7


def test_submission_options_come_from_the_environment_too() -> None:
    assert from_environment({"NUM_GPUS": "8", "TIME": "1:00:00", "NICE": "", "PATH": "/bin"}) == ["num_gpus=8", "time=1:00:00"]


def test_the_table_in_the_docs_is_the_table_in_the_code() -> None:
    written = (ROOT / "docs" / "options.md").read_text()
    assert written == options_document(), "run: python -m ksweep.legacy --table > docs/options.md"


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    script = tmp_path / "echo.py"
    script.write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    return script


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    known = {k: v for k, v in os.environ.items() if k.lower() not in reference_options.FROM_ENVIRONMENT}
    env = known | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=840, check=False)


def test_the_wrapper_runs_the_sweep_with_new_names(echo: Path) -> None:
    wrapper = str(ROOT / "scripts" / "submit_k_sweep.sh")
    done = run([wrapper, "eval.k_values=[1,2,4]", "eval.batch_size=8", "--dry-run"], EXPERIMENT=str(echo), NUM_GPUS="2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["resources.gpus=2", "scoring.ks=[1,2,4]", "sampling.num_draws=4", "--dry-run"]
    assert "warning: eval.batch_size never had an effect" in done.stderr


def test_the_wrapper_refuses_a_mistyped_option_with_exit_code_2(echo: Path) -> None:
    done = run([sys.executable, "-m", "ksweep.config.reference_options", str(echo), "eval.k_vals=[1]"])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown option 'eval.k_vals': did you mean eval.k_values")


def test_an_old_file_loads_as_a_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "quick.yaml"
    path.write_text(OLD_FILE)
    cell = Cell(autoencoder=Autoencoder(av="av", ar="ar"), activations=Activations(model="m", text="t.txt"))
    changed = overridden(Sweep(name="s", cell=cell), ["sampling.seed=2"], path)
    assert changed.cell.ks == (1, 2, 4) and changed.cell.sampling.seed == 2
    assert changed.export_json == "./eval_results/gemma3_quick.json" and "eval.batch_size never had an effect" in caplog.text


def test_a_config_of_the_old_shape_lies_under_old_arguments_of_the_wrapper(tmp_path: Path) -> None:
    """Options that depend on each other do so across file and command line."""
    path = tmp_path / "quick.yaml"
    path.write_text(OLD_FILE)
    for spelling in (["--config", str(path)], [f"--config={path}"]):
        new, warnings = translate([*spelling, "eval.num_positions=3", "eval.output_dir=out", "--no-charts"])
        assert "activations.num_activations=300" in new and "export_json=out/gemma3_quick.json" in new
        assert new[-1] == "--no-charts" and any("eval.batch_size" in text for text in warnings)


def test_a_checkpoint_whose_own_data_nobody_asked_for_is_told() -> None:
    """The reference always took it; the experiment's text would stand there in silence."""
    assert "--checkpoint-data" in translate(["eval.checkpoint_path=c.pt"])[1][0]
    for more in ("--checkpoint-data", "activations.text=t.jsonl", "text=t.jsonl", "activations.vectors=v.parquet"):
        assert translate(["+eval.checkpoint_path=c.pt", more])[1] == []
    assert translate(["eval.checkpoint_path=null"]) == ([], [])


def test_dashed_options_keep_their_value(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    path.write_text("sampling: {num_draws: 3}")
    given = ["--config", str(path), "--base", "models/a b", "--checkpoint-data", "--config-name", "gpt2", "eval.k_values=[2]"]
    new, warnings = translate(given)
    assert new == [
        "scoring.ks=[2]", "sampling.num_draws=2", f"--config={path}", "--base=models/a b", "--checkpoint-data",
    ]  # fmt: skip
    assert [text.split()[0] for text in warnings] == ["--config-name=gpt2"]


TAE = ROOT / "tests" / "fixtures" / "tae" / "gpt2_patch_all"
SHAPE = """
eval:
  k_values: [1, 2, 4]

  output_dir: {out}
  output_file: quick.json

  max_batches: null
  temperature: 1.0
  batch_size: 8
  max_generation_batch_size: 16
  dataloader_batch_size: 16
  vector_extraction_batch_size: 8
  dataloader_fwd_pass_batch_size: 8
  use_bf16: false
  num_positions: 1
  max_val_samples: 12
  do_bootstrap: false
  load_store: false
  cache_dir: {out}/vectors

dataset:
  activation_dir: "./data/train"
  on_the_fly:
    enabled: false
    generation_batch_size: 32

data:
  num_workers: 0
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    source = random.Random(0)
    words = "the of and to in is was he for it with as his on be at by had".split()  # noqa: SIM905
    rows = [{"text": " ".join(source.choices(words, k=20)), "document": f"d{i // 2}"} for i in range(20)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "text.jsonl"


@pytest.mark.slow
def test_the_old_command_line_runs_a_sweep(text: Path, tmp_path: Path) -> None:
    """A config with arguments beside it, through the wrapper, in a process of its own, on the CPU."""
    checkpoint = next(TAE.glob("*.pt"))
    ours = [
        f"activations.text={text}", "min_position=4", "activations.dtype=float32", f"registry={tmp_path / 'registry'}",
        "--no-charts",
    ]  # fmt: skip
    old = ["num_gpus=0", "time=1:00:00", "nice=", "force_direct=true", f"+eval.checkpoint_path={checkpoint}"]
    (tmp_path / "quick.yaml").write_text(SHAPE.format(out=tmp_path))
    old += ["--config", str(tmp_path / "quick.yaml"), "+eval.k_values=[1,2,8]", "+eval.output_file=other.json"]
    done = run([str(ROOT / "scripts" / "submit_k_sweep.sh"), *old, *ours])
    assert done.returncode == 0, done.stderr
    assert "warning: eval.dataloader_batch_size is not needed here" in done.stderr
    document = json.loads((tmp_path / "other.json").read_text())
    assert document["checkpoint_path"] == str(checkpoint)
    assert [row["k"] for row in document["results_by_k"]] == [1, 2, 8]
    assert {len(row["mse_values"]) for row in document["results_by_k"]} == {12}
    with connect(tmp_path / "registry") as connection:
        recorded = "SELECT checkpoint, sweep, num_draws, max_new_tokens, status FROM runs"
        assert connection.execute(recorded).fetchall() == [(str(checkpoint), "k_sweep", 8, 8, "finished")]
