"""vLLM in a process of its own: its GPUs, its threads and its torch.distributed are not those of the rank that started it.

The rank sends requests, several draws of one prompt in a message, and gets each draw when it ends; vLLM decodes on while the rank
scores. The process ends when the rank does: its end of the connection is then closed.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from ksweep.utils.errors import RunError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float

GPU_MEMORY_SHARE = 0.85
"""Of the memory that is free on the fullest GPU of a rank, where the AR lies already; the rest is for what scoring needs."""
CPU_CACHE_BYTES = 4 << 30
"""Most memory for keys and values on a CPU, where it is no more than a quarter of what is free and VLLM_CPU_KVCACHE_SPACE does
not say otherwise."""
CPU_BLOCK = 32
"""Tokens of a block of the prefix cache on a CPU, where vLLM would take 128, longer than most prompts; its attention there takes
multiples of 32. On a GPU vLLM's own choice of 16 stays."""
STEP_TOKENS = 8192
"""Most tokens of a step, or as many as one text may have: prompts are never split over steps, where a draw's generator would have
to be set back, which vLLM 0.32 cannot do on a CPU."""
SIGNALS_OF_RANKS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Sent to every process of a job when its ranks are to stop; a rank then ends this one itself."""
END_SECONDS = 20.0
"""After which a process that was asked to end is killed."""


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """What vLLM is started with."""

    directory: Path
    """config.json and safetensors of the model."""
    dtype: str
    num_gpus: int
    """GPUs that the model is spread over (tensor parallel), all that the process sees; 0 runs on the CPU."""
    max_model_len: int
    """Most tokens of prompt and text together."""
    max_num_seqs: int
    """Most draws that vLLM decodes at once."""


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """Draws of one prompt that are sampled alike, each with its own seed."""

    embeddings: Float[torch.Tensor, "token d_model"]
    ids: tuple[int, ...]
    """The rank's numbers of the draws."""
    seeds: tuple[int, ...]
    temperature: float
    top_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    num_alternatives: int = 0
    """Of the first token, how many of the most probable ones are returned with their log probabilities."""


@dataclass(frozen=True)
class FinishedDraw:
    """One draw as vLLM gives it."""

    id: int
    token_ids: tuple[int, ...]
    """Tokens sampled, with the stop token."""
    log_probability: float
    """Sum over its tokens, at temperature 1 and without top_p."""
    alternatives: Mapping[int, float]
    """Of the first token: ids of the most probable ones and their log probabilities."""


