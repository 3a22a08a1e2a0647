"""Steps that are recorded and replayed. CUDA graphs need a GPU; a tape of torch's operations stands in for them: like a graph it
repeats the same operations on the same memory, whatever has changed on the host meanwhile, and refuses what asks the host."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ksweep.autoencoder import compiled, graphs
from ksweep.autoencoder.decoding import Order, draw, stream
from tests.autoencoder.test_decoding import (
    STOPS,
    VECTORS,
    OutOfMemoryModel,
    TinyVerbalizer,
    models,  # noqa: F401  # a fixture
    requests_for,
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
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """All of them again; results land where they were the first time."""
        for func, args, kwargs, made in self.done:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
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
    monkeypatch.setattr(compiled, "fits", lambda like: False)
    monkeypatch.setattr(graphs, "fits", lambda model: True)
    monkeypatch.setattr(graphs, "cuda_recorder", lambda: made)
    return made


@pytest.fixture
def expected(monkeypatch):
    """Draws without any recording."""

    def drawn(verbalizer, requests, **options):
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "fits", lambda model: False)
            return texts(take(verbalizer, requests, **options))

    return drawn


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2_capped", "gemma3_wide", "gpt2"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.6)])
def test_replayed_steps_give_the_same_draws(models, recorder, expected, name, temperature, top_p):  # noqa: F811
    verbalizer = TinyVerbalizer(models[name], STOPS)
    options = {"temperature": temperature, "top_p": top_p, "max_new_tokens": 40, "batch_size": 16}
    requests = requests_for(range(6), range(12))
    assert texts(take(verbalizer, requests, **options)) == expected(verbalizer, requests, **options)
    assert recorder.replays > 20 > len(recorder.tapes)


def test_rows_and_places_come_in_few_sizes(models, recorder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(graphs, "PLACES", 8)
    steps: list[int] = []
    take(TinyVerbalizer(models["llama"], STOPS), requests_for(range(6), range(20)), max_new_tokens=40, on_step=steps.append)
    assert len(recorder.tapes) < 15 and recorder.replays > len(steps) / 2
    assert [graphs.rows_for(n, 512) for n in (1, 2, 3, 33, 64, 65, 128, 129, 512)] == [1, 2, 4, 64, 64, 128, 128, 192, 512]
    assert [graphs.rows_for(n, 100) for n in (63, 65, 100)] == [64, 100, 100]


def test_graphs_are_recorded_anew_when_slots_move(models, recorder, expected, monkeypatch):  # noqa: F811
    """Room for 8 places at first, then for more: what was recorded before points to memory that has been given up."""
    monkeypatch.setattr(graphs, "PLACES", 8)
    verbalizer = TinyVerbalizer(models["llama"])  # no text ends by itself
    requests = requests_for(range(4), range(4))
    options = {"max_new_tokens": 90}
    before = Counter[str]()
    clear = dict.clear

    class Watched(dict[Any, Any]):
        def clear(self) -> None:
            before["cleared"] += bool(self)
            clear(self)

    made = graphs.Steps.__init__

    def watched(self: Any, *given: Any) -> None:
        made(self, *given)
        self._recorded = Watched()

    monkeypatch.setattr(graphs.Steps, "__init__", watched)
    assert texts(take(verbalizer, requests, **options)) == expected(verbalizer, requests, **options)
    assert before["cleared"] >= 1


def _without_the_last_write(tape: Tape) -> None:
    writes = [i for i, (func, *_) in enumerate(tape.done) if func.overloadpacket.__name__ == "copy_"]
    _, args, _, made = tape.done[writes[-1]]
    tape.done[writes[-1]] = (torch.ops.aten.fill_.Scalar, (args[0], 0.0), {}, made)


def _with_other_tokens(tape: Tape) -> None:
    place = next(i for i, (func, *_) in enumerate(tape.done) if func.overloadpacket.__name__ == "embedding")
    func, (weight, ids, *rest), kwargs, made = tape.done[place]
    tape.done[place] = (func, (weight, (ids + 1) % len(weight), *rest), kwargs, made)


@pytest.mark.parametrize("spoil", [_without_the_last_write, _with_other_tokens])
def test_a_graph_that_gives_something_else_is_not_used(models, recorder, expected, caplog, spoil):  # noqa: F811
    recorder.spoil = spoil
    verbalizer, requests = TinyVerbalizer(models["llama"], STOPS), requests_for(range(6), range(6))
    assert texts(take(verbalizer, requests, max_new_tokens=40)) == expected(verbalizer, requests, max_new_tokens=40)
    assert recorder.replays == 1
    assert caplog.text.count("not recorded as CUDA graphs") == 1 and "of the largest" in caplog.text


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


def test_out_of_memory_while_recording_halves_the_batch(models, recorder, expected, caplog):  # noqa: F811
    failures = []

    def fail_once(tape: Tape) -> None:
        if not failures:
            failures.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")

    recorder.spoil = fail_once
    verbalizer, requests = TinyVerbalizer(models["llama"], STOPS), requests_for(range(6), range(6))
    assert texts(take(verbalizer, requests, max_new_tokens=40)) == expected(verbalizer, requests, max_new_tokens=40)
    assert "at most 18 rows" in caplog.text and recorder.replays > 5


def test_out_of_memory_between_replays_starts_over_with_graphs_of_fewer_rows(models, recorder, expected):  # noqa: F811
    small = TinyVerbalizer(OutOfMemoryModel(models["llama"], most=8), STOPS)
    requests = requests_for(range(4), range(8))
    assert texts(take(small, requests, max_new_tokens=40)) == expected(
        TinyVerbalizer(models["llama"], STOPS), requests, max_new_tokens=40
    )
    assert recorder.replays > 5


def test_orders_of_a_stream_share_graphs(models, recorder):  # noqa: F811
    verbalizer = TinyVerbalizer(models["llama"], STOPS)
    orders = [
        Order(vectors=VECTORS, requests=requests_for(range(6), range(4)), temperature=temperature, seed=3)
        for temperature in (1.0, 0.0, 0.7)
    ]
    drawn = list(stream(verbalizer, orders, max_new_tokens=12, batch_size=16))
    assert len(drawn) == 3 * 24 and recorder.replays
    for number, order in enumerate(orders):
        alone = draw(verbalizer, VECTORS, order.requests, temperature=order.temperature, max_new_tokens=12, seed=3)
        mine = {(d.request.row, d.request.draw): d.token_ids for n, d in drawn if n == number}
        assert mine == {(d.request.row, d.request.draw): d.token_ids for d in alone}


def test_no_graphs_on_a_cpu_nor_where_they_are_switched_off(models, monkeypatch):  # noqa: F811
    assert not graphs.fits(models["llama"])

    class OnDevices:
        def __init__(self, *devices: str) -> None:
            self.devices, self.device = devices, torch.device(devices[0])

        def parameters(self) -> Any:
            return iter([type("Parameter", (), {"device": torch.device(device)}) for device in self.devices])

    assert graphs.fits(OnDevices("cuda:0", "cuda:0"))
    assert not graphs.fits(OnDevices("cuda:0", "cuda:1")), "blocks spread over several GPUs"
    monkeypatch.setenv(graphs.SWITCH, "0")
    assert not graphs.fits(OnDevices("cuda:0"))


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
