"""The process of vLLM and the connection to it: real processes, with a module `vllm` that draws without a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from ksweep.inference.vllm_process import DrawRequest, VllmProcess, VllmSettings
from ksweep.utils.errors import RunError

ROOT = Path(__file__).parents[2]
PRETEND = {"PYTHONPATH": f"{ROOT / 'tests' / 'toy' / 'pretend_vllm'}:{ROOT}", "OMP_NUM_THREADS": "1"}
SETTINGS = VllmSettings(directory=Path("/nowhere"), dtype="float32", num_gpus=0, max_model_len=20, max_num_seqs=8)


@pytest.fixture(scope="module")
def process() -> Iterator[VllmProcess]:
    process = VllmProcess(SETTINGS, PRETEND)
    yield process
    process.close()
    assert process._process.returncode == 0


def request(process: VllmProcess, seeds: tuple[int, ...], tokens: int = 3, size: int = 4) -> DrawRequest:
    return DrawRequest(
        embeddings=torch.zeros(5, size), ids=process.new_ids(len(seeds)), seeds=seeds, temperature=1.0, top_p=1.0,
        max_new_tokens=tokens, stop_token_ids=(2,),
    )  # fmt: skip


def all_of(process: VllmProcess, asked: DrawRequest) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    deadline = time.monotonic() + 60
    while len(found) < len(asked.ids):
        assert time.monotonic() < deadline
        found |= {draw.id: draw.token_ids for draw in process.take(asked.ids, 1.0)}
    return found


def test_draws_come_back_under_their_ids_and_facts_are_told(process: VllmProcess) -> None:
    asked = request(process, (11, 12, 13))
    process.submit(asked)
    assert all_of(process, asked) == {id: (seed,) * 3 for id, seed in zip(asked.ids, asked.seeds, strict=True)}
    assert process.facts == {
        "dtype": "float32", "vllm_device": "cpu", "vllm_model_runner": "v1", "tensor_parallel_size": "1", "prefix_block": "32",
    }  # fmt: skip


def test_two_streams_take_each_their_own(process: VllmProcess) -> None:
    first, second = request(process, (1, 2)), request(process, (3, 4))
    process.submit(first)
    process.submit(second)
    assert set(all_of(process, second).values()) == {(3,) * 3, (4,) * 3}
    assert set(all_of(process, first).values()) == {(1,) * 3, (2,) * 3}


def test_cancelled_draws_end_and_are_not_returned(process: VllmProcess) -> None:
    endless, after = request(process, (5, 6), tokens=10**9), request(process, (7,))
    process.submit(endless)
    process.submit(after)
    all_of(process, after)
    process.cancel(endless.ids)
    again = request(process, (8,))
    process.submit(again)
    assert all_of(process, again) == {again.ids[0]: (8,) * 3} and process.take(endless.ids, 0.0) == []


def test_a_rank_that_sends_much_before_it_reads_does_not_wait_for_ever(process: VllmProcess) -> None:
    """Draws of 500 kB together end while prompts of 8 MB are sent; a socket holds some 200 kB."""
    small = request(process, tuple(range(1000, 1600)), tokens=300)
    process.submit(small)
    assert process._connection.poll(60), "they end in one step, and the message is larger than the socket: it waits in the middle"
    large = [request(process, (1,), size=100_000) for _ in range(4)]
    for asked in large:
        process.submit(asked)
    assert len(all_of(process, small)) == 600
    assert all(len(all_of(process, asked)) == 1 for asked in large)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_signals_of_the_rank_do_not_end_it(process: VllmProcess, number: signal.Signals) -> None:
    os.kill(process._process.pid, number)
    asked = request(process, (9,))
    process.submit(asked)
    assert all_of(process, asked) == {asked.ids[0]: (9,) * 3}


def test_what_fails_in_it_is_the_error_of_the_rank_also_where_that_notices_while_it_sends() -> None:
    process = VllmProcess(SETTINGS, PRETEND)
    asked = request(process, (666,))
    process.submit(asked)
    process._process.wait(60)
    for act in (lambda: process.submit(request(process, (1,))), lambda: process.take(asked.ids, 1.0)):
        with pytest.raises(RunError, match=r"vLLM failed \(RuntimeError: a kernel is missing\)|ended with exit status 1"):
            act()
    process.close()


def test_it_ends_with_a_rank_that_is_killed() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.inference.test_vllm_process import *
process = VllmProcess(SETTINGS, PRETEND)
process.submit(request(process, (5,), tokens=10**9))
print(process._process.pid, flush=True)
time.sleep(600)
"""
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    child = psutil.Process(int(rank.stdout.readline()))
    rank.kill()
    rank.wait()
    assert psutil.wait_procs([child], timeout=30)[1] == []
