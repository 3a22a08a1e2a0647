"""Attention over slots on a CPU, compiled from attention.c when it is first used; without a C compiler torch's functions serve.

torch has no function for it: one query a row, slots of different lengths, a part that all rows share. What comes nearest, batched
products and a softmax over all places that the longest row has, reads float32 (bfloat16 products round scores) and every score
nine times. Measured beside it on 2 cores, 512 rows, 9 heads over 3 of 64, 73 shared tokens, bfloat16: slots of 32 tokens 2.4
against 4.8 ms a block, of 14 to 62 tokens (27 on average) 2.2 against 7.9 ms. Without grouped queries (GPT-2) there is no gain.

It must run on torch's own threads, or its idle threads and torch's would spin against one another: it is used where loading it
brings in no second OpenMP runtime (with torch's wheels for Linux and gcc).
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ksweep.utils import files

if TYPE_CHECKING:
    from jaxtyping import Float, Int

log = logging.getLogger(__name__)

SWITCH = "KSWEEP_COMPILED"
"""Environment variable; 0: torch's own functions."""

SOURCE = Path(__file__).with_name("attention.c")
FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros",
    "-shared", "-fPIC",
)  # fmt: skip
"""Sums may be taken in vectors, but NaN stays NaN: what is not finite has to be found in the logits."""

DTYPES = (torch.bfloat16, torch.float32)
MOST_HEAD_DIM = 512
"""As in attention.c."""

TOLERANCE = 1e-4
"""Of the trials after loading, against float64: float32 sums in whatever order are off by some 1e-6."""


class _Work(ctypes.Structure):
    """As in attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "key_heads", "group", "head_dim", "shared", "longest")),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride", "bfloat16", "threads")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "lengths", "query", "shared_scores", "out")),
    )


def fits(like: torch.Tensor) -> bool:
    """Whether keys and values [..., head_dim] like these can be attended to by `attend`."""
    return like.device.type == "cpu" and like.dtype in DTYPES and like.shape[-1] <= MOST_HEAD_DIM and library() is not None


def attend(
    query: Float[torch.Tensor, "row head head_dim"],
    keys: Float[torch.Tensor, "row key_head token head_dim"],
    values: Float[torch.Tensor, "row key_head token head_dim"],
    lengths: Int[torch.Tensor, " row"],
    longest: int,
    shared_keys: Float[torch.Tensor, "key_head head_dim shared"] | None,
    shared_values: Float[torch.Tensor, "key_head shared head_dim"] | None,
    *,
    scaling: float,
    softcap: float | None,
    loaded: ctypes.CDLL | None = None,
) -> Float[torch.Tensor, "row head head_dim"]:
    """Softmax attention of each row over what all share and the first lengths[row] tokens of its slot; in the query's dtype.

    Args:
        keys: of all rows, bfloat16 or float32 as `values`; tokens of a row and head follow one another without gaps.
        longest: the largest of `lengths` (int64).
        shared_keys: float32, as `shared_values`.
        loaded: what `library` gives.
    """
    loaded = loaded or library()
    assert loaded is not None, "no compiled attention: ask `fits` first"
    n, heads, head_dim = query.shape
    key_heads, shared = keys.shape[1], 0 if shared_keys is None else shared_keys.shape[2]
    group = heads // key_heads
    # From here on there are only addresses.
    assert keys.dtype == values.dtype and keys.dtype in DTYPES and keys.shape == values.shape, (keys.dtype, values.dtype)
    assert keys.stride() == values.stride() and keys.stride()[2:] == (head_dim, 1), (keys.stride(), values.stride())
    assert lengths.dtype == torch.int64 and lengths.is_contiguous() and len(lengths) == len(keys) == n, lengths
    assert longest <= keys.shape[2] and head_dim <= MOST_HEAD_DIM, (longest, keys.shape)
    by_head = query.view(n, key_heads, group, head_dim).transpose(0, 1)
    queries = by_head.to(torch.float32, memory_format=torch.contiguous_format, copy=True).view(key_heads, n * group, head_dim)
    # Their dtype is named by its source: the default one belongs to the process, and transformers changes it while it loads.
    scores = queries.new_empty(0) if shared_keys is None else torch.bmm(queries, shared_keys)
    out = torch.empty_like(queries)
    work = _Work(
        n, key_heads, group, head_dim, shared, longest, keys.stride(0), keys.stride(1),
        keys.dtype == torch.bfloat16, torch.get_num_threads(), scaling, softcap or 0.0,
        *(tensor.data_ptr() for tensor in (keys, values, lengths, queries, scores, out)),
    )  # fmt: skip
    if loaded.attend(ctypes.byref(work)):
        raise torch.OutOfMemoryError(f"no memory for the scores of {longest} places")
    if shared_values is not None:
        out = torch.baddbmm(out, scores, shared_values)
    return out.view(key_heads, n, group, head_dim).transpose(0, 1).to(query.dtype).reshape(n, heads, head_dim)


def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be had."""
    return _found()[0]


