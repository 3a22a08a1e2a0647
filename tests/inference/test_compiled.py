"""The compiled attention against torch's, and what happens where it cannot be had."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ksweep.inference import compiled, kv_cache

COMPILER = next((name for name in ("cc", "gcc") if shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler (cc or gcc) here")

LENGTHS = [1, 40, 7, 33, 40, 2, 19]


@pytest.fixture(autouse=True)
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the tests are run with."""
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    compiled._found.cache_clear()
    yield
    compiled._found.cache_clear()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing compiled or loaded yet; where it would go. In this process compiled without optimisation: 0.2 s instead of 3."""
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-O0"))
    return tmp_path / "home" / "compiled"


def random_past(
    lengths: list[int], key_heads: int, head_dim: int, shared: int, dtype: torch.dtype, seed: int = 0
) -> kv_cache.Past:
    """Slots with more places than any row uses; what lies in those is NaN."""
    generator = torch.Generator().manual_seed(seed)
    reach = torch.tensor(lengths)
    shape = (len(lengths), key_heads, max(lengths) + 5, head_dim)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    unused = torch.arange(shape[2]) >= reach[:, None]
    for array in (keys, values):
        array.masked_fill_(unused[:, None, :, None], float("nan"))
    common = [torch.randn(key_heads, shared, head_dim, generator=generator).to(dtype).float() for _ in range(2)]
    return kv_cache.Past(
        common[0].transpose(1, 2).contiguous() if shared else None, common[1] if shared else None,
        keys, values, unused, reach, max(lengths), compiled=True,
    )  # fmt: skip


UNIT = 2.0**-24
"""Largest relative error of rounding to float32."""


def exactly(
    past: kv_cache.Past,
    query: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    exact_scores: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64, and how far float32 may be from it, whatever the order of its sums.

    A product of n terms is off by (n + 1) units of the sum of their magnitudes at most (Higham 2002, 3.1; scaling is one more),
    and a cap shrinks differences. Where every score is off by d at most, weights are by the factor exp(2 d), and by some units
    for the exponential (4), the sum of all places, its inverse and products with it. So is what they weigh.
    """
    n, heads, _, width = query.shape
    group, scaling = heads // past.keys.shape[1], scaling or width**-0.5
    unused, arrays = past.unused, []
    for own, shared in ((past.keys, past.shared_keys), (past.values, past.shared_values)):
        all_places = torch.nan_to_num(own.double())
        if shared is not None:
            common = (shared.transpose(1, 2) if own is past.keys else shared).double()
            all_places = torch.cat([common.expand(n, -1, -1, -1), all_places], dim=2)
        arrays.append(all_places.repeat_interleave(group, dim=1))
    keys, values = arrays
    unused = torch.nn.functional.pad(unused, (keys.shape[2] - unused.shape[1], 0))[:, None, None]
    scores, sizes = (scaling * (q @ k.transpose(2, 3)) for q, k in ((query.double(), keys), (query.double().abs(), keys.abs())))
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(unused, -torch.inf).softmax(-1)
    off = 0 * sizes if exact_scores else (width + 2) * UNIT * sizes + (0 if softcap is None else 8 * UNIT * softcap)
    off = off.masked_fill(unused, 0.0).amax(-1, keepdim=True)
    allowed = torch.expm1(2 * off) + (2 * keys.shape[2] + 16) * UNIT
    out, bound = weights @ values, allowed * (weights @ values.abs())
    return out.transpose(1, 2), bound.transpose(1, 2)


def zeroed(past: kv_cache.Past) -> dict[str, torch.Tensor]:
    """Keys and values for torch's functions: float32, and 0 in the places not used (0 times NaN is NaN)."""
    return {name: torch.nan_to_num(getattr(past, name).float()) for name in ("keys", "values")}


def attended(past: kv_cache.Past, query: torch.Tensor, **options: Any) -> torch.Tensor:
    out, _ = kv_cache.attend(None, query, past, past, None, **options)
    return out


