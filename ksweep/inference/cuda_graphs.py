"""Decoding steps on a GPU, recorded once per shape as a CUDA graph and replayed.

A step of a model of 28 blocks is some thousand short kernels, and the processor takes longer to launch them one by one than the
GPU to run them: an estimated 20 to 30 ms against 5 to 12 ms for 7 billion parameters and up to 512 rows on an H100. A graph is
launched as a whole.

A graph repeats the same kernels at the same addresses. So tokens and lengths are kept in tensors that are refilled before every
replay, nothing that the host does in a step depends on their values, and rows and widths come in a few sizes: a row that is not
in use writes to the first place of a free slot, where the next draw will begin.

The first steps of a shape run as usual. Before its graph is used, the graph must reproduce the logits of a step that ran beside
it, after being recorded with other tokens and lengths and with NaN where it must write. If a graph does not, recording ends for
its model; if one cannot be recorded, it ends for this process; if memory does not suffice, for this stream of draws. A warning
says so, and drawing continues without it. Slots have their full capacity from the start, so that the memory that graphs point to
never moves.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch

from ksweep.inference import attention, kv_cache, memory

if TYPE_CHECKING:
    from jaxtyping import Float, Int

log = logging.getLogger(__name__)

CUDA_GRAPHS_VARIABLE = "KSWEEP_CUDA_GRAPHS"
"""Environment variable; 0 switches CUDA graphs off."""

USES_BEFORE_RECORDING = 8
"""A shape is recorded at its next use after this many. Recording and checking one takes as long as some steps and empties
torch's cache, so it pays after about as many replays; at the end of a run most shapes come up once or twice. An estimate."""

WIDTH_MULTIPLE = 64
"""The width that a step reads of each slot is a multiple of this."""

REPLAY_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Largest difference between the logits of a replay and of the step itself, as a share of the largest logit. The kernels are the
same: the check is for a step recorded only in part and for addresses that have moved."""

ROOM_SHARE = 0.8
"""Largest share of the free memory that a step may take if it is to be recorded; blocks of memory never fit without gaps."""

_failed_recording: list[str] = []
"""Why recording has ended in this process, if it has: after a failed recording torch's allocator is not as it was before, whoever
records next. Nothing but recording depends on it."""

_differing: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""How the graphs of a model differed from its steps, for models whose recording has ended."""

_times_out_of_memory: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""How many streams of a model's draws ran out of memory while they recorded."""

MOST_TIMES_OUT_OF_MEMORY = 3
"""Streams of a model that may do so before none records any more: each may lose the memory of a graph that was begun (torch frees
it only from pull request 190308 on)."""


class Replayable(Protocol):
    """A recorded step."""

    def replay(self) -> None:
        """Run the step again, from and into the same tensors."""


Recorder = Callable[[Callable[[], None]], Replayable]
"""Records what a function does on the device; the function may or may not take effect while it is recorded."""


def supports_cuda_graphs(model: Any) -> bool:
    """Return whether a model's steps can be recorded: it is on one GPU, and recording is not switched off and has not failed."""
    if model.device.type != "cuda" or os.environ.get(CUDA_GRAPHS_VARIABLE) == "0" or recording_problem(model):
        return False
    return {parameter.device for parameter in model.parameters()} == {model.device}


def cuda_graphs_state(model: Any) -> str:
    """Return "on", "off", or why recording was given up, for the run record."""
    if problem := recording_problem(model):
        return f"given up: {problem}"
    times = _times_out_of_memory.get(model, 0)
    on = f"on, out of memory in {times} streams" if times else "on"
    return on if supports_cuda_graphs(model) else "off"


def recording_problem(model: Any) -> str | None:
    """Return why a model's steps are no longer recorded, None if nothing has gone wrong."""
    if _times_out_of_memory.get(model, 0) >= MOST_TIMES_OUT_OF_MEMORY:
        return f"out of memory in {MOST_TIMES_OUT_OF_MEMORY} streams of draws"
    return next(iter(_failed_recording), None) or _differing.get(model)