def why_not() -> str:
    """Why there is no `library`."""
    return _found()[1]


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    """The library of the first compiler that makes a right one, or the reason why there is none."""
    if os.environ.get(SWITCH) == "0":
        return None, f"switched off by {SWITCH}=0"
    compilers = [*filter(None, [os.environ.get("CC")]), *(name for name in ("cc", "gcc") if shutil.which(name))]
    reasons = []
    for compiler in compilers:
        try:
            return _loaded(_library_file(compiler)), ""
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:
            reasons.append(f"{compiler}: {str(getattr(error, 'stderr', None) or error).strip()[-500:]}")
    if not reasons:
        return None, "there is no C compiler (cc, gcc or $CC)"
    log.warning("attention cannot be compiled here, so drawing on the CPU leaves it to torch (%s)", "; ".join(reasons))
    return None, "; ".join(reasons)


def _loaded(data: bytes) -> ctypes.CDLL:
    """A shared library, from a file that nobody else knows: a mapped file that is replaced or damaged would end the process.

    Raises:
        RuntimeError: it computes something else, or came with an OpenMP runtime of its own.
    """
    before = _openmp_runtimes()
    with tempfile.TemporaryDirectory(prefix="ksweep-") as folder:
        path = Path(folder) / "attention.so"
        path.write_bytes(data)
        loaded = ctypes.CDLL(str(path))
    loaded.attend.argtypes = [ctypes.POINTER(_Work)]
    if more := _openmp_runtimes() - before:
        raise RuntimeError(f"it needs another OpenMP runtime than torch's: {', '.join(sorted(more))}")
    if not (error := _error(loaded)) < TOLERANCE:
        raise RuntimeError(f"what it makes is wrong by {error:.2g}")
    return loaded


def _openmp_runtimes() -> set[str]:
    """Files of those that are loaded, where the system says."""
    with suppress(OSError):
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        return {name for name in mapped if Path(name).name.startswith(("libgomp", "libomp", "libiomp"))}
    return set()


@torch.inference_mode()
def _error(loaded: ctypes.CDLL) -> float:
    """The largest of trials of everything that is compiled separately, against torch in float64: its float32 has errors of its
    own, on a Xeon with AMX a hundred times those of what is compiled here."""
    generator = torch.Generator("cpu").manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    lengths, found = torch.tensor([9, 1, 4], dtype=torch.int64, device="cpu"), [0.0]
    for dtype, head_dim, softcap in itertools.product(DTYPES, (64, 128, 20), (None, 3.0)):
        keys, values = (noise(3, 2, 9, head_dim).to(dtype) for _ in range(2))
        shared_keys, shared_values = (noise(2, 5, head_dim) for _ in range(2))
        query = noise(3, 4, head_dim)
        out = attend(
            query, keys, values, lengths, 9, shared_keys.transpose(1, 2).contiguous(), shared_values,
            scaling=0.3, softcap=softcap, loaded=loaded,
        )  # fmt: skip
        all_keys, all_values = (
            torch.cat([shared.expand(3, -1, -1, -1), own], dim=2).double()
            for shared, own in ((shared_keys, keys), (shared_values, values))
        )
        scores = 0.3 * query.double().view(3, 2, 2, head_dim) @ all_keys.transpose(2, 3)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        unused = torch.arange(14, device="cpu") >= 5 + lengths[:, None]
        weights = scores.masked_fill(unused[:, None, None], float("-inf")).softmax(-1)
        found.append(float((out - (weights @ all_values).view(3, 4, head_dim)).abs().max()))
    return max(found, key=lambda error: (error != error, error))


def _library_file(compiler: str) -> bytes:
    """What the compiler makes of the source for this processor, remembered under `files.home`; its digest is part of its name."""
    made_of = "\n".join([SOURCE.read_text(), compiler, *FLAGS, _run([*shlex.split(compiler), "--version"]), _processor()])
    place = files.home() / "compiled"
    name = f"attention-{_digest(made_of.encode())}"
    for path in place.glob(f"{name}-*.so"):
        with suppress(OSError):
            if path.stem == f"{name}-{_digest(data := path.read_bytes())}":
                return data
            path.unlink()  # damaged
    with tempfile.TemporaryDirectory(prefix="ksweep-") as folder:
        made = Path(folder) / "attention.so"
        _run([*shlex.split(compiler), *FLAGS, str(SOURCE), "-o", str(made), "-lm"])
        data = made.read_bytes()
    with suppress(OSError):  # a home that cannot be written to only costs the time of compiling again
        files.publish_once(place / f"{name}-{_digest(data)}.so", data)
    return data


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=120).stdout


def _processor() -> str:
    """What `-march=native` looks at: nodes of a cluster differ, and share the home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
