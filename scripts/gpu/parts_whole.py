"""A sweep as a user starts it: submitit's local launcher, a rank on the GPU, the registry; against the same one on the CPU."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from gpu_common import Setting, same_texts, say

from ksweep import Sweep
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell


def whole(setting: Setting) -> None:
    """Curves of a float32 sweep on CPU and GPU, and how many texts are equal."""
    ways = {"cpu": ["gpus=0", "cluster=local"], "cpu, in this process": ["gpus=0", "cluster=inprocess"]}
    if setting.on_gpu:
        ways = {"cpu": ways["cpu"], "gpu": ["gpus=1", "cluster=local"], "gpu, in this process": ["gpus=1", "cluster=inprocess"]}
    first: dict[tuple[int, int], str] = {}
    with tempfile.TemporaryDirectory(prefix="ksweep-whole-") as folder:
        place = Path(folder)
        os.chdir(place)
        cell = tiny_cell(talking_pair(place, 40), num_replicates=200)
        for name, arguments in ways.items():
            store = place / name.replace(", ", "-").replace(" ", "-")
            sweep = Sweep(
                name="whole",
                question="Does it run?",
                cell=cell,
                registry=str(store / "registry"),
                vector_cache=str(store / "vectors"),
            )
            began = time.perf_counter()
            code = run(sweep, *arguments)
            say(f"{name}: exit code {code} after {time.perf_counter() - began:.0f} s")
            if code:
                logs = sorted(Path("logs").rglob("*log.err"))
                raise RuntimeError(logs[-1].read_text()[-3000:] if logs else "no rank has written a log")
            for row in ask(sweep, "SELECT k, fve, fve_low, fve_high FROM curves ORDER BY k"):
                say(f"  K={row[0]}: FVE {row[1]:.4f} [{row[2]:.4f}, {row[3]:.4f}]")
            texts = {(a, k): text for a, k, text in ask(sweep, "SELECT activation, draw, text FROM texts")}
            first = first or texts
            say(f"  against cpu: {same_texts(first, texts)}")
        os.chdir("/")
