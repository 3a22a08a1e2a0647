"""Steps that are recorded and replayed. CUDA graphs need a GPU; a tape of torch's operations stands in for them: like a graph it
repeats the same operations on the same memory, whatever has changed on the host meanwhile, and refuses what asks the host."""

from __future__ import annotations

import gc
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ksweep.inference import cuda_graphs, kv_cache
from ksweep.inference.engine import DrawBatch, draw
from ksweep.utils.errors import RunError
from tests.inference.test_engine import (
    STOPS,
    VECTORS,
    TinyVerbalizer,
    models,  # noqa: F401  # a fixture
    requests_for,
    stream_draws,
    take,
    texts,
)

ASKS_THE_HOST = (
    "item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique_dim", "_unique2", "masked_select", "lift_fresh",
)  # fmt: skip
"""Operations that no graph can hold: they bring values to the host, or from its pageable memory."""


class Tape(TorchDispatchMode):
    """Operations, with the tensors that they read and made."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs and notes it."""
        if func.overloadpacket.__name__ in ASKS_THE_HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]))
        return out

    def replay(self) -> None:
        """All of them again; results land where they were the first time."""
        for func, args, kwargs, made in self.done:
            again = func(*args, **kwargs)
            again = [again] if isinstance(again, torch.Tensor) else [x for x in tree_leaves(again) if isinstance(x, torch.Tensor)]
            for old, new in zip(made, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@dataclass
class Recorder:
    """Makes tapes; `spoil` may change one before it is used."""

    spoil: Any = None
    tapes: list[Tape] = field(default_factory=list)
    replays: int = 0

    def __call__(self, step: Any) -> Any:
        """Records it."""
        tape = Tape()
        with tape:
            step()
        if self.spoil is not None:
            self.spoil(tape)
        self.tapes.append(tape)
        recorder, replay = self, tape.replay

        def counted() -> None:
            recorder.replays += 1
            replay()

        tape.replay = counted  # type: ignore[method-assign]
        return tape


@pytest.fixture
def recorder(monkeypatch):
    """What records every step from now on."""
    made = Recorder()
    monkeypatch.setattr(cuda_graphs, "supports_cuda_graphs", lambda model: not cuda_graphs.recording_problem(model))
    monkeypatch.setattr(cuda_graphs, "cuda_recorder", lambda device: made)
    monkeypatch.setattr(cuda_graphs, "_failed_recording", [])
    monkeypatch.setattr(cuda_graphs, "_differing", WeakKeyDictionary())
    monkeypatch.setattr(cuda_graphs, "_times_out_of_memory", WeakKeyDictionary())
    monkeypatch.setattr(cuda_graphs, "USES_BEFORE_RECORDING", 2)  # these runs are short
    return made


@pytest.fixture
def expected(monkeypatch):
    """Draws without any recording."""

    def drawn(verbalizer, requests, **options):
        with monkeypatch.context() as patch:
            patch.setattr(cuda_graphs, "supports_cuda_graphs", lambda model: False)
            return texts(take(verbalizer, requests, **options))

    return drawn


@pytest.mark.heavy(5)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2_capped", "gemma3_wide", "gpt2"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), pytest.param(0.5, 0.6, marks=pytest.mark.slow)])
def test_replayed_steps_give_the_same_draws(models, recorder, expected, name, temperature, top_p):  # noqa: F811
    verbalizer = TinyVerbalizer(models[name], STOPS)
    options = {"temperature": temperature, "top_p": top_p, "max_new_tokens": 40, "batch_size": 16}
    requests = requests_for(range(6), range(12))
    assert texts(take(verbalizer, requests, **options)) == expected(verbalizer, requests, **options)
    assert recorder.replays > 20 > len(recorder.tapes)


class WithoutPrefix(TinyVerbalizer):
    """Nothing before the injection site is run beforehand."""

    shared_length = 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "draws", "options"),
    [
        (TinyVerbalizer, 40, {"batch_size": 16}),  # an activation has more draws than there are slots
        (TinyVerbalizer, 1, {}),
        (TinyVerbalizer, 12, {"max_new_tokens": 1}),
        (TinyVerbalizer, 12, {"max_new_tokens": 2}),
        (WithoutPrefix, 12, {}),
    ],
)
def test_replayed_steps_at_the_edges(models, recorder, expected, monkeypatch, kind, draws, options):  # noqa: F811
    monkeypatch.setattr(cuda_graphs, "USES_BEFORE_RECORDING", 0)
    monkeypatch.setattr(cuda_graphs, "WIDTH_MULTIPLE", 4)
    verbalizer, requests = kind(models["llama"], STOPS), requests_for(range(4), range(draws))
    options = {"max_new_tokens": 40} | options
    assert texts(take(verbalizer, requests, **options)) == expected(verbalizer, requests, **options)
    assert bool(recorder.replays) == (options["max_new_tokens"] > 1), "a first token needs no step"


