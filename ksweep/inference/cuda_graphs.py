"""Decoding steps on a GPU, recorded once for each shape as a CUDA graph and replayed.

A step of a model of 28 blocks is some thousand short kernels, and the processor takes longer to launch them one by one than the
GPU to run them: an estimated 20 to 30 ms against 5 to 12 ms for 7 billion parameters and up to 512 rows on an H100. A graph is
launched as a whole.

A graph repeats the same kernels at the same addresses. So tokens and lengths lie in tensors that are filled anew before every
replay, nothing that the host does in a step depends on their values, and rows and places come in a few sizes: a row that is not
in use writes into the first place of a slot that is free, where the next draw will begin.

A shape is drawn as usual the first times. Before its graph is used, the graph has to make the logits of a step that was run
beside it, with other tokens and lengths than it was recorded with and NaN where it has to write. A graph that does not, or
cannot be recorded, ends recording for this process, with a warning, and drawing goes on without. Slots have all their places
from the start, so that what graphs point to never moves.
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

import torch

from ksweep.inference import kv_cache, memory

if TYPE_CHECKING:
    from jaxtyping import Float, Int

log = logging.getLogger(__name__)

SWITCH = "KSWEEP_CUDA_GRAPHS"
"""Environment variable; 0: every step as usual."""

USES_BEFORE = 8
"""A shape is recorded when it comes up once more than this. To record and try one takes as long as some steps and empties torch's
cache, so it pays after about as many replays; at the end of a run most shapes come up once or twice. An estimate."""

PLACES = 64
"""Widths of the past are multiples of this."""

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Of a replay against the step itself, as a share of the largest logit. The kernels are the same: what is sought are a step that
was recorded by halves and addresses that have moved."""


_given_up: list[str] = []
"""Why nothing more is recorded in this process: after a recording that failed, torch's allocator is not as it was before."""


class Recorded(Protocol):
    """What can be run again."""

    def replay(self) -> None:
        """Once more, from and into the same tensors."""


Recorder = Callable[[Callable[[], None]], Recorded]
"""Records what a function does on the device; whether it also happens then is the recorder's affair."""


def fits(model: Any) -> bool:
    """Whether a model's steps can be recorded: on one GPU, and not switched off or given up."""
    if model.device.type != "cuda" or os.environ.get(SWITCH) == "0" or _given_up:
        return False
    return {parameter.device for parameter in model.parameters()} == {model.device}


def state(model: Any) -> str:
    """For the record: "on", "off", or why recording was given up."""
    return f"given up: {_given_up[0]}" if _given_up else "on" if fits(model) else "off"