def cuda_recorder(device: torch.device) -> Recorder:
    """Return a recorder of CUDA graphs that share their memory: one runs at a time.

    They share a stream to be recorded on, too. torch's own belongs to the device that was recorded on first, and a cuBLAS
    workspace that belongs to a stream must not lie in the memory of other graphs (pytorch issue 193402).
    """
    pool, recording_stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(step: Callable[[], None]) -> Replayable:
        with torch.cuda.device(device), _garbage_collection_off():
            # A step that waits for the device, or for which there is no room, fails here already: an error while recording would
            # corrupt torch's allocator.
            with _synchronisation_forbidden(), _room_for_another(device):
                step()
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # thread_local: only this thread is recorded.
                with torch.cuda.graph(graph, pool=pool, stream=recording_stream, capture_error_mode="thread_local"):
                    step()
            finally:
                torch.cuda.set_stream(stream)  # a capture that fails to end leaves its own stream current
        return graph

    return record


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """Switch the cyclic garbage collector off: objects that it frees may call the device in ways that cannot be recorded."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _room_for_another(device: torch.device) -> Iterator[None]:
    """Check that what is allocated inside could be allocated once more: a graph has memory of its own.

    Raises:
        torch.OutOfMemoryError: it could not.
    """
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield
    needed, free = torch.cuda.max_memory_allocated(device) - before, memory.free_device_bytes(device) or 0
    if needed > ROOM_SHARE * free:
        raise torch.OutOfMemoryError(f"a step takes {needed / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free for its graph")


@contextmanager
def _synchronisation_forbidden() -> Iterator[None]:
    """Make waiting for the device an error, in all threads. torch warns that this is a prototype."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def padded_rows(rows: int, most: int) -> int:
    """Round a number of rows up to that of a recorded shape: a power of two up to 64, then a multiple of 64, at most `most`."""
    size = 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64
    return min(size, most)


