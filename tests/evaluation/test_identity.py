"""What changes which key of a cell, and what must not; with real (tiny) checkpoints on disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ksweep import Activations, Autoencoder, Cell, Resources, Sampling, Sweep
from ksweep.config.spec import replace_at
from ksweep.evaluation.cell_record import identity_fields
from ksweep.evaluation.identity import CellKeys, cell_keys, cell_label
from ksweep.registry.earlier_draws import SplitKeys, split_identity
from ksweep.utils.errors import DataError, RequestError, SpecError
from ksweep.utils.fingerprint import fingerprint
from tests.activations.helpers import passages, random_vectors, write_jsonl, write_vectors
from tests.hub_server import HubRepository, serving_hub, use_hub
from tests.tiny_models import TinyPair, edit_sidecar, edit_weights, make_pair

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return make_pair(tmp_path_factory.mktemp("tiny"), "qwen2", layer=1)


@pytest.fixture
def cell(pair: TinyPair, tmp_path: Path) -> Cell:
    """On text."""
    text = write_jsonl(tmp_path / "text.jsonl", passages(20))
    return Cell(
        autoencoder=Autoencoder(av=str(pair.av), ar=str(pair.ar)),
        activations=Activations(model=str(pair.base), text=str(text), num_activations=10, min_position=4),
        sampling=Sampling(num_draws=8, temperature=0.7),
    )


@pytest.fixture
def ready_made(cell: Cell, pair: TinyPair, tmp_path: Path) -> Cell:
    """On a file of vectors."""
    path = write_vectors(tmp_path / "v.parquet", random_vectors(20, pair.d_model))
    return replace(cell, activations=Activations(vectors=str(path), num_activations=10))


def with_sidecar(cell: Cell, **extraction: Any) -> Cell:
    meta = {"kind": "nla_dataset", "extraction": extraction}
    Path(f"{cell.activations.vectors}.nla_meta.yaml").write_text(yaml.safe_dump(meta))
    return cell


def changed(before: CellKeys, after: CellKeys) -> set[str]:
    return {
        name for name in ("activations", "draws", "scores", "combined", "cell") if getattr(before, name) != getattr(after, name)
    }


@pytest.mark.parametrize(
    ("field", "value", "keys"),
    [
        ("sampling.num_draws", 16, {"cell"}),
        ("activations.num_activations", 12, {"cell"}),
        ("scoring.seed", 1, {"cell"}),
        ("scoring.baseline", 0.7, {"cell"}),
        ("scoring.ks", (1, 8), {"cell"}),
        ("sampling.temperature", 0.8, {"draws", "combined", "cell"}),
        ("sampling.top_p", 0.9, {"draws", "combined", "cell"}),
        ("sampling.max_new_tokens", 20, {"draws", "combined", "cell"}),
        ("sampling.seed", 1, {"draws", "combined", "cell"}),
        ("autoencoder.dtype", "float32", {"draws", "scores", "combined", "cell"}),
        ("autoencoder.ar_dtype", "float32", {"scores", "combined", "cell"}),
        ("autoencoder.ar_dtype", "bfloat16", set()),
        ("activations.seed", 1, {"activations", "draws", "combined", "cell"}),
        ("activations.dtype", "float32", {"activations", "draws", "combined", "cell"}),
        ("activations.min_position", 5, {"activations", "draws", "combined", "cell"}),
        ("activations.positions", "last", {"activations", "draws", "combined", "cell"}),
    ],
)
def test_keys_change_with_a_field_from_its_own_stage_on(cell: Cell, field: str, value: Any, keys: set[str]) -> None:
    assert changed(cell_keys(cell), cell_keys(replace_at(cell, field, value))) == keys


def test_keys_of_the_same_cell_are_the_same(cell: Cell) -> None:
    assert cell_keys(cell) == cell_keys(replace(cell))
    assert changed(cell_keys(cell), cell_keys(replace_at(cell, "sampling.temperature", 0.70))) == set()


def test_keys_of_a_layer_left_out_are_those_of_the_layer_said(cell: Cell) -> None:
    assert cell_keys(cell).layer == 1
    assert changed(cell_keys(cell), cell_keys(replace_at(cell, "activations.layer", 1))) == set()


def test_keys_ignore_where_files_lie(cell: Cell, pair: TinyPair, tmp_path: Path) -> None:
    there = tmp_path / "elsewhere"
    for name, source in (("my-av", pair.av), ("my-ar", pair.ar), ("my-base", pair.base)):
        shutil.copytree(source, there / name)
    text = shutil.copyfile(cell.activations.text or "", there / "words.jsonl")
    moved = replace(
        cell,
        autoencoder=Autoencoder(av=str(there / "my-av"), ar=str(there / "my-ar")),
        activations=replace(cell.activations, model=str(there / "my-base"), text=str(text)),
    )
    assert changed(cell_keys(cell), cell_keys(moved)) == set()


def test_keys_ignore_resources_registry_and_cache(cell: Cell) -> None:
    small = Sweep(name="a", cell=cell, resources=Resources(batch_size=4), registry="r", vector_cache="v")
    large = Sweep(name="b", cell=cell, resources=Resources(batch_size=512, tasks=8, gpus=0), question="why?")
    assert [cell_keys(c) for c in small.cells()] == [cell_keys(c) for c in large.cells()]


def test_keys_ignore_a_readme_beside_the_weights(cell: Cell, pair: TinyPair, tmp_path: Path) -> None:
    shutil.copytree(pair.av, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a pair")
    assert changed(cell_keys(cell), cell_keys(replace_at(cell, "autoencoder.av", str(tmp_path / "copy")))) == set()


@pytest.mark.parametrize(("role", "key"), [("av", "draws"), ("ar", "scores")])
def test_keys_of_other_weights_are_other_draws_or_scores_of_the_same_activations(
    cell: Cell, pair: TinyPair, tmp_path: Path, role: str, key: str
) -> None:
    shutil.copytree(getattr(pair, role), tmp_path / "copy")
    edit_weights(tmp_path / "copy", change=lambda state: state["model.embed_tokens.weight"][0].add_(1e-3))
    other = replace_at(cell, f"autoencoder.{role}", str(tmp_path / "copy"))
    assert changed(cell_keys(cell), cell_keys(other)) == {key, "combined", "cell"}


def test_keys_of_another_injection_scale_are_other_draws(cell: Cell, pair: TinyPair, tmp_path: Path) -> None:
    shutil.copytree(pair.av, tmp_path / "copy")
    edit_sidecar(tmp_path / "copy", extraction__injection_scale=10.0)
    other = replace_at(cell, "autoencoder.av", str(tmp_path / "copy"))
    assert changed(cell_keys(cell), cell_keys(other)) == {"draws", "combined", "cell"}


def test_keys_of_an_edited_text_are_other_activations(cell: Cell, tmp_path: Path) -> None:
    before = cell_keys(cell)
    path = Path(cell.activations.text or "")
    path.write_text(path.read_text().replace("stone", "wood"))
    assert changed(before, cell_keys(cell)) == {"activations", "draws", "combined", "cell"}


def test_keys_of_a_greedy_cell_ignore_seed_and_number_of_draws(cell: Cell) -> None:
    greedy = replace_at(cell, "sampling.temperature", 0.0)
    for field, value in (("sampling.seed", 5), ("sampling.num_draws", 64)):
        assert changed(cell_keys(greedy), cell_keys(replace_at(greedy, field, value))) == set()
    assert changed(cell_keys(greedy), cell_keys(cell)) == {"draws", "combined", "cell"}


def test_keys_of_vectors_follow_content_and_not_path(ready_made: Cell, pair: TinyPair, tmp_path: Path) -> None:
    before = cell_keys(replace_at(ready_made, "activations.layer", 1))
    copy = shutil.copyfile(ready_made.activations.vectors or "", tmp_path / "copy.parquet")
    moved = replace_at(replace_at(ready_made, "activations.vectors", str(copy)), "activations.layer", 1)
    assert changed(before, cell_keys(moved)) == set()
    write_vectors(copy, random_vectors(20, pair.d_model, seed=1))
    assert changed(before, cell_keys(moved)) == {"activations", "draws", "combined", "cell"}


def test_vectors_whose_sidecar_fits_are_accepted(ready_made: Cell, pair: TinyPair) -> None:
    assert cell_keys(with_sidecar(ready_made, layer_index=1, d_model=pair.d_model)).layer == 1


def test_vectors_asked_for_at_another_layer_than_their_sidecar_says_are_refused(ready_made: Cell) -> None:
    with pytest.raises(SpecError, match=r"activations\.layer=0, but the sidecar of .* says layer 1"):
        cell_keys(replace_at(with_sidecar(ready_made, layer_index=1), "activations.layer", 0))


def test_vectors_without_a_layer_in_their_sidecar_are_held_to_the_layer_asked_for(ready_made: Cell) -> None:
    assert cell_keys(with_sidecar(ready_made, norm="none")).layer == 1
    with pytest.raises(DataError, match="activations are of layer 2"):
        cell_keys(replace_at(ready_made, "activations.layer", 2))


def test_vectors_of_another_width_are_refused(ready_made: Cell, tmp_path: Path) -> None:
    narrow = write_vectors(tmp_path / "narrow.parquet", random_vectors(20, 16))
    cell = replace_at(ready_made, "activations.vectors", str(narrow))
    for known in ({}, {"layer_index": 1}):  # without a sidecar, and with one that leaves the width out
        with pytest.raises(DataError, match="16 dimensions"):
            cell_keys(with_sidecar(cell, **known) if known else cell)


def test_vectors_whose_sidecar_names_another_model_are_noted(ready_made: Cell) -> None:
    """A fine-tune of the base is a use of a pair like another."""
    before = cell_keys(replace_at(ready_made, "activations.layer", 1))
    keys = cell_keys(with_sidecar(ready_made, layer_index=1, base_model="someone/other-model"))
    assert [note.about for note in keys.notes] == ["base model"] and "someone/other-model" in keys.notes[0].text
    assert changed(before, keys) == set()


def test_keys_of_a_missing_checkpoint_name_the_path(cell: Cell) -> None:
    with pytest.raises(RequestError, match="/nowhere/av"):
        cell_keys(replace_at(cell, "autoencoder.av", "/nowhere/av"))


def test_label_says_pair_layer_temperature_and_top_p_where_it_cuts(cell: Cell) -> None:
    cell = replace_at(cell, "autoencoder.av", "owner/nla-qwen-av")
    assert cell_label(cell, 20) == "qwen L20 T=0.7"
    assert cell_label(replace_at(cell, "sampling.top_p", 0.95), 20) == "qwen L20 T=0.7 top_p=0.95"
    assert cell_label(replace_at(cell, "sampling.engine", "my.engines:Fast"), 20) == "qwen L20 T=0.7 engine=Fast"


def test_vllm_is_in_the_draws_key_of_its_own_cells_with_its_version(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for version in ("0.32.0", "0.33.0"):
        monkeypatch.setattr("ksweep.inference.vllm_engine.vllm_version", lambda version=version: version)
        keys.append(cell_keys(replace_at(cell, "sampling.engine", "vllm")))
    before = cell_keys(cell)
    assert changed(before, keys[0]) == changed(*keys) == {"draws", "combined", "cell"}
    assert keys[0].identity["draws"] == before.identity["draws"] | {
        "engine": {"engine": "vllm", "version": "1", "vllm": "0.32.0", "noise": "a seed for each draw"}
    }


def test_what_vllm_cannot_draw_is_refused_with_the_keys(cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksweep.inference.vllm_engine.vllm_version", lambda: "0.32.0")
    cell = replace_at(cell, "sampling.engine", "vllm")
    [tae] = (FIXTURES / "tae" / "gpt2_patch_all").glob("**/*.pt")
    easynla = FIXTURES / "layouts" / "easynla_qwen3_merged"
    for changes, reason in (
        ({"sampling.temperature": 0.005}, "vLLM takes temperature=0.005 for 0.01"),
        ({"autoencoder": Autoencoder(checkpoint=str(tae), base=str(tae.parent / "base"))}, "only the AV of an NLA pair has"),
        ({"autoencoder": Autoencoder(av=str(easynla / "av"), ar=str(easynla / "ar"))}, "added behind a block"),
        (
            {"autoencoder": Autoencoder(av="tests.toy.family:ToyVerbalizer", ar=cell.autoencoder.ar)},
            "only the AV of an NLA pair has",
        ),
    ):
        for field, value in changes.items():
            with pytest.raises(SpecError, match=f"sampling.engine=vllm does not draw .*{reason}.*built-in engine draws them"):
                cell_keys(replace_at(cell, field, value))


def test_name_of_a_cell_is_its_label_and_the_start_of_its_key(cell: Cell) -> None:
    keys = cell_keys(cell)
    assert keys.name == f"{keys.label} @{keys.cell[:8]}"
    assert keys.label == cell_label(cell, 1)


def test_keys_of_a_pair_are_those_that_its_stored_results_have(tmp_path: Path) -> None:
    pair, text = FIXTURES / "nla" / "qwen2_text", tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "words of row {i} and some more of them"}}\n' for i in range(20)))
    cell = Cell(
        autoencoder=Autoencoder(av=str(pair / "nla-av"), ar=str(pair / "nla-ar"), dtype="float32"),
        activations=Activations(
            model=str(pair / "base"), text=str(text), num_activations=10, rows="first", min_position=2, dtype="float32"
        ),
        sampling=Sampling(num_draws=4),
    )
    keys, prefix = cell_keys(cell), cell_keys(replace_at(cell, "scoring.selection", "prefix"))
    # Of extractor version 3 (batches of similar length) and sampler version 2 (slots). If they change on purpose, raise one.
    assert keys.activations == "d3ad13506846d575113e3801a565928b"
    assert keys.combined == "e16d676791fba0da91ca21357dba7f7d"
    assert (keys.draws, keys.scores) == ("6bd55489912ef3b966d7c2876f9e893f", "cba135e23fea2f707a024d1fe3c9cf37")
    assert keys.cell == "426076d6751ecf3d61a2cee8c5fba7eb"  # of statistics version 2
    assert prefix.combined == keys.combined and prefix.cell != keys.cell


@pytest.mark.parametrize(
    ("prompt", "combined"),
    [("learned", "f098e87b233e7ccef2b89ac6dcad183e"), ("text", "60d3a8ba2e04290b3720eb746d6bd366")],
)
def test_keys_of_a_checkpoint_are_those_that_its_stored_results_have(prompt: str, combined: str, tmp_path: Path) -> None:
    case, text = FIXTURES / "tae" / "gpt2_patch_all", tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "words of row {i} and some more of them"}}\n' for i in range(20)))
    [file] = case.glob("**/*.pt")
    cell = Cell(
        autoencoder=Autoencoder(checkpoint=str(file), base=str(case / "base"), dtype="float32"),
        activations=Activations(text=str(text), num_activations=10, rows="first", min_position=2, dtype="float32"),
        sampling=Sampling(num_draws=4),
    )
    keys = cell_keys(replace_at(cell, "autoencoder.encoder_prompt", prompt))
    assert (keys.activations, keys.combined) == ("1456886ebcb405a79188e30b121e8ebe", combined)
    assert keys.draws == "b596be3206f36a12a689e09663dfe58b"


@pytest.mark.parametrize("prompt", ["learned", "text", None])
def test_what_an_earlier_version_hashed_together_gives_the_keys_of_draws_and_scores(
    cell: Cell, prompt: str | None, tmp_path: Path
) -> None:
    if prompt is not None:
        case = FIXTURES / "tae" / "gpt2_patch_all"
        [file] = case.glob("**/*.pt")
        autoencoder = Autoencoder(checkpoint=str(file), base=str(case / "base"), encoder_prompt=prompt)  # type: ignore[arg-type]
        activations = replace(cell.activations, model=str(case / "base"))
        cell = replace(cell, autoencoder=autoencoder, activations=activations)
    keys = cell_keys(cell)
    of_ar = {name: value for name, value in keys.identity["scores"].items() if name not in ("metric", "dtype")}
    combined = keys.identity["draws"] | of_ar
    assert fingerprint(combined) == keys.combined
    assert split_identity(combined) == SplitKeys(keys.draws, keys.scores)


@pytest.mark.parametrize(
    ("width", "layer", "says"),
    [
        (None, 1, r"activations of .*base are of layer 1, but .* trained on layer 2: leave activations.layer out"),
        (48, 1, r"activations of .*v.parquet are of layer 1, but .* trained on layer 2: give it vectors of layer 2"),
        (12, None, r"v.parquet gives activations of width 12, but .* width 48, layer 2: give it those of its own model \("),
    ],
)
def test_activations_that_a_checkpoint_was_not_trained_on_are_refused_with_the_remedy(
    width: int | None, layer: int | None, says: str, tmp_path: Path
) -> None:
    case = FIXTURES / "tae" / "gpt2_patch_all"
    [file] = case.glob("**/*.pt")
    if width is None:
        text = write_jsonl(tmp_path / "text.jsonl", passages(20))
        activations = Activations(model=str(case / "base"), text=str(text), num_activations=10, layer=layer)
    else:
        path = write_vectors(tmp_path / "v.parquet", random_vectors(20, width))
        activations = Activations(vectors=str(path), num_activations=10)
    cell = Cell(
        autoencoder=Autoencoder(checkpoint=str(file), base=str(case / "base")), activations=activations, sampling=Sampling()
    )
    with pytest.raises(DataError, match=says):
        cell_keys(cell if width is None or layer is None else with_sidecar(cell, layer_index=layer))


def in_hub_cache(name: str, directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub id whose snapshot is a copy of a directory; nothing is asked of the hub."""
    from huggingface_hub import constants

    commit, repo = "0" * 40, cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(directory, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return name


def test_activations_of_a_fine_tune_of_the_base_are_noted_and_of_another_architecture_refused(
    cell: Cell, pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine_tune = in_hub_cache("someone/qwen2-dpo", pair.base, tmp_path / "hub", monkeypatch)
    [note] = cell_keys(replace_at(cell, "activations.model", fine_tune)).notes
    assert note.about == "base model"
    assert note.text == "The activations come from someone/qwen2-dpo, but the pair was trained on tiny/qwen2."
    other = make_pair(tmp_path / "other", "llama", layer=1).base
    in_hub_cache("someone/llama", other, tmp_path / "hub", monkeypatch)
    with pytest.raises(DataError, match=r"come from someone/llama, whose config.json says model_type=llama"):
        cell_keys(replace_at(cell, "activations.model", "someone/llama"))


def test_directory_that_may_be_the_base_is_noted_and_changes_no_key(cell: Cell, pair: TinyPair, tmp_path: Path) -> None:
    keys = cell_keys(cell)
    assert [note.text.partition(" that ")[0] for note in keys.notes] == ["Could not verify"]
    copy = shutil.copytree(pair.base, tmp_path / "copy")
    assert changed(keys, cell_keys(replace_at(cell, "activations.model", str(copy)))) == set()


@pytest.mark.parametrize(
    ("extraction", "says"),
    [
        ({"layer_index": 0}, r"activations are of layer 0, but AV .* trained on layer 1"),
        ({"layer_index": 1, "d_model": 16}, "32 dimensions and its sidecar says 16"),
        ({"norm": "whitened_zca_v1", "whitening": {"method": "zca"}}, "norm='whitened_zca_v1'"),
        ({"whitening": {"method": "zca"}}, "whitening="),
        ({"layer_index": 1, "position": "mean"}, "position='mean', which says how"),
    ],
)
def test_vectors_whose_sidecar_does_not_fit_the_pair_are_refused(ready_made: Cell, extraction: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        cell_keys(with_sidecar(ready_made, **extraction))


def test_pair_of_whitened_vectors_is_refused_before_anything_is_computed(cell: Cell, pair: TinyPair, tmp_path: Path) -> None:
    av = shutil.copytree(pair.av, tmp_path / "nla-av")
    edit_sidecar(av, extraction__norm="whitened_zca_v1")
    with pytest.raises(RequestError, match="norm='whitened_zca_v1'"):
        cell_keys(replace_at(cell, "autoencoder.av", str(av)))


# --- checkpoints on the model hub ---


def test_a_pair_in_folders_of_a_hub_repository_has_the_keys_of_its_local_copy_and_states_its_commits(
    pair: TinyPair, cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"iter_0000400/av": pair.av, "iter_0000400/ar": pair.ar, "base": pair.base}
    files = {f"{name}/{file.name}": file.read_bytes() for name, folder in folders.items() for file in folder.iterdir()}
    files |= {"optim_latest.pt": b"", "iter_0000200/av/model.safetensors": b""}
    with serving_hub() as hub:
        hub.repositories["owner/nla"] = HubRepository({"v1": files})
        use_hub(monkeypatch, hub.endpoint, str(tmp_path / "cache"))
        with monkeypatch.context() as here:
            here.chdir(tmp_path)
            on_hub = replace(
                cell,
                autoencoder=Autoencoder(av="owner/nla@v1/iter_0000400/av", ar="owner/nla@v1/iter_0000400/ar"),
                activations=replace(cell.activations, model="owner/nla@v1/base"),
            )
            keys, local = cell_keys(on_hub), cell_keys(cell)
    assert not changed(keys, local) and local.revisions == ()
    commit = HubRepository.commit(files)
    assert keys.revisions == tuple(f"owner/nla@{commit}/{name}" for name in sorted(folders))
    record = identity_fields(on_hub, keys)
    assert record["revisions"] == keys.revisions