def cuda_recorder(device: torch.device) -> Recorder:
    """Graphs that share their memory: one runs at a time.

    They have a stream to be recorded on, too. torch's own is of the device that was recorded on first, and a work space of cuBLAS
    that belongs to a stream must not lie in the memory of other graphs (pytorch issue 193402).
    """
    pool, own = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(step: Callable[[], None]) -> Recorded:
        with torch.cuda.device(device), _uncollected():
            # What asks the device fails here: an error while recording leaves torch's allocator in disorder, one here does not.
            with _synchronisation_refused():
                step()
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # Only what this thread does is recorded.
                with torch.cuda.graph(graph, pool=pool, stream=own, capture_error_mode="thread_local"):
                    step()
            finally:
                torch.cuda.set_stream(stream)  # a capture that fails to end leaves its own stream in place
        return graph

    return record


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector of cycles: what it frees may do things to the device that no recording can hold."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _synchronisation_refused() -> Iterator[None]:
    """In all threads, for a step: what waits for the device is an error. torch warns that this is a prototype."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def rows_for(rows: int, most: int) -> int:
    """Rows of the shape in which so many run: a power of two to 64, then a multiple of 64."""
    size = 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64
    return min(size, most)


class Steps:
    """The steps of a model over a `SlotCache`, recorded as they come up."""

    def __init__(self, model: Any, cache: kv_cache.SlotCache, record: Recorder) -> None:
        """None recorded yet.

        Args:
            model: causal language model, all of it on one device.
            cache: where its past lies; rows may come and go between steps.
            record: `cuda_recorder` of that device.
        """
        self._model, self._cache, self._record = model, cache, record
        most, device = cache.book.num_slots, model.device
        self._tokens = torch.zeros(most, dtype=torch.long, device=device)
        self._lengths = torch.zeros(most, dtype=torch.long, device=device)
        self._logits: Any = None
        """[slot, vocabulary], where every graph leaves its logits."""
        self._recorded: dict[tuple[int, int], Recorded] = {}
        self._uses: Counter[tuple[int, int]] = Counter()

    def logits(self, tokens: Int[torch.Tensor, " row"]) -> Float[torch.Tensor, "row vocabulary"]:
        """Logits after each row's last token, whose keys and values go into its slot; to be read before the next call."""
        book = self._cache.book
        if self._logits is None:
            self._cache.reserve(book.capacity)
        longest = max(self._cache.lengths) + 1
        shape = rows_for(len(tokens), book.num_slots), min(-(-longest // PLACES) * PLACES, book.capacity)
        self._fill(tokens)
        if shape in self._recorded:
            self._recorded[shape].replay()
        else:
            self._step(*shape)
            if self._uses[shape] >= USES_BEFORE and not _given_up:
                self._try(shape)
        self._uses[shape] += 1
        self._cache.end_step()
        logits: torch.Tensor = self._logits[: len(tokens)]
        return logits

    def _fill(self, tokens: Int[torch.Tensor, " row"]) -> None:
        """The rows of the next step; those that are not in use have length 0."""
        n = len(tokens)
        self._tokens[:n] = tokens
        self._tokens[n:] = 0
        self._lengths[:n] = torch.tensor(self._cache.lengths, device=self._lengths.device)
        self._lengths[n:] = 0

    def _step(self, rows: int, width: int) -> None:
        """What is recorded: the logits of so many rows into `_logits`. Doing it twice changes nothing."""
        positions = self._cache.begin_static_step(self._lengths[:rows], width)
        logits = kv_cache.next_logits(self._model, self._cache, self._tokens[:rows], positions)
        if self._logits is None:
            self._logits = logits.new_empty(self._cache.book.num_slots, logits.shape[1])
        self._logits[:rows] = logits

    def _try(self, shape: tuple[int, int]) -> None:
        """Record a shape whose step has just been run, if what the record gives is what the step gave. Leaves the step done."""
        expected = self._logits[: shape[0]].clone()
        if not float(expected.max()) < float("inf"):
            return  # NaN or infinity, with which nothing can be compared: sampling will refuse it
        try:
            why = self._record_and_compare(shape, expected)
        except RuntimeError as failure:
            # Of a capture that failed, the last error says only that it did.
            why = str(failure.__context__ or failure).strip().split("\n")[0]
        if why is not None:
            self._give_up(why)
            self._step(*shape)

    def _record_and_compare(self, shape: tuple[int, int], expected: torch.Tensor) -> str | None:
        """Why a record of this shape is not to be used; None: from now on it is."""
        rows, width = shape
        lengths = self._cache.lengths
        tokens = self._tokens[: len(lengths)].clone()
        try:
            self._cache.lengths = [min(length + 1, width - 1) for length in lengths]  # that place is not in use either
            self._fill(torch.zeros_like(tokens))
            recorded = self._record(lambda: self._step(*shape))
        finally:
            self._cache.lengths = lengths
            self._fill(tokens)
        self._logits[:rows] = float("nan")
        self._cache.spoil(self._lengths[:rows])
        recorded.replay()
        difference, largest = _largest(self._logits[:rows], less=expected), _largest(expected)
        if difference <= TOLERANCE.get(expected.dtype, 0.0) * largest:
            self._recorded[shape] = recorded
            return None
        return f"a graph's logits differ by {difference:.2g} from those of the step, of which the largest is {largest:.2g}"

    def _give_up(self, why: str) -> None:
        log.warning("decoding steps are not recorded as CUDA graphs, which makes drawing slower: %s", why)
        _given_up.append(why)
        self._recorded.clear()
        memory.release(self._model.device)


def _largest(x: torch.Tensor, less: torch.Tensor | None = None) -> float:
    """Of |x - less|; NaN where one is. Some rows at a time: all logits at once are hundreds of megabytes."""
    found = []
    for start in range(0, len(x), 64):
        rows = slice(start, start + 64)
        found.append((x[rows] if less is None else x[rows] - less[rows]).abs().max())
    return float(torch.stack(found).max())
