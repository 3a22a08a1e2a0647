"""How long do the statistics of a large cell take, and how much memory: best-of-K for every K with its bootstrap?

    python scripts/bench_statistics.py                      # 10,000 activations x 64 draws x 64 K x 2,000 replicates
    python scripts/bench_statistics.py --activations 1000 --repeats 5

Both sides are timed in one run: `fve_curve` against the plain method (for each replicate: pick documents, average, divide),
which is the oracle of its tests. The plain method runs few replicates and is scaled up.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np

from ksweep import stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--activations", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--documents", type=int, default=2_000)
    parser.add_argument("--replicates", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    generator = np.random.default_rng(0)
    errors = generator.uniform(0.2, 1.5, (options.activations, options.draws))
    documents = generator.integers(0, options.documents, options.activations)
    baseline = stats.stated_baseline(0.7)
    ours, plain = [], []
    for _ in range(options.repeats):
        ours.append(seconds(lambda: stats.fve_curve(errors, documents, baseline, num_replicates=options.replicates)))
        plain.append(seconds(lambda: replicates_one_by_one(errors, documents, 10)) * options.replicates / 10)
    ratios = [b / a for a, b in zip(ours, plain, strict=True)]
    print(f"{options.activations:,} activations x {options.draws} draws x {options.draws} K x {options.replicates:,} replicates")
    print(f"fve_curve: median {statistics.median(ours):.2f} s of {options.repeats}")
    print(f"one replicate after another: median {statistics.median(plain):.1f} s (scaled up from 10 replicates)")
    print(f"ratio: median {statistics.median(ratios):.1f}x, {min(ratios):.1f}x to {max(ratios):.1f}x")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def replicates_one_by_one(errors: np.ndarray, documents: np.ndarray, count: int) -> list[np.ndarray]:
    best = stats.best_of_k_errors(errors, range(1, errors.shape[1] + 1))
    members = [np.flatnonzero(documents == d) for d in np.unique(documents)]
    generator = np.random.default_rng(0)
    picks = [generator.integers(0, len(members), len(members)) for _ in range(count)]
    return [1 - best[np.concatenate([members[i] for i in pick])].mean(axis=0) / 0.7 for pick in picks]


if __name__ == "__main__":
    main()
