"""Attention over slots on a CPU, compiled from attention.c when it is first used; None where there is no C compiler.

torch has no function for it: one query a row, slots of different lengths, a part that all rows share. What comes nearest, batched
products and a softmax over all places that the longest row has, reads float32 (bfloat16 products round scores) and every score
nine times. Measured beside it on 2 cores, 512 rows, 9 heads over 3 of 64, 73 shared tokens, bfloat16: slots of 32 tokens 2.4
against 4.8 ms a block, of 14 to 62 tokens (27 on average) 2.2 against 7.9 ms.

It runs on torch's own threads: the OpenMP runtime is the one that torch has loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ksweep import files

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
"""Of the trial after loading; sums in another order differ by some 1e-6."""


class _Work(ctypes.Structure):
    """As in attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "key_heads", "group", "head_dim", "shared", "longest")),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride", "bfloat16", "threads")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "lengths", "query", "shared_scores", "out")),
    )


def fits(like: torch.Tensor) -> bool:
    """Whether keys [..., head_dim] like these can be attended to by `attend`."""
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
) -> Float[torch.Tensor, "row head head_dim"]:
    """Softmax attention of each row over what all share and the first lengths[row] tokens of its slot; in the query's dtype.

    Args:
        keys: of all rows; tokens of a row and head follow one another without gaps.
        longest: the largest of `lengths`.
        shared_keys: float32, as `shared_values`.
    """
    loaded = library()
    assert loaded is not None, "no compiled attention: ask `fits` first"
    return _attend(loaded, query, keys, values, lengths, longest, shared_keys, shared_values, scaling=scaling, softcap=softcap)


def _attend(
    loaded: ctypes.CDLL,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    longest: int,
    shared_keys: torch.Tensor | None,
    shared_values: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    n, heads, head_dim = query.shape
    key_heads, shared = keys.shape[1], 0 if shared_keys is None else shared_keys.shape[2]
    group = heads // key_heads
    assert keys.stride() == values.stride() and keys.stride(3) == 1 and keys.stride(2) == head_dim, keys.stride()
    by_head = query.view(n, key_heads, group, head_dim).transpose(0, 1)
    queries = by_head.to(torch.float32, memory_format=torch.contiguous_format, copy=True).view(key_heads, n * group, head_dim)
    scores = torch.empty(0) if shared_keys is None else torch.bmm(queries, shared_keys)
    out = torch.empty(key_heads, n * group, head_dim)
    work = _Work(
        n, key_heads, group, head_dim, shared, longest, keys.stride(0), keys.stride(1),
        keys.dtype == torch.bfloat16, torch.get_num_threads(), scaling, softcap or 0.0,
        *(tensor.data_ptr() for tensor in (keys, values, lengths, queries, scores, out)),
    )  # fmt: skip
    if loaded.attend(ctypes.byref(work)):
        raise MemoryError(f"no memory for the scores of {n} rows")
    if shared_values is not None:
        out = torch.baddbmm(out, scores, shared_values)
    return out.view(key_heads, n, group, head_dim).transpose(0, 1).to(query.dtype).reshape(n, heads, head_dim)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None without a compiler, where it fails, or where what it made computes something else."""
    if os.environ.get(SWITCH) == "0" or not (compiler := _compiler()):
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
        error = _error(loaded)
    except (OSError, AttributeError, subprocess.SubprocessError) as failure:
        said = str(getattr(failure, "stderr", None) or failure).strip()[-500:]
        log.warning("ksweep's attention cannot be compiled with %s, so torch's own functions are used: %s", compiler, said)
        return None
    if not error < TOLERANCE:
        log.warning("ksweep's attention as %s compiles it is wrong by %.2g, so torch's own functions are used", compiler, error)
        return None
    return loaded


@torch.inference_mode()
def _error(loaded: ctypes.CDLL) -> float:
    """Of a small trial, against torch."""
    generator = torch.Generator().manual_seed(0)
    keys, values, shared = (torch.randn(shape, generator=generator) for shape in ((3, 2, 9, 64), (3, 2, 9, 64), (2, 5, 64)))
    query, lengths = 3 * torch.randn(3, 4, 64, generator=generator), torch.tensor([9, 1, 4])
    out = _attend(loaded, query, keys, values, lengths, 9, shared.transpose(1, 2).contiguous(), shared, scaling=0.3, softcap=None)
    all_keys, all_values = (torch.cat([shared.expand(3, -1, -1, -1), own], dim=2) for own in (keys, values))
    seen = (torch.arange(14) < 5 + lengths[:, None])[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None], all_keys, all_values, seen, scale=0.3, enable_gqa=True
    )
    return float((out - expected[:, :, 0]).abs().max())


def _compiler() -> str | None:
    return os.environ.get("CC") or next((name for name in ("cc", "gcc") if shutil.which(name)), None)


def _compiled(compiler: str) -> Path:
    """The shared library of this source for this compiler and processor, made if it is not there."""
    made_of = "\n".join([SOURCE.read_text(), compiler, *FLAGS, _version(compiler), _processor()])
    path = files.home() / "compiled" / f"attention-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=".making-", dir=path.parent))
        except OSError:  # a home that cannot be written to
            path = Path(tempfile.mkdtemp(prefix="ksweep-")) / path.name
            folder = path.parent
        made = folder / "attention.so"
        try:
            _run([*shlex.split(compiler), *FLAGS, str(SOURCE), "-o", str(made), "-lm"])
            made.replace(path)  # whole or not at all: ranks start together
        finally:
            if folder != path.parent:
                shutil.rmtree(folder, ignore_errors=True)
    return path


def _version(compiler: str) -> str:
    return _run([*shlex.split(compiler), "--version"])


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _processor() -> str:
    """What `-march=native` looks at: nodes of a cluster differ, and share the home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