def test_rows_and_places_come_in_few_sizes(models, recorder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda_graphs, "WIDTH_MULTIPLE", 8)
    steps: list[int] = []
    take(TinyVerbalizer(models["llama"], STOPS), requests_for(range(6), range(20)), max_new_tokens=40, on_step=steps.append)
    assert len(recorder.tapes) < 15 and recorder.replays > len(steps) / 2
    assert [cuda_graphs.padded_rows(n, 512) for n in (1, 2, 3, 33, 64, 65, 128, 129, 512)] == [
        1,
        2,
        4,
        64,
        64,
        128,
        128,
        192,
        512,
    ]
    assert [cuda_graphs.padded_rows(n, 100) for n in (63, 65, 100)] == [64, 100, 100]


@pytest.mark.slow
def test_what_graphs_point_to_never_moves(models, recorder, expected, monkeypatch):  # noqa: F811
    """Slots grow as their texts do where nothing is recorded; here they have all their places before the first graph."""
    monkeypatch.setattr(cuda_graphs, "WIDTH_MULTIPLE", 8)
    verbalizer, requests = TinyVerbalizer(models["llama"]), requests_for(range(4), range(4))  # no text ends by itself
    grow, moved = kv_cache.KVCacheLayer._grow, []

    def watched(layer, *given):
        moved.append(len(recorder.tapes))
        grow(layer, *given)

    monkeypatch.setattr(kv_cache.KVCacheLayer, "_grow", watched)
    drawn = texts(take(verbalizer, requests, max_new_tokens=90))
    assert moved and set(moved) == {0} and len(recorder.tapes) > 3
    moved.clear()
    assert drawn == expected(verbalizer, requests, max_new_tokens=90)
    layers = len(verbalizer.model.model.layers)
    assert len(moved) > 2 * layers, "without graphs they do grow: the test would see it"


def _without_the_last_write(tape: Tape) -> None:
    writes = [i for i, (func, *_) in enumerate(tape.done) if func.overloadpacket.__name__ == "copy_"]
    _, args, _, made = tape.done[writes[-1]]
    tape.done[writes[-1]] = (torch.ops.aten.fill_.Scalar, (args[0], 0.0), {}, made)


def _with_other_tokens(tape: Tape) -> None:
    place = next(i for i, (func, *_) in enumerate(tape.done) if func.overloadpacket.__name__ == "embedding")
    func, (weight, ids, *rest), kwargs, made = tape.done[place]
    tape.done[place] = (func, (weight, (ids + 1) % len(weight), *rest), kwargs, made)


def _empty(tape: Tape) -> None:
    tape.done.clear()


def _without_keys_and_values(tape: Tape) -> None:
    """What earlier steps wrote is there, what this one was to write is not."""
    tape.done[:] = [one for one in tape.done if not one[0].overloadpacket.__name__.startswith("index_put")]


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [_without_the_last_write, _with_other_tokens, _empty, _without_keys_and_values])
def test_a_graph_that_gives_something_else_is_not_used(models, recorder, expected, caplog, spoil):  # noqa: F811
    recorder.spoil = spoil
    verbalizer, requests = TinyVerbalizer(models["llama"], STOPS), requests_for(range(6), range(6))
    assert texts(take(verbalizer, requests, max_new_tokens=40)) == expected(verbalizer, requests, max_new_tokens=40)
    assert recorder.replays == 1
    assert caplog.text.count("not recorded as CUDA graphs") == 1 and "a graph's logits differ by" in caplog.text
    assert cuda_graphs.cuda_graphs_state(verbalizer.model).startswith("given up: a graph's logits differ")
    take(verbalizer, requests, max_new_tokens=40)
    assert len(recorder.tapes) == 1, "nor is anything recorded by the streams that follow"


def test_what_cannot_be_recorded_is_drawn_without(models, recorder, expected, caplog, monkeypatch):  # noqa: F811
    model = models["llama"]
    asked = []
    handle = model.model.layers[1].register_forward_hook(lambda _, __, out: asked.append(out[0].sum().item()))
    try:
        verbalizer, requests = TinyVerbalizer(model, STOPS), requests_for(range(6), range(6))
        assert texts(take(verbalizer, requests, max_new_tokens=40)) == expected(verbalizer, requests, max_new_tokens=40)
    finally:
        handle.remove()
    assert recorder.tapes == []
    assert caplog.text.count("not permitted when stream is capturing") == 1


