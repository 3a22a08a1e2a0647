"""How often do nominal 95 % intervals contain the truth, and how biased is the baseline? Simulated, current and old method.

    python scripts/simulate_coverage.py                                  # 10, 20, 40, 80 documents, even and uneven; half an hour
    python scripts/simulate_coverage.py --documents 80 --sizes uneven --simulations 400
    python scripts/simulate_coverage.py --difficulty 0.75                # heavier tails

The population: half of the variance of activations lies between documents, and so does half of the variance of an activation's
difficulty (log-normal). Errors of draws are log-normal around the difficulty and capped at 3.9. 5 % of draws fail, at a rate that
differs by document (beta with mean 0.05, standard deviation 0.07), and a few activations always fail. Two cells share all of
this. Uneven sizes are log-normal (sigma 1.2): 80 documents have an effective number of about 27. Scoring is that of public pairs.
The truth comes from 400,000 documents of one activation each, as sizes are independent of errors.

The old method: distance from the mean as baseline, percentiles of the replicates at Student's tails for the number of documents,
and a band of as many standard errors.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

from ksweep import stats

KS = (1, 4, 16)
NUM_DRAWS = 16
DIMENSIONS = 64
SPECTRUM = np.sqrt(DIMENSIONS / np.arange(1, DIMENSIONS + 1) / np.sum(1 / np.arange(1, DIMENSIONS + 1)))
MEAN = 0.75
CELLS = ((0.3, 0.5), (0.285, 0.6))
"""Scale and log-normal spread of the errors of each cell's draws."""
LEVEL = 0.95


@dataclass(frozen=True)
class Truth:
    fve: np.ndarray
    """[cell, k]"""
    baseline: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--sizes", choices=("even", "uneven", "huge"), nargs="+", default=["even", "uneven"])
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--difficulty", type=float, default=0.6, help="log-normal sigma of an activation's difficulty")
    options = parser.parse_args()

    truth = truth_of(options.difficulty)
    error = 100 * np.sqrt(LEVEL * (1 - LEVEL) / options.simulations)
    print(f"{options.simulations} simulations (standard error {error:.1f} %), {options.replicates} replicates, K = 1, 4, 16")
    print(
        "documents, effective | baseline | method | cell | difference | bands: cell, difference | FVE bias of the baseline, K = 1"
    )
    for sizes in options.sizes:
        for num_documents in options.documents:
            results = coverage(num_documents, sizes, options.difficulty, truth, options.simulations, options.replicates)
            for (baseline, way), row in results.items():
                shares = [100 * row[name] for name in ("cell", "difference", "bands")]
                cells = " | ".join(" ".join(f"{x:.1f}" for x in share) for share in shares)
                off = row["fve"] - results["stated", way]["fve"]
                print(f"{num_documents} {sizes}, {row['effective']:.0f} | {baseline} | {way} | {cells} | {off:+.4f}", flush=True)