class RecordedSteps:
    """Decoding steps of a model over a `KVCache`, recorded as their shapes come up."""

    def __init__(self, model: Any, cache: kv_cache.KVCache, record: Recorder) -> None:
        """Allocate the tensors that graphs read and write.

        Args:
            model: causal language model, all of it on one device.
            cache: its KV cache; rows may come and go between steps.
            record: `cuda_recorder` of that device.
        """
        self._model, self._cache, self._record = model, cache, record
        most, device = cache.state.num_slots, model.device
        self._tokens = torch.zeros(most, dtype=torch.long, device=device)
        self._lengths = torch.zeros(most, dtype=torch.long, device=device)
        self._logits: Any = None
        """[slot, vocabulary]: every graph writes its logits here."""
        self._recorded: dict[tuple[int, int], Replayable] = {}
        self._uses: Counter[tuple[int, int]] = Counter()
        self._has_room = True
        """Whether recording has not run out of memory yet."""

    def logits(self, tokens: Int[torch.Tensor, " row"]) -> Float[torch.Tensor, "row vocabulary"]:
        """Return the logits after each row's last token and write its keys and values to its slot.

        The result is overwritten by the next call.
        """
        state = self._cache.state
        if self._logits is None:
            self._cache.reserve(state.capacity)
        # 1. Round rows and width up to a shape, and fill its inputs.
        longest = max(self._cache.lengths) + 1
        shape = padded_rows(len(tokens), state.num_slots), min(-(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, state.capacity)
        self._fill_inputs(tokens)
        # 2. Replay the shape's graph; without one run the step, and record it once the shape has come up often enough.
        if shape in self._recorded:
            self._recorded[shape].replay()
        else:
            self._step(*shape)
            if self._has_room and self._uses[shape] >= USES_BEFORE_RECORDING and not recording_problem(self._model):
                self._try_to_record(shape)
        self._uses[shape] += 1
        self._cache.end_step()
        logits: torch.Tensor = self._logits[: len(tokens)]
        return logits

    def _fill_inputs(self, tokens: Int[torch.Tensor, " row"]) -> None:
        """Fill in tokens and lengths of the next step; rows that are not in use have length 0."""
        n = len(tokens)
        self._tokens[:n] = tokens
        self._tokens[n:] = 0
        self._lengths[:n] = torch.tensor(self._cache.lengths, device=self._lengths.device)
        self._lengths[n:] = 0

    def _step(self, rows: int, width: int) -> None:
        """Write the logits of that many rows to `_logits`. This is what is recorded; doing it twice changes nothing."""
        positions = self._cache.begin_static_step(self._lengths[:rows], width)
        logits = attention.next_logits(self._model, self._cache, self._tokens[:rows], positions)
        if self._logits is None:
            self._logits = logits.new_empty(self._cache.state.num_slots, logits.shape[1])
        self._logits[:rows] = logits

    def _try_to_record(self, shape: tuple[int, int]) -> None:
        """Record a shape whose step has just run, and use the graph if it reproduces the step's logits. The step stays done."""
        expected = self._logits[: shape[0]].clone()
        if not float(expected.max()) < float("inf"):
            return  # NaN or infinity cannot be compared, and sampling will refuse them
        try:
            problem = self._record_and_compare(shape, expected)
            if problem is not None:
                _differing[self._model] = problem
        except RuntimeError as failure:
            # Of a failed capture the last error says only that it failed; the one before says why.
            reason = failure.__context__ or failure
            problem = str(reason).strip().split("\n")[0]
            self._has_room = not (memory.is_out_of_memory(reason) or memory.is_out_of_memory(failure))
            if self._has_room:
                _failed_recording.append(problem)
        if problem is not None:
            self._give_up(problem)
            self._step(*shape)

    def _record_and_compare(self, shape: tuple[int, int], expected: torch.Tensor) -> str | None:
        """Record a shape and replay it on the step that has just run. Returns why its graph cannot be used, None if it can."""
        rows, width = shape
        lengths = self._cache.lengths
        tokens = self._tokens[: len(lengths)].clone()
        # 1. Record with other tokens and lengths than the step's: the graph must not depend on their values.
        try:
            self._cache.lengths = [min(length + 1, width - 1) for length in lengths]  # writes to places that are unused as well
            self._fill_inputs(torch.zeros_like(tokens))
            recorded = self._record(lambda: self._step(*shape))
        finally:
            self._cache.lengths = lengths
            self._fill_inputs(tokens)
        # 2. Replay on the step's own inputs, with NaN wherever it has to write.
        self._logits[:rows] = float("nan")
        self._cache.poison_with_nan(self._lengths[:rows])
        recorded.replay()
        # 3. Compare with the step.
        difference, largest = _largest(self._logits[:rows], less=expected), _largest(expected)
        if difference <= REPLAY_TOLERANCE.get(expected.dtype, 0.0) * largest:
            self._recorded[shape] = recorded
            return None
        return f"a graph's logits differ by {difference:.2g} from those of the step, of which the largest is {largest:.2g}"

    def _give_up(self, problem: str) -> None:
        """End recording; graphs are kept where it was memory that did not suffice for another."""
        if self._has_room:
            log.warning("decoding steps are not recorded as CUDA graphs, which makes drawing slower: %s", problem)
            self._recorded.clear()
        else:
            log.warning("no more decoding steps are recorded as CUDA graphs in this stream, which makes it slower: %s", problem)
            _times_out_of_memory[self._model] = _times_out_of_memory.get(self._model, 0) + 1
        memory.release_cached_memory(self._model.device)


def _largest(x: torch.Tensor, less: torch.Tensor | None = None) -> float:
    """Return the largest |x - less|, NaN if there is one. Works on some rows at a time: all logits are hundreds of megabytes."""
    largest = []
    for start in range(0, len(x), 64):
        rows = slice(start, start + 64)
        largest.append((x[rows] if less is None else x[rows] - less[rows]).abs().max())
    return float(torch.stack(largest).max())
