"""What a user may ask for, how it is spelled, and what a mistake is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest

from ksweep import Activations, Autoencoder, Cell, RequestError, Sampling, Scoring, Sweep, replace_at
from ksweep.config.overrides import apply_overrides
from ksweep.config.resources import Resources
from ksweep.config.spec import cell_from_dict
from ksweep.config.sweep import known_keys
from ksweep.utils.errors import SpecError
from tests.config.helpers import overridden


@pytest.fixture
def sweep() -> Sweep:
    return Sweep(
        name="temp",
        cell=Cell(autoencoder=Autoencoder(av="av", ar="ar", base="b"), activations=Activations(model="m", text="t.txt")),
        axes={"sampling.temperature": (0.5, 1.0)},
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("sampling.temperature", -1.0), "temperature=-1.0 must be a finite number >= 0"),
        (("sampling.temperature", float("nan")), "finite"),
        (("sampling.top_p", 0.0), r"top_p=0.0 must lie in \(0, 1\]"),
        (("sampling.num_draws", 0), "num_draws=0 must be a whole number >= 1"),
        (("sampling.num_draws", 2.5), "whole number"),
        (("sampling.num_draws", True), "whole number"),
        (("scoring.ks", (1, 32)), "K=32 but sampling.num_draws=16"),
        (("scoring.ks", ()), "empty"),
        (("scoring.baseline", 0.0), "baseline=0.0"),
        (("scoring.level", 95.0), "level=95.0"),
        (("activations.positions", "first"), "random, midpoint, last, all, stride"),
        (("activations.text", None), "model and a text"),
        (("activations.min_position", 4096), "leaves nothing"),
        (("autoencoder.dtype", "int8"), "bfloat16, float16, float32"),
        (("autoencoder.encoder_prompt", "hard"), "encoder_prompt='hard' is not one of learned, text"),
        (("autoencoder.encoder_prompt", "text"), r"NLA pair \(ar\) has no trained prompt"),
        (("scoring.reference_replicates", -1), "reference_replicates=-1 must be a whole number >= 0"),
        (("sampling.seed", 2**64), "seed=18446744073709551616 is too large.* from 0 to 9,223,372,036,854,775,807"),
        (("scoring.seed", 2**63), "seed=9223372036854775808 is too large"),
        (("scoring.seed", -1), "scoring.seed=-1 must be a whole number >= 0"),
        (("activations.seed", 2**64), "activations.seed=18446744073709551616 is too large"),
        (("sampling.num_draws", 10**11), "num_draws=100000000000 is too large"),
        (("activations.num_activations", 10**12), "num_activations=1000000000000 is too large"),
        (("scoring.num_replicates", 10**10), "num_replicates=10000000000 is too large"),
        (("scoring.reference_replicates", 10**10), "reference_replicates=10000000000 is too large"),
        (("activations.num_activations", 10**8), "1,600,000,000 draws, and a cell holds at most 1,000,000,000"),
        (("sampling.temperature", 10**400), r"temperature=10\*\*399 or more must be a finite number"),
        (("autoencoder.av_stack", None), "av_stack=None must be a list of texts"),
        (("autoencoder.av_stack", (5,)), r"av_stack=\(5,\) must be a list of texts"),
        (("autoencoder.prompting.stop_tokens", 5), "stop_tokens=5 must be a list of texts"),
        (("autoencoder.prompting.chat_arguments", 5), "chat_arguments=5 must be values by name"),
        (("autoencoder.prompting.prefill", ["- "]), r"prefill=\['- '\] must be text"),
        (("activations.roles", None), "roles=None must be a list of texts"),
        (("activations.chat_arguments", "a"), "chat_arguments='a' must be values by name"),
        (("scoring.groups", 5), "groups=5 must be a list of texts"),
        (("scoring.metrics", None), "metrics=None must be a list of texts"),
        (("sampling.max_new_tokens", 10**5000), r"max_new_tokens=10\*\*\d+ or more is too large"),
    ],
)
def test_a_spec_that_cannot_mean_anything_is_refused_with_what_to_do(
    sweep: Sweep, change: tuple[str, object], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        replace_at(sweep.cell, *change)


def test_spec_with_lists_among_chat_arguments_can_be_hashed() -> None:
    """A planning pass asks once of each spec."""
    one, other = (Autoencoder(av="a", ar="b", prompting={"chat_arguments": {"tools": [value]}}) for value in (1, 2))  # type: ignore[arg-type]
    assert len({one, other, replace(one)}) == 2


@pytest.mark.parametrize(
    ("named", "fields"),
    [
        ("max_norm", {"max_norm": 3.0}),
        ("roles", {"roles": ("user",)}),
        ("chat_arguments", {"chat_arguments": {"enable_thinking": False}}),
        ("system_prompt", {"system_prompt": ""}),
        ("adapter_base", {"adapter_base": "b"}),
        ("positions=turn_ends", {"positions": "turn_ends"}),
        ("positions=prompt_end", {"positions": "prompt_end"}),
    ],
)
def test_settings_of_texts_are_refused_beside_vectors_and_those_of_vectors_beside_texts(
    named: str, fields: dict[str, Any]
) -> None:
    assert Activations(model="m", text="t", **fields).vectors is None
    with pytest.raises(SpecError, match=f"activations.{named} is for activations extracted from text"):
        Activations(vectors="v.parquet", **fields)
    assert Activations(vectors="v.parquet", model="m", text="t", min_position=3).vectors  # which give way to vectors
    with pytest.raises(SpecError, match="vector_column='act' is a column of ready-made vectors"):
        Activations(model="m", text="t", vector_column="act")


def test_cells_are_the_product_of_the_axes_in_order_without_duplicates(sweep: Sweep) -> None:
    grid = Sweep(name="g", cell=sweep.cell, axes={"sampling.temperature": (0.5, 1.0, 0.5), "sampling.seed": (0, 1)})
    assert [(c.sampling.temperature, c.sampling.seed) for c in grid.cells()] == [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1)]
    assert grid.labels()[1] == "temperature=0.5, seed=1"


def test_greedy_takes_one_draw_and_reports_k_one(sweep: Sweep) -> None:
    cell = replace_at(sweep.cell, "sampling.temperature", 0.0)
    assert cell.sampling.effective_num_draws == 1 and cell.ks == (1,)


def test_cell_survives_json(sweep: Sweep) -> None:
    import json
    from dataclasses import asdict

    cell = replace_at(sweep.cell, "scoring.ks", (1, 4))
    assert cell_from_dict(json.loads(json.dumps(asdict(cell)))) == cell


def test_key_value_sets_nested_fields_with_their_types(sweep: Sweep) -> None:
    changed = overridden(sweep, ["sampling.num_draws=32", "sampling.seed=1", "scoring.baseline=0.7335", "activations.layer=null"])
    assert changed.cell.sampling == Sampling(num_draws=32, seed=1)
    assert changed.cell.scoring.baseline == 0.7335 and changed.cell.activations.layer is None


def test_fields_that_depend_on_each_other_may_come_in_any_order(sweep: Sweep) -> None:
    for arguments in (["scoring.ks=[1,32]", "sampling.num_draws=32"], ["sampling.num_draws=32", "scoring.ks=[1,32]"]):
        assert overridden(sweep, arguments).cell.scoring.ks == (1, 32)


def test_one_value_for_an_axis_reduces_it_and_a_list_replaces_it(sweep: Sweep) -> None:
    one = overridden(sweep, ["sampling.temperature=0.7"])
    assert [c.sampling.temperature for c in one.cells()] == [0.7]
    many = overridden(sweep, ["sampling.temperature=[0,0.3]"])
    assert [c.sampling.temperature for c in many.cells()] == [0.0, 0.3]


def test_a_list_for_a_single_value_makes_a_new_axis(sweep: Sweep) -> None:
    changed = overridden(sweep, ["sampling.seed=[0,1,2]"])
    assert len(changed.cells()) == 6


def test_short_keys_are_found_and_ambiguous_ones_are_refused(sweep: Sweep) -> None:
    assert overridden(sweep, ["cluster=inprocess"]).resources == Resources(cluster="inprocess")
    assert overridden(sweep, ["layer=3"]).cell.activations.layer == 3  # as before autoencoder.layer came
    with pytest.raises(SpecError, match=r"'seed' could be activations.seed or sampling.seed or scoring.seed"):
        overridden(sweep, ["seed=1"])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("smapling.seed=1", r"unknown key 'smapling.seed': did you mean sampling.seed"),
        ("sampling.temprature=1", "did you mean sampling.temperature"),
        ("sampling.temperature=[]", "axis 'sampling.temperature' of sweep .* has no values"),
        ("autoencoder=[]", "axis 'autoencoder' of sweep .* has no values"),
        ("num_drawz=3", "did you mean sampling.num_draws"),
        ("sampling.num_draws=many", "expected a whole number"),
        ("sampling.num_draws=1.5", "expected a whole number"),
        ("sampling.temperature=hot", "expected a number"),
        ("sampling.temperature=0.7,1.0", r"give a list: 'sampling.temperature=\[0.7,1.0\]'"),
        ("resources.cluster=slrum", "expected one of auto, slurm, local, inprocess"),
        ("sampling.seed", "neither an option nor key=value"),
        ("autoencoder=3", "expected a mapping"),
    ],
)
def test_a_mistyped_override_is_told_what_was_expected(sweep: Sweep, argument: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        overridden(sweep, [argument])


def test_yaml_is_laid_under_the_command_line(sweep: Sweep, tmp_path: Path) -> None:
    config = tmp_path / "s.yaml"
    config.write_text("sampling:\n  num_draws: 8\n  temperature: [0.1, 0.2]\nscoring.num_replicates: 100\nname: mine\n")
    changed = overridden(sweep, ["sampling.num_draws=4"], config)
    assert changed.name == "mine" and changed.cell.sampling.num_draws == 4
    assert changed.cell.scoring == Scoring(num_replicates=100) and len(changed.cells()) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sampling:\n  num_drawz: 3\n", "did you mean"),
        ("- a\n- b\n", "expected keys"),
        ("a: [1\n", "YAML"),
        ("sampling: 3\n", "sampling=3"),
    ],
)
def test_a_yaml_file_with_a_mistake_is_refused(sweep: Sweep, tmp_path: Path, text: str, words: str) -> None:
    config = tmp_path / "s.yaml"
    config.write_text(text)
    with pytest.raises(SpecError, match=words):
        overridden(sweep, [], config)


def test_a_missing_yaml_file_is_named(sweep: Sweep, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no configuration file at .*nothing.yaml"):
        overridden(sweep, [], tmp_path / "nothing.yaml")


def test_a_new_verbalizer_forgets_the_base_of_the_old_pair(sweep: Sweep) -> None:
    assert overridden(sweep, ["autoencoder.av=x", "autoencoder.ar=y"]).cell.autoencoder == Autoencoder(av="x", ar="y")
    assert overridden(sweep, ["autoencoder.av=x", "autoencoder.base=z"]).cell.autoencoder.base == "z"


def test_an_axis_of_pairs_can_be_given_as_mappings(sweep: Sweep, tmp_path: Path) -> None:
    config = tmp_path / "s.yaml"
    config.write_text("autoencoder:\n- {av: a1, ar: r1}\n- {av: a2, ar: r2}\n")
    changed = overridden(sweep, ["sampling.temperature=1", "autoencoder.dtype=float32"], config)
    assert [(c.autoencoder.av, c.autoencoder.dtype) for c in changed.cells()] == [("a1", "float32"), ("a2", "float32")]


def test_a_checkpoint_ends_the_length_of_a_pairs_explanations_and_a_pair_the_text_prompt(sweep: Sweep) -> None:
    of_pair = replace_at(sweep.cell, "sampling.max_new_tokens", 40)
    changed = overridden(Sweep(name="s", cell=of_pair), ["autoencoder.checkpoint=c.pt", "encoder_prompt=text"])
    assert changed.cell.sampling.max_new_tokens == Sampling().max_new_tokens
    assert changed.cell.autoencoder == Autoencoder(checkpoint="c.pt", encoder_prompt="text")
    kept = overridden(Sweep(name="s", cell=of_pair), ["autoencoder.checkpoint=c.pt", "max_new_tokens=9"])
    assert kept.cell.sampling.max_new_tokens == 9
    back = overridden(changed, ["autoencoder.av=x", "autoencoder.ar=y"])
    assert back.cell.autoencoder == Autoencoder(av="x", ar="y")


WHOLE_NUMBERS = sorted(key for key, hint in known_keys().items() if int in (hint, *get_args(hint)) and key != "scoring.ks")


@pytest.mark.parametrize("key", WHOLE_NUMBERS)
def test_a_whole_number_that_no_store_could_hold_is_refused_with_its_field(sweep: Sweep, key: str) -> None:
    for huge in (10**30, 10**5000):
        with pytest.raises(SpecError, match=key.rpartition(".")[2]):
            apply_overrides(sweep, {key: huge} | ({"autoencoder.texts": "t.jsonl"} if "max_text" in key else {}))


def test_a_cell_with_the_largest_seed_has_the_type_of_the_registrys_column(sweep: Sweep) -> None:
    seed = replace_at(sweep.cell, "sampling.seed", 2**63 - 1).sampling.seed
    assert pa.scalar(seed, pa.int64()).as_py() == seed


@pytest.mark.parametrize(
    "name", ["a\nrm -rf x", "a\0b", "", " ", "-rf", ".hidden", "a/b", "x" * 300, "a ", "\x1b[31m", "a\u2028b"]
)
def test_a_name_that_a_shell_or_a_file_system_would_misread_is_refused_everywhere(sweep: Sweep, name: str) -> None:
    with pytest.raises(SpecError, match="name="):
        replace(sweep, name=name)
    for field in ("partition", "account", "qos", "constraint", "job_name"):
        with pytest.raises(SpecError, match=field):
            Resources(**{field: name})


@pytest.mark.parametrize("name", ["temp_sweep", "k-sweep.2", "other way round", "Größe=3", "T=0.5, 1.0", "layer20+21", "2026-11"])
def test_plain_names_stay_allowed(sweep: Sweep, name: str) -> None:
    assert replace(sweep, name=name).name == name == Resources(job_name=name).job_name


def test_options_of_sbatch_stay_allowed_as_slurm_writes_them() -> None:
    given = {"partition": "gpu,h100_80", "account": "lab-x", "qos": "normal", "constraint": "[rack1|rack2]&h100*2"}
    resources = Resources(**given, extra={"--reservation": "nightly", "gres": "gpu:h100:2", "exclude": "n[1-3]"})
    assert {name: getattr(resources, name) for name in given} == given


@pytest.mark.parametrize("extra", [{"a b": 1}, {"x\ny": 1}, {"reservation": "n\nrm -rf ~"}, {"reservation": "a\0"}, {"": 1}])
def test_an_option_of_sbatch_that_would_begin_another_line_is_refused(extra: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=r"resources\.extra"):
        Resources(extra=extra)


def test_a_line_break_within_a_line_of_setup_is_refused_and_a_block_of_lines_is_not() -> None:
    assert Resources(setup="module load cuda\n\texport A=1").setup_lines == ["module load cuda", "\texport A=1"]
    with pytest.raises(SpecError, match=r"resources\.setup"):
        Resources(setup=("module load cuda\nrm -rf ~",))


@pytest.mark.parametrize("key", ["registry", "vector_cache"])
@pytest.mark.parametrize("path", ["", " ", "a\0b"])
def test_a_directory_without_a_name_is_refused(sweep: Sweep, key: str, path: str) -> None:
    with pytest.raises(SpecError, match=f"{key}="):
        replace(sweep, **{key: path})


def test_interpolations_are_refused_in_yaml_and_on_the_command_line_and_never_resolved(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_TOKEN", "hf_secret")
    config = tmp_path / "from_elsewhere.yaml"
    for text in ("question: ${oc.env:A_TOKEN}", "autoencoder: {av: 'x/${oc.env:A_TOKEN}'}", "question: ${name}\nname: a"):
        config.write_text(text)
        with pytest.raises(SpecError, match="interpolation") as error:
            overridden(sweep, config=config)
        assert "hf_secret" not in str(error.value) and str(config) in str(error.value)
    with pytest.raises(SpecError, match="interpolation"):
        overridden(sweep, ["question=${oc.env:A_TOKEN}"])
    config.write_text(r"question: 'costs \${5}'")
    assert overridden(sweep, config=config).question == "costs ${5}"


def test_a_yaml_file_whose_aliases_stand_for_a_hundred_million_values_is_refused_at_once(sweep: Sweep, tmp_path: Path) -> None:
    levels = ["a0: &a0 1", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))]
    for text, words in (
        ("\n".join([*levels, "sampling: {temperature: *a8}"]), r"aliases it holds 2.35e\+08"),
        ("a: &a [*a]", "aliases it holds inf"),
        ("question: " + "x" * 2_000_000, "2,000,010 bytes"),
        ("question: " + "[" * 2_000, "not valid YAML"),
    ):
        (tmp_path / "bomb.yaml").write_text(text)
        with pytest.raises(SpecError, match=words) as error:
            overridden(sweep, config=tmp_path / "bomb.yaml")
        assert len(str(error.value)) < 1000


def test_an_empty_list_for_a_single_value_is_refused(sweep: Sweep) -> None:
    with pytest.raises(SpecError, match=r"sampling\.temperature.* has no values"):
        overridden(replace(sweep, axes={}), ["sampling.temperature=[]"])


def test_axes_of_more_cells_than_a_sweep_can_have_are_refused_before_they_are_made(sweep: Sweep) -> None:
    with pytest.raises(SpecError, match="1,000,000,000,000 cells"):
        replace(sweep, axes={"sampling.seed": tuple(range(10**6)), "sampling.num_draws": tuple(range(10**6))})
