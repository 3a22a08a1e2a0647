"""A series of checkpoints as an axis: what a pattern stands for, in which order, under which labels, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from ksweep import Activations, Autoencoder, Cell, Sweep
from ksweep.config.overrides import apply_overrides, parse_overrides
from ksweep.config.series import expand_series
from ksweep.utils.checkpoint_series import step_of, steps_of
from ksweep.utils.errors import CheckpointError, SpecError
from tests.hub_server import HubRepository, serving_hub, use_hub

ACTIVATIONS = Activations(model="base", text="text.jsonl")


def sweep_of(av: str = "av", ar: str = "ar", **axes: tuple[object, ...]) -> Sweep:
    cell = Cell(autoencoder=Autoencoder(av=av, ar=ar), activations=ACTIVATIONS)
    return Sweep(name="series", cell=cell, axes={name.replace("__", "."): values for name, values in axes.items()})


def pairs(sweep: Sweep) -> list[tuple[str | None, str | None]]:
    return [(cell.autoencoder.av, cell.autoencoder.ar) for cell in sweep.cells()]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(here: Path, steps: Iterable[object], *halves: str) -> None:
    for step in steps:
        for half in halves:
            (here / "runs" / f"iter_{step}" / half).mkdir(parents=True)


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("runs/iter_0000500/av", 500),
        ("owner/name@v1/iter_000400", 400),
        ("owner/name@step143000", 143000),
        ("out/checkpoint-300", 300),
        ("out/checkpoints/40/ar", 40),
        ("x/checkpoint_step9_epoch1_.pt", 9),
        ("a/global_step12/b/step3", 3),
        ("owner/nla-qwen2.5-7b-L20-av", None),
        ("rl-lora/p0.03", None),
        ("step1.5/av", None),
        ("stepwise/av", None),
        ("kilter_3/av", None),
        ("runs/v2/av_step400", 400),
        ("runs/iter_5/lora.v2/av-iter_6", 6),
        ("owner/nla-iter3@main/iter_400/av", 400),
        ("owner/nla@exp-step7", 7),
        ("x_step900.pt", 900),
        ("stepfun/step3-7b-av", None),
        ("qwen-step3-av", None),
        ("runs/x/qwen-step3-av", None),
        ("owner/model-iter3", None),
        ("owner/model-iter3/av", None),
        ("owner/step3@main/av", None),
        ("runs/steps_10k", None),
        ("runs/step_1e3", None),
    ],
)
def test_the_step_that_a_path_states(path: str, step: int | None) -> None:
    assert step_of(path) == step


def test_what_names_a_repository_of_the_hub_is_no_step() -> None:
    assert step_of("owner/step3") == 3, "a path like runs/step3"
    sources = ("owner/step3", "owner/step3/av", "owner/step3@main", "owner/step3@v1/iter_400/av", "owner/step3/iter_400")
    assert [step_of(source, {"owner/step3"}) for source in sources] == [None, None, None, 400, 400]


def test_steps_are_of_paths_that_differ_in_nothing_else() -> None:
    assert steps_of(["runs/iter_90/av", "runs/iter_0100/av"]) == [90, 100]
    assert steps_of(["a/step1/ar", "b/step1/ar"]) is None and steps_of(["a/step1/ar", "b/step2/ar"]) is None
    assert steps_of(["a/step1", "a/final"]) is None
    assert steps_of(["owner/nla-step100-av", "owner/nla-step200-av"]) == [100, 200]
    assert steps_of(["a/steps_1k", "a/steps_2k"]) is None


def test_a_series_of_one_half_is_an_axis_by_step_with_the_steps_as_labels(here: Path) -> None:
    make(here, ("0000900", "0001000", "0000050", "0000060.tmp"), "ar")
    sweep = expand_series(sweep_of(ar="runs/iter_*/ar", sampling__temperature=(0.5, 1.0)))
    ars = [f"runs/iter_{step}/ar" for step in ("0000050", "0000900", "0001000")]
    assert sweep.axes["autoencoder.ar"] == tuple(ars)
    assert sweep.labels()[:3] == ["temperature=0.5, step=50", "temperature=0.5, step=900", "temperature=0.5, step=1000"]
    assert expand_series(sweep) is sweep, "nothing is left to expand"


def test_files_beside_the_directories_of_a_series_are_no_checkpoints_of_it(here: Path) -> None:
    make(here, (100, 200), "av")
    for name in ("iter_100.log", "iter_300", "iter_900.pt"):
        (here / "runs" / name).touch()
    found = ["runs/iter_100", "runs/iter_200"]
    assert expand_series(sweep_of(av="runs/iter_*")).axes == {"autoencoder.av": tuple(found)}
    files = Autoencoder(checkpoint="runs/iter_*")
    assert expand_series(replace(sweep_of(), cell=Cell(autoencoder=files, activations=ACTIVATIONS))).axes == {
        "autoencoder.checkpoint": (*found, "runs/iter_900.pt")
    }
    with pytest.raises(CheckpointError, match=r"no AV matches .*, only files do \(runs/iter_100\.log, runs/iter_900\.pt\)"):
        expand_series(sweep_of(av="runs/*.*"))


def test_series_of_both_halves_vary_together(here: Path) -> None:
    make(here, (300, 20, 1000), "av", "ar")
    sweep = expand_series(sweep_of(av="runs/iter_*/av", ar="runs/iter_*/ar"))
    assert pairs(sweep) == [(f"runs/iter_{step}/av", f"runs/iter_{step}/ar") for step in (20, 300, 1000)]
    assert sweep.labels() == ["step=20", "step=300", "step=1000"]


def test_a_step_in_the_middle_of_names_orders_and_pairs_a_series(here: Path) -> None:
    for name in ("iter_90_av", "iter_100_av", "iter_90_ar", "iter_100_ar"):
        (here / "runs" / name).mkdir(parents=True)
    sweep = expand_series(sweep_of(av="runs/iter_*_av", ar="runs/iter_*_ar"))
    assert pairs(sweep) == [(f"runs/iter_{step}_av", f"runs/iter_{step}_ar") for step in (90, 100)]
    assert sweep.labels() == ["step=90", "step=100"]


def test_a_step_that_one_half_lacks_is_named(here: Path) -> None:
    make(here, (100, 200), "av", "ar")
    make(here, (300,), "av")
    make(here, (400, 500), "ar")
    with pytest.raises(SpecError, match=r"there is only an AV at 300 and only an AR at 400, 500\. Narrow the patterns"):
        expand_series(sweep_of(av="runs/iter_*/av", ar="runs/iter_*/ar"))
    assert len(expand_series(sweep_of(av="runs/iter_[12]00/av", ar="runs/iter_[12]00/ar")).cells()) == 2


def test_two_checkpoints_of_one_step_cannot_vary_together(here: Path) -> None:
    make(here, ("100", "0100"), "av", "ar")
    with pytest.raises(SpecError, match=r"runs/iter_\d+/av has the step of runs/iter_\d+/av"):
        expand_series(sweep_of(av="runs/iter_*/av", ar="runs/iter_*/ar"))


def test_the_command_line_makes_a_series_also_where_the_sweep_has_an_axis_of_autoencoders(here: Path) -> None:
    make(here, (1, 2), "av", "ar")
    settings = parse_overrides(["autoencoder.av=runs/iter_*/av", "autoencoder.ar=runs/iter_*/ar"])
    both = [("runs/iter_1/av", "runs/iter_1/ar"), ("runs/iter_2/av", "runs/iter_2/ar")]
    of_groups = sweep_of(autoencoder=(Autoencoder(av="a", ar="b"), Autoencoder(av="a", ar="c")))
    of_paths = sweep_of(autoencoder__ar=("b", "c"))
    for sweep in (sweep_of(), of_groups, of_paths):
        expanded = expand_series(apply_overrides(sweep, settings))
        assert pairs(expanded) == both and expanded.labels() == ["step=1", "step=2"]


def test_a_list_may_have_patterns_among_its_paths(here: Path) -> None:
    make(here, (1, 2), "ar")
    sweep = expand_series(sweep_of(autoencoder__ar=("untrained/ar", "runs/iter_*/ar")))
    assert sweep.axes["autoencoder.ar"] == ("untrained/ar", "runs/iter_1/ar", "runs/iter_2/ar")
    assert sweep.labels() == ["ar=untrained", "ar=iter_1", "ar=iter_2"]
    with pytest.raises(SpecError, match="give one pattern each, and they vary together by step"):
        expand_series(sweep_of(autoencoder__av=("a", "runs/iter_*/ar"), autoencoder__ar=("b", "runs/iter_*/ar")))


def test_two_axes_of_steps_say_which_step_is_whose() -> None:
    sweep = sweep_of(autoencoder__ar=("r/step1/ar", "r/step2/ar"), activations__model=("o/n@step5", "o/n@step6"))
    assert sweep.labels()[1] == "ar step=1, model step=6"


@pytest.mark.parametrize("pattern", ["runs/iter_*/av", "runs/*\0/av", "[", "./" + "x" * 5000 + "*", "~nobody/*"])
def test_a_pattern_that_nothing_matches_is_said(here: Path, pattern: str) -> None:
    (here / "runs").mkdir()
    with pytest.raises(CheckpointError, match=re.escape(f"no AV matches {pattern!r}")):
        expand_series(sweep_of(av=pattern))


def test_a_pattern_of_folders_of_a_hub_repository_is_listed_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"iter_{step}/{half}/config.json" for step in ("0000400", "0001000") for half in ("av", "ar")]
    with serving_hub() as hub:
        hub.repositories["owner/nla"] = HubRepository(
            {"v1": dict.fromkeys([*names, "iter_9.old/av/config.json", "final/x.pt"], b"")}
        )
        use_hub(monkeypatch, hub.endpoint, str(here / "cache"))
        sweep = expand_series(sweep_of(av="owner/nla@v1/iter_*/av", ar="owner/nla@v1/iter_*/ar"))
        assert pairs(sweep) == [(f"owner/nla@v1/iter_{s}/av", f"owner/nla@v1/iter_{s}/ar") for s in ("0000400", "0001000")]
        assert sweep.labels() == ["step=400", "step=1000"] and not hub.asked_files()
        with pytest.raises(
            CheckpointError, match=r"2 folders of owner/nla have such a name, and none of them holds a checkpoint"
        ):
            expand_series(sweep_of(av="owner/nla@v1/iter_0*"))
        with pytest.raises(CheckpointError, match="owner/nla of the model hub has no revision 'v2'"):
            expand_series(sweep_of(av="owner/nla@v2/iter_*/av"))