def test_a_graph_that_holds_what_the_host_knew_is_not_used(models, recorder, expected, caplog):  # noqa: F811
    """A block that reads the rows' lengths on the host: its graph is right as long as they are what they were."""
    model = models["llama"]

    def by_length(module, args, kwargs, out):
        lengths = getattr(kwargs["past_key_values"], "lengths", None)
        return out if not lengths else out * (1 + max(lengths) / 50)

    handle = model.model.layers[0].register_forward_hook(by_length, with_kwargs=True)
    try:
        verbalizer, requests = TinyVerbalizer(model, STOPS), requests_for(range(6), range(6))
        assert texts(take(verbalizer, requests, max_new_tokens=40)) == expected(verbalizer, requests, max_new_tokens=40)
    finally:
        handle.remove()
    assert recorder.replays == 1 and "a graph's logits differ by" in caplog.text


def test_a_step_of_nan_is_not_what_a_graph_is_judged_by(models, recorder):  # noqa: F811
    """The step that a graph would have been compared with makes NaN, which ends these draws; the next ones have their graphs."""
    model, steps = models["llama"], []

    def nan_in_the_third(module, args, out):
        steps.append(out.shape[1] == 1)
        return out * float("nan") if steps[-1] and sum(steps) == 3 else out

    verbalizer = TinyVerbalizer(model, STOPS)
    handle = model.model.layers[0].register_forward_hook(nan_in_the_third)
    try:
        with pytest.raises(RunError, match="logits are not finite"):
            take(verbalizer, requests_for([0], range(4)), max_new_tokens=40)
    finally:
        handle.remove()
    assert recorder.tapes == [] and cuda_graphs.recording_problem(model) is None
    take(verbalizer, requests_for([1], range(4)), max_new_tokens=40)
    assert recorder.replays


def test_logits_that_cannot_be_compared_end_recording_in_words(models, recorder, expected, caplog):  # noqa: F811
    """A model that rules a token out has -inf among its logits: sampling takes that, a comparison cannot."""
    model = models["llama"]

    def without_the_last_token(module, args, out):
        return torch.cat([out[..., :-1], out.new_full((*out.shape[:-1], 1), -torch.inf)], dim=-1)

    handle = model.lm_head.register_forward_hook(without_the_last_token)
    try:
        verbalizer, requests = TinyVerbalizer(model, STOPS), requests_for(range(6), range(6))
        assert texts(take(verbalizer, requests, max_new_tokens=40)) == expected(verbalizer, requests, max_new_tokens=40)
    finally:
        handle.remove()
    assert "differ by nan" in caplog.text and "the largest is inf" in caplog.text and len(recorder.tapes) == 1


def test_logits_that_are_all_the_same_can_be_compared(models, recorder):  # noqa: F811
    model = models["llama"]
    handle = model.lm_head.register_forward_hook(lambda _, __, out: 0 * out)
    try:
        take(TinyVerbalizer(model, STOPS), requests_for(range(2), range(4)), max_new_tokens=40)
    finally:
        handle.remove()
    assert recorder.replays and cuda_graphs.recording_problem(model) is None


def test_a_pad_token_does_not_have_gpt2_look_for_padding(models, recorder, monkeypatch):  # noqa: F811
    """transformers does that on the host where there is no mask; many fine-tuned checkpoints name a pad token."""
    model, looked = models["gpt2"], []
    monkeypatch.setattr(model.config, "pad_token_id", 3)
    warn = type(model).warn_if_padding_and_no_attention_mask

    def noted(self, ids, mask):
        if self.config.pad_token_id is not None and ids is not None and ids.shape[1] == 1:
            looked.append(len(ids))
        return warn(self, ids, mask)

    monkeypatch.setattr(type(model.transformer), "warn_if_padding_and_no_attention_mask", noted)
    take(TinyVerbalizer(model, STOPS), requests_for(range(6), range(4)), max_new_tokens=40)
    assert looked == [] and recorder.replays and model.config.pad_token_id == 3


def _out_of_memory(tape: Tape) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")