def truth_of(difficulty: float) -> Truth:
    generator, documents = np.random.default_rng(2**31), np.arange(400_000)
    errors = errors_of(generator, documents, difficulty)
    vectors = vectors_of(generator, documents[: len(documents) // 4])
    baseline = stats.mean_distance_baseline(vectors).value
    return Truth(1 - np.array([stats.best_of_k_errors(e, KS).mean(axis=0) for e in errors]) / baseline, baseline)


def coverage(
    num_documents: int, sizes: str, difficulty: float, truth: Truth, simulations: int, replicates: int = 2000, seed: int = 0
) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Return the share of simulations whose interval contains the truth at each K, by (baseline, method) and kind of interval."""
    generator, rows = np.random.default_rng([seed, num_documents, len(sizes)]), {}
    targets = {"cell": truth.fve[0], "difference": truth.fve[1] - truth.fve[0]}
    for simulation in range(simulations):
        documents = documents_of(generator, num_documents, sizes)
        vectors, errors = vectors_of(generator, documents), errors_of(generator, documents, difficulty)
        resampling = {"ks": KS, "num_replicates": replicates, "seed": simulation % 4, "level": LEVEL}
        for baseline, way, curves in curves_of(vectors, errors, documents, truth.baseline, resampling):
            ends, bands = new_ends(*curves) if way == "new" else old_ends(*curves)
            row = rows.setdefault((baseline, way), {"cell": [], "difference": [], "bands": [], "fve": [], "effective": []})
            for name, target in targets.items():
                row[name].append((ends[name][0] <= target) & (target <= ends[name][1]))
            row["bands"].append([((bands[n][0] <= t) & (t <= bands[n][1])).all() for n, t in targets.items()])
            row["fve"].append(curves[0].fve[0])
            row["effective"].append(curves[0].effective_documents)
    return {key: {name: np.mean(values, axis=0) for name, values in row.items()} for key, row in rows.items()}


def documents_of(generator: np.random.Generator, num_documents: int, sizes: str) -> np.ndarray:
    if sizes == "even":
        counts = np.full(num_documents, 4)
    elif sizes == "huge":  # one document has as many as all others
        counts = np.array([4 * (num_documents - 1)] + [4] * (num_documents - 1))
    else:
        drawn = np.exp(1.2 * generator.normal(size=num_documents))
        counts = np.maximum(1, np.round(6 * drawn / drawn.mean())).astype(int)
    return np.repeat(np.arange(num_documents), counts)


def half_shared(generator: np.random.Generator, documents: np.ndarray, *shape: int) -> np.ndarray:
    """Sample standard normals with half of their variance between documents."""
    shared = generator.normal(size=(documents.max() + 1, *shape))[documents]
    return np.sqrt(0.5) * (shared + generator.normal(size=(len(documents), *shape)))


def vectors_of(generator: np.random.Generator, documents: np.ndarray) -> np.ndarray:
    return MEAN + SPECTRUM * half_shared(generator, documents, DIMENSIONS)


def errors_of(generator: np.random.Generator, documents: np.ndarray, difficulty: float) -> list[np.ndarray]:
    """Return errors [activation, draw] for each cell; NaN where a draw failed."""
    shape = (len(documents), NUM_DRAWS)
    difficulties = difficulty * half_shared(generator, documents)
    rate = generator.beta(0.5, 9.5, size=documents.max() + 1)[documents]
    always = generator.random(len(documents)) < 0.03 * rate
    cells = []
    for scale, spread in CELLS:
        own = difficulties + 0.15 * half_shared(generator, documents)
        errors = np.minimum(scale * np.exp(own[:, None] + spread * generator.normal(size=shape)), 3.9)
        errors[(generator.random(shape) < rate[:, None]) | always[:, None]] = np.nan
        cells.append(errors)
    return cells


def curves_of(
    vectors: np.ndarray, errors: list[np.ndarray], documents: np.ndarray, stated: float, resampling: dict[str, object]
) -> Iterator[tuple[str, str, list[stats.FveCurve]]]:
    measured = {"new": stats.between_documents_baseline(vectors, documents), "old": stats.mean_distance_baseline(vectors)}
    for way, baseline in measured.items():
        yield "measured", way, [stats.fve_curve(e, documents, baseline, **resampling) for e in errors]
    curves = [stats.fve_curve(e, documents, stats.stated_baseline(stated), **resampling) for e in errors]
    for way in measured:
        yield "stated", way, curves


def new_ends(curve: stats.FveCurve, other: stats.FveCurve) -> tuple[dict, dict]:
    difference = stats.paired_difference(other, curve, LEVEL)
    ends = {"cell": (curve.fve_low, curve.fve_high), "difference": (difference.low, difference.high)}
    return ends, {"cell": stats.curve_band(curve), "difference": stats.difference_band(other, curve, LEVEL)}


def old_ends(curve: stats.FveCurve, other: stats.FveCurve) -> tuple[dict, dict]:
    estimates = {"cell": curve.fve, "difference": other.fve - curve.fve}
    replicates = {"cell": curve.replicates, "difference": other.replicates - curve.replicates}
    ends, bands = {}, {}
    for name, values in replicates.items():
        ends[name] = expanded_percentiles(values, curve.num_documents)
        bands[name] = standard_error_band(estimates[name], values, curve.num_documents)
    return ends, bands


def expanded_percentiles(replicates: np.ndarray, num_documents: int) -> np.ndarray:
    """Return Hesterberg's expanded percentile interval."""
    quantile = stdtrit(num_documents - 1, (1 + LEVEL) / 2)
    tail = ndtr(-quantile * np.sqrt(num_documents / (num_documents - 1)))
    return np.quantile(replicates, [tail, 1 - tail], axis=0)


def standard_error_band(estimate: np.ndarray, replicates: np.ndarray, num_documents: int) -> tuple[np.ndarray, np.ndarray]:
    spread = replicates.std(axis=0)
    normal = np.quantile((np.abs(replicates - estimate) / spread).max(axis=1), LEVEL)
    half = stdtrit(num_documents - 1, ndtr(normal)) * np.sqrt(num_documents / (num_documents - 1)) * spread
    return estimate - half, estimate + half


if __name__ == "__main__":
    main()