def queries(rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return (2 * torch.randn(rows, heads, 1, head_dim, generator=torch.Generator().manual_seed(9))).to(dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(4, 4, 8), (9, 3, 64), (8, 2, 128), (4, 1, 256), (6, 2, 20)])
@pytest.mark.parametrize("shared", [0, 1, 73])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.3, "softcap": 2.0}])
def test_it_gives_softmax_attention_to_the_rounding_of_float32(
    dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, shared: int, options: dict[str, float]
) -> None:
    past = random_past(LENGTHS, key_heads, head_dim, shared, dtype)
    assert compiled.fits(past.keys), "there is a compiler, and what it made passed its trial"
    query = queries(len(LENGTHS), heads, head_dim, dtype)
    ours, (oracle, bound) = attended(past, query, **options), exactly(past, query, **options)
    assert ours.dtype == dtype and ours.shape == oracle.shape
    if dtype == torch.bfloat16:  # 8 bits, in the last rounding
        bound = bound + 2.0**-8 * oracle.abs()
    assert ((ours - oracle).abs() <= bound).all()
    in_torch = attended(replace(past, **zeroed(past), compiled=False), query.float(), **options)
    assert ((in_torch - oracle).abs() <= bound).all(), "what serves where nothing can be compiled"


@needs_compiler
def test_without_a_shared_part_a_row_does_not_depend_on_its_neighbours_to_the_last_bit() -> None:
    past = random_past(LENGTHS, 3, 64, 0, torch.bfloat16)
    query = queries(len(LENGTHS), 9, 64, torch.bfloat16)
    together = attended(past, query)
    for row, length in enumerate(LENGTHS):
        one = slice(row, row + 1)
        alone = replace(past, keys=past.keys[one], values=past.values[one], reach=past.reach[one], longest=length)
        assert torch.equal(attended(alone, query[one]), together[one])


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    past, query = random_past(LENGTHS, 3, 64, 11, torch.bfloat16), queries(len(LENGTHS), 9, 64, torch.bfloat16)
    expected, before = attended(past, query), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(attended(past, query), expected)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_far_apart_scores_neither_overflow_nor_vanish() -> None:
    past = random_past(LENGTHS, 3, 64, 11, torch.float32)
    # Scores of some hundreds would be off by 1e-4 in float32, and weights with them. So that they are not: whole numbers below
    # 2^11 times sixteenths below 4, 64 of which add up without rounding, scaled by an eighth.
    query = (200 * queries(len(LENGTHS), 9, 64, torch.float32)).round().clamp(-2047, 2047)
    sixteenths = {name: (16 * getattr(past, name)).round().clamp(-63, 63) / 16 for name in ("keys", "shared_keys")}
    past = replace(past, **sixteenths)
    ours, (oracle, bound) = attended(past, query), exactly(past, query, exact_scores=True)
    assert ((ours - oracle).abs() <= bound).all() and bound.max() < 1e-4


@needs_compiler
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(poison: float) -> None:
    past, query = random_past(LENGTHS, 3, 64, 11, torch.float32), queries(len(LENGTHS), 9, 64, torch.float32)
    query[2, 4, 0, 7] = poison
    out = attended(past, query)
    assert not out[2, 0, 4].isfinite().any()
    assert out[[0, 1, 3, 4, 5, 6]].isfinite().all(), "the other rows are not touched"


START_TOGETHER = """
import multiprocessing
from ksweep.inference import compiled
ranks = [multiprocessing.get_context("fork").Process(target=lambda: exit(compiled.library() is None)) for _ in range(2)]
for rank in ranks:
    rank.start()
for rank in ranks:
    rank.join()
print([rank.exitcode for rank in ranks])
"""


@pytest.mark.slow
@needs_compiler
def test_ranks_that_start_together_share_one_file(fresh: Path) -> None:
    done = subprocess.run([sys.executable, "-c", START_TOGETHER], capture_output=True, text=True, check=True)
    assert done.stdout == "[0, 0]\n", done.stderr
    assert len(list(fresh.iterdir())) == 1, "and leave nothing else behind"