def _out_of_memory_in_a_capture(tape: Tape) -> None:
    """As torch raises it: the capture's end says only that it was invalidated."""
    try:
        _out_of_memory(tape)
    finally:
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("fail", [_out_of_memory, _out_of_memory_in_a_capture])
def test_out_of_memory_while_recording_ends_recording_in_this_stream_alone(models, recorder, expected, caplog, fail):  # noqa: F811
    """Graphs have memory of their own, kept from the rest; without them there is room for as many rows as before."""
    recorder.spoil = fail
    verbalizer, requests = TinyVerbalizer(models["llama"], STOPS), requests_for(range(6), range(6))
    wanted = expected(verbalizer, requests, max_new_tokens=40)
    assert texts(take(verbalizer, requests, max_new_tokens=40)) == wanted
    assert caplog.text.count("a test says so") == 1 and "draws at once" not in caplog.text and recorder.replays == 0
    assert cuda_graphs.recording_problem(verbalizer.model) is None
    recorder.spoil = None
    assert texts(take(verbalizer, requests, max_new_tokens=40)) == wanted and recorder.replays > 0
    # After three such streams of a model it is given up: each may have lost memory.
    recorder.spoil = fail
    for _ in range(2):
        take(verbalizer, requests, max_new_tokens=40)
    assert cuda_graphs.cuda_graphs_state(verbalizer.model) == "given up: out of memory in 3 streams of draws"
    assert cuda_graphs.recording_problem(models["qwen2"]) is None


def test_out_of_memory_while_recording_leaves_the_graphs_that_are_there(models, recorder, expected, monkeypatch):  # noqa: F811
    verbalizer, requests = TinyVerbalizer(models["llama"], STOPS), requests_for(range(6), range(12))
    options = {"max_new_tokens": 40, "batch_size": 16}
    give_up, left = cuda_graphs.RecordedSteps._give_up, []

    def watched(self, problem):
        give_up(self, problem)
        left.append(len(self._recorded))

    monkeypatch.setattr(cuda_graphs.RecordedSteps, "_give_up", watched)
    recorder.spoil = lambda tape: _out_of_memory(tape) if recorder.tapes else None
    assert texts(take(verbalizer, requests, **options)) == expected(verbalizer, requests, **options)
    assert left == [1]


@pytest.mark.parametrize(("free", "room"), [(1000, True), (124, False)])
def test_a_step_without_room_for_a_graph_is_not_begun_to_be_recorded(monkeypatch, free, room):
    """An error while a graph is recorded costs memory until the process ends."""
    allocated = iter([5_000])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5_100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(cuda_graphs.memory, "free_device_bytes", lambda device: free)
    with nullcontext() if room else pytest.raises(torch.OutOfMemoryError), cuda_graphs._room_for_another(torch.device("cpu")):
        pass


@pytest.mark.slow
def test_out_of_memory_between_replays_starts_over_with_graphs_of_fewer_rows(models, recorder, expected, monkeypatch, caplog):  # noqa: F811
    """The second batch of prompts does not fit beside the slots and graphs of the first."""
    requests = requests_for(range(6), range(8))
    wanted = expected(TinyVerbalizer(models["llama"], STOPS), requests, max_new_tokens=40)
    verbalizer, replays_when, made = TinyVerbalizer(models["llama"], STOPS), [], []
    prompts, begin = TinyVerbalizer.prompts, cuda_graphs.RecordedSteps.__init__

    def scarce(self, vectors):
        if recorder.replays and not replays_when:
            replays_when.append(recorder.replays)
            raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
        return prompts(self, vectors)

    def noted(self, *given):
        begin(self, *given)
        made.append(weakref.ref(self))
        assert [one() for one in made[:-1]] == [None] * (len(made) - 1), "what was recorded before holds its memory"

    monkeypatch.setattr(TinyVerbalizer, "prompts", scarce)
    monkeypatch.setattr(cuda_graphs.RecordedSteps, "__init__", noted)
    assert texts(take(verbalizer, requests, max_new_tokens=40, batch_size=16)) == wanted
    assert "continuing with at most 8 draws" in caplog.text
    assert len(made) == 2 and 0 < replays_when[0] < recorder.replays


@pytest.mark.slow
def test_batches_of_a_stream_share_graphs(models, recorder):  # noqa: F811
    verbalizer = TinyVerbalizer(models["llama"], STOPS)
    batches = [
        DrawBatch(vectors=VECTORS, requests=requests_for(range(6), range(4)), temperature=temperature, seed=3)
        for temperature in (1.0, 0.0, 0.7)
    ]
    drawn = list(stream_draws(verbalizer, batches, max_new_tokens=12, batch_size=16))
    assert len(drawn) == 3 * 24 and recorder.replays
    for number, batch in enumerate(batches):
        alone = draw(verbalizer, VECTORS, batch.requests, temperature=batch.temperature, max_new_tokens=12, seed=3)
        mine = {(d.request.row, d.request.draw): d.token_ids for n, d in drawn if n == number}
        assert mine == {(d.request.row, d.request.draw): d.token_ids for d in alone}


