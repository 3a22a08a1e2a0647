"""Running out of memory, and how much there is."""

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import torch

from ksweep.inference import memory
from ksweep.utils import machine

CPU = torch.device("cpu")


def limited(most, calls, error):
    """Doubles its items, and fails above a number of them."""

    def run(items):
        calls.append(len(items))
        if len(items) > most:
            error()
        return 2 * torch.tensor(items)

    return run


def fails_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")


def fails_on_a_cpu():
    torch.empty(1 << 50)  # a petabyte


@pytest.mark.parametrize("error", [fails_on_a_gpu, fails_on_a_cpu])
def test_what_does_not_fit_at_once_is_run_in_halves_in_its_order(error):
    calls = []
    assert memory.run_in_halves(limited(3, calls, error), list(range(11)), CPU).tolist() == list(range(0, 22, 2))
    assert calls[0] == 11 and sorted(n for n in calls if n <= 3) == [2, 3, 3, 3]


def test_a_single_item_that_does_not_fit_is_the_end():
    with pytest.raises(torch.OutOfMemoryError):
        memory.run_in_halves(limited(0, [], fails_on_a_gpu), [1, 2], CPU)


def test_another_error_is_raised_at_once():
    calls = []

    def other():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        memory.run_in_halves(limited(0, calls, other), [1, 2, 3], CPU)
    assert calls == [3]


def test_free_memory_is_no_more_than_the_machine_has():
    free = memory.free_device_bytes(CPU)
    assert free is not None and 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_ranks_of_one_machine_have_a_share_of_its_memory_each(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 2000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert memory.free_device_bytes(CPU) == 2000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_device_bytes(CPU) == 500
    monkeypatch.setattr(machine, "free_memory", lambda: None)
    assert memory.free_device_bytes(CPU) is None


def test_a_control_group_and_those_around_it_limit_what_is_free(tmp_path, monkeypatch):
    own = next((x[3:].strip() for x in Path("/proc/self/cgroup").read_text().splitlines() if x.startswith("0::")), None)
    if own is None:
        pytest.skip("no unified control groups")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    group = tmp_path / own.lstrip("/")
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text("5000\n")
    (group / "memory.current").write_text("3000\n")
    assert memory.free_device_bytes(CPU) == 2000
    (group / "memory.max").write_text("max\n")
    assert memory.free_device_bytes(CPU) > 1 << 20


FAULTS = """
import resource, torch
from ksweep.inference import memory
kept = memory.keep_freed_memory(torch.device("cpu")) if {keep} else False
for _ in range(3):
    torch.ones(60 * 2**20, dtype=torch.int8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(60 * 2**20, dtype=torch.int8)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True)
    kept, count = map(int, done.stdout.split())
    return bool(kept), count


@pytest.mark.trials
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library that is asked is glibc")
def test_what_is_freed_is_kept_for_the_next_use() -> None:
    kept, count = faults(keep=True)
    if not kept:
        pytest.skip("this C library does not let itself be asked (glibc before 2.35, or another)")
    most = faults(keep=False)[1] / 10
    # A kernel short of memory takes pages from a process that waits: that only adds to the count.
    assert count < most or min(faults(keep=True)[1] for _ in range(3)) < most


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library that is asked is glibc")
def test_kept_memory_is_given_back() -> None:
    memory.keep_freed_memory(torch.device("cpu"))
    blocks = [torch.ones(60 * 2**20, dtype=torch.int8) for _ in range(10)]
    pin = torch.ones(2 * 2**20, dtype=torch.int8)  # above them in the heap: nothing below it is trimmed by itself
    used = psutil.Process().memory_info().rss
    blocks.clear()
    memory.release_cached_memory(torch.device("cpu"))
    assert psutil.Process().memory_info().rss < used - 500 * 2**20
    assert pin.sum() == len(pin)


def test_torch_that_will_not_give_memory_back_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As torch 2.12 does for the rest of a process in which the recording of a CUDA graph has failed."""

    def refuse() -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED\nException raised from emptyCache")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    memory.release_cached_memory(torch.device("cuda"))
    assert "captures_underway" in caplog.text and "Exception raised" not in caplog.text


def test_where_the_c_library_refuses_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        asked: ClassVar[list[int]] = []

        def mallopt(self, parameter: int, value: int) -> int:
            self.asked.append(parameter)
            return 0

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Refusing())
    assert not memory.keep_freed_memory(torch.device("cpu"))
    assert Refusing.asked == [memory._MMAP_THRESHOLD], "the second would have stopped glibc from finding its own"