@needs_compiler
def test_another_compiler_or_processor_has_a_file_of_its_own(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.library() is not None
    monkeypatch.setattr(compiled, "_processor", lambda: "another")
    compiled._found.cache_clear()
    assert compiled.library() is not None
    assert len(list(fresh.iterdir())) == 2


@needs_compiler
def test_a_home_that_cannot_be_written_to_is_no_hindrance(fresh: Path) -> None:
    fresh.parent.mkdir()
    fresh.write_text("in the way")
    assert compiled.library() is not None


def test_without_a_compiler_torch_does_it(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    assert compiled.library() is None and not compiled.fits(torch.zeros(1, 64))
    assert "no C compiler" in compiled.why_not()


def test_it_can_be_switched_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert compiled.library() is None and "KSWEEP_COMPILED=0" in compiled.why_not()


def broken_compiler(tmp_path: Path) -> str:
    broken = tmp_path / "broken-cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no OpenMP here" >&2\nexit 1\n')
    broken.chmod(0o755)
    return str(broken)


def test_a_compiler_that_fails_is_told_of_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", broken_compiler(tmp_path))
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert compiled.library() is None and compiled.library() is None
    [said] = caplog.messages
    assert "broken-cc" in said and "no OpenMP here" in said and said.count("broken-cc") == 1
    assert not fresh.exists()


@needs_compiler
@pytest.mark.parametrize("useless", ["broken", "no-such-compiler-anywhere", "gcc 'unclosed"])
def test_after_a_useless_cc_the_usual_compilers_are_tried(
    useless: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", broken_compiler(tmp_path) if useless == "broken" else useless)
    assert compiled.library() is not None


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("float share = 1.0f /", "float share = 1.01f /"),
        ("ATTEND(128, 1);", "ATTEND(127, 1);"),
        ("tanhf(scores[t] / softcap)", "tanhf(scores[t])"),
        ("<< 16", "<< 15"),
    ],
)
def test_a_library_that_computes_something_else_is_not_used(
    right: str, wrong: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    source = compiled.SOURCE.read_text()
    assert right in source
    spoilt = tmp_path / "attention.c"
    spoilt.write_text(source.replace(right, wrong))
    monkeypatch.setattr(compiled, "SOURCE", spoilt)
    with caplog.at_level(logging.WARNING):
        assert compiled.library() is None
    assert "wrong by" in caplog.text and "wrong by" in compiled.why_not()


@needs_compiler
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-9] + b"x" * 9])
def test_a_damaged_file_is_made_anew(damage: Any, fresh: Path) -> None:
    assert compiled.library() is not None
    [path] = fresh.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    compiled._found.cache_clear()
    assert compiled.library() is not None
    assert [one.read_bytes() for one in fresh.iterdir()] == [whole]


@needs_compiler
def test_a_second_openmp_runtime_is_not_let_in(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtimes = iter([{"libgomp.so.1"}, {"libgomp.so.1", "libomp.so.5"}] * 2)
    monkeypatch.setattr(compiled, "_openmp_runtimes", lambda: next(runtimes))
    assert compiled.library() is None and "libomp.so.5" in compiled.why_not()


@needs_compiler
def test_torchs_own_runtime_is_the_one_used() -> None:
    assert compiled.library() is not None
    assert len(compiled._openmp_runtimes()) <= 1


@needs_compiler
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_process_does_not_matter(default: torch.dtype) -> None:
    # transformers sets it while it loads a model, perhaps in another thread.
    past, query = random_past(LENGTHS, 3, 64, 11, torch.bfloat16), queries(len(LENGTHS), 9, 64, torch.bfloat16)
    expected = attended(past, query)
    torch.set_default_dtype(default)
    try:
        compiled._found.cache_clear()
        assert torch.equal(attended(past, query), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_compiler
@pytest.mark.parametrize(
    "wrong",
    [
        {"values": torch.zeros(7, 3, 45, 64)},
        {"keys": torch.zeros(7, 3, 45, 64, dtype=torch.float64), "values": torch.zeros(7, 3, 45, 64, dtype=torch.float64)},
        {"keys": torch.zeros(7, 3, 64, 45, dtype=torch.bfloat16).transpose(2, 3)},
        {"reach": torch.tensor(LENGTHS, dtype=torch.int32)},
        {"reach": torch.tensor(LENGTHS[:-1])},
        {"longest": 46},
    ],
)
def test_nothing_is_read_by_address_that_is_not_what_it_should_be(wrong: dict[str, Any]) -> None:
    past = replace(random_past(LENGTHS, 3, 64, 0, torch.bfloat16), **wrong)
    with pytest.raises(AssertionError):
        attended(past, queries(len(LENGTHS), 9, 64, torch.bfloat16))


def test_what_it_does_not_know_is_left_to_torch() -> None:
    for like in (torch.zeros(1, 64, dtype=torch.float16), torch.zeros(1, 1024), torch.zeros(1, 64, device="meta")):
        assert not compiled.fits(like)