def test_no_graphs_on_a_cpu_nor_where_they_are_switched_off(models, monkeypatch):  # noqa: F811
    assert not cuda_graphs.supports_cuda_graphs(models["llama"])

    class OnDevices:
        def __init__(self, *devices: str) -> None:
            self.devices, self.device = devices, torch.device(devices[0])

        def parameters(self) -> Any:
            return iter([type("Parameter", (), {"device": torch.device(device)}) for device in self.devices])

    assert cuda_graphs.supports_cuda_graphs(OnDevices("cuda:0", "cuda:0"))
    assert not cuda_graphs.supports_cuda_graphs(OnDevices("cuda:0", "cuda:1")), "blocks spread over several GPUs"
    monkeypatch.setenv(cuda_graphs.CUDA_GRAPHS_VARIABLE, "0")
    assert not cuda_graphs.supports_cuda_graphs(OnDevices("cuda:0"))


class CudaOfOneThread:
    """As much of torch.cuda as a recording uses; `torch.cuda.graph` fails as a capture does that a step has broken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device: Any = "cuda:0"
        self.stream = "the stream of drawing"
        self.on_synchronisation = "default"
        self.captured: list[tuple[Any, ...]] = []
        for name in ("graph_pool_handle", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: name)
        monkeypatch.setattr(cuda_graphs, "_room_for_another", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.on_synchronisation)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_sync_debug_mode)
        monkeypatch.setattr(torch.cuda, "device", self.on)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    def set_sync_debug_mode(self, mode: str) -> None:
        """torch.cuda.set_sync_debug_mode, with its warning."""
        self.on_synchronisation = mode
        if mode == "error":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    @contextmanager
    def on(self, device: Any) -> Any:
        """torch.cuda.device"""
        before, self.device = self.device, device
        try:
            yield
        finally:
            self.device = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        """torch.cuda.graph: gives the stream back only where the capture ends well."""
        before, self.stream = self.stream, stream
        self.captured.append((graph, pool, capture_error_mode, self.device))
        yield
        self.stream = before

    def now(self) -> tuple[Any, ...]:
        """Device, stream, what happens when the host waits, whether cycles are collected."""
        return self.device, self.stream, self.on_synchronisation, gc.isenabled()


@pytest.fixture
def cuda(monkeypatch):
    """No device at all."""
    return CudaOfOneThread(monkeypatch)


BEFORE = ("cuda:0", "the stream of drawing", "default", True)


@pytest.mark.filterwarnings("error")
def test_a_recording_is_of_the_models_device_after_a_step_that_may_not_wait(cuda):
    second, seen = torch.device("cuda:1"), []
    record = cuda_graphs.cuda_recorder(second)
    assert record(lambda: seen.append(cuda.now())) == "CUDAGraph"
    assert seen == [(second, "the stream of drawing", "error", False), (second, "a stream of cuda:1", "default", False)]
    assert cuda.captured == [("CUDAGraph", "graph_pool_handle", "thread_local", second)] and cuda.now() == BEFORE
    cuda_graphs.cuda_recorder(torch.device("cuda:0"))(lambda: seen.append(cuda.now()))
    assert seen[-1][:2] == (torch.device("cuda:0"), "a stream of cuda:0")


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_recording_that_fails_leaves_all_as_it_was(cuda, fails_at):
    """At the step before it, where nothing has been captured yet, or while it goes on."""
    steps = []

    def broken() -> None:
        steps.append(1)
        if len(steps) == fails_at:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        cuda_graphs.cuda_recorder(torch.device("cuda:1"))(broken)
    assert cuda.now() == BEFORE and len(cuda.captured) == fails_at - 1


def test_the_tape_itself_freezes_what_the_host_says():
    """A stand-in that read the host's values again would let every test above pass."""
    box, out, asked = torch.zeros(2), torch.zeros(2), [1.0]
    tape = Tape()
    with tape:
        out.copy_(box + asked[0])
    box += 10
    asked[0] = 5.0
    tape.replay()
    assert out.tolist() == [11.0, 11.0]
    with pytest.raises(RuntimeError, match="not permitted"), Tape():
        box.sum().item()
