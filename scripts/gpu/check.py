"""Run one part of the check of the GPU path: `python scripts/gpu/check.py PART [--tiny]`. `run.sh` runs all of them.

Every part runs on a CPU with --tiny; what only a GPU can tell is left out there. The exit code is 1 where a part fails.
"""

from __future__ import annotations

import argparse
import logging
import time

import torch
from gpu_common import Setting, say
from parts_limits import env, memory, ranks, syncs
from parts_parity import invariance, smoke
from parts_speed import bench, pieces, profile, scoring
from parts_whole import whole

PARTS = {part.__name__: part for part in (env, smoke, bench, syncs, pieces, profile, whole, invariance, scoring, memory, ranks)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("part", choices=PARTS)
    options.add_argument("--tiny", action="store_true", help="models of a few kB")
    given = options.parse_args()
    logging.basicConfig(level=logging.WARNING, format="LOG %(name)s: %(message)s")
    torch.set_num_threads(1 if given.tiny else 8)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    if device.type == "cpu" and not given.tiny:
        raise SystemExit("torch sees no GPU: nothing was measured. --tiny runs the same code on a CPU.")
    say(f"== {given.part} on {where}{', tiny' if given.tiny else ''}")
    began = time.perf_counter()
    try:
        PARTS[given.part](Setting(given.tiny, device))
    finally:
        say(f"== {given.part}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