class VllmProcess:
    """The rank's side: starts the process, sends requests, collects finished draws."""

    def __init__(self, settings: VllmSettings, environment: Mapping[str, str]) -> None:
        """Start vLLM and wait until it is ready.

        Args:
            environment: variables that the process gets beside this one's.

        Raises:
            RunError: vLLM did not start; the message has its reason.
        """
        self.settings = settings
        ours, its = socket.socketpair()
        # Not `-m`: the classes of messages would be those of __main__ there.
        command = [sys.executable, "-c", f"from {__name__} import serve_rank; serve_rank()", str(its.fileno())]
        with its:
            self._process = subprocess.Popen(
                command, pass_fds=[its.fileno()], env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=2
            )
        self._connection = Connection(ours.detach())
        self._num_requested = 0
        self._in_flight: set[int] = set()
        self._finished: dict[int, FinishedDraw] = {}
        self.facts: dict[str, str] = {}
        """How vLLM runs, for the run record."""
        try:
            self._send(settings)
            self.facts = self._receive()
        except BaseException:
            self.close()
            raise

    def new_ids(self, number: int) -> tuple[int, ...]:
        """Return ids for the next draws, which no other draw of this process has."""
        self._num_requested += number
        return tuple(range(self._num_requested - number, self._num_requested))

    def submit(self, request: DrawRequest) -> None:
        """Ask for draws."""
        self._in_flight.update(request.ids)
        self._send(request)

    def take(self, ids: Collection[int], patience: float) -> list[FinishedDraw]:
        """Return those of the draws that have ended; wait up to `patience` seconds for one.

        Raises:
            RunError: vLLM failed or its process ended.
        """
        if not any(id in self._finished for id in ids) and self._connection.poll(patience):
            for draw in self._receive():
                if draw.id in self._in_flight:
                    self._in_flight.remove(draw.id)
                    self._finished[draw.id] = draw
        return [self._finished.pop(id) for id in list(ids) if id in self._finished]

    def cancel(self, ids: Collection[int]) -> None:
        """Let draws end unfinished, where the process still lives; what has ended of them is dropped."""
        for id in ids:
            self._finished.pop(id, None)
        self._in_flight.difference_update(ids)
        with suppress(OSError, RunError):
            self._send(tuple(ids))

    def close(self) -> None:
        """End the process, and free what it holds."""
        self._connection.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: Any) -> None:
        # Not Connection.send: torch makes that pass tensors by shared memory, which fails where /dev/shm is small.
        try:
            self._connection.send_bytes(pickle.dumps(message))
        except OSError as error:
            raise self._ended() from error

    def _receive(self) -> Any:
        try:
            message = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if isinstance(message, _Failure):
            raise message.as_error()
        return message

    def _ended(self) -> RunError:
        """Return the error for a process that has ended: what it says itself, or else its exit status."""
        with suppress(EOFError, OSError):
            while not isinstance(message := pickle.loads(self._connection.recv_bytes()), _Failure):
                pass
            return message.as_error()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        return RunError(
            f"the process of vLLM ended with exit status {self._process.returncode}: the rank's log has its last output. If it "
            "was killed for memory, choose a smaller autoencoder.dtype or more GPUs (resources.gpus_per_model)"
        )


@dataclass(frozen=True)
class _Failure:
    text: str

    def as_error(self) -> RunError:
        return RunError(
            f"vLLM failed ({self.text}). The rank's log has its own output; sampling.engine=builtin draws without vLLM"
        )


def gpu_environment(devices: Sequence[str], visible: str | None) -> dict[str, str]:
    """Return the variables that show a rank's GPUs, and no others, to a process.

    Args:
        devices: torch devices of the rank, "cuda:2"; numbers count what `visible` lists.
        visible: CUDA_VISIBLE_DEVICES of the rank; None if it is not set.
    """
    numbers = [int(device.partition(":")[2] or 0) for device in devices]
    listed = [name.strip() for name in visible.split(",")] if visible else None
    return {"CUDA_VISIBLE_DEVICES": ",".join(str(n) if listed is None else listed[n] for n in numbers)}


def cpu_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for vLLM on a CPU, without those that are set already: the threads stay where the rank's are."""
    return {} if "VLLM_CPU_OMP_THREADS_BIND" in environment else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def serve_rank() -> None:
    """Serve the rank that started this process, at the connection whose file descriptor it has passed."""
    for number in SIGNALS_OF_RANKS:
        signal.signal(number, signal.SIG_IGN)
    connection, status = Connection(int(sys.argv[1])), 0
    try:
        _serve(connection)
    except (EOFError, OSError):  # the rank has ended, or closed its end
        pass
    except Exception as error:  # whatever it is, the rank is to say so
        traceback.print_exc()
        text, status = " ".join(f"{type(error).__name__}: {error}".split())[:600], 1
        with suppress(OSError):
            connection.send_bytes(pickle.dumps(_Failure(text)))
    sys.stderr.flush()
    os._exit(status)  # vLLM's own way out may take a minute; its workers end when this process has


