"""A pair that does not fit on a rank's GPUs is drawn and scored in phases; a model that does not fit alone is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ksweep import Autoencoder, Cell
from ksweep.autoencoder.nla.family import NlaPair
from ksweep.evaluation import memory_plan
from ksweep.evaluation.context import RunContext
from ksweep.evaluation.distributed import Solo
from ksweep.evaluation.evaluate import evaluate
from ksweep.evaluation.memory_plan import draws_before_scoring, fit_of_weights
from ksweep.evaluation.models import Models
from ksweep.utils.errors import RunError
from tests.tiny_models import make_pair
from tests.tiny_sweeps import talking_pair, tiny_cell

GB = 10**9


@pytest.mark.parametrize(
    ("av", "ar", "devices", "fit"),
    [
        (15, 11, [80], "together"),  # Qwen2.5-7B
        (54, 38, [80], "one at a time"),  # Gemma-3-27B: 92 of 72
        (54, 38, [141], "together"),
        (54, 38, [80, 80], "together"),
        (141, 100, [141], "too large"),  # Llama-3.3-70B: 141 of 127
        (141, 100, [80] * 2, "one at a time"),
        (10, 73, [80], "too large"),
        (72, 0, [80], "together"),
    ],
)
def test_fit_of_weights_leaves_a_tenth_of_the_memory(av: int, ar: int, devices: list[int], fit: str) -> None:
    assert fit_of_weights(av * GB, ar * GB, [size * GB for size in devices]) == fit


def ask(
    monkeypatch: pytest.MonkeyPatch,
    halves: tuple[int, int],
    gpu: int | None,
    asked: bool | None,
    missing: str,
    engine: str = "builtin",
) -> bool:
    """What `draws_before_scoring` answers for halves and a GPU of so many GB, with draws ("d") and scores ("s") missing."""
    family = SimpleNamespace(
        half_bytes=lambda: tuple(size * GB for size in halves), autoencoder=Autoencoder(av="an/av", ar="an/ar")
    )
    monkeypatch.setattr(memory_plan, "family_of", lambda autoencoder: family)
    monkeypatch.setattr(memory_plan, "loads_weights", lambda engine: engine == "vllm")
    monkeypatch.setattr(memory_plan, "total_device_bytes", lambda devices: None if gpu is None else [gpu * GB])
    cell = SimpleNamespace(autoencoder=None, sampling=SimpleNamespace(engine=engine))
    run: Any = SimpleNamespace(cell=cell, units=["a unit"] * ("d" in missing), num_unscored="s" in missing)
    return draws_before_scoring([run], asked, Solo(devices=("cuda:0",), device_name="a GPU"), stream=0)


@pytest.mark.parametrize(
    ("halves", "gpu", "asked", "missing", "expected"),
    [
        ((54, 38), 80, None, "ds", True),
        ((54, 38), 141, None, "ds", False),
        ((54, 38), None, None, "ds", False),  # a CPU
        ((54, 38), 80, None, "s", False),  # the AV is not loaded
        ((54, 38), 80, False, "ds", False),
        ((15, 11), 80, True, "ds", True),
        ((15, 11), None, True, "ds", True),
    ],
)
def test_phases_are_chosen_where_the_pair_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, halves: tuple[int, int], gpu: int | None, asked: bool | None, missing: str, expected: bool
) -> None:
    assert ask(monkeypatch, halves, gpu, asked, missing) == expected


def test_a_model_larger_than_the_gpu_is_refused_with_its_bytes_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"the AV of .*an/av.* takes 141\.0 GB, and a GPU has 80\.0 GB.*gpus_per_model=2"):
        ask(monkeypatch, (141, 100), 80, None, "ds")
    with pytest.raises(RunError, match=r"the AR of .* takes 100\.0 GB"):
        ask(monkeypatch, (141, 100), 80, None, "s")
    assert not ask(monkeypatch, (141, 60), 80, None, "ds", engine="vllm"), "vLLM finds a place for the AV itself"


@pytest.mark.slow
def test_a_pair_that_does_not_fit_is_drawn_before_its_ar_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell: Cell = tiny_cell(talking_pair(tmp_path, num_rows=60), num_replicates=20)
    cell = replace(cell, sampling=replace(cell.sampling, num_draws=2))
    av, ar = NlaPair(cell.autoencoder).half_bytes()
    monkeypatch.setattr(memory_plan, "total_device_bytes", lambda devices: [int(1.2 * max(av, ar))])
    events = []
    for name in ("verbalizer", "release_verbalizer", "reconstructor"):
        original = getattr(Models, name)
        monkeypatch.setattr(
            Models, name, lambda self, *args, name=name, call=original: (events.append(name), call(self, *args))[1]
        )
    context = RunContext(registry=tmp_path / "registry", vector_cache=tmp_path / "vectors", phases=None)
    assert len(evaluate([cell], context, Solo(), Models(("cpu",)))) == 1
    loads = [event for number, event in enumerate(events) if event not in events[:number]]
    assert loads == ["verbalizer", "release_verbalizer", "reconstructor"]


@pytest.mark.parametrize("adapters", [False, True])
def test_half_bytes_are_those_of_the_models_that_are_loaded(tmp_path: Path, adapters: bool) -> None:
    pair = make_pair(tmp_path, "llama", layer=1, num_layers=3, adapters=adapters)
    family = NlaPair(Autoencoder(av=str(pair.av), ar=str(pair.ar), base=str(pair.base) if adapters else None, dtype="float32"))
    av, ar = (
        sum(p.nbytes for p in half.model.parameters())
        for half in (family.load_verbalizer(["cpu"]), family.load_reconstructor(["cpu"]))
    )
    own_av, own_ar = family.half_bytes()
    assert own_av == av
    # An adapter's base has a head and a final norm, which the AR leaves.
    assert ar <= own_ar <= ar + adapters * (own_av - ar)