def _serve(connection: Connection) -> None:
    """Start vLLM and draw what the rank asks for, until its end of the connection is closed."""
    settings = pickle.loads(connection.recv_bytes())
    engine = _start(settings)
    connection.send_bytes(pickle.dumps(_facts(engine, settings)))
    messages: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_collect, args=(connection, messages), daemon=True).start()
    while True:
        # 1. Take what the rank has sent; wait for it where nothing is in flight.
        while not messages.empty() or not engine.has_unfinished_requests():
            message = messages.get()
            if message is None:
                return
            if isinstance(message, DrawRequest):
                _add(engine, message)
            else:
                engine.abort_request([str(id) for id in message])
        # 2. Decode one step, and send what has ended.
        outputs = [output for output in engine.step() if output.finished]
        if finished := [_finished_draw(output) for output in outputs if output.outputs[0].finish_reason in ("stop", "length")]:
            connection.send_bytes(pickle.dumps(finished))


def _collect(connection: Connection, messages: SimpleQueue[Any]) -> None:
    """Put what the rank sends into a queue, and None at its end: a rank that sends must not wait for one that does not read."""
    with suppress(EOFError, OSError):
        while True:
            messages.put(pickle.loads(connection.recv_bytes()))
    messages.put(None)


def _start(settings: VllmSettings) -> Any:
    """Return an LLMEngine of vLLM that takes embeddings, in this process; with several GPUs its workers are children."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import EngineArgs, LLMEngine

    from ksweep.inference import memory

    on_device: dict[str, Any] = {}
    if settings.num_gpus:
        on_device = {"tensor_parallel_size": settings.num_gpus, "gpu_memory_utilization": _gpu_memory_share(settings.num_gpus)}
    else:
        on_device = {"enforce_eager": True, "block_size": CPU_BLOCK}
        if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            on_device["kv_cache_memory_bytes"] = min(CPU_CACHE_BYTES, (memory.free_device_bytes(torch.device("cpu")) or 0) // 4)
    arguments = EngineArgs(
        model=str(settings.directory), dtype=settings.dtype, max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs, skip_tokenizer_init=True, enable_prompt_embeds=True, enable_prefix_caching=True,
        load_format="safetensors", generation_config="vllm", logprobs_mode="raw_logprobs", disable_log_stats=True, seed=0,
        use_tqdm_on_load=False, enable_chunked_prefill=False, max_num_batched_tokens=max(STEP_TOKENS, settings.max_model_len),
        **on_device,
    )  # fmt: skip
    return LLMEngine.from_engine_args(arguments)


def _gpu_memory_share(num_gpus: int) -> float:
    """Return the share of the GPUs' whole memory that vLLM may take, given what others hold of it."""
    import torch

    free = [torch.cuda.mem_get_info(number) for number in range(num_gpus)]
    return GPU_MEMORY_SHARE * min(here / whole for here, whole in free)


def _facts(engine: Any, settings: VllmSettings) -> dict[str, str]:
    """Return how vLLM runs, for the run record: what gives other noise or other rounding."""
    config = engine.vllm_config
    return {
        "dtype": settings.dtype, "vllm_device": "cuda" if settings.num_gpus else "cpu",
        "vllm_model_runner": "v2" if config.use_v2_model_runner else "v1",
        "tensor_parallel_size": str(max(1, settings.num_gpus)), "prefix_block": str(config.cache_config.block_size),
    }  # fmt: skip


def _add(engine: Any, request: DrawRequest) -> None:
    """Hand each draw of a request to vLLM, as a request of its own."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    for id, seed in zip(request.ids, request.seeds, strict=True):
        params = SamplingParams(
            temperature=request.temperature, top_p=request.top_p, max_tokens=request.max_new_tokens, seed=seed,
            stop_token_ids=list(request.stop_token_ids), ignore_eos=True, logprobs=request.num_alternatives, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        engine.add_request(str(id), {"prompt_embeds": request.embeddings}, params)


def _finished_draw(output: Any) -> FinishedDraw:
    text = output.outputs[0]
    first = {} if not text.logprobs else {token: value.logprob for token, value in text.logprobs[0].items()}
    return FinishedDraw(int(output.request_id), tuple(text.token_ids), float(text.cumulative_logprob), first)
